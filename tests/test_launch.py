"""A text-to-image student on two processes, whole on each or in shares: it learns what one process learns, resumes
where it was, and failures are told.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from forked import PROCESSES
from torch import nn, Tensor

from ddil.rollins.data import TensorData
from ddil.diffusion.wrappers import Guided
from ddil.models.unet import TextDenoiser
from ddil.rollins.ddil import DDIL
from ddil.training.parallel import kept
from ddil.files import read_tensors, write_tensors
from ddil.training.launch import VARIABLES, launch
from ddil.methods.base import Method, Turn
from ddil.methods.consistency import Consistency, Edges
from ddil.methods.progressive import Progressive
from ddil.diffusion.noise import Shard, Source
from ddil.diffusion.grids import uniform_grid
from ddil.diffusion.schedule import Cosine
from ddil.solvers import consistency
from ddil.rollins.states import States
from ddil.rollins.teacher import Teacher
from ddil.training.parallel import make_accelerator
from ddil.training.settings import Settings
from ddil.training.checkpoints import latest_checkpoint
from ddil.training.trainer import optimizer_states, Trainer

# Adam divides gradients by their own size, and so enlarges the rounding of the smallest; training moves every weight by
# 0.001 and more
ROUNDING = 2e-5
SETTINGS: dict[str, Any] = {
    "updates": 4,
    "batch": 8,
    "learning_rate": 1e-3,
    "warm_up": 2,
    "ema": 0.9,
    "accumulate": 2,
    "checkpoint_every": 2,
    "log_every": 1,
    "gradient_checkpointing": True,
}


def student_of(frozen: bool = False) -> TextDenoiser:
    """A small U-Net of Stable Diffusion's class with random weights; `frozen`: only its last layer learns."""
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
    }
    network = UNet2DConditionModel(
        8,
        4,
        4,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        **blocks,
    )
    student = TextDenoiser(network, Cosine(), "v", null_embedding=torch.randn(3, 8))
    if frozen:
        network.requires_grad_(False).conv_out.requires_grad_(True)
    return student


class Imitated(Progressive):
    """A copy learns to predict almost what the student predicts, by a loss that reaches the student, too."""

    def __init__(self, teacher: Teacher):
        super().__init__(teacher)
        self.networks = {"copy": student_of()}

    def turns(self, step: int) -> list[Turn]:
        return [*super().turns(step), Turn("copy", self.imitate)]

    def imitate(self, networks: dict[str, nn.Module], states: States) -> tuple[Tensor, dict[str, Tensor]]:
        copy, student = (networks[name](states.z, states.t, states.cond) for name in ("copy", "student"))
        return (copy - student - 0.1).square().mean(), {}


METHODS: dict[str, Callable[[Teacher], Method]] = {
    "progressive": Progressive,
    "consistency": lambda teacher: Consistency(teacher, Edges([1.0, 0.0]), 0.5, "huber"),
    "imitated": Imitated,
}


def trainer(
    folder: Path | None = None,
    method: str = "progressive",
    frozen: bool = False,
    mixing: str = "batch",
    progress: Any = iter,
    **changes: Any,
) -> Trainer:
    """A run on random latents and embeddings, with DDIL's states."""
    accelerator, settings, student = make_accelerator("cpu"), Settings(**{**SETTINGS, **changes}), student_of(frozen)
    teacher = Teacher(
        Guided(student_of().requires_grad_(False), 2.0), uniform_grid(4), 2, look=1 if method == "consistency" else None
    )
    source, rng = (
        Source(settings.seed, Shard(accelerator.process_index, accelerator.num_processes)),
        torch.Generator().manual_seed(1),
    )
    data = TensorData(torch.randn(64, 4, 8, 8, generator=rng), torch.randn(64, 3, 8, generator=rng))
    walks = {"solver": consistency} if method == "consistency" else {}
    states = DDIL(
        (0.5, 0.5), mixing=mixing, capacity=64, reuse=0.25
    )  # little reuse: each process also collects single rows
    rollin = states.states(student, teacher, data, (4, 8, 8), settings.updates, settings.batch, source, **walks)
    ask = METHODS[method](teacher)
    return Trainer(student, ask, rollin, settings, folder, accelerator, progress)


def learnt(run: Trainer) -> dict[str, Tensor]:
    """Raw, averaged and following weights, and the optimiser's state, whole (all processes ask)."""
    live = {name: kept(network) for name, network in run.learners.networks.items()}
    live |= {"finished": run.finished().state_dict(), "optimiser": optimizer_states(run.learners)["optimizer-student"]}
    live |= {name: kept(follower.network, run.student) for name, follower in run.learners.followers.items()}
    return {
        f"{part} {name}": run.distribution.gathered(value)
        for part, tensors in live.items()
        for name, value in tensors.items()
    }


def stopping(steps: Iterable[int]) -> Iterator[int]:
    """Interrupts after three updates."""
    for step in steps:
        if step == 3:
            raise KeyboardInterrupt
        yield step


def _train(
    environment: dict[str, str], folder: Path | None, file: Path, interrupt: bool, options: dict[str, Any]
) -> None:
    """What a forked process does: train, and write what was learnt."""
    output = os.open(file.with_suffix(f".{environment['RANK']}.txt"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    run = trainer(folder, progress=stopping if interrupt else iter, **options)
    with contextlib.suppress(KeyboardInterrupt):
        run.fit()
    tensors = learnt(run)
    if run.accelerator.is_main_process:
        assert type(run.distribution).name == os.environ["EXPECTED"]
        write_tensors(file, tensors)
    run.accelerator.end_training()


def together(
    distribution: str, file: Path, folder: Path | None = None, interrupt: bool = False, **options: Any
) -> dict[str, Tensor]:
    """What two processes learn under a distribution."""
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(tiny.free_port()),
        "EXPECTED": distribution,
        **VARIABLES[distribution],
    }
    runs = [
        PROCESSES.Process(
            target=_train,
            args=({**shared, "RANK": rank, "LOCAL_RANK": rank}, folder, file, interrupt, options),
            daemon=True,
        )
        for rank in ("0", "1")
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(tiny.DEADLINE)
    said = "\n".join(path.read_text() for path in sorted(file.parent.glob(f"{file.stem}.?.txt")))
    assert [run.exitcode for run in runs] == [0, 0], said
    return read_tensors(file)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Uninterrupted runs of two processes by distribution (what was learnt, and the folder), and what one process
    learns.
    """
    place = tmp_path_factory.mktemp("runs")
    alone = trainer(place / "alone").fit()
    made: dict[str, Any] = {
        name: (together(name, place / f"{name}.safetensors", place / name), place / name) for name in VARIABLES
    }
    return {
        **made,
        "alone": (learnt(alone), place / "alone"),
        "start": {f"student {name}": value for name, value in kept(student_of()).items()},
    }


# Holding and learning


@pytest.mark.parametrize("distribution", VARIABLES)
def test_two_processes_learn_what_one_does(distribution: str, launched: dict[str, Any]) -> None:
    """Raw and averaged weights and Adam's moments: to rounding, which is far less than what was learnt."""
    one, two = launched["alone"][0], launched[distribution][0]
    assert tiny.largest_difference(one, two) < ROUNDING
    moved = [
        (one[name] - value).abs().max().item()
        for name, value in launched["start"].items()
        if "null_embedding" not in name
    ]
    assert min(moved) > 50 * ROUNDING and any(
        not torch.equal(one[f"student {name}"], one[f"finished {name}"]) for name in kept(student_of())
    )


@pytest.mark.parametrize("distribution", VARIABLES)
def test_it_resumes_where_it_was(distribution: str, launched: dict[str, Any], tmp_path: Path) -> None:
    """Interrupted after three updates and resumed from the second: to the last bit the uninterrupted run."""
    half = together(distribution, tmp_path / "half.safetensors", tmp_path / "run", interrupt=True)
    assert latest_checkpoint(tmp_path / "run").name == "update-00000002"
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    whole, resumed = (
        launched[distribution][0],
        together(distribution, tmp_path / "resumed.safetensors", tmp_path / "run"),
    )
    assert tiny.largest_difference(resumed, whole) == 0 < tiny.largest_difference(half, whole)
    if distribution != "ddp":  # a checkpoint is whole, so the run may go on under another distribution
        assert (
            tiny.largest_difference(together("ddp", tmp_path / "other.safetensors", tmp_path / "copy"), whole)
            < ROUNDING
        )


def test_a_checkpoint_is_whole_under_every_distribution(launched: dict[str, Any]) -> None:
    """The files hold the same tensors, to rounding."""
    doubled = lambda path: {name: value.double() for name, value in read_tensors(path).items()}
    for path in sorted(latest_checkpoint(launched["ddp"][1]).glob("*.safetensors")):
        for name in ("fsdp2", "zero2"):
            other = latest_checkpoint(launched[name][1]) / path.name
            assert tiny.largest_difference(doubled(path), doubled(other)) < 10 * ROUNDING, other


@pytest.mark.parametrize("distribution", ["fsdp2", "zero2"])
def test_followers_are_shared_too(distribution: str, tmp_path: Path) -> None:
    """A target network that follows a sharded student ends where it does on one process."""
    one = learnt(trainer(method="consistency").fit())
    two = together(distribution, tmp_path / "out.safetensors", method="consistency")
    assert {name.split()[0] for name in two} == {"student", "finished", "optimiser", "target"}
    assert tiny.largest_difference(one, two) < ROUNDING


def test_samples_draw_their_drivers_under_zero2(tmp_path: Path) -> None:
    """Parameters are whole during an update, so that processes may call the networks for other rows than each other."""
    one, two = learnt(trainer(mixing="sample").fit()), together("zero2", tmp_path / "out.safetensors", mixing="sample")
    assert tiny.largest_difference(one, two) < ROUNDING


def test_two_networks_under_zero2(tmp_path: Path) -> None:
    """A network beside the student learns in turns with it what it learns on one process."""
    one, two = (
        learnt(trainer(method="imitated").fit()),
        together("zero2", tmp_path / "out.safetensors", method="imitated"),
    )
    assert {name.split()[0] for name in two} == {"student", "finished", "optimiser", "copy"}
    assert tiny.largest_difference(one, two) < ROUNDING


def test_frozen_weights_are_not_in_the_checkpoint(tmp_path: Path) -> None:
    """Only what learns is written, and it resumes; a checkpoint of other trained weights is refused."""
    run = trainer(tmp_path, frozen=True).fit()
    saved = read_tensors(latest_checkpoint(tmp_path) / "network-student.safetensors")
    assert saved.keys() == {"network.conv_out.weight", "network.conv_out.bias", "null_embedding"}
    assert all(torch.equal(value, run.student.state_dict()[name]) for name, value in saved.items())
    assert {
        name.split(".")[0] for name in read_tensors(latest_checkpoint(tmp_path) / "optimizer-student.safetensors")
    } == {"0", "1"}
    assert tiny.largest_difference(learnt(trainer(tmp_path, frozen=True)), learnt(run)) == 0
    with pytest.raises(ValueError, match="belongs to another run: parameters"):
        trainer(tmp_path)


def test_drivers_of_each_sample_are_refused_under_fsdp(tmp_path: Path) -> None:
    """Processes that call the networks for other rows than each other would wait for ever."""
    with pytest.raises(AssertionError, match="choose mixing='batch', or the distribution 'ddp'"):
        together("fsdp2", tmp_path / "out.safetensors", mixing="sample")


# Launching


def test_the_number_of_processes_is_asserted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a single-process run do not pass for a run of many processes."""
    monkeypatch.setenv("DDIL_WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="launched as 2 processes but accelerate sees 1"):
        make_accelerator("cpu")


def test_eight_bits_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its absence is told before anything is computed, and by its name."""
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes"):
        trainer(optimizer="adamw8bit")


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> str:
    """A module of that source which launched processes can import."""
    (folder / "launched.py").write_text(
        f"import os, sys, time\nfrom pathlib import Path\nrank, task = os.environ['RANK'], Path(sys.argv[1])\n{source}"
    )
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return "launched"


def running(pid: int) -> bool:
    """Whether there is such a process, dead ones that nobody has asked about left out."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_failing_process_is_told_and_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error holds the last lines of the one that failed; the other does not go on alone."""
    name = module(
        tmp_path,
        monkeypatch,
        "(task / rank).write_text(str(os.getpid()))\nif rank == '1':\n    raise "
        "ValueError('no latents for row 17')\ntime.sleep(600)\n",
    )
    with pytest.raises(RuntimeError, match="ValueError: no latents for row 17"):
        launch(tmp_path, name, processes=2, device="cpu")
    assert not running(int((tmp_path / "0").read_text()))


def _launch(folder: Path, name: str, path: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["PYTHONPATH"] = path
    launch(folder, name, processes=2, device="cpu")


def test_an_interrupted_launch_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted like a cell of a notebook, it ends the processes that it started."""
    name = module(
        tmp_path,
        monkeypatch,
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n(task / "
        "rank).write_text(str(os.getpid()))\ntime.sleep(600)\n",
    )
    launcher = PROCESSES.Process(target=_launch, args=(tmp_path, name, os.environ["PYTHONPATH"]))
    launcher.start()
    end = time.monotonic() + tiny.DEADLINE
    while not all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"):
        assert launcher.is_alive() and time.monotonic() < end
        time.sleep(0.05)
    os.kill(launcher.pid, signal.SIGINT)
    launcher.join(tiny.DEADLINE)
    assert launcher.exitcode == 1 and not any(running(int((tmp_path / rank).read_text())) for rank in "01")
