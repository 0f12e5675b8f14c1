"""The student against a judge: bad input is refused by name, a critic that diverges is told from a student that
does, runs resume to the last bit, and parts add up to the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil.rollins.data import TensorData
from ddil.diffusion.denoiser import coefficients, Denoiser, cast
from ddil.diffusion.wrappers import Guided
from ddil.models.unet import ClassDenoiser
from ddil.diffusion.exact import Gaussian, GaussianMixture
from ddil.methods import add
from ddil.methods.add import AdversarialDistillation
from ddil.methods.adversary import DINOv2, Heads, LayerFeatures, heads_for
from ddil.methods.base import Method
from ddil.methods.fakes import Critic, RealSamples
from ddil.methods.matching import DistributionMatching
from ddil.diffusion.small_networks import MLP
from ddil.rollins.forward import Forward
from ddil.rollins.mixture import Mixture as MixedStates
from ddil.rollins.rollout import Rollout
from ddil.diffusion.grids import uniform_grid
from ddil.diffusion.schedule import Schedule
from ddil.solvers import consistency
from ddil.rollins.states import RollIn
from ddil.rollins.teacher import Teacher
from ddil.training.settings import Settings
from ddil.training.journal import DivergingCritic, NonFiniteLoss
from ddil.training.trainer import Trainer

GRID = uniform_grid(4)
SETTINGS: dict[str, Any] = {
    "updates": 12,
    "batch": 16,
    "learning_rate": 3e-3,
    "ema": 0.9,
    "checkpoint_every": 4,
    "log_every": 1,
    "seed": 1,
}


def exact() -> GaussianMixture:
    """Four labelled points, smeared."""
    means = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    return GaussianMixture(means, 0.2, classes=torch.arange(4))


def points() -> TensorData:
    """Samples of `exact`, labelled by their nearest mean."""
    x = exact().draw(200, torch.Generator().manual_seed(1)).float()
    return TensorData(x, torch.cdist(x.double(), exact().means).argmin(1))


def network() -> Denoiser:
    """A small perceptron with labels, always the same."""
    torch.manual_seed(0)
    return ClassDenoiser(MLP(2, 16, 1, num_class_embeds=5), exact().schedule, "v")


def sight() -> LayerFeatures:
    """Something to look through, always the same."""
    torch.manual_seed(2)
    return LayerFeatures(nn.Sequential(nn.Identity(), nn.Linear(2, 16), nn.SiLU()), ["0", "2"], "points")


def heads() -> Heads:
    """The judge, told the label."""
    torch.manual_seed(3)
    return heads_for(sight(), torch.zeros(1, 2), 8, condition=5)


def adversarial(teacher: Denoiser | None = None, discriminator: nn.Module | None = None, **options: Any) -> Method:
    """ADD on the points, guided, with data of its own for the judge."""
    options = {"data": RealSamples(points()), **options}
    return AdversarialDistillation(
        teacher or Guided(exact(), 2.0), options.pop("features", sight()), discriminator or heads(), **options
    )


def rollins(student: Denoiser) -> dict[str, RollIn]:
    """Forward states, as published; the student's own walk, which knows no data; and both by turns."""
    forward = Forward(points(), student.schedule, GRID)
    walked = Rollout(student, Teacher(exact(), GRID, 1), (2,), points(), beta=1.0, label=False, solver=consistency)
    return {
        "forward": forward,
        "walk": walked,
        "mixture": MixedStates({"forward": (forward, 0.5), "walk": (walked, 0.5)}, "sample"),
    }


def trainer(
    rollin: str = "forward",
    method: Method | None = None,
    folder: Path | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    **settings: Any,
) -> Trainer:
    student = network().train().requires_grad_(True)
    return Trainer(
        student,
        method or adversarial(),
        rollins(student)[rollin],
        Settings(**{**SETTINGS, **settings}),
        folder,
        progress=progress,
    )


def learnt(run: Trainer) -> dict[str, Tensor]:
    """All that training moves: the networks, their optimisers' moments, and the average."""
    weights = {
        f"{name}.{key}": value.clone()
        for name, module in run.learners.networks.items()
        for key, value in module.state_dict().items()
    }
    moments = {
        f"{name} {i} {key}": value.clone()
        for name, one in run.learners.optimizers.items()
        for i, p in enumerate(one.param_groups[0]["params"])
        for key, value in one.state[p].items()
    }
    return {
        **weights,
        **moments,
        **{f"average {name}": value.clone() for name, value in run.learners.average.tensors.items()},
    }


# Resuming, and parts


@pytest.mark.parametrize("rollin", ["forward", "walk", "mixture"])
def test_it_resumes_to_the_last_bit(rollin: str, tmp_path: Path) -> None:
    """Student, judge and both optimisers of a run that was stopped between checkpoints end as those of one that was
    not.
    """

    def stopping(steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            if step == 7:
                raise KeyboardInterrupt
            yield step

    begin = learnt(trainer(rollin))
    end = learnt(trainer(rollin, folder=tmp_path / "whole").fit())
    with suppress(KeyboardInterrupt):
        trainer(rollin, folder=tmp_path / "halves", progress=stopping).fit()
    again = trainer(rollin, folder=tmp_path / "halves")
    assert again.step == 4
    resumed = learnt(again.fit())
    assert resumed.keys() == end.keys() and any("discriminator 0 exp_avg" in key for key in end)
    assert all(torch.equal(resumed[key], end[key]) for key in end)
    assert all(
        any(not torch.equal(end[key], begin[key]) for key in begin if key.startswith(name))
        for name in ("student", "discriminator", "average")
    )


def test_a_checkpoint_of_another_judge_is_refused(tmp_path: Path) -> None:
    """Through what the judge looks, and how strongly it is held back, decide a run."""
    trainer(folder=tmp_path, updates=4).fit()
    with pytest.raises(ValueError, match="gamma 1e-05 there, 0.1 here"):
        trainer(method=adversarial(gamma=0.1), folder=tmp_path, updates=4)
    other = LayerFeatures(sight().network, ["0", "2"], "others")
    with pytest.raises(ValueError, match="features"):
        trainer(method=adversarial(features=other), folder=tmp_path, updates=4)


@pytest.mark.parametrize("rollin", ["forward", "walk"])
def test_parts_add_up_to_the_batch(rollin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch in four parts moves student and judge as it does at once, and logs the same, where the noise of a
    sample is its own: each part is judged with its own samples and data.
    """

    def own_noise(x: Tensor, schedule: Schedule, low: float = 0.001, high: float = 1.0) -> tuple[Tensor, Tensor]:
        noise, t = (50 * x.flip(1)).sin(), torch.full((len(x),), 0.4, dtype=torch.float64)
        alpha, sigma = coefficients(schedule, t, x)
        return x * cast(alpha, x.dtype) + noise * cast(sigma, x.dtype), t

    monkeypatch.setattr(add, "noised_at_random", own_noise)
    whole, parts = (trainer(rollin, updates=1, accumulate=accumulate).fit() for accumulate in (1, 4))
    one, other = (
        {key: value for key, value in learnt(run).items() if key.endswith(" exp_avg")} for run in (whole, parts)
    )  # a tenth of the gradient
    assert one.keys() == other.keys() and all(torch.allclose(one[key], other[key], rtol=1e-3, atol=1e-6) for key in one)
    assert all(
        max(one[key].abs().max() for key in one if key.startswith(name)) > 1e-3 for name in ("student", "discriminator")
    )
    for name in (
        "loss",
        "gradient of adversary",
        "gradient of distillation",
        "contrast",
        "discriminator loss",
        "discriminator R1",
    ):
        assert parts.history[-1][name] == pytest.approx(whole.history[-1][name], rel=1e-3), name


def test_evaluations_are_those_that_are_needed() -> None:
    """One of the student for a sample, shared by both turns; two of a guided teacher, and one more for its negative
    condition.
    """
    run = trainer(updates=3).fit()
    assert run.evaluations == {"student": 48, "teacher": 96}
    assert trainer(method=adversarial(weighting="nfsd"), updates=3).fit().evaluations == {"student": 48, "teacher": 144}
    assert trainer(method=adversarial(distillation=0.0), updates=3).fit().evaluations == {"student": 48, "teacher": 0}


# Bad input

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "weighting": (lambda: adversarial(weighting="linear"), "weighting must be one of exponential, sds, nfsd"),
    "times": (lambda: adversarial(times=(0.0, 1.0)), "times rise within"),
    "loss": (lambda: adversarial(adversarial="wgan"), "unknown adversarial loss 'wgan'; known are softplus, hinge"),
    "no features": (lambda: adversarial(features=None), "features must be a network to look through, such as DINOv2"),
    "missing weights": (
        lambda: DINOv2("nowhere/dinov2"),
        "feature weights are missing: there is no folder nowhere/dinov2",
    ),
    "negative weight": (lambda: adversarial(gamma=-1.0), "a weight of at least 0"),
    "rate": (lambda: adversarial(rate=0.0), "rate positive"),
    "guidance without a null condition": (
        lambda: adversarial(Guided(Gaussian(), 3.0)),
        "guided at 3, but Gaussian knows no null condition",
    ),
    "nfsd without a null condition": (
        lambda: adversarial(Gaussian(), weighting="nfsd"),
        "give `negative`, or choose 'sds'",
    ),
    "empty stream": (lambda: RealSamples(TensorData(torch.zeros(0, 2))), "the data set is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_when_it_is_made(name: str) -> None:
    make, told = BAD[name]
    with pytest.raises((ValueError, FileNotFoundError), match=told.replace("(", r"\(")):
        make()


def test_a_judge_without_data_is_refused_before_the_student_is_asked() -> None:
    run = trainer("walk", adversarial(data=None))
    states, before = run.rollin.sample(16, 0), run.student.evaluations
    with pytest.raises(ValueError, match=r"give the method data=RealSamples\(data\)"):
        run.method.turns(0)[0].loss(run.learners.prepared, states)
    assert run.student.evaluations == before


def test_a_condition_that_the_states_lack() -> None:
    """A judge who is to be told the label says so when there is none."""
    student = ClassDenoiser(MLP(2, 16, 1), exact().schedule, "v")
    unlabelled = TensorData(points().x)
    with pytest.raises(ValueError, match="this judge is told a condition of width 5, and the states have none"):
        Trainer(
            student,
            adversarial(GaussianMixture(exact().means, 0.2)),
            Forward(unlabelled, student.schedule, GRID),
            Settings(updates=1, batch=8),
        ).fit()


class Exploding(Heads):
    """Heads whose logits grow tenfold each time the judge learns, as those of one without bounds would."""

    def __init__(self) -> None:
        super().__init__([2, 16], 8)
        self.asked = 0

    def forward(self, *arguments: Any) -> Tensor:
        self.asked += 1
        return super().forward(*arguments) * 10.0 ** max(0, self.asked // 2 - 5)


def with_rate(method: Method, name: str, rate: float) -> Method:
    method.rates = {name: rate}
    return method


DIVERGING: dict[str, tuple[Callable[[], Method], str]] = {
    "grows": (
        lambda: adversarial(discriminator=Exploding()),
        r"the discriminator \(a Exploding\) diverged: discriminator loss has risen to .* by update \d+ of 40",
    ),
    "too fast a judge": (
        lambda: adversarial(rate=1e38),
        r"the discriminator \(a Heads\) diverged: .*Lower its learning rate",
    ),
    "too fast a fake score": (
        lambda: with_rate(DistributionMatching(exact(), Critic(copy.deepcopy(network()))), "fake", 1e30),
        r"the fake \(a ClassDenoiser\) diverged: .*Lower its learning rate",
    ),
}


@pytest.mark.parametrize("name", DIVERGING)
def test_a_critic_that_diverges_is_named(name: str) -> None:
    """With what to do; its loss may be finite, or what it says to the student may be the first that is not."""
    make, told = DIVERGING[name]
    with pytest.raises(DivergingCritic, match=told):
        trainer(method=make(), updates=40).fit()


def test_a_student_that_diverges_is_not_taken_for_its_critic() -> None:
    with pytest.raises(NonFiniteLoss, match="training diverged: loss is nan") as caught:
        trainer(method=with_rate(adversarial(), "discriminator", 1e-30), learning_rate=1e30, updates=40).fit()
    assert not isinstance(caught.value, DivergingCritic)
