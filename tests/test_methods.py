"""Every method on every roll-in it can be asked on: it trains, counts its cost, resumes to the last bit, and learns
in two processes what it learns in one.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from forked import PROCESSES
from torch import Tensor, nn

from ddil.rollins.data import TensorData
from ddil.diffusion.denoiser import Denoiser
from ddil.models.unet import ClassDenoiser
from ddil.rollins.ddil import DDIL
from ddil.diffusion.exact import GaussianMixture
from ddil.files import read_tensors, write_tensors
from ddil.methods.base import Denoising, Method
from ddil.methods.consistency import Anywhere, BiDirectional, Consistency, ConsistencyTraining, Edges
from ddil.methods.ctm import CTM, AdversarialCTM
from ddil.methods.progressive import Progressive
from ddil.methods.regression import GuidanceDistillation, Regression
from ddil.diffusion.small_networks import MLP
from ddil.diffusion.noise import Shard, Source
from ddil.rollins.forward import Forward
from ddil.rollins.walk import Walk
from ddil.diffusion.grids import uniform_grid
from ddil.diffusion.schedule import Cosine
from ddil.solvers import consistency
from ddil.rollins.states import RollIn
from ddil.rollins.teacher import Teacher
from ddil.training.parallel import make_accelerator
from ddil.training.settings import Settings
from ddil.training.trainer import Trainer

GRID = torch.cat([uniform_grid(16)[:-1], torch.tensor([0.01], dtype=torch.float64)])
SETTINGS = Settings(updates=20, batch=16, learning_rate=3e-3, ema=0.9, checkpoint_every=8, log_every=1, seed=1)
ROUNDING = 1e-5  # of weights that training moves by 0.01 and more


class Judge(nn.Sequential):
    """A discriminator in the plane."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))


def network(*inputs: str) -> Denoiser:
    """A small perceptron in the plane, always the same."""
    torch.manual_seed(0)
    return (
        ClassDenoiser(MLP(2, 16, 1), Cosine(), "v").taking(*inputs)
        if inputs
        else ClassDenoiser(MLP(2, 16, 1), Cosine(), "v")
    )


def exact() -> GaussianMixture:
    return GaussianMixture(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), 0.2)


def judged(teacher: Teacher, student: Denoiser) -> Method:
    """CTM with its adversary."""
    torch.manual_seed(1)
    return AdversarialCTM(teacher, 0.9, Judge(), adversary_from=4, longest=3)


# name: (further inputs of the student, how far labels look, what is asked, whether states without data will do)
METHODS: dict[str, tuple[tuple[str, ...], int, Callable[[Teacher, Denoiser], Method], bool]] = {
    "denoising": ((), 4, lambda teacher, student: Denoising(), False),
    "regression": ((), 4, lambda teacher, student: Regression(teacher, "l1"), True),
    "progressive": ((), 4, lambda teacher, student: Progressive(teacher), True),
    "guidance": ((), 4, lambda teacher, student: GuidanceDistillation(teacher.denoiser), True),
    "consistency": ((), 1, lambda teacher, student: Consistency(teacher, Edges([1.0, GRID[-1].item()]), 0.9), True),
    "segments": ((), 2, lambda teacher, student: Consistency(teacher, Edges(teacher.student_grid)), True),
    "trajectory": ((), 1, lambda teacher, student: Consistency(teacher, Anywhere(GRID), 0.9), True),
    "consistency training": (
        (),
        1,
        lambda teacher, student: ConsistencyTraining(student.schedule, Edges([1.0, GRID[-1].item()])),
        False,
    ),
    "CTM": (("end",), 1, lambda teacher, student: CTM(teacher, 0.9, longest=3), True),
    "CTM with adversary": (("end",), 1, judged, False),
    "there and back": ((), 1, lambda teacher, student: BiDirectional(teacher, teacher.student_grid, network()), True),
}
NEEDS_DATA = [name for name, (*_, without) in METHODS.items() if not without]


def build(
    name: str, rollin: str, shard: Shard = Shard(), settings: Settings = SETTINGS
) -> tuple[Denoiser, Method, RollIn]:
    """A student, what it is asked, and where: on "forward" states, on DDIL's, or on a "walk" of its own."""
    inputs, look, ask, _ = METHODS[name]
    student, teacher = network(*inputs).train().requires_grad_(True), Teacher(exact(), GRID, 4, look=look)
    data = TensorData(exact().draw(200, torch.Generator().manual_seed(1)).float())
    source = Source(settings.seed, shard)
    rollins: dict[str, Callable[[], RollIn]] = {
        "forward": lambda: Forward(data, student.schedule, teacher.label_grid, source),
        "DDIL": lambda: DDIL(capacity=128).states(
            student, teacher, data, (2,), settings.updates, settings.batch, source, consistency
        ),
        "walk": lambda: Walk(student, teacher, (2,), source=source),
    }
    return student, ask(teacher, student), rollins[rollin]()


def trainer(
    name: str, rollin: str, folder: Path | None = None, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> Trainer:
    student, method, states = build(name, rollin)
    return Trainer(student, method, states, SETTINGS, folder, progress=progress)


def learnt(run: Trainer) -> dict[str, Tensor]:
    """All that training moves: the networks, what follows them, and the average."""
    modules = {
        **run.learners.networks,
        **{f"follower {name}": follower.network for name, follower in run.learners.followers.items()},
    }
    weights = {
        f"{name}.{key}": value.clone() for name, module in modules.items() for key, value in module.state_dict().items()
    }
    return weights | {f"average.{name}": value.clone() for name, value in run.learners.average.tensors.items()}


POSSIBLE = [
    (name, rollin)
    for name, (_, look, _, without) in METHODS.items()
    for rollin in ("forward", "DDIL", "walk")
    if (rollin == "forward" or without) and (rollin != "walk" or look == 4)
]


@pytest.mark.parametrize(("name", "rollin"), POSSIBLE)
def test_it_trains_and_resumes(name: str, rollin: str, tmp_path: Path) -> None:
    """A run that stopped in the middle of things ends where an uninterrupted one does; every network moved, and
    every evaluation is counted.
    """

    def stopping(steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            if step == 13:
                raise KeyboardInterrupt
            yield step

    whole = trainer(name, rollin, tmp_path / "whole")
    begin = learnt(whole)
    end = learnt(whole.fit())
    moved = {key.split(".")[0] for key in end if not torch.equal(end[key], begin[key])}
    assert moved == {key.split(".")[0] for key in end}, f"only {moved} have learnt"
    assert all(value.isfinite().all() for value in end.values())
    assert whole.evaluations["student"] >= SETTINGS.updates * SETTINGS.batch and set(whole.evaluations) == {
        "student",
        *whole.method.asked,
        *whole.learners.followers,
        *(set(whole.method.networks) - {"discriminator"}),
    }
    with contextlib.suppress(KeyboardInterrupt):
        trainer(name, rollin, tmp_path / "halves", stopping).fit()
    again = trainer(name, rollin, tmp_path / "halves")
    assert again.step == 8
    resumed = learnt(again.fit())
    assert resumed.keys() == end.keys() and all(torch.equal(resumed[key], end[key]) for key in end)
    assert again.evaluations == whole.evaluations


@pytest.mark.parametrize("name", NEEDS_DATA)
def test_states_without_data_are_refused(name: str) -> None:
    """A method that needs the clean data says which roll-in has them."""
    with pytest.raises(ValueError, match="use the roll-in Forward|data=RealSamples"):
        run = trainer(name, "DDIL")
        for step in range(SETTINGS.updates):
            run.update(step)


@pytest.mark.parametrize(
    ("edges", "decay", "named"), [([1.0, 0.5, 0.01], 0.9, "ends"), ([1.0, 0.01], 0.8, "decay of target")]
)
def test_a_checkpoint_of_another_question_is_refused(
    edges: list[float], decay: float, named: str, tmp_path: Path
) -> None:
    """Where the student is to arrive, and how fast its target follows, decide a run."""

    def run(edges: list[float], decay: float) -> Trainer:
        student, method, states = build("consistency", "forward")
        method = Consistency(method.teacher, Edges(edges), decay)
        return Trainer(student, method, states, SETTINGS.but(updates=2, checkpoint_every=2), tmp_path)

    run([1.0, 0.01], 0.9).fit()
    assert run([1.0, 0.01], 0.9).step == 2
    with pytest.raises(ValueError, match=named):
        run(edges, decay)


# Two processes


def _train(name: str, rollin: str, file: Path, environment: dict[str, str]) -> None:
    """What a forked process does: train, and write what was learnt."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    accelerator = make_accelerator("cpu")
    student, method, states = build(name, rollin, Shard(accelerator.process_index, accelerator.num_processes))
    run = Trainer(student, method, states, SETTINGS, accelerator=accelerator).fit()
    if accelerator.is_main_process:
        write_tensors(file, learnt(run))
    accelerator.end_training()


def together(name: str, rollin: str, file: Path) -> dict[str, Tensor]:
    """What two processes learn."""
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(tiny.free_port()),
    }
    places = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    runs = [PROCESSES.Process(target=_train, args=(name, rollin, file, place), daemon=True) for place in places]
    for run in runs:
        run.start()
    for run in runs:
        run.join(tiny.DEADLINE)
    assert [run.exitcode for run in runs] == [0, 0]
    return read_tensors(file)


@pytest.mark.parametrize(
    ("name", "rollin"), [("there and back", "forward"), ("regression", "walk"), ("consistency", "DDIL")]
)
def test_two_processes_learn_what_one_does(name: str, rollin: str, tmp_path: Path) -> None:
    """Two networks in turns, a walk that goes on from the last batch, a follower beside a replay: to rounding, on
    two processes as on one.
    """
    one, two = learnt(trainer(name, rollin).fit()), together(name, rollin, tmp_path / "two.safetensors")
    assert one.keys() == two.keys() and tiny.largest_difference(one, two) < ROUNDING
    begin = copy.deepcopy(learnt(trainer(name, rollin)))
    assert tiny.largest_difference(one, begin) > 0.01
