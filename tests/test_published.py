"""What the menu says of each published method, against the numbers of its paper, which stand here with their sources.

Where a number is known from official code it is marked [C]; [P] is recalled from the paper. The table is written by
hand and reads nothing from the menu, so that an entry that drifts fails. `small` is what we do by default where the
paper's number makes no sense for a short run; the paper's is then what `as_published` gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from ddil.diffusion.schedule import Cosine, RectifiedFlow
from ddil.diffusion.wrappers import Guided, Wrapper
from ddil.distil.menu import MENU, menu_text, method_by_name
from ddil.distil.plan import Plan, preset, read_plan
from ddil.distil.problem import digits_problem
from ddil.distil.stages import Ready, stage_of
from ddil.methods.consistency import Curriculum
from ddil.rollins.forward import Forward
from ddil.rollins.rollout import Rollout

DATA, PAIRS, OWN_WALK = "noised data", "noised pairs", "its own walk, to one node"


@dataclass
class Paper:
    """What a paper says. states: where the student learns without DDIL; times: at the student's "nodes", at those of
    the "teacher", at "any" time; look: of the teacher, in its steps, for a student of 4 steps of a teacher of 8 (of 1
    for the methods of one step); solver: of the student, with its options; teacher: the solver of the first teacher;
    method: attributes of the method; decay: of the network that gives the target (None: there is none); settings: of
    the optimiser; small: numbers of ours where the paper's would make no sense.
    """

    source: str
    states: str
    times: str
    look: int
    solver: tuple[str, dict]
    method: dict[str, Any]
    teacher: str = "ddim"
    decay: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)


CONSTANT, DDIM, AGAIN = {"decay": "constant"}, ("ddim", {}), ("consistency", {})
NO_DECAY = {"weight_decay": 0.0, "betas": (0.9, 0.999), "clip": 1.0, "warm_up": 0}
MATCHED = {"decay": "constant", "clip": 10.0, "weight_decay": 0.01, "betas": (0.9, 0.999), "warm_up": 500}
LATE = {"low": 0.02, "high": 0.98}

PAPERS = {
    "progressive": Paper(
        "Salimans & Ho 2022, google-research/diffusion_distillation, CIFAR-10 [C]",
        DATA,
        "nodes",
        2,
        DDIM,
        {"weighting": "truncated_snr"},
        settings={
            **NO_DECAY,
            "decay": "linear",
            "ema": None,
            "updates": 50_000,
            "batch": 128,
            "learning_rate": 5e-5,
        },
        small={"ema": 0.99, "updates": 1000, "batch": 64, "learning_rate": 1e-3},
    ),
    "guidance": Paper(
        "Meng et al. 2023, stage one; w in [0, 4] for pixels [P]",
        DATA,
        "any",
        1,
        DDIM,
        {"weighting": "truncated_snr"},
        options={"scales": (1.0, 5.0)},
        small={"scales": None},
    ),
    "naive": Paper(
        "Luhman & Luhman 2021: squares, 1.02 million pairs [P]",
        PAIRS,
        "nodes",
        8,
        DDIM,
        {"distance": "l2"},
        options={"pairs": 1_020_000},
        small={"pairs": 2048},
    ),
    "reflow": Paper(
        "Liu et al. 2022, gnobitab/RectifiedFlow, CIFAR-10 [C]: v-loss, t uniform; a million pairs at least",
        PAIRS,
        "any",
        1,
        DDIM,
        {"weighting": "flow"},
        settings={**CONSTANT, "batch": 128, "learning_rate": 2e-4, "warm_up": 5000, "ema": 0.9999, "clip": 1.0},
        options={"pairs": 1_000_000},
        small={
            "decay": "linear",
            "batch": 64,
            "learning_rate": 1e-3,
            "warm_up": 0,
            "ema": 0.99,
            "pairs": 2048,
        },
    ),
    "instaflow": Paper(
        "Liu et al. 2023: pairs by DPM-Solver, reflow, then one step by squares first [P]",
        PAIRS,
        "any",
        1,
        DDIM,
        {"weighting": "flow"},
        teacher="dpm_solver_pp_2m",
        options={"distance": "l2"},
        small={"teacher_solver": "ddim"},
    ),
    "consistency": Paper(
        "Song et al. 2023, openai/consistency_models, ImageNet 64 [C]: Heun, weight 1, target .95",
        DATA,
        "teacher",
        1,
        AGAIN,
        {"distance": "l2", "ends": "edges [1.0, 0.0]"},
        teacher="heun",
        decay=0.95,
        settings={
            **CONSTANT,
            "updates": 600_000,
            "batch": 2048,
            "learning_rate": 8e-6,
            "ema": 0.999943,
            "weight_decay": 0.0,
        },
        small={"decay": "linear", "updates": 1000, "batch": 64, "learning_rate": 1e-3, "ema": 0.99},
    ),
    "lcm": Paper(
        "Luo et al. 2023 [P]: w in [2, 14], k = 20 of 1000, target .999943; diffusers' script [C]: Huber's c .001",
        DATA,
        "teacher",
        1,
        AGAIN,
        {"distance": "huber", "ends": "edges [1.0, 0.0]"},
        decay=0.999943,
        settings={**CONSTANT, "updates": 100_000, "batch": 72, "learning_rate": 8e-6, "clip": 1.0},
        options={"scales": (3.0, 15.0)},
        small={
            "decay": "linear",
            "updates": 1000,
            "batch": 64,
            "learning_rate": 1e-3,
            "scales": None,
            "target_decay": 0.95,  # the official script's [C]
        },
    ),
    "segments": Paper(
        "Wang et al. 2024 (phased consistency), G-U-N/Phased-Consistency-Model [C]: Huber's c .001, no average",
        DATA,
        "teacher",
        1,
        DDIM,
        {"distance": "huber", "ends": "edges [1.0, 0.75, 0.5, 0.25, 0.0]"},
        settings={"learning_rate": 5e-6, "weight_decay": 1e-3},
        small={"learning_rate": 1e-3, "weight_decay": 0.0},
    ),
    "tcd": Paper(
        "Zheng et al. 2024: gamma-sampling with eta .3 (diffusers [C]); ends drawn below, an average as target [P]",
        DATA,
        "teacher",
        1,
        ("tcd", {"eta": 0.3}),
        {"distance": "huber", "ends": f"anywhere on {[k / 8 for k in range(8, -1, -1)]}"},
        decay=0.95,
    ),
    "ctm": Paper(
        "Kim et al. 2023, sony/ctm, CIFAR-10 [C]: Heun, 18 points, looks in proportion, target .999, gamma 0, hinge",
        DATA,
        "teacher",
        1,
        ("ctm", {"gamma": 0.0}),
        {"longest": 17, "favour": "long", "denoising": "adaptive", "adversary": "adaptive", "distance": "huber"},
        teacher="heun",
        decay=0.999,
        settings={**CONSTANT, "batch": 128, "learning_rate": 4e-4, "ema": 0.999},
        small={
            "decay": "linear",
            "batch": 64,
            "learning_rate": 1e-3,
            "ema": 0.99,
            "target_decay": 0.95,
            "longest": 4,
            "favour": "none",
            "adversary": 0.0,
        },
    ),
    "there-and-back": Paper(
        "Starodubcev et al. 2024, yandex-research/invertible-cd [C]: w 0 … 19, encoder unguided, cycles 1.5, Huber",
        DATA,
        "teacher",
        1,
        DDIM,
        {"distance": "huber", "weight": 1.5},
        settings={"learning_rate": 8e-6, "batch": 8, "updates": 6000},
        options={"scales": (1.0, 20.0)},
        small={"learning_rate": 1e-3, "batch": 64, "updates": 1000, "scales": None},
    ),
    "consistency-training": Paper(
        "Song et al. 2023, algorithm 3 and appendix C, CIFAR-10 [P]: s0 2, s1 150, mu0 .9",
        DATA,
        "growing",
        1,
        AGAIN,
        {"distance": "l2", "ends": "edges [1.0, 0.0]"},
        settings={**CONSTANT, "updates": 800_000, "batch": 512, "learning_rate": 4e-4, "ema": 0.9999},
        options={"finest": 150, "coarsest": 2, "target_decay": 0.9},
        small={
            "decay": "linear",
            "updates": 1000,
            "batch": 64,
            "learning_rate": 1e-3,
            "ema": 0.99,
            "finest": None,
        },
    ),
    "sds": Paper(
        "Poole et al. 2022 [P]: w(t) = sigma^2 times the difference of the noises, t in [.02, .98]",
        OWN_WALK,
        "nodes",
        2,
        AGAIN,
        {"weighting": "noise", "ratio": 1, **LATE},
    ),
    "unbiased-score": Paper(
        "Schlichting et al. 2024, in the lecture (003): the KL's gradient, weighed by sigma^2",
        OWN_WALK,
        "nodes",
        2,
        AGAIN,
        {"weighting": "variance", "ratio": 1, **LATE},
    ),
    "dmd": Paper(
        "Yin et al. 2023, equations 7 and 8 [P]: one update of the fake score for one, regression .25, one step",
        PAIRS,
        "nodes",
        8,
        AGAIN,
        {"weighting": "normalised", "ratio": 1, "regression": 0.25, "adversary": 0.0, **LATE},
        settings={**MATCHED, "learning_rate": 5e-5},
        small={"learning_rate": 1e-3, "warm_up": 0},
    ),
    "dmd2": Paper(
        "Yin et al. 2024, tianweiy/DMD2, SDXL in four steps [C]: ratio 5, adversary 5e-3, its judge's share 1e-2",
        OWN_WALK,
        "nodes",
        2,
        AGAIN,
        {"weighting": "normalised", "ratio": 5, "regression": 0.0, "adversary": 0.005, **LATE},
        settings={**MATCHED, "learning_rate": 5e-7},
        small={"learning_rate": 1e-3, "warm_up": 0},
    ),
    "add": Paper(
        "Sauer et al. 2023 [P]: lambda 2.5, c(t) = alpha, hinge, R1 with 1e-5, the teacher asked at all times",
        DATA,
        "nodes",
        2,
        AGAIN,
        {"weighting": "exponential", "distillation": 2.5, "gamma": 1e-5, "adversarial": "hinge", "high": 1.0},
    ),
}
NOT_HERE = {"sfd"}  # which has a test of its own


def steps_of(name: str) -> tuple[int, ...]:
    """From 8 steps to 4, or to one."""
    return {"one": (8, 1), "same": (8, 8), "reflow": (8, 8, 1), "halving": (8, 4)}.get(MENU[name].steps, (8, 4))


def plan_of(name: str, published: bool, **changes: Any) -> Plan:
    """The method on the digits, in 8 steps of the teacher, on its plain states."""
    plain = {} if MENU[name].ddil else {"collected": (0.0, 0.0)}
    values = {"method": name, "problem": "digits", "stages": steps_of(name), "guidance_scale": 3.0, **plain, **changes}
    return read_plan(as_published=published, **values)


def ready_of(plan: Plan) -> Ready:
    return stage_of(digits_problem(3.0), plan)


@pytest.fixture(scope="module")
def published() -> dict[str, tuple[Plan, Ready]]:
    """Each method as its paper has it, in short stages of small batches."""
    short = {"updates": 6000, "batch": 8}
    plans = {name: plan_of(name, True, **short, warm_up=0) for name in PAPERS}
    return {name: (plan, ready_of(plan)) for name, plan in plans.items()}


def test_every_method_is_pinned() -> None:
    assert PAPERS.keys() | NOT_HERE == MENU.keys()


def said(plan: Plan, name: str) -> Any:
    """A value of the plan, or of the method's own options."""
    return getattr(plan, name) if name in Plan.model_fields else getattr(plan.options, name)


@pytest.mark.parametrize("name", PAPERS)
def test_as_published_a_plan_says_what_the_paper_says(name: str) -> None:
    """Optimiser and options, to the number."""
    paper, updates = PAPERS[name], {} if name != "reflow" else {"updates": 100_000}
    plan = plan_of(name, True, **updates)
    expected = {**paper.settings, **paper.options, "teacher_solver": paper.teacher}
    assert {option: said(plan, option) for option in expected} == expected


@pytest.mark.parametrize("name", PAPERS)
def test_by_default_only_what_is_listed_is_ours(name: str) -> None:
    """Where a short run has other numbers, they are these; all else is the paper's."""
    paper, plan = PAPERS[name], plan_of(name, False)
    expected = {**paper.settings, **paper.options, "teacher_solver": paper.teacher, **paper.small}
    assert {option: said(plan, option) for option in expected} == expected
    drifted = {option for option, value in MENU[name].published.items() if said(plan, option) != value}
    assert drifted <= paper.small.keys() | {"stages"}


@pytest.mark.parametrize("name", PAPERS)
def test_the_method_asks_what_the_paper_asks(name: str, published: dict[str, tuple[Plan, Ready]]) -> None:
    """Weight, distance, ratio and what else the method has."""
    method, expected = published[name][1].method, PAPERS[name].method
    assert {attribute: getattr(method, attribute) for attribute in expected} == expected


@pytest.mark.parametrize("name", PAPERS)
def test_the_target_follows_as_published(name: str, published: dict[str, tuple[Plan, Ready]]) -> None:
    """At a fixed decay, or at that of the curriculum."""
    followers = published[name][1].method.followers
    if name == "consistency-training":
        assert followers == {"target": Curriculum(6000, 2, 150, 0.9)}
    else:
        assert followers.get("target") == PAPERS[name].decay


@pytest.mark.parametrize("name", PAPERS)
def test_the_teacher_looks_as_far_as_published(name: str, published: dict[str, tuple[Plan, Ready]]) -> None:
    """In its own steps, with its own solver."""
    teacher = published[name][1].stage.teacher
    assert teacher.look == PAPERS[name].look
    assert teacher.solver.__name__ == PAPERS[name].teacher


@pytest.mark.parametrize("name", PAPERS)
def test_the_student_is_sampled_as_published(name: str, published: dict[str, tuple[Plan, Ready]]) -> None:
    plan, ready = published[name]
    assert (ready.entry.solver, ready.entry.sampling(plan.options)) == PAPERS[name].solver


@pytest.mark.parametrize("name", [name for name, paper in PAPERS.items() if paper.states == DATA])
def test_the_states_are_noised_data(name: str, published: dict[str, tuple[Plan, Ready]]) -> None:
    """At the student's nodes, at the teacher's, at any time, or on a grid that grows."""
    rollin, teacher = published[name][1].rollin, published[name][1].stage.teacher
    assert type(rollin) is Forward
    assert getattr(rollin.data, "noise", None) is None
    grids = {"nodes": teacher.student_grid, "teacher": teacher.grid.cpu(), "any": None}
    if PAPERS[name].times == "growing":
        assert [len(rollin.grid(update)) for update in (0, 3000, 5999)] == [2, 107, 151]
    elif grids[PAPERS[name].times] is None:
        assert rollin.grid is None
    else:
        assert torch.equal(rollin.grid, grids[PAPERS[name].times])


@pytest.mark.parametrize("name", [name for name, paper in PAPERS.items() if paper.states == PAIRS])
def test_the_states_are_noised_pairs(name: str, published: dict[str, tuple[Plan, Ready]]) -> None:
    """Each sample with the noise that it was made of."""
    rollin = published[name][1].rollin
    assert type(rollin) is Forward
    assert callable(rollin.data.noise)
    assert (rollin.grid is None) == (PAPERS[name].times == "any")


@pytest.mark.parametrize("name", [name for name, paper in PAPERS.items() if paper.states == OWN_WALK])
def test_the_states_are_those_of_inference(name: str, published: dict[str, tuple[Plan, Ready]]) -> None:
    """The student walks alone to one node, with its sampler, and no label is asked for."""
    rollin = published[name][1].rollin
    assert type(rollin) is Rollout
    assert (rollin.beta(0), rollin.visit, rollin.label) == (1.0, "one", False)
    assert rollin.wheel.solver.__name__ == "consistency"


# What is particular to some


def test_a_consistency_model_of_latents_looks_as_far_as_published() -> None:
    """Twenty of a thousand indices, and diffusers' nodes."""
    plan = Plan(method="lcm", problem="digits", collected=(0.0, 0.0))
    teacher = ready_of(plan).stage.teacher
    assert plan.stages == (50, 4)
    assert [round(1000 * t) - 1 for t in teacher.student_grid.tolist()[:-1]] == [999, 759, 499, 259]
    assert torch.allclose(1000 * (teacher.grid[:-1] - teacher.grid[1:]), torch.tensor(20.0).double())


def test_its_student_takes_the_guidance_scale(published: dict[str, tuple[Plan, Ready]]) -> None:
    """As published; and each sample's teacher is guided at its scale."""
    stage = published["lcm"][1].stage
    assert "guidance_scale" in stage.student.inputs
    scales = stage.data.conditions(np.arange(200))["guidance_scale"]
    assert 3 <= scales.min() < 4
    assert 14 < scales.max() <= 15


def test_its_boundary_is_the_clean_sample() -> None:
    """c_skip and c_out with a timestep scaling of 10 differ from 0 and 1 by less than 1e-5 at its nodes."""
    index = torch.arange(19, 1000, 20).double()
    skip = 0.25 / ((10 * index) ** 2 + 0.25)
    out = 10 * index / ((10 * index) ** 2 + 0.25).sqrt()
    assert skip.max() < 1e-5
    assert (1 - out).max() < 1e-5


def guidance_of(denoiser: torch.nn.Module) -> list[float | None]:
    """The guidance scales around a denoiser."""
    scales = []
    while isinstance(denoiser, Wrapper):
        scales += [denoiser.guidance_scale] if isinstance(denoiser, Guided) else []
        denoiser = denoiser.denoiser
    return scales


def test_the_encoder_is_taught_unguided(published: dict[str, tuple[Plan, Ready]]) -> None:
    """While the decoder's teacher is guided at each sample's scale; its cycles are made at 1, or not at all."""
    method = published["there-and-back"][1].method
    assert guidance_of(method.teacher.denoiser) == [None]
    assert guidance_of(method.away.denoiser) == []
    fixed = ready_of(plan_of("there-and-back", False)).method
    assert guidance_of(fixed.teacher.denoiser) == [3.0]
    assert guidance_of(fixed.away.denoiser) == []
    assert fixed.weight == 0
    plain = stage_of(digits_problem(1.0), plan_of("there-and-back", False, guidance_scale=1.0)).method
    assert plain.away is None
    assert plain.weight == 1.5


@pytest.mark.parametrize(
    ("prediction", "weighting"), [("eps", "snr"), ("v", "snr_plus_one")], ids=["noise", "velocity"]
)
def test_the_critic_learns_its_own_error(prediction: str, weighting: str, published: dict) -> None:
    """The squared error of what it predicts, whichever that is; its judge's share is .01."""
    problem, plan = digits_problem(3.0), published["dmd2"][0]
    problem.student.prediction = prediction
    fake = stage_of(problem, plan).method.fake
    assert (fake.weighting, fake.adversary, fake.loss_name) == (weighting, 0.01, "softplus")
    assert type(problem.student.schedule) is Cosine


def test_a_rectified_flow_is_presented_as_one(published: dict[str, tuple[Plan, Ready]]) -> None:
    """On equal steps of its own time."""
    for name in ("reflow", "instaflow"):
        stage = published[name][1].stage
        assert stage.student.schedule == RectifiedFlow()
        assert torch.equal(stage.teacher.grid, torch.linspace(1, 0, 9, dtype=torch.float64))


def test_presets_of_text_to_image_train_as_published() -> None:
    """DMD2 with a constant rate, late clipping, Adam's usual betas and a little weight decay, whatever the model."""
    for plan in (
        preset("scenes", method="dmd2"),
        preset("sd15-coco", method="dmd2", model="sd15", data="coco"),
        preset("scenes-dmd2"),
        preset("ssd1b-dmd2", model="ssd1b", data="captions"),
    ):
        assert (plan.decay, plan.clip, plan.betas, plan.weight_decay) == ("constant", 10.0, (0.9, 0.999), 0.01)
    large = preset("ssd1b-dmd2", model="ssd1b", data="captions")
    assert (large.warm_up, large.options.ratio, large.options.adversary) == (500, 5, 0.005)
    assert (large.rank, large.alpha, large.learning_rate) == (64, 8.0, 5e-5)


def test_the_menu_says_which_numbers_are_the_papers() -> None:
    """Each number of `as_published`, and each of our liberties."""
    blocks = {block.split()[0]: block for block in menu_text().split("\n\n")}
    for name in PAPERS:
        entry = method_by_name(name)
        for option, value in entry.published.items():
            assert f"{option} = {value}" in blocks[name].partition("--as-published: ")[2]
        for text in (*entry.ours, entry.published_for):
            assert text in blocks[name]
