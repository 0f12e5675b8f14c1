"""Each method's gradient on a case that can be derived by hand: a student of two parameters, x̂ = p·z + q.

A loss of 0 at the exact student sees neither a weight nor a stopped gradient. Here the student is wrong, its output is
linear in its parameters, and what its gradient must be is written out from the equations of the paper: the derivative
of the loss by the student's answer, times z for p and 1 for q. Nothing of the methods is used for that.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddil.diffusion.denoiser import Denoiser
from ddil.diffusion.exact import Gaussian
from ddil.diffusion.grids import uniform_grid
from ddil.diffusion.schedule import Cosine, RectifiedFlow
from ddil.methods.add import AdversarialDistillation
from ddil.methods.base import Denoising
from ddil.methods.consistency import Anywhere, BiDirectional, Consistency, ConsistencyTraining, Edges
from ddil.methods.ctm import CTM, AdversarialCTM
from ddil.methods.fakes import Critic, Delta, Known, Samples
from ddil.methods.matching import DistributionMatching
from ddil.methods.progressive import Progressive
from ddil.methods.regression import GuidanceDistillation, Regression
from ddil.rollins.states import Origin, States
from ddil.rollins.teacher import Teacher

GRID, N = uniform_grid(8), 6
COSINE = Cosine()


class Line(Denoiser):
    """The student: x̂ = p z + q, whatever the time."""

    def __init__(self, p: float = 0.7, q: float = 0.2, inputs: tuple[str, ...] = (), schedule=COSINE):
        super().__init__(schedule)
        self.p, self.q = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (p, q))
        self.inputs = inputs
        self.prediction = "x"

    def predict(self, z: Tensor, t: Tensor, cond: object) -> Tensor:
        return self.p * z + self.q


def coefficients(t: Tensor, schedule=COSINE) -> tuple[Tensor, Tensor]:
    """alpha and sigma, (n, 1) each; at the clean end there is no noise."""
    alpha, sigma, clean = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None], (t == 0)[:, None]
    return torch.where(clean, 1.0, alpha), torch.where(clean, 0.0, sigma)


def step(x_hat: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DDIM's step, written out."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = coefficients(t), coefficients(s)
    return alpha_s * x_hat + sigma_s * (z - alpha_t * x_hat) / sigma_t


def reach(t: Tensor, s: Tensor) -> Tensor:
    """(n, 1): the derivative of that step by the estimate."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = coefficients(t), coefficients(s)
    return alpha_s - sigma_s * alpha_t / sigma_t


def states(t: list[float], ahead: int = 1, seed: int = 0, schedule=COSINE) -> States:
    """Noised data of the Gaussian at the times t, and the times `ahead` nodes further on."""
    rng = torch.Generator().manual_seed(seed)
    times = torch.tensor(t, dtype=torch.float64)
    x = 0.3 + 0.5 * torch.randn(len(t), 2, dtype=torch.float64, generator=rng)
    alpha, sigma = coefficients(times, schedule)
    z = alpha * x + sigma * torch.randn(len(t), 2, dtype=torch.float64, generator=rng)
    return States(z, times, (times - ahead / 8).clamp(min=0), None, np.full(len(t), Origin.DATA), x=x)


def gaussian() -> Gaussian:
    return Gaussian(0.3, 0.5)


def walked(denoiser: Denoiser, z: Tensor, t: Tensor, steps: int) -> Tensor:
    """The teacher's steps, written out."""
    for _ in range(steps):
        s = (t - 1 / 8).clamp(min=0)
        z, t = step(denoiser(z, t), z, t, s), s
    return z


def gradient(loss: Tensor, student: Line) -> Tensor:
    """(2,): by p and q."""
    return torch.stack(torch.autograd.grad(loss, [student.p, student.q], retain_graph=True))


def by_hand(slope: Tensor, z: Tensor) -> Tensor:
    """(2,): the chain rule's end, from the derivative of the loss by the student's answers (n, d) at z."""
    return torch.stack([(slope * z).sum(), slope.sum()])


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


INNER = [0.875, 0.75, 0.625, 0.5, 0.375, 0.25]


# What the teacher says


@pytest.mark.parametrize("weighting", ["constant", "snr", "truncated_snr", "snr_plus_one"])
def test_progressive(weighting: str) -> None:
    """Two steps of the teacher, the estimate that would go there in one, and the weight, once."""
    student, at = Line(), states([0.75, 0.5, 0.25, 0.75, 0.5, 0.25], 2)
    loss, _ = Progressive(Teacher(gaussian(), GRID, 2), weighting).loss(student, at)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = coefficients(at.t), coefficients(at.s)
    there, ratio = walked(gaussian(), at.z, at.t, 2), sigma_s / sigma_t
    target = (there - ratio * at.z) / (alpha_s - ratio * alpha_t)
    snr = (alpha_t / sigma_t) ** 2
    weight = {
        "constant": torch.ones_like(snr),
        "snr": snr,
        "truncated_snr": snr.clamp(min=1),
        "snr_plus_one": snr + 1,
    }[weighting]
    error = 0.7 * at.z + 0.2 - target
    same(loss, (weight * error.square()).mean())
    same(gradient(loss, student), by_hand(2 * weight * error / error.numel(), at.z))


def test_guidance() -> None:
    """The guided estimate at the state itself; by default the weight is the truncated SNR."""
    student, at = Line(), states(INNER)
    loss, _ = GuidanceDistillation(gaussian()).loss(student, at)
    alpha, sigma = coefficients(at.t)
    error = 0.7 * at.z + 0.2 - gaussian()(at.z, at.t)
    same(gradient(loss, student), by_hand(2 * ((alpha / sigma) ** 2).clamp(min=1) * error / error.numel(), at.z))


def test_naive() -> None:
    """The whole walk of the teacher, and squares at its end."""
    student, at = Line(), states([1.0] * N, 8)
    loss, _ = Regression(Teacher(gaussian(), GRID, 8), "l2").loss(student, at)
    error = 0.7 * at.z + 0.2 - walked(gaussian(), at.z, at.t, 8)
    same(gradient(loss, student), by_hand(2 * error / error.numel(), at.z))


def test_reflow() -> None:
    """The velocity z' = noise - x along the straight line: its squared error, which is that of x over t squared."""
    student, at = Line(schedule=RectifiedFlow()), states(INNER, schedule=RectifiedFlow())
    loss, _ = Denoising("flow").loss(student, at)
    t = at.t[:, None]
    noise = (at.z - (1 - t) * at.x) / t
    velocity = (at.z - (0.7 * at.z + 0.2)) / t
    error = velocity - (noise - at.x)
    same(loss, error.square().mean())
    same(gradient(loss, student), by_hand(-2 * error / t / error.numel(), at.z))


# Consistency

FOLLOWS = pytest.mark.parametrize("follows", [False, True], ids=["itself", "an average"])


def goal_of(follows: bool, later: Tensor, s: Tensor, end: Tensor) -> Tensor:
    """Where the target's jump arrives: the student's own, or that of p = .5, q = -.1; a state at its end stays."""
    estimate = 0.5 * later - 0.1 if follows else 0.7 * later + 0.2
    safe = torch.where(s == end, torch.ones_like(s), s)
    return torch.where((s == end)[:, None], later, step(estimate, later, safe, end)).detach()


def asked(method: Consistency, at: States, follows: bool) -> tuple[Line, Tensor]:
    student, target = Line(), Line(0.5, -0.1).requires_grad_(False)
    loss, _ = method.loss(student, at, **({"target": target} if follows else {}))
    return student, loss


@FOLLOWS
def test_consistency(follows: bool) -> None:
    """The gradient passes through the student's jump alone, and the other jump begins one step of the teacher on."""
    at = states([*INNER[1:], 0.125])
    teacher, decay = Teacher(gaussian(), GRID, 4, look=1), 0.9 if follows else None
    student, loss = asked(Consistency(teacher, Edges([1.0, 0.0]), decay, "l2"), at, follows)
    goal = goal_of(follows, walked(gaussian(), at.z, at.t, 1), at.s, torch.zeros(N).double())
    error = 0.7 * at.z + 0.2 - goal
    same(loss, error.square().mean())
    same(gradient(loss, student), by_hand(2 * error / error.numel(), at.z))


@FOLLOWS
def test_segments(follows: bool) -> None:
    """A jump ends at the next edge below, where the teacher may have arrived already."""
    at = states([0.875, 0.75, 0.625, 0.5, 0.375, 0.25])
    teacher, decay = Teacher(gaussian(), GRID, 2, look=1), 0.9 if follows else None
    student, loss = asked(Consistency(teacher, Edges(uniform_grid(4)), decay, "l2"), at, follows)
    end = torch.tensor([0.75, 0.5, 0.5, 0.25, 0.25, 0.0]).double()
    goal = goal_of(follows, walked(gaussian(), at.z, at.t, 1), at.s, end)
    error = step(0.7 * at.z + 0.2, at.z, at.t, end) - goal
    same(gradient(loss, student), by_hand(2 * reach(at.t, end) * error / error.numel(), at.z))


@FOLLOWS
def test_trajectory_consistency(follows: bool) -> None:
    """The end is drawn at or below where the teacher arrives, and is the same for both jumps."""
    at, teacher = states(INNER), Teacher(gaussian(), GRID, 4, look=1)
    method = Consistency(teacher, Anywhere(GRID), 0.9 if follows else None, "l2")
    torch.manual_seed(0)
    student, loss = asked(method, at, follows)
    torch.manual_seed(0)
    end = Anywhere(GRID)(at.t, at.s)
    assert bool((end <= at.s).all())
    assert len(end.unique()) > 2
    goal = goal_of(follows, walked(gaussian(), at.z, at.t, 1), at.s, end)
    error = step(0.7 * at.z + 0.2, at.z, at.t, end) - goal
    same(gradient(loss, student), by_hand(2 * reach(at.t, end) * error / error.numel(), at.z))


@FOLLOWS
def test_consistency_training(follows: bool) -> None:
    """The other jump begins on the line from the data to the same noise."""
    at = states(INNER)
    method = ConsistencyTraining(COSINE, Edges([1.0, 0.0]), 0.9 if follows else None, "l2")
    student, loss = asked(method, at, follows)
    alpha, sigma = coefficients(at.t)
    later = coefficients(at.s)[0] * at.x + coefficients(at.s)[1] * (at.z - alpha * at.x) / sigma
    error = 0.7 * at.z + 0.2 - goal_of(follows, later, at.s, torch.zeros(N).double())
    same(gradient(loss, student), by_hand(2 * error / error.numel(), at.z))


def test_huber_of_latent_consistency() -> None:
    """Elementwise, with c = .001: the slope is d / sqrt(d² + c²)."""
    at, teacher = states(INNER), Teacher(gaussian(), GRID, 4, look=1)
    student, loss = asked(Consistency(teacher, Edges([1.0, 0.0]), 0.9), at, True)
    error = 0.7 * at.z + 0.2 - goal_of(True, walked(gaussian(), at.z, at.t, 1), at.s, torch.zeros(N).double())
    same(loss, ((error**2 + 0.001**2).sqrt() - 0.001).mean())
    same(gradient(loss, student), by_hand(error / (error**2 + 0.001**2).sqrt() / error.numel(), at.z))


# There and back


@pytest.mark.parametrize("apart", [False, True], ids=["one teacher", "an unguided one"])
@pytest.mark.parametrize("turn", [0, 1], ids=["student", "encoder"])
def test_there_and_back(turn: int, apart: bool) -> None:
    """A segment and 1.5 times a cycle. Of the cycle only the jump back to where one arrived has a gradient."""
    grid = torch.cat([GRID[:-1], torch.tensor([0.02], dtype=torch.float64)])
    at = states([0.875, 0.75, 0.625, 0.5, 0.375, 0.25])
    edges, other = grid[::2], Gaussian(0.1, 0.7)
    networks = {"student": Line(0.7, 0.2), "encoder": Line(0.5, -0.1)}
    teacher, away = Teacher(gaussian(), grid, 2, look=1), Teacher(other, grid, 2, look=1) if apart else None
    at = replace(at, s=at.t - 1 / 8)
    method = BiDirectional(teacher, edges, networks["encoder"], 1.5, "l2", away)
    loss, _ = method.turns(0)[turn].loss(networks, at)
    low = torch.tensor([0.75, 0.5, 0.5, 0.25, 0.25, 0.02], dtype=torch.float64)
    high = torch.tensor([1.0, 0.75, 0.75, 0.5, 0.5, 0.25], dtype=torch.float64)
    asked_of = other if apart and turn else gaussian()
    later = step(asked_of(at.z, at.t), at.z, at.t, at.s)
    (start, t), (ahead, s) = ((at.z, at.t), (later, at.s))[:: -1 if turn else 1]
    end, back = (high, low) if turn else (low, high)
    own, others = [lambda z: 0.7 * z + 0.2, lambda z: 0.5 * z - 0.1][:: -1 if turn else 1]

    def jumped(estimate, z: Tensor, t: Tensor, end: Tensor) -> Tensor:
        safe = torch.where(t == end, 0.5 * end, end)
        return torch.where((t == end)[:, None], z, step(estimate(z), z, t, safe))

    moves = lambda t: (t != end)[:, None]
    there = jumped(own, start, t, end)
    away_z = jumped(others, there, end, back)
    safe = torch.where(t == end, 0.5 * end, end)
    first = there - jumped(own, ahead, s, end)
    second = jumped(own, away_z, back, end) - there
    expected = by_hand(2 * moves(t) * reach(t, safe) * first / first.numel(), start)
    expected = expected + 1.5 * by_hand(2 * reach(back, end) * second / second.numel(), away_z)
    same(loss, first.square().mean() + 1.5 * second.square().mean())
    same(gradient(loss, list(networks.values())[turn]), expected)


# Consistency trajectory models


def ctm_case(**settings) -> tuple[CTM, Line, Line, States]:
    teacher = Teacher(gaussian(), GRID, 4, look=1)
    return CTM(teacher, 0.9, "l2", 1, **settings), Line(inputs=("end",)), Line(0.5, -0.1, ("end",)), states(INNER)


def test_soft_consistency_of_ctm() -> None:
    """Both arrivals go on to the clean end by the target; the gradient passes through the target's input."""
    method, student, target, at = ctm_case(denoising=0.0)
    torch.manual_seed(0)
    loss, _ = method.loss(student, at, target.requires_grad_(False))
    torch.manual_seed(0)
    torch.rand(N)  # how many looks
    end = Anywhere(GRID)(at.t, at.s)
    clean = (end == 0)[:, None]
    carried = lambda z: torch.where(clean, z, 0.5 * z - 0.1)
    goal = carried(goal_of(False, walked(gaussian(), at.z, at.t, 1), at.s, end))
    error = carried(step(0.7 * at.z + 0.2, at.z, at.t, end)) - goal
    slope = 2 * torch.where(clean, 1.0, 0.5) * reach(at.t, end) * error / error.numel()
    same(loss, error.square().mean())
    same(gradient(loss, student), by_hand(slope, at.z))


def test_denoising_of_ctm() -> None:
    """The error of the estimate at the state's own time, weighed by SNR + 1, beside the other term."""
    method, student, target, at = ctm_case(denoising=3.0)
    torch.manual_seed(0)
    loss, logs = method.loss(student, at, target.requires_grad_(False))
    alpha, sigma = coefficients(at.t)
    error = 0.7 * at.z + 0.2 - at.x
    weight = (alpha / sigma) ** 2 + 1
    expected = 3 * by_hand(2 * weight * error / error.numel(), at.z)
    same(gradient(loss, student) - gradient(logs["consistency"], student), expected)


class Slope(nn.Module):
    """A judge: the sum over a sample, times k."""

    def __init__(self, k: float = 0.4):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.k * x.sum(1)


@pytest.mark.parametrize("denoising", [0.0, 3.0])
def test_adversary_of_ctm(denoising: float) -> None:
    """Its own weight times the mean of what the judge says of the jumps to the clean end, whatever denoising has."""
    teacher, at, student, target = Teacher(gaussian(), GRID, 4, look=1), states(INNER), *(
        Line(*values, ("end",)) for values in ((0.7, 0.2), (0.5, -0.1))
    )
    plain = CTM(teacher, 0.9, "l2", 1, denoising)
    method = AdversarialCTM(teacher, 0.9, Slope(), adversary=2.0, distance="l2", longest=1, denoising=denoising)
    networks = {"student": student, "target": target.requires_grad_(False), "discriminator": Slope()}
    losses = []
    for turn in (lambda: method.turns(0)[0].loss(networks, at)[0], lambda: plain.loss(student, at, target)[0]):
        torch.manual_seed(0)
        losses.append(gradient(turn(), student))
    same(losses[0] - losses[1], 2 * by_hand(-0.4 * torch.ones_like(at.z) / N, at.z))


# Distributions


def at_noise(seed: int, x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """What `noised` draws after the seed: times, then noise."""
    torch.manual_seed(seed)
    t = high - (high - low) * torch.rand(len(x), dtype=torch.float64)
    alpha, sigma = coefficients(t)
    return alpha * x + sigma * torch.randn_like(x), t


WEIGHTS = {
    "normalised": lambda alpha, sigma, x, real: 1 / (x - real).abs().mean(1, keepdim=True),
    "score": lambda alpha, sigma, x, real: (alpha / sigma) ** 2,
    "variance": lambda alpha, sigma, x, real: alpha**2,
    "noise": lambda alpha, sigma, x, real: alpha * sigma,
}


def estimate_of(kind: str, x: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
    """The posterior mean under the student's distribution, as each method has it."""
    if kind == "sds":
        return x
    if kind == "dmd":
        return 0.5 * noisy - 0.1
    alpha, sigma = coefficients(t)
    far = (noisy[:, None] - alpha[:, None] * x).square().sum(2) / (2 * sigma**2)
    return (-far).masked_fill(torch.eye(len(x)).bool(), -torch.inf).softmax(1) @ x


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("kind", ["sds", "unbiased", "dmd"])
def test_matching(kind: str, weighting: str) -> None:
    """The student's samples move along the weighted difference of the estimates, and nothing else has a gradient."""
    fakes = {"sds": Delta(), "unbiased": Samples(COSINE), "dmd": Known(Line(0.5, -0.1))}
    method, student, at = DistributionMatching(gaussian(), fakes[kind], weighting=weighting), Line(), states(INNER)
    x = (0.7 * at.z + 0.2).detach()
    noisy, t = at_noise(5, x, 0.02, 0.98)
    torch.manual_seed(5)
    loss, _ = method.turns(0)[0].loss({"student": student}, at)
    real, fake = gaussian()(noisy, t), estimate_of(kind, x, noisy, t)
    weight = WEIGHTS[weighting](*coefficients(t), x, real)
    same(gradient(loss, student), by_hand(weight * (fake - real) / x.numel(), at.z))


def test_score_distillation_is_the_difference_of_the_noises() -> None:
    """Poole et al.: sigma² (noise that the teacher sees - noise that was added), at each sample."""
    method, student, at = DistributionMatching(gaussian(), Delta(), weighting="noise"), Line(), states(INNER)
    x = (0.7 * at.z + 0.2).detach()
    noisy, t = at_noise(5, x, 0.02, 0.98)
    alpha, sigma = coefficients(t)
    seen = (noisy - alpha * gaussian()(noisy, t)) / sigma
    added = (noisy - alpha * x) / sigma
    torch.manual_seed(5)
    loss, _ = method.turns(0)[0].loss({"student": student}, at)
    same(gradient(loss, student), by_hand(sigma**2 * (seen - added) / x.numel(), at.z))


def test_regression_of_dmd() -> None:
    """A quarter of the squared distance from the pair's sample joins, averaged over the states."""
    student, at = Line(), states([1.0] * N, 8).with_labels(torch.full((N, 2), 0.4, dtype=torch.float64))
    gradients = []
    for regression in (0.0, 0.25):
        method = DistributionMatching(gaussian(), Known(Line(0.5, -0.1)), regression=regression)
        torch.manual_seed(5)
        gradients.append(gradient(method.turns(0)[0].loss({"student": student}, at)[0], student))
    error = 0.7 * at.z + 0.2 - 0.4
    same(gradients[1] - gradients[0], 0.25 * by_hand(2 * error / error.numel(), at.z))


@pytest.mark.parametrize("weighting", ["snr", "snr_plus_one"])
def test_critic(weighting: str) -> None:
    """The fake score learns the student's samples, at all times: "snr" is the error of the noise, the other of v."""
    critic, x = Line(0.5, -0.1), states(INNER).x
    noisy, t = at_noise(5, x, 0.001, 1.0)
    torch.manual_seed(5)
    loss, _ = Critic(critic, weighting).loss(critic, x, None)
    alpha, sigma = coefficients(t)
    x_hat, noise = 0.5 * noisy - 0.1, (noisy - alpha * x) / sigma
    of_noise = (noisy - alpha * x_hat) / sigma - noise
    of_velocity = (alpha * (noisy - alpha * x_hat) / sigma - sigma * x_hat) - (alpha * noise - sigma * x)
    error, by_estimate = {
        "snr": (of_noise, -alpha / sigma),
        "snr_plus_one": (of_velocity, -(alpha**2) / sigma - sigma),
    }[weighting]
    same(loss, error.square().mean())
    same(gradient(loss, critic), by_hand(2 * error * by_estimate / error.numel(), noisy))


class Seen:
    """Features: the samples themselves."""

    name = "the samples"

    def features(self, x: Tensor) -> list[Tensor]:
        return [x[:, None]]


class Flat(nn.Module):
    """Heads: the sum of the features, times .4."""

    def forward(self, features: list[Tensor], cond: object = None, image: object = None) -> Tensor:
        return 0.4 * features[0].sum((1, 2))[:, None]


def test_adversarial_diffusion_distillation() -> None:
    """The judge's hinge, and 2.5 times alpha times the squared distance from one step of the teacher, which stands."""
    method, student, at = AdversarialDistillation(gaussian(), Seen(), Flat()), Line(), states(INNER)
    x = (0.7 * at.z + 0.2).detach()
    noisy, t = at_noise(5, x, 0.001, 1.0)
    torch.manual_seed(5)
    loss, _ = method.turns(0)[0].loss({"student": student, "discriminator": method.networks["discriminator"]}, at)
    alpha, _ = coefficients(t)
    error = x - gaussian()(noisy, t)
    slope = -0.4 * torch.ones_like(x) / N + 2.5 * 2 * alpha * error / error.numel()
    same(loss, -(0.4 * x.sum(1)).mean() + 2.5 * (alpha * error.square()).mean())
    same(gradient(loss, student), by_hand(slope, at.z))
