"""What a plan asks of a text-to-image student, computed a second time from diffusers' own parts: the U-Net and the text
encoder of the folder, the scheduler's alphas, and the papers' formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ddil.datasets.scenes import tiny_pipeline
from ddil.diffusion.denoiser import Denoiser
from ddil.diffusion.wrappers import innermost
from ddil.distil.plan import Plan
from ddil.distil.problem import ModelOptions, Problem, digits_problem, problem_of_model
from ddil.distil.stages import Ready, stage_of
from ddil.models.pipeline import TextToImage
from ddil.rollins.data import TensorData
from ddil.rollins.states import Origin, States

PROMPTS = ["a red square above a blue circle", "three green triangles", "a small white circle", "two pink squares"]
SCALE = 3.0


class ByHand:
    """Diffusers' parts of a folder, and what the papers do with them."""

    def __init__(self, folder: Path):
        self.parts = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
        self.alphas_cumprod, self.unet = self.parts.scheduler.alphas_cumprod.double(), self.parts.unet
        self.predicts_v = self.parts.scheduler.config.prediction_type == "v_prediction"

    def embeddings(self, prompts: Sequence[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": self.parts.tokenizer.model_max_length}
        ids = self.parts.tokenizer(list(prompts), truncation=True, return_tensors="pt", **options).input_ids
        return self.parts.text_encoder(ids)[0]

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """At t = (index + 1) / 1000; 1 and 0 at the end."""
        product = self.alphas_cumprod[round(t * 1000) - 1].item() if t > 0 else 1.0
        return product**0.5, (1 - product) ** 0.5

    @torch.no_grad()
    def eps(self, z: Tensor, t: float, prompts: Sequence[str], unet: nn.Module | None = None) -> Tensor:
        """The noise that the network sees at the timestep 1000 t - 1."""
        output = (unet or self.unet)(z, round(t * 1000) - 1, encoder_hidden_states=self.embeddings(prompts)).sample
        alpha, sigma = self.alpha_sigma(t)
        return sigma * z + alpha * output if self.predicts_v else output

    def guided(self, z: Tensor, t: float) -> Tensor:
        """In the convention of Stable Diffusion's pipelines: a scale of 1 is no guidance."""
        conditional, unconditional = self.eps(z, t, PROMPTS), self.eps(z, t, [""] * len(PROMPTS))
        return unconditional + SCALE * (conditional - unconditional)

    def x(self, z: Tensor, t: float, eps: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        return (z - sigma * eps) / alpha

    def ddim(self, z: Tensor, t: float, s: float, eps: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(s)
        return alpha * self.x(z, t, eps) + sigma * eps

    def progressive(self, z: Tensor, times: Sequence[float], teacher, student: Tensor) -> float:
        """max(1, SNR) times the squared error of x, where x is what brings the student, in one DDIM step, to where
        the teacher's two arrive (Salimans & Ho 2022)."""
        t, middle, s = times
        z_middle = self.ddim(z, t, middle, teacher(z, t))
        z_s = self.ddim(z_middle, middle, s, teacher(z_middle, middle))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t), self.alpha_sigma(s)
        target = (z_s - sigma_s / sigma_t * z) / (alpha_s - sigma_s / sigma_t * alpha_t)
        weight = max(1.0, alpha_t**2 / sigma_t**2)
        return weight * (self.x(z, t, student) - target).square().mean().item()


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion of each prediction."""
    return tiny_pipeline(tmp_path_factory.mktemp(request.param) / "model", prediction=request.param)


@pytest.fixture(scope="module")
def hand(folder: Path) -> ByHand:
    return ByHand(folder)


@pytest.fixture(scope="module")
def problem(folder: Path) -> Problem:
    """The same model as the library reads it, guided."""
    model = TextToImage.load(folder)
    data = TensorData(torch.randn(4, 4, 8, 8), model.conditions(PROMPTS, 32).clone())
    options = ModelOptions(model=str(folder), data="given", size=32, guidance_scale=SCALE, check_weights=False)
    return problem_of_model(model, data, options)


def ready(problem: Problem, method: str, index: int = 0, before: Denoiser | None = None, **changes: object) -> Ready:
    values = {"method": method, "stages": (8, 4, 2), "updates": 4, "batch": 4, "capacity": 32, "reflection": "off"}
    return stage_of(problem, Plan(problem="digits", **{**values, **changes}), index, before)


def states_at(stage: Ready, place: int) -> States:
    """Four noisy states at a node of the teacher's grid, one for each prompt."""
    z = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(place))
    cond = stage.stage.data.conditions(np.arange(4))
    return stage.stage.teacher.states_at(place, z, cond, np.full(4, Origin.STUDENT))


def loss(stage: Ready, states: States) -> float:
    """The student's loss, before it has learnt anything."""
    networks = {**stage.networks, **stage.followers()}
    return stage.method.turns(0)[0].loss(networks, states)[0].item()


@pytest.mark.parametrize("place", [0, 4, 6])
def test_progressive_distillation(problem: Problem, hand: ByHand, place: int) -> None:
    """Two guided steps of the teacher, the weight of the paper, which is above 1 at t = .25."""
    stage = ready(problem, "progressive")
    states = states_at(stage, place)
    times = stage.stage.teacher.stops[place : place + 3]
    eps = hand.eps(states.z, times[0], PROMPTS)
    expected = hand.progressive(states.z, times, hand.guided, eps)
    assert loss(stage, states) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("place", [0, 2])
def test_the_second_stage_asks_the_student_of_the_first(problem: Problem, hand: ByHand, place: int) -> None:
    """Its teacher and its beginning are that student, not guided again."""
    first = copy.deepcopy(problem.student)
    with torch.no_grad():
        for parameter in innermost(first).network.parameters():
            parameter.mul_(1.1)
    stage = ready(problem, "progressive", 1, first)
    states = states_at(stage, place)
    times = stage.stage.teacher.stops[place : place + 3]
    teacher = lambda z, t: hand.eps(z, t, PROMPTS, innermost(first).network)
    expected = hand.progressive(states.z, times, teacher, teacher(states.z, times[0]))
    assert loss(stage, states) == pytest.approx(expected, rel=1e-3)
    assert len(stage.stage.teacher.stops) == 5


@pytest.mark.parametrize("place", [0, 3, 7])
def test_latent_consistency(problem: Problem, hand: ByHand, place: int) -> None:
    """The estimate at t against that where one guided step of the teacher leads, by LCM's Huber distance."""
    stage = ready(problem, "lcm", stages=(8, 2))
    states = states_at(stage, place)
    t, u = stage.stage.teacher.stops[place : place + 2]
    z_u = hand.ddim(states.z, t, u, hand.guided(states.z, t))
    target = hand.x(z_u, u, hand.eps(z_u, u, PROMPTS)) if u > 0 else z_u
    difference = hand.x(states.z, t, hand.eps(states.z, t, PROMPTS)) - target
    expected = ((difference.square() + 1e-6).sqrt() - 1e-3).mean().item()
    assert loss(stage, states) == pytest.approx(expected, rel=1e-3)


def test_teacher_and_unguided_teacher(problem: Problem, hand: ByHand) -> None:
    """The one is guided, the other is not; both at the timestep of their state."""
    stage, z = ready(problem, "progressive"), torch.randn(4, 4, 8, 8)
    cond = problem.data.conditions(np.arange(4))
    for t in (1.0, 0.5, 0.125):
        teacher, unguided = (one(z, t, cond) for one in (stage.stage.teacher.denoiser, stage.stage.unguided))
        alpha, sigma = hand.alpha_sigma(t)
        for mine, other in ((teacher, hand.guided(z, t)), (unguided, hand.eps(z, t, PROMPTS))):
            torch.testing.assert_close((z - alpha * mine) / sigma, other, rtol=1e-3, atol=1e-3)
    assert (teacher - unguided).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_digits_are_guided_in_the_same_convention(scale: float) -> None:
    """x_null + scale (x_cond - x_null), where the null label is the one after the classes."""
    problem, labels = digits_problem(scale), torch.tensor([0, 9, 4])
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ask = lambda cond: problem.student(z, 0.6, cond)
    with torch.no_grad():
        null, conditional = ask(torch.full((3,), 10)), ask(labels)
        expected = null + scale * (conditional - null)
        torch.testing.assert_close(problem.teacher(z, 0.6, labels), expected, rtol=1e-4, atol=1e-5)
