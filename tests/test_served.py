"""What is asked is served: of the states trained on, the student made the share that its schedule says, at the time."""

from __future__ import annotations

import warnings
from itertools import product

import numpy as np
import pytest
import torch

from ddil.diffusion.exact import Gaussian
from ddil.diffusion.grids import uniform_grid
from ddil.diffusion.noise import Shard, Source
from ddil.methods.progressive import Progressive
from ddil.rollins.data import TensorData
from ddil.rollins.ddil import DDIL
from ddil.rollins.mixture import Mixture
from ddil.rollins.ramp import constant, linear, Ramp, staged
from ddil.rollins.rollout import Rollout
from ddil.rollins.states import Origin, States
from ddil.rollins.teacher import Teacher
from ddil.training.settings import Settings
from ddil.training.trainer import Trainer

BATCH, MIXINGS = 64, ("batch", "sample")
DATA = TensorData(torch.randn(500, 1, generator=torch.Generator().manual_seed(0)))
SCHEDULES = {
    ".15 then .80": lambda updates: staged(0.15, 0.80, updates),
    "0 then 1": lambda updates: staged(0.0, 1.0, updates),
    "1 then 0": lambda updates: staged(1.0, 0.0, updates),
    "0 to 1": lambda updates: linear(0.0, 1.0, updates),
    ".9 to .3": lambda updates: linear(0.9, 0.3, updates),
    "0": lambda updates: constant(0.0),
    ".5": lambda updates: constant(0.5),
}


def stage(beta: Ramp, updates: int, nodes: int = 8, source: Source | int = 0, **options) -> Mixture:
    """DDIL's states for a stage on a grid of so many steps, where networks cost nothing."""
    teacher = Teacher(Gaussian(0.0, 0.5), uniform_grid(2 * nodes), 2)
    return DDIL(beta=beta, **options).states(Gaussian(0.0, 0.5), teacher, DATA, (1,), updates, BATCH, source)


def drivers(states: States) -> np.ndarray:
    """(driven,) booleans: whether the student made each of the states to which somebody drove."""
    driven = states.origin[np.isin(states.origin, (Origin.STUDENT, Origin.TEACHER))]
    return driven == Origin.STUDENT


def shares(mixture: Mixture, beta: Ramp, updates: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """(parts,), (parts,): the shares of the student asked and served in equal parts of a stage, read off the states."""
    sums, replay, share = np.zeros((parts, 3)), mixture.parts["collected"], mixture.priors["collected"]
    turns = np.random.default_rng(0).random(updates) < [share(step) for step in range(updates)]
    for step in map(int, np.flatnonzero(turns)):
        mine = drivers(replay.sample(BATCH, step))
        sums[step * parts // updates] += len(mine), len(mine) * beta(step), mine.sum()
    return sums[:, 1] / sums[:, 0], sums[:, 2] / sums[:, 0]


LONG = [(name, 10_000, "batch") for name in (".15 then .80", "0 to 1")]


@pytest.mark.parametrize(("name", "updates", "mixing"), [*product(SCHEDULES, (200, 1000), MIXINGS), *LONG])
def test_what_is_asked_is_served(name: str, updates: int, mixing: str) -> None:
    """In each fifth of a stage; the tolerance is that of the drift, and of the few coins of a short stage."""
    beta = SCHEDULES[name](updates)
    mixture = stage(beta, updates, mixing=mixing)
    asked, served = shares(mixture, beta, updates, 5)
    few = {200: 0.2, 1000: 0.06, 10_000: 0.02}[updates] if mixing == "batch" else 0.02
    assert served == pytest.approx(asked, abs=0.03 + few * (0 < asked.mean() < 1))
    assert mixture.complaints() == []


def test_a_jump_is_served_at_once() -> None:
    """From the first collected batch after it, and until the last one before it."""
    mixture = stage(staged(0.0, 1.0, 500), 500)
    batches = {step: drivers(mixture.sample(BATCH, step)) for step in range(500)}
    for step, mine in batches.items():
        assert (mine == (step >= 300)).all(), step
    assert sum(len(mine) > 0 for mine in batches.values()) > 100


@pytest.mark.parametrize("mixing", MIXINGS)
def test_the_log_says_what_was_served(mixing: str) -> None:
    """Counted by hand from the states, over all and by phase, on one process and on each of two."""
    beta, share = staged(0.2, 0.7, 200), staged(0.25, 0.5, 200)
    mixture = stage(beta, 200, mixing=mixing)
    pair = [stage(beta, 200, mixing=mixing, source=Source(0, Shard(rank, 2))) for rank in (0, 1)]
    origins = [mixture.sample(BATCH, step).origin for step in range(200)]
    for step in range(200):
        parts = [part.sample(BATCH, step).origin for part in pair]
        assert sorted(np.concatenate(parts)) == sorted(origins[step])
    everything, log = np.concatenate(origins), mixture.log()
    assert log["collected asked"] == pytest.approx(np.mean([share(step) for step in range(200)]))
    assert log["collected served"] == (everything != Origin.DATA).mean()
    driven = np.concatenate([origin[origin >= Origin.TEACHER] for origin in origins])
    late = np.concatenate([origin[origin >= Origin.TEACHER] for origin in origins[120:]])
    assert log["collected driven by student served"] == (driven == Origin.STUDENT).mean()
    assert log["collected driven by student from update 120 served"] == (late == Origin.STUDENT).mean()
    assert log["collected driven by student from update 120 asked"] == pytest.approx(0.7)
    counts = [(origin >= Origin.TEACHER).sum() for origin in origins]
    asked = sum(count * beta(step) for step, count in enumerate(counts)) / sum(counts)
    assert log["collected driven by student asked"] == pytest.approx(asked)
    assert log["collected oldest age"] <= 20
    assert [part.log() for part in pair] == [log, log]


def test_counting_goes_on_where_it_stopped() -> None:
    """States and counts of a stage that was stopped are those of one that was not, to the last bit."""
    beta = staged(0.2, 0.7, 200)
    whole, first = stage(beta, 200), stage(beta, 200)
    for step in range(130):
        whole.sample(BATCH, step)
        first.sample(BATCH, step)
    memory = {name: value.clone() for name, value in first.state_dict().items()}
    later = stage(beta, 200)
    later.load_state_dict(memory)
    for step in range(130, 200):
        assert torch.equal(later.sample(BATCH, step).z, whole.sample(BATCH, step).z)
    assert later.log() == whole.log()
    assert later.complaints() == whole.complaints()


def test_a_checkpoint_of_an_earlier_version_is_refused() -> None:
    """It did not know who drove to its states."""
    mixture = stage(constant(0.5), 100)
    with pytest.raises(ValueError, match="written by an earlier version.*train the stage anew"):
        mixture.load_state_dict({"asked": torch.ones(2), "used": torch.ones(2), "collected.written": torch.ones(64)})


def test_who_serves_something_else_says_so() -> None:
    """A replay that never forgets is accused: by a warning while it trains, once, and in what it says at the end."""
    mixture = stage(staged(0.0, 1.0, 120), 120, reach=1.0)
    mixture.parts["collected"].drift = 1.0  # as a memory does that is only full some day
    method = Progressive(Teacher(Gaussian(0.0, 0.5), uniform_grid(16), 2))
    run = Trainer(Scaled(), method, mixture, Settings(updates=120, batch=BATCH, log_every=10, ema=None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit()
    about = [str(one.message) for one in caught if "not those that were asked for" in str(one.message)]
    assert len(about) == 1
    (line,) = mixture.complaints()
    assert line.startswith("collected driven by student: 1.00 asked, ")
    assert line.endswith("served from update 72 on")


class Scaled(Gaussian):
    """A student with one weight."""

    def __init__(self) -> None:
        super().__init__(0.0, 0.5)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def predict(self, z, t, cond=None):
        return self.scale * super().predict(z, t, cond)


def test_long_stages_cost_what_reuse_says() -> None:
    """A state costs two evaluations of the teacher, divided by the reuse, where the reach is long."""
    for nodes in (4, 8):
        beta = constant(0.5)
        mixture = stage(beta, 1000, nodes)
        for step in range(1000):
            mixture.sample(BATCH, step)
        replay = mixture.parts["collected"]
        assert replay.rollout.wheel.teacher.denoiser.evaluations / replay.served == pytest.approx(2 / 4, rel=0.03)


def test_a_state_keeps_its_condition() -> None:
    """The conditions number the walks: each state is served with number, clean data and label of its own."""
    data = Numbered()
    student, exact = Shifted(), Shifted()
    teacher = Teacher(exact, uniform_grid(16), 2)
    for mixing, world in (("batch", 1), ("sample", 1), ("batch", 2)):
        whose = DDIL((1.0, 1.0), (0.5, 0.5), mixing)
        parts = [whose.states(student, teacher, data, (1,), 100, 16, Source(0, Shard(i, world))) for i in range(world)]
        for step in range(100):
            for part in parts:
                states = part.sample(16, step)
                torch.testing.assert_close(states.x[:, 0], states.cond)
                torch.testing.assert_close(teacher.advance(states.z, states.t, states.cond), states.teacher_z)


class Shifted(Gaussian):
    """The estimate depends on the condition, a number."""

    def __init__(self) -> None:
        super().__init__(0.0, 0.5)

    def predict(self, z, t, cond=None):
        return super().predict(z, t) + cond[:, None]


class Numbered(TensorData):
    """Sample i is i / 1000, and so is its condition; each is coupled with a noise of its own."""

    def __init__(self) -> None:
        super().__init__(torch.arange(1000)[:, None] / 1000, torch.arange(1000) / 1000)

    def noise(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.cos(rows * 12.9898)[:, None]).float()


@pytest.mark.parametrize("visit", ["all", "one"])
def test_walks_that_are_not_remembered_count_too(visit: str) -> None:
    """A roll-out that is used by itself logs what it served."""
    exact = Gaussian(0.0, 0.5)
    walks = Rollout(exact, Teacher(exact, uniform_grid(8), 2), (1,), beta=0.3, mixing="sample", visit=visit)
    mine = np.concatenate([drivers(walks.sample(16, step)) for step in range(200)])
    assert walks.log()["driven by student served"] == mine.mean()
    assert mine.mean() == pytest.approx(0.3, abs=0.05)
    assert walks.complaints() == []
