"""Batches run, fail, are killed and go on; nothing is done twice, and nothing starts before all of it was checked."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from ddil.lab import runner
from ddil.lab.batch import Run
from ddil.lab.executors import Local, Slurm, Task
from ddil.lab.job import prepare_run, read_json
from ddil.lab.precheck import check_batches
from ddil.lab.runner import Scheduler, run_batches

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = (
    'steps: int = 3\nrate: float = 0.5\nmode: str = "well"\npause: float = 0.0\nreads: str = ""\noutput: str = ""'
)
CHECK = """
from ddil.lab.parameters import check_parameters, number, one_of, whole
settings = check_parameters(globals(), {
    "steps": whole(), "rate": number(0, 1), "mode": one_of("well", "fails", "dies"), "pause": number(0),
    "reads": str, "output": str})
if settings.steps > 1000: raise ValueError("steps: more than this notebook can take")
"""
# An experiment with checkpoints: `at` holds the steps done, `trace` a line for each step and who did it.
WORK = """
import os, signal, subprocess, time
from pathlib import Path
from ddil.words import progress
from ddil.files import write_text
folder = Path(settings.output)
at, mended = folder / "at", Path("mended").exists()
for i in progress(range(int(at.read_text()) if at.exists() else 0, settings.steps), settings.mode):
    with open(folder / "trace", "a") as trace: trace.write(f"{i} {os.getpid()}\\n")
    time.sleep(settings.pause)
    write_text(at, str(i + 1))
    if i == 1 and not mended and settings.mode == "fails": raise RuntimeError("the first line\\nit went wrong")
    if i == 1 and not mended and settings.mode == "dies":
        subprocess.Popen(["sleep", "300"])
        os.kill(os.getpid(), signal.SIGKILL)
write_text(folder / "results.json", "{}")
"""
RUNS = """
notebook: tiny.ipynb
defaults: {steps: 4}
runs:
  - {name: first, parameters: {rate: 0.25}, keep: kept/first}
  - {name: reader, parameters: {reads: "{first}/at"}}
  - {name: failing, parameters: {mode: fails}}
  - {name: killed, parameters: {mode: dies}}
  - {name: after, requires: [failing]}
"""


def notebook(path: Path, *sources: str) -> None:
    """A notebook whose first cell holds its parameters."""
    cells = [
        {
            "cell_type": "code",
            "id": f"cell{i}",
            "execution_count": None,
            "metadata": {"tags": ["parameters"]} if i == 0 else {},
            "outputs": [],
            "source": source.strip(),
        }
        for i, source in enumerate(sources)
    ]
    path.write_text(
        json.dumps(
            {
                "cells": cells,
                "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
                "nbformat": 4,
                "nbformat_minor": 5,
            }
        )
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a notebook and a batch, in which the test stands."""
    notebook(tmp_path / "tiny.ipynb", PARAMETERS, CHECK, WORK)
    (tmp_path / "small.yaml").write_text(RUNS)
    (tmp_path / "faster").mkdir()
    (tmp_path / "faster" / "rfc3987_syntax.py").write_text(
        "raise ImportError"
    )  # jsonschema can do without; it takes two seconds of every kernel's start
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path / 'faster'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def ddil_batch(*words: str) -> int:
    """`ddil batch` in this process."""
    parser = argparse.ArgumentParser()
    runner.batch_options(parser)
    return runner.batch_command(parser.parse_args(words))


def states(tasks: Sequence[Task]) -> dict[str, str]:
    return {task.run.name: task.state for task in tasks}


def traced(name: str, batch: str = "small") -> list[tuple[int, int]]:
    """(step, process) of all steps of a run, in order."""
    return [tuple(map(int, line.split())) for line in Path(f"runs/{batch}/{name}/trace").read_text().splitlines()]


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def test_all_that_is_wrong_is_told_before_anything_starts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, types, ranges, duplicates, unknown keys, YAML's 1e-3, empty grids, lacking notebooks, of two files:
    one error.
    """
    (place / "one.yaml").write_text("""
notebook: tiny.ipynb
default: {steps: 2}
runs:
  - {name: a, parameters: {rate: 1e-3x}}
  - {name: a, parameters: {stpes: 3, steps: 0}}
  - {name: b, parameters: {mode: weel, steps: 2000}, reqires: [a]}
  - {name: c, parameters: {steps: 2000}}
  - {name: d, notebook: tinny.ipynb}
  - {name: e, parameters: {reads: "{f}/at"}, resources: {minutes: long}}
  - {name: g, requires: [h]}
  - {name: h, requires: [g]}
""")
    (place / "two.yaml").write_text("notebook: tiny.ipynb\ngrid: {steps: []}\nsteps: 1\nsteps: 2\n")
    assert ddil_batch("one.yaml", "two.yaml") == 2
    said = capsys.readouterr().err
    expected = [
        "default = {'steps': 2}: there is no such name (did you mean defaults?)",
        "rate = '1e-3x': must be a number in [0, 1]",
        "the name a is given to 2 runs",
        "stpes = 3: there is no such parameter of tiny.ipynb (did you mean steps?)",
        "steps = 0: must be a whole number ≥ 1",
        "mode = 'weel': must be one of well, fails, dies (did you mean well?)",
        "reqires = ['a']: there is no such name (did you mean requires?)",
        "run c: steps: more than this notebook can take",
        "there is no notebook tinny.ipynb",
        "there is no run f in this batch",
        "minutes = 'long': must be a number ≥ 0",
        "the runs g, h wait for each other",
        "two.yaml: grid = {'steps': []}: must give each name a list of at least one value",
        "two.yaml: 'steps' is given 2 times",
    ]
    for told in expected:
        assert told in said, f"{told}\nis not in\n{said}"
    assert "nothing was started" in said and not (place / "runs").exists()


def test_a_batch_to_its_end(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some runs are done, one fails, one is killed, one is in vain; the killed one goes on, the failed one when
    asked, the rest is never run again.
    """
    assert ddil_batch("small.yaml", "--parallel", "3") == 1
    said = capsys.readouterr().out
    for told in (
        "first +done",
        "reader +done",
        "failing +failed +it went wrong",
        "killed +interrupted",
        "after +blocked +needs failing, which is failed",
    ):
        assert re.search(told, said), f"{told}\nis not in\n{said}"
    done = {name: traced(name) for name in ("first", "reader")}
    assert all([step for step, _ in steps] == [0, 1, 2, 3] for steps in done.values())
    assert [step for step, _ in traced("failing")] == [step for step, _ in traced("killed")] == [0, 1]
    assert sorted(path.name for path in Path("kept/first").iterdir()) == ["results.json", "tiny.ipynb"]
    orphans = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] == ["sleep", "300"]
        and process.environ().get("DDIL_RUN") == str(place / "runs/small/killed")
    ]
    assert len(orphans) == 1, "the test is to leave a process behind"

    (place / "mended").touch()
    assert ddil_batch("small.yaml", "--dry-run") == 0
    said = capsys.readouterr().out
    for told in (
        "first .* measured +done",
        "failing .* failed before: it went wrong",
        "killed .* unknown +unknown +goes on",
        "after .* waits for failing",
        "2 runs of which nobody knows|3 runs of which nobody knows",
    ):
        assert re.search(told, said), f"{told}\nis not in\n{said}"
    assert ddil_batch("small.yaml") == 1
    assert [step for step, _ in traced("killed")] == [0, 1, 2, 3] and len(
        {process for _, process in traced("killed")}
    ) == 2
    assert not orphans[0].is_running() or orphans[0].status() == psutil.STATUS_ZOMBIE
    assert len(traced("failing")) == 2 and "--retry starts it again" in capsys.readouterr().out
    assert ddil_batch("small.yaml", "--retry") == 0
    assert [step for step, _ in traced("failing")] == [0, 1, 2, 3] and len(traced("after")) == 4
    assert done == {name: traced(name) for name in done}


def test_a_killed_process_loses_its_step_alone(place: Path) -> None:
    """kill -9 of papermill's process: the run is interrupted, its kernel does not linger, and it goes on where it
    was.
    """
    (place / "small.yaml").write_text(
        "notebook: tiny.ipynb\nruns: [{name: slow, parameters: {steps: 30, pause: 0.1}}]\n"
    )
    checked = check_batches(["small.yaml"])
    schedule, at = Scheduler(checked, Local(1)), Path("runs/small/slow/at")
    schedule.round()
    until(lambda: at.exists() and int(at.read_text()) >= 3)
    assert re.search(
        r"slow +running .*well: \d+/30", runner.status_table(schedule.tasks)
    ) or "slow" in runner.status_table(schedule.tasks)
    [process] = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"][1:] == ["-m", "ddil.lab.job", str(place / "runs/small/slow")]
    ]
    process.send_signal(signal.SIGKILL)
    until(lambda: not schedule.round())
    assert states(schedule.tasks) == {"slow": "interrupted"}
    tasks = run_batches(checked, Local(1), pause=0.05)
    steps = [step for step, _ in traced("slow")]
    assert states(tasks) == {"slow": "done"} and sorted(set(steps)) == list(range(30)) and len(steps) <= 32
    by_process = {
        process: [step for step, other in traced("slow") if other == process] for _, process in traced("slow")
    }
    first, second = by_process.values()
    assert second[0] in (first[-1], first[-1] + 1) and len(by_process) == 2


RUNNER = (
    "import argparse, sys; from ddil.lab import runner; parser = argparse.ArgumentParser(); "
    "runner.batch_options(parser); sys.exit(runner.batch_command(parser.parse_args(sys.argv[1:])))"
)


def test_a_killed_runner_is_followed_by_another(place: Path) -> None:
    """kill -9 of the runner leaves its run going; while it lives a second is refused; the next takes the run over,
    and starts no second copy.
    """
    (place / "small.yaml").write_text(
        "notebook: tiny.ipynb\nruns: [{name: slow, parameters: {steps: 40, pause: 0.1}}, {name: next}]\n"
    )
    command = [sys.executable, "-c", RUNNER, "small.yaml", "--parallel", "1"]
    one = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: Path("runs/small/slow/at").exists())
    other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode == 2 and "another `ddil batch` is running runs/small" in other.stderr
    one.kill()
    one.wait()
    at = int(Path("runs/small/slow/at").read_text())
    tasks = run_batches(check_batches(["small.yaml"]), Local(1), pause=0.05)
    assert states(tasks) == {"slow": "done", "next": "done"} and at < 40
    assert [step for step, _ in traced("slow")] == list(range(40)) and len(
        {process for _, process in traced("slow")}
    ) == 1


def test_other_parameters_begin_anew(place: Path) -> None:
    """A run with other parameters, or of other code, does not mix with what lies in its folder; that is moved aside."""
    batch = lambda steps: (place / "small.yaml").write_text(
        f"notebook: tiny.ipynb\ndefaults: {{steps: {steps}}}\ngrid: {{rate: [0.5]}}\n"
    )
    batch(2)
    assert states(run_batches(check_batches(["small.yaml"]), Local(1), pause=0.05)) == {"rate=0.5": "done"}
    batch(3)
    [task] = run_batches(check_batches(["small.yaml"]), Local(1), pause=0.05)
    assert task.state == "done" and [step for step, _ in traced("rate=0.5")] == [0, 1, 2]
    [aside] = Path("runs/small/.before").iterdir()
    assert read_json(aside / "done.json")["parts"]["parameters"]["steps"] == 2
    [task] = run_batches(check_batches(["small.yaml"]), Forgetful(), pause=0)
    assert task.state == "done", "it is done, and no executor is asked"
    notebook(place / "tiny.ipynb", PARAMETERS, CHECK, WORK.replace("{}", "[]"))
    schedule = Scheduler(check_batches(["small.yaml"]), Forgetful())
    schedule.round()
    assert schedule.tasks[0].told.startswith("anew: the notebook's code")


class Forgetful:
    """An executor that never has room."""

    def start(self, tasks: Sequence[Task]) -> list[Task]:
        return []

    def look(self, task: Task) -> str:
        return "running"

    def adopt(self, task: Task) -> bool:
        return False

    def last_words(self, task: Task) -> str:
        return ""

    def refuses(self, run: Run) -> str:
        return ""


class Instant(Forgetful):
    """An executor that has done everything at once, eight at a time."""

    def start(self, tasks: Sequence[Task]) -> list[Task]:
        for task in tasks[:8]:
            prepare_run(task.run, task.parts)
            (task.folder / "done.json").write_text(
                json.dumps({**read_json(task.folder / ".run/task.json"), "seconds": 0.1})
            )
        return list(tasks[:8])

    def look(self, task: Task) -> str:
        return "ended"


def test_two_hundred_runs(place: Path) -> None:
    """Each is begun once, and a second call begins none."""
    (place / "many.yaml").write_text(
        "notebook: tiny.ipynb\ngrid: {steps: [" + ", ".join(map(str, range(1, 201))) + "]}\n"
    )
    checked, seen = check_batches(["many.yaml"]), []
    tasks = run_batches(
        checked, Instant(), show=lambda tasks: seen.append(Counter(task.state for task in tasks)), pause=0
    )
    assert (
        Counter(task.state for task in tasks) == {"done": 200}
        and len(seen) >= 25
        and all(counts["running"] <= 8 for counts in seen)
    )
    assert len(runner.status_table(tasks, height=20).splitlines()) == 1
    assert Counter(task.state for task in run_batches(checked, Forgetful(), pause=0)) == {"done": 200}


SBATCH = """#!/usr/bin/env python3
import pathlib, re, subprocess, sys, os
here = pathlib.Path(__file__).parent
script = pathlib.Path(sys.argv[1]).read_text()
job = 7 + len(list(here.glob("*.sent")))
(here / f"{job}.sent").write_text(script)
array = re.search(r"#SBATCH --array=0-(\\d+)", script)
for i in range(int(array[1]) + 1) if array else [None]:
    name = str(job) if i is None else f"{job}_{i}"
    output = re.search(r"#SBATCH --output=(\\S+)", script)[1].replace("%j", name).replace("%A_%a", name)
    output = output.replace("%A", str(job)).replace("%a", str(i))
    array = {} if i is None else {"SLURM_ARRAY_JOB_ID": str(job), "SLURM_ARRAY_TASK_ID": str(i)}
    environment = {**os.environ, "SLURM_JOB_ID": str(job), **array}
    with open(output, "w") as log:
        way = dict(env=environment, stdout=log, stderr=log, start_new_session=True)
        process = subprocess.Popen(["bash", "-c", script], **way)
    (here / f"{name}.process").write_text(str(process.pid))
print(f"Submitted batch job {job}")
"""
SQUEUE = """#!/usr/bin/env python3
import pathlib
for path in pathlib.Path(__file__).parent.glob("*.process"):
    state = pathlib.Path(f"/proc/{path.read_text()}/stat")
    if state.exists() and state.read_text().split()[2] != "Z": print(f"{path.stem}|RUNNING")
"""


def test_jobs_of_slurm(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through sbatch and squeue of our own: like runs go out as one array, the file's and the command line's wishes
    reach it, a killed runner's jobs are taken over. (A real one: make test-slurm.)
    """
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "srun": "#!/bin/sh\n"}.items():
        (place / "faster" / name).write_text(text)
        (place / "faster" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place / 'faster'}{os.pathsep}{os.environ['PATH']}")
    (place / "small.yaml").write_text("""
notebook: tiny.ipynb
resources: {minutes: 3, memory: 0.5}
slurm: {partition: long, account: me}
runs:
  - {name: first, parameters: {steps: 20, pause: 0.1}}
  - {name: failing, parameters: {mode: fails}}
  - {name: big, resources: {nodes: 1, cores: 2}, requires: [first]}
""")
    checked = check_batches(["small.yaml"])
    before = Scheduler(checked, Slurm(options={"partition": "short"}, every=0, settle=0.5))
    before.round()
    assert [task.state for task in before.tasks] == ["pending", "pending", "queued"]
    tasks = run_batches(checked, Slurm(every=0, settle=0.5), pause=0.1)
    assert states(tasks) == {"first": "done", "failing": "failed", "big": "done"}
    assert len(traced("first")) == 20
    sent = [path.read_text() for path in sorted((place / "faster").glob("*.sent"))]
    assert len(sent) == 2 and "--array=0-1" in sent[0] and "--array" not in sent[1]
    for line in ("--partition=short", "--account=me", "--time=6", "--mem=512M", "--job-name=ddil-small"):
        assert f"#SBATCH {line}" in sent[0], sent[0]
    assert "#SBATCH --cpus-per-task=2" in sent[1] and "#SBATCH --partition=long" in sent[1]


def test_ready_files_pass_the_check() -> None:
    """Every batch file of the repository, as it would be run from its root; what is missing here is told apart."""
    files = sorted((ROOT / "experiments/batches").glob("*.yaml"))
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        checked = check_batches([path.relative_to(ROOT) for path in files])
    finally:
        os.chdir(here)
    assert {
        "reference",
        "sd15-coco",
        "tables2to4-sd15",
        "table5-inversion",
        "lcm-sd15",
        "dmd2-ssd1b",
        "sfd-cifar10",
        "sfd-imagenet64",
        "sfd-sd15",
    } <= {batch.name for batch in checked.batches}
    reference = next(batch for batch in checked.batches if batch.name == "reference")
    assert not [line for run in reference.runs for line in checked.missing[run.folder]]
    kept = {run.keep for run in reference.runs}
    assert {path.name for path in (ROOT / "experiments/reference").iterdir() if path.is_dir()} - {
        path.name for path in kept if path
    } == {"teacher"}
