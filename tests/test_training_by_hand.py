"""Training whose every number is known: a student of one weight, a rival of another, and gradients of plus or minus 1,
for which Adam's first steps are as long as the learning rate.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddil.diffusion.denoiser import Cond, Denoiser
from ddil.diffusion.schedule import Cosine, Time
from ddil.methods.base import Method, Turn
from ddil.rollins.states import Origin, RollIn, States
from ddil.training.parallel import Replicated
from ddil.training.settings import Settings, make_optimizer
from ddil.training.trainer import Trainer

RATE = 0.01


class Line(Denoiser):
    """x_hat = weight · z, with dropout that a test may look at."""

    def __init__(self, weight: float = 1.0):
        super().__init__(Cosine())
        self.weight = nn.Parameter(torch.tensor(weight))

    def predict(self, z: Tensor, t: Time, cond: Cond) -> Tensor:
        return self.weight * z


class Rival(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.0))

    def forward(self) -> Tensor:
        return self.weight


class Race(Method):
    """Both weights fall with gradient 1; the student's turn pulls hard at the rival's weight, which is not its own."""

    def __init__(self) -> None:
        self.networks, self.rates, self.followers = {"rival": Rival()}, {"rival": 0.25}, {"target": 0.8}
        self._seen = 0

    def turns(self, step: int) -> list[Turn]:
        def student(networks: dict[str, nn.Module], states: States) -> tuple[Tensor, dict[str, Tensor]]:
            self._seen += 1
            x_hat, behind = networks["student"](states.z, states.t), networks["target"](states.z, states.t)
            return (x_hat - 100 * networks["rival"]()).mean(), {"behind": behind.mean(), "luck": torch.rand(())}

        rival = lambda networks, states: (networks["rival"](), {"luck": torch.rand(())})
        return [Turn("student", student), Turn("rival", rival)]

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor(self._seen)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._seen = int(state["seen"])


class Ones(RollIn):
    """States that are all 1, and remember how often they were asked for, and of which update."""

    def __init__(self) -> None:
        self.asked, self.steps = 0, []

    def sample(self, n: int, step: int, rows: np.ndarray | None = None) -> States:
        self.asked += 1
        self.steps.append(step)
        t = torch.full((n,), 0.5, dtype=torch.float64)
        return States(torch.ones(n, 1), t, t / 2, None, np.full(n, Origin.NOISE))

    def log(self) -> dict[str, float]:
        return {"asked": float(self.asked)}

    def state_dict(self) -> dict[str, Tensor]:
        return {"asked": torch.tensor(self.asked)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.asked = int(state["asked"])


def trainer(folder: Path | None = None, **changes: object) -> Trainer:
    values = {"updates": 6, "batch": 4, "learning_rate": RATE, "log_every": 1, "clip": 1e9, "decay": "constant"}
    return Trainer(Line(), Race(), Ones(), Settings(**{**values, **changes}), folder)


def weights(run: Trainer) -> tuple[float, float]:
    return run.student.weight.item(), run.learners.networks["rival"].weight.item()


def test_each_network_at_its_own_rate_by_its_own_gradient() -> None:
    """The student falls by the rate and the rival by a quarter of it, although the student's turn pulls it up."""
    run = trainer().fit()
    assert weights(run) == (pytest.approx(1 - 6 * RATE), pytest.approx(-6 * RATE / 4))
    assert run.rollin.steps == list(range(6))


def test_the_rate_falls_on_a_line_after_the_warm_up() -> None:
    """Update k of 6 has the rate (1 - k / 6), and in the warm-up of three (k + 1) / 3 of it; the log says which."""
    run = trainer(decay="linear", warm_up=3).fit()
    rates = [RATE * min(1, (k + 1) / 3) * (1 - k / 6) for k in range(6)]
    assert [line["learning rate"] for line in run.history] == pytest.approx(rates)
    assert weights(run)[0] == pytest.approx(1 - sum(rates))


def test_averages_follow_from_where_they_were() -> None:
    """The target moves a fifth of the way from the first update on; the average is younger, and forgets faster."""
    run = trainer(ema=0.9).fit()
    target = average = 1.0
    for k in range(6):
        assert run.history[k]["behind"] == pytest.approx(target)
        weight = 1 - (k + 1) * RATE
        target += 0.2 * (weight - target)
        average += (1 - min(0.9, (1 + k) / (10 + k))) * (weight - average)
    assert run.learners.followers["target"].network.weight.item() == pytest.approx(target)
    assert run.finished().weight.item() == pytest.approx(average)
    assert abs(average - target) > RATE / 10
    assert abs(average - weight) > RATE / 100
    assert trainer().fit().finished().weight.item() == pytest.approx(1 - 6 * RATE)


def test_the_luck_of_every_update_is_its_own() -> None:
    """What torch draws in an update depends on its number, in each turn anew, and on nothing else."""
    history, again = trainer().fit().history, trainer().fit().history
    luck = [line[name] for line in history for name in ("luck", "rival luck")]
    assert len(set(luck)) == 12
    assert [line[name] for line in again for name in ("luck", "rival luck")] == luck
    assert trainer(seed=1).fit().history[0]["luck"] != luck[0]


def test_a_run_that_goes_on_has_forgotten_nothing(tmp_path: Path) -> None:
    """Weights, moments, averages, counts and the log are those of a run that was not interrupted; time adds up."""
    options = {"ema": 0.9, "checkpoint_every": 2, "betas": (0.5, 0.9), "decay": "linear"}
    whole = trainer(tmp_path / "whole", **options).fit()

    class Stop(Exception):
        pass

    def until(updates, last):
        for update in updates:
            if update == last:
                raise Stop
            yield update

    first = trainer(tmp_path / "parts", **options)
    first.progress = lambda updates: until(updates, 5)
    with pytest.raises(Stop):
        first.fit()
    second = trainer(tmp_path / "parts", **options)
    assert second.step == 4
    spent = second.seconds
    assert spent == pytest.approx(first.history[3]["seconds"], rel=0.5)
    assert spent > 0
    second.fit()
    assert second.rollin.steps == [4, 5]
    assert weights(second) == weights(whole)
    assert second.finished().weight == whole.finished().weight
    target = lambda run: run.learners.followers["target"].network.weight
    assert target(second) == target(whole)
    assert second.evaluations == whole.evaluations == {"student": 24, "target": 24}
    assert second.method._seen == 6
    plain = lambda run: [{name: value for name, value in line.items() if name != "seconds"} for line in run.history]
    assert plain(second) == plain(whole)
    assert second.seconds > spent


def test_adam_with_the_settings_it_is_given() -> None:
    """Two steps by hand (Loshchilov & Hutter 2019), with gradients 1 and -3."""
    weight, (first, second) = nn.Parameter(torch.tensor(2.0, dtype=torch.float64)), (0.6, 0.9)
    settings = Settings(learning_rate=0.1, weight_decay=0.2, betas=(first, second))
    optimizer, value, mean, square = make_optimizer(settings, [weight]), 2.0, 0.0, 0.0
    for step, gradient in enumerate((1.0, -3.0), 1):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        mean = first * mean + (1 - first) * gradient
        square = second * square + (1 - second) * gradient**2
        value *= 1 - 0.1 * 0.2
        value -= 0.1 * mean / (1 - first**step) / ((square / (1 - second**step)) ** 0.5 + 1e-8)
        assert weight.item() == pytest.approx(value)


class Recorder:
    """An accelerator whose gradients are scaled by 1024 until they are clipped, and what is done in which order."""

    scaler = None

    def __init__(self, weight: nn.Parameter):
        self.weight = weight

    def clip_grad_norm_(self, parameters: list[nn.Parameter], clip: float) -> Tensor:
        self.weight.grad /= 1024
        return nn.utils.clip_grad_norm_(parameters, clip)


@pytest.mark.parametrize(("gradient", "clip", "step"), [(4.0, 1.0, 1.0), (0.5, 1.0, 0.5)])
def test_gradients_are_clipped_as_they_are_and_before_the_step(gradient: float, clip: float, step: float) -> None:
    """Scaled gradients are brought back before their norm is looked at; what is said is the norm before clipping."""
    weight = nn.Parameter(torch.tensor(1.0))
    weight.grad = torch.tensor(1024 * gradient)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    norm = Replicated(Recorder(weight), clip).take_step(nn.Module(), optimizer, [weight])
    assert norm.item() == pytest.approx(gradient)
    assert weight.item() == pytest.approx(1 - 0.1 * step, rel=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_parts_of_a_batch_add_up(parts: int) -> None:
    """Four states in any number of parts, two of them unequal, give one gradient, and one loss in the log."""
    run = trainer(accumulate=parts, updates=1)
    run.fit()
    assert run.history[0]["loss"] == pytest.approx(1.0)
    assert run.history[0]["gradient norm"] == pytest.approx(1.0)
