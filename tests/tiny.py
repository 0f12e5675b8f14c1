"""A distillation that takes a second, in processes that can be killed, and what to compare of the results."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forked import PROCESSES
from torch import Tensor

from ddil import files
from ddil.solvers import sampler as artifact
from ddil.training import checkpoints, journal
from ddil.distil.plan import Plan
from ddil.distil.problem import atoms_problem, Problem
from ddil.distil.stages import distil
from ddil.files import read_tensors
from ddil.training.parallel import make_accelerator
from ddil.training.journal import read_log

OPTIONS = {"count": 50, "width": 32, "depth": 1}
CHECKPOINT_EVERY = 10
ARMS: dict[str, dict[str, Any]] = {
    "PD": {"collected": (0.0, 0.0)},
    "PD + DDIL, batch": {"mixing": "batch"},
    "PD + DDIL, sample": {"mixing": "sample"},
}
DEADLINE = 600.0  # seconds until a process that does not end counts as hung


def problem(**changes: Any) -> Problem:
    """The exact teacher of 50 digits and a perceptron of two layers, with some fields changed."""
    made = atoms_problem(**OPTIONS)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def plan(**changes: Any) -> Plan:
    """One stage from 8 steps to 4 in 40 updates of 16, with some fields changed. Every update is a line of the log."""
    often = {"log_every": 1, "checkpoint_every": CHECKPOINT_EVERY}
    return Plan(**{"stages": (8, 4), "updates": 40, "batch": 16, "seed": 1, **often, **changes})


# Processes


def _dying(owner: Any, name: str, when: Callable[..., bool], first: Callable[..., Any] = lambda *_: None) -> None:
    """Let this process be killed at the call of owner.name for which `when` holds, after doing `first`."""
    original = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        if when(*arguments):
            first(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(owner, name, call)


def _lose_a_file(folder: Path) -> None:
    next(Path(folder).glob("*.safetensors")).unlink()


def _writes(update: int, kind: str) -> Callable[..., bool]:
    """Whether tensors of that kind are being written into the checkpoint of that update."""
    return lambda path, _: path.parent.name == f"writing-{update:08d}" and path.name.startswith(kind)


# Where a process may be killed, by what it is about to do.
KILL_POINTS: dict[str, Callable[[], None]] = {
    "write the optimiser of checkpoint 10": lambda: _dying(checkpoints, "write_tensors", _writes(10, "optimizer")),
    "write the second process' roll-in of checkpoint 20": lambda: _dying(
        checkpoints, "write_tensors", _writes(20, "rollin-1")
    ),
    "seal checkpoint 20": lambda: _dying(checkpoints, "seal", lambda folder, *_: folder.name == "writing-00000020"),
    "rename the sealed checkpoint 20": lambda: _dying(
        files.os, "replace", lambda source, _: Path(source).name == "writing-00000020"
    ),
    "remove the rest of checkpoint 10": lambda: _dying(
        checkpoints.shutil, "rmtree", lambda folder, *_: Path(folder).name == "update-00000010", _lose_a_file
    ),
    "cut the log": lambda: _dying(journal, "write_text", lambda path, _: path.name == "log.jsonl"),
    "save the student": lambda: _dying(artifact, "seal", lambda folder, *_: ".student.writing" in folder.name),
}


def _run(
    folder: Path, changes: dict[str, Any], environment: dict[str, str], kill_before: str | None, pause: float
) -> None:
    """What a forked process does: distil, with its output in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    said = folder.with_name(f"{folder.name}-output-{environment.get('RANK', 0)}")
    output = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if kill_before is not None:
        KILL_POINTS[kill_before]()

    def slowly(steps: Iterable[int], _: str) -> Iterator[int]:
        for step in steps:
            time.sleep(pause)
            yield step

    accelerator = make_accelerator("cpu")
    distil(problem(), plan(**changes), folder, accelerator, slowly)


@dataclass
class Run:
    """A distillation under way in one or more processes."""

    folder: Path
    processes: list[multiprocessing.process.BaseProcess]

    def kill(self) -> None:
        """SIGKILL for all processes."""
        for process in self.processes:
            process.kill()
            process.join()

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait until `reached`. Fails if the run ends before."""
        end = time.monotonic() + DEADLINE
        while not reached():
            alive = all(process.is_alive() for process in self.processes)
            assert alive, f"the run ended before it was to be killed:\n{self.output()}"
            assert time.monotonic() < end, f"the run hangs:\n{self.output()}"
            time.sleep(0.001)

    def codes(self, first_end: bool = False) -> list[int | None]:
        """The exit codes, once all processes have ended (with `first_end`: once one has; the others are killed)."""
        end = time.monotonic() + DEADLINE
        while any(process.is_alive() for process in self.processes) and time.monotonic() < end:
            if first_end and not all(process.is_alive() for process in self.processes):
                break
            time.sleep(0.002)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def finish(self) -> Path:
        """Wait for the end, which must be a good one. Returns the folder."""
        assert self.codes() == [0] * len(self.processes), self.output()
        return self.folder

    def output(self) -> str:
        """What the processes wrote."""
        files_of_all = sorted(self.folder.parent.glob(f"{self.folder.name}-output-*"))
        return "\n".join(path.read_text() for path in files_of_all)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def started(
    folder: Path,
    changes: dict[str, Any],
    processes: int = 1,
    kill_before: str | None = None,
    rank: int = 0,
    pause: float = 0.0,
) -> Iterator[Run]:
    """Distil the tiny problem into `folder` in one process, or in several as torch.distributed.run would start them.

    kill_before: where process `rank` is killed; pause: seconds before each update.
    """
    size = str(processes)
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)] if processes > 1 else [{}]
    calls = [(folder, changes, place, kill_before if i == rank else None, pause) for i, place in enumerate(places)]
    run = Run(folder, [PROCESSES.Process(target=_run, args=call, daemon=True) for call in calls])
    for process in run.processes:
        process.start()
    try:
        yield run
    finally:
        run.kill()


def trained(folder: Path, changes: dict[str, Any], processes: int = 1) -> Path:
    """Distil without interruption. Returns the folder."""
    with started(folder, changes, processes) as run:
        return run.finish()


# Results


def stages(folder: Path) -> list[Path]:
    """The folders of the stages, in order."""
    return sorted(folder.glob("*-to-*"), key=lambda path: -int(path.name.split("-")[0]))


def lines(stage: Path) -> list[dict[str, float]]:
    """The lines of a stage's log without the seconds."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(stage)]


def progress_of(stage: Path) -> int:
    """The last update in the log of a stage that may not have begun."""
    log = read_log(stage)
    return int(log[-1]["update"]) if log else 0


def weights(stage: Path) -> dict[str, Tensor]:
    """The weights of a stage's student."""
    return read_tensors(stage / "student" / "network" / "diffusion_pytorch_model.safetensors")


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest absolute difference between two sets of weights."""
    assert one
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def described(stage: Path) -> dict[str, Any]:
    """What a stage's student says about itself, without seconds and hashes of files."""
    description = json.loads((stage / "student" / "sealed.json").read_text())
    del description["files"]
    del description["provenance"]["cost"]["seconds"]
    return description


def assert_same(folder: Path, other: Path) -> None:
    """Students, logs and costs of two runs are the same to the last bit (but for the seconds)."""
    assert [stage.name for stage in stages(folder)] == [stage.name for stage in stages(other)]
    for one, two in zip(stages(folder), stages(other)):
        assert largest_difference(weights(one), weights(two)) == 0, one.name
        assert lines(one) == lines(two), one.name
        assert described(one) == described(two), one.name


def edited(folder: Path, copy: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a sealed folder whose description went through `change`, its weights untouched."""
    shutil.copytree(folder, copy)
    path = copy / "sealed.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    return copy
