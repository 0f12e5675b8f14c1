"""Every method of the menu, on every kind of problem, from one command; what is added to the menu goes the same way."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from pydantic import Field
from torch import Tensor

from ddil import cli
from ddil.datasets.digits import digits
from ddil.datasets.scenes import tiny_pipeline
from ddil.diffusion.denoiser import Denoiser, split_inputs
from ddil.diffusion.wrappers import Told, innermost
from ddil.distil import doctor, stages
from ddil.distil.budget import cost_of, spend
from ddil.distil.command import distil_options, finish, plan_of
from ddil.distil.doctor import examine
from ddil.distil.menu import MENU, Entry, Stage, ddil_states, enter, guided_within
from ddil.distil.plan import Plan, WhoseStates, read_plan, write_plan
from ddil.distil.problem import KINDS_OF_PROBLEM, Problem, atoms_problem, digits_problem, problem_kind
from ddil.distil.stages import carry_out, handed_on
from ddil.forms import Form, UnusableValues
from ddil.methods.base import Method
from ddil.methods.regression import Regression
from ddil.models.pipeline import TextToImage
from ddil.rollins.data import TensorData
from ddil.rollins.rollout import begin
from ddil.solvers import ddim, walk
from ddil.solvers.sampler import Sampler
from ddil.training.journal import read_log

STAGES = {"halving": (4, 2), "once": (4, 2), "again": (8, 4, 2), "among": (4, 2)}
STAGES |= {"one": (4, 1), "same": (4, 4), "reflow": (4, 4, 1)}
LORA = {"adapters": "lora", "rank": 2}
ATOMS = {"problem": "atoms", "count": 40, "width": 16, "depth": 1}


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor neither measures this machine nor counts evaluations over many updates."""
    monkeypatch.setattr(doctor, "throughput", lambda precision, device: 1e10)
    monkeypatch.setattr(doctor, "cost_of", partial(cost_of, trial=4))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text-to-image pipeline."""
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "pipeline")


@pytest.fixture(scope="module")
def text(model: Path) -> dict[str, Any]:
    """The problem of that pipeline and forty drawn scenes, whose encoded data all runs share."""
    data = {"data": "scenes:40", "size": 32, "cache": str(model.parent / "cache")}
    return {"problem": "model", "model": str(model), **data, "check_weights": False, "guidance_scale": 3.0}


def asked(name: str, output: Path, **changes: Any) -> dict[str, Any]:
    """A plan of three updates of a method, with checkpoints, as names and values."""
    entry = MENU[name]
    values = {"method": name, "stages": STAGES[entry.steps], "updates": 3, "batch": 8, "checkpoint_every": 2}
    values |= {"pairs": 8} if "pairs" in entry.options.model_fields else {}
    return {**values, "output": str(output), **changes}


def word(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(word, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def words(values: dict[str, Any]) -> list[str]:
    """Names and values as options of a command."""
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", word(value))]


def distilled(values: dict[str, Any]) -> int:
    """The exit status of `ddil distil` with these values."""
    return cli.main(["distil", *words(values)])


def undoctored(values: dict[str, Any]) -> None:
    """What the command does after the doctor has agreed."""
    plan = Plan(**values)
    finish(plan, carry_out(plan))


def trained(output: Path) -> dict[str, Any]:
    """When each stage's student was written, and what each stage's log says."""
    places = sorted(output.glob("*-to-*"))
    return {place.name: ((place / "student" / "sealed.json").stat().st_mtime_ns, read_log(place)) for place in places}


# Digits and atoms


PROBLEMS = {"digits": {"problem": "digits"}, "atoms": ATOMS}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Any]]:
    """What was said to carry out a method on a problem, which is done once."""
    root, runs = tmp_path_factory.mktemp("runs"), {}

    def run(problem: str, name: str) -> dict[str, Any]:
        if (problem, name) not in runs:
            values = asked(name, root / problem / name, **PROBLEMS[problem])
            assert distilled(values) == 0
            runs[problem, name] = values
        return runs[problem, name]

    return run


@pytest.mark.parametrize("name", MENU)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_it_leaves_a_student(problem: str, name: str, run_of: Callable[[str, str], dict[str, Any]]) -> None:
    """Each stage is trained for as long as the plan says, and what is left draws samples."""
    values = run_of(problem, name)
    logs = [log for _, log in trained(Path(values["output"])).values()]
    assert [log[-1]["update"] for log in logs] == [3] * (len(values["stages"]) - 1)
    student = Sampler.load(Path(values["output"]) / "student")
    assert student.steps == values["stages"][-1]
    labels = None if problem == "atoms" else torch.tensor([3, 8])
    assert student.sample(range(2), labels).isfinite().all()


@pytest.mark.parametrize("name", MENU)
def test_a_student_that_is_there_is_not_trained_again(name: str, run_of: Callable[[str, str], dict[str, Any]]) -> None:
    """The same plan finds all stages done and leaves the same student."""
    values = run_of("atoms", name)
    output = Path(values["output"])
    before, weights = trained(output), Sampler.load(output / "student").denoiser.state_dict()
    undoctored(values)
    assert trained(output) == before
    again = Sampler.load(output / "student").denoiser.state_dict()
    assert [key for key in weights if not torch.equal(weights[key], again[key])] == []


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_encoder_is_kept(problem: str, run_of: Callable[[str, str], dict[str, Any]]) -> None:
    """It lies beside the student, loads, and takes samples up the student's grid, each row under its condition."""
    values = run_of(problem, "there-and-back")
    place = Path(values["output"]) / "4-to-2"
    student, encoder = Sampler.load(place / "student"), Sampler.load(place / "encoder")
    assert torch.equal(encoder.grid, student.grid)
    assert any(
        not torch.equal(one, other)
        for one, other in zip(innermost(encoder.denoiser).parameters(), innermost(student.denoiser).parameters())
    )
    labels = None if problem == "atoms" else torch.tensor([3, 8])
    z = student.sample(range(2), labels)
    noise, (low, middle, high) = encoder.invert(z, labels), encoder.grid.flip(0).tolist()
    by_hand = ddim(encoder.denoiser, ddim(encoder.denoiser, z, low, middle, labels), middle, high, labels)
    torch.testing.assert_close(noise, by_hand)


# A text-to-image model

REFUSED = {"unbiased-score": "conditions that many samples share", "add": "a network that a judge may look through"}
INPUTS = {"ctm": "adapters on a shared network take no further inputs"}
SAVED = {
    "reflow": "a Rescheduled wrapper",
    "instaflow": "a Rescheduled wrapper",
    "tcd": "a student sampled with 'tcd' cannot leave",
    "ctm": "further inputs, end",
    "there-and-back": "and the student at t = ",
}



@pytest.mark.parametrize("name", [name for name in MENU if name not in REFUSED])
def test_a_text_to_image_student(
    name: str, text: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves as a pipeline that plain diffusers draws with, or, where diffusers cannot, with the reason."""
    assert distilled(asked(name, tmp_path, **text)) == 0
    message = capsys.readouterr().out
    check_what_is_left(name, tmp_path, message)


@pytest.mark.parametrize("name", [name for name in MENU if name not in {**REFUSED, **INPUTS}])
def test_a_student_of_adapters(
    name: str, text: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves in the same way, and as a LoRA file where plain diffusers can sample it."""
    undoctored(asked(name, tmp_path, **text, **LORA))
    message = capsys.readouterr().out
    check_what_is_left(name, tmp_path, message)
    first, second, *_ = STAGES[MENU[name].steps]
    light = tmp_path / f"{first}-to-{second}" / "lora" / "pytorch_lora_weights.safetensors"
    assert light.exists() == (name not in SAVED)
    assert ("no LoRA file is written" in message) == (name in SAVED)


def check_what_is_left(name: str, output: Path, message: str) -> None:
    """Draw with plain diffusers, or find the reason why it cannot be, and the student as it is."""
    steps = STAGES[MENU[name].steps][-1]
    assert ("plain diffusers cannot sample it" in message) == (name in SAVED)
    if name in SAVED:
        assert SAVED[name] in message.partition("cannot sample it: ")[2]
        assert Sampler.load(output / "student").steps == steps
    else:
        assert picture_of(output / "student", steps).shape == (1, 32, 32, 3)


def picture_of(folder: Path, steps: int) -> np.ndarray:
    """A picture that plain diffusers draws."""
    plain = diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    plain.set_progress_bar_config(disable=True)
    sizes = {"height": 32, "width": 32, "output_type": "np"}
    return plain("a red square", num_inference_steps=steps, guidance_scale=1.0, **sizes).images


WITH_INPUTS = {"scales": ("lcm", {"scales": (2.0, 8.0)}), "lengths": ("sfd", {"lengths": (3, 4)})}


@pytest.mark.parametrize("option", WITH_INPUTS)
@pytest.mark.parametrize("kind", ["digits", "text"])
def test_a_student_of_further_inputs(kind: str, option: str, text: dict[str, Any], tmp_path: Path) -> None:
    """One student for a range of guidance scales, or for several numbers of steps, is sampled at the plan's own."""
    name, changes = WITH_INPUTS[option]
    problem = {"problem": "digits", "guidance_scale": 3.0} if kind == "digits" else text
    assert distilled(asked(name, tmp_path, **problem, **changes)) == 0
    student = Sampler.load(tmp_path / "student").denoiser
    assert {"scales": {"guidance_scale": 3.0}, "lengths": {"steps": 2.0}}[option] == told(student)


def test_a_student_for_any_scale(text: dict[str, Any], tmp_path: Path) -> None:
    """It imitates the teacher without guidance, and plain diffusers draws it at any scale as we do."""
    undoctored(asked("sfd", tmp_path, **text, any_scale=True))
    student = Sampler.load(tmp_path / "4-to-2" / "student")
    assert student.guidance_scale == 1.0
    assert "guidance_scale=3.0" in (tmp_path / "student" / "README.md").read_text()
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student", use_safetensors=True)
    plain.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *student.shape, generator=torch.Generator().manual_seed(0))
    cond = TextToImage.load(text["model"]).conditions(["a red square"], 32)
    pictures = []
    for scale in (1.0, 3.0, 6.0):
        walker = guided_within(handed_on(student.denoiser), scale)
        with torch.inference_mode():
            *_, ours = walk(walker, noise, student.grid, cond, student.step)
        given = {"latents": noise, "output_type": "latent", "height": 32, "width": 32, "num_inference_steps": 2}
        pictures.append(plain("a red square", guidance_scale=scale, **given).images)
        torch.testing.assert_close(ours, pictures[-1], rtol=1e-3, atol=1e-3)
        if scale == 3.0:  # the plan's own
            with torch.inference_mode():
                *_, own = walk(student.denoiser, noise, student.grid, cond, student.step)
            assert torch.equal(own, ours)
    assert (pictures[0] - pictures[2]).abs().max() > 0.01


def test_the_second_stage_of_sfd(tmp_path: Path) -> None:
    """Its teacher is the first stage's student as that one walks: told its own number of steps, its first step
    analytic, its grid the same; the new student asks its network once.
    """
    plan = Plan(**asked("sfd", tmp_path, problem="digits", stages=(24, 6, 2), lengths=(3, 4, 5, 6)))
    students = carry_out(plan)
    second = stages.stage_of(digits_problem(), plan, 1, stages.handed_on(students[6].denoiser))
    teacher, rollin = second.stage.teacher, second.rollin
    torch.testing.assert_close(teacher.grid, students[6].grid)
    states = rollin.sample(4, 0)
    assert told(teacher.denoiser) == {"steps": 6.0}
    assert states.cond["steps"].tolist() == [2.0] * 4
    assert states.t[0] == teacher.student_grid[1], "the analytic step is walked and not trained"
    labels = split_inputs(states.cond)[0]
    start = begin(teacher, (1, 8, 8), second.stage.data, second.stage.source.draws("walk", 1, n=4))
    path = list(walk(students[6].denoiser, start.z, students[6].grid, labels))
    torch.testing.assert_close(second.stage.teacher.label(states), path[-1], rtol=1e-4, atol=1e-4)
    report: dict[str, float] = {}
    students[2].sample(range(2), torch.tensor([3, 8]), report=report)
    assert report["NFE"] == 1


def told(student: Denoiser) -> dict[str, float]:
    """The values of further inputs that are chosen."""
    while not isinstance(student, Told):
        student = student.denoiser
    return student.values


def captions(folder: Path) -> str:
    """A file of captions without pictures."""
    (folder / "captions.txt").write_text("\n".join(f"a square, {number} times" for number in range(40)))
    return str(folder / "captions.txt")


CAPTIONS_ALONE = "clean samples.* the data are captions alone"
NEEDING_PICTURES = [name for name, entry in MENU.items() if "pictures" in entry.needs and name not in REFUSED]
NO: dict[str, tuple[str, dict[str, Any], str]] = {
    **{name: (name, {}, reason) for name, reason in REFUSED.items()},
    **{f"{name}, captions alone": (name, {"data": "captions"}, CAPTIONS_ALONE) for name in NEEDING_PICTURES},
    "noised data": ("progressive", {"data": "captions"}, CAPTIONS_ALONE),
    "plain states": ("lcm", {"data": "captions", "collected": (0, 0)}, CAPTIONS_ALONE),
    "a watch": ("sfd", {"data": "captions", "watch_every": 1}, "watch_every: .*captions alone"),
    "a walk that asks nothing": ("sfd", {"analytic": True, "lengths": (1, 4)}, "in a walk of one step no network"),
    "other lengths": ("sfd", {"lengths": (2,)}, "sampled in 4 steps, so 4 must be among them"),
    "noise that the model does not know": ("sfd", {"sigma_min": 0.006}, "sigma_min = 0.006: this model knows noise"),
    "any scale without guidance": ("sfd", {"any_scale": True, "guidance_scale": 1.0}, "any_scale: the teacher is not"),
    "scales without guidance": ("lcm", {"scales": (2.0, 8.0), "guidance_scale": 1.0}, "the teacher is not guided"),
    "adapters of digits": ("progressive", {"problem": "digits", **LORA}, "adapters = 'lora': they sit on the U-Net"),
    "adapters of atoms": ("dmd2", {**ATOMS, **LORA}, "adapters = 'lora': they sit on the U-Net"),
}


@pytest.mark.parametrize("case", NO)
def test_the_doctor_refuses_what_the_job_refuses(
    case: str, text: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason is the same sentence in both, and nothing is computed."""
    name, changes, reason = NO[case]
    problem = {} if "problem" in changes else text
    changes = {**changes, "data": captions(tmp_path)} if "data" in changes else changes
    values = asked(name, tmp_path / "run", **{**problem, **changes})
    assert distilled(values) == 1
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=reason) as refusal:
        carry_out(Plan(**values))
    assert str(refusal.value) in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_adapters_that_would_need_inputs(text: dict[str, Any], tmp_path: Path) -> None:
    """A plan with adapters for a student of further inputs is refused as it is made."""
    for name, reason in INPUTS.items():
        with pytest.raises(UnusableValues, match=reason):
            Plan(**asked(name, tmp_path, **text, **LORA))


@pytest.mark.parametrize("name", ["progressive", "dmd2"])
def test_the_doctor_agrees_to_adapters(name: str, text: dict[str, Any], tmp_path: Path) -> None:
    """What the tests above have trained, it finds well, and says how much memory and time it takes."""
    report = examine(Plan(**asked(name, tmp_path, **text, **LORA)))
    assert report.ok
    assert sum(report.memory.values()) > 1e6
    assert report.seconds > 0


# What a plan refuses


def options_of_others(name: str) -> dict[str, Any]:
    """Options of other methods that this one would ignore, with their defaults."""
    own = {*MENU[name].options.model_fields, *Plan.model_fields}
    others = {option: field.default for entry in MENU.values() for option, field in entry.options.model_fields.items()}
    return {option: value for option, value in others.items() if option not in own}


@pytest.mark.parametrize("name", MENU)
def test_an_option_that_would_be_ignored_is_refused(name: str) -> None:
    """Each by its name, with the method that it belongs to."""
    others = options_of_others(name)
    assert len(others) > 10
    with pytest.raises(UnusableValues) as refusal:
        Plan(method=name, **others)
    lines = [line for line in str(refusal.value).splitlines() if f", not of {name}" in line]
    assert sorted(line.split()[1] for line in lines) == sorted(others)


@pytest.mark.parametrize("name", [name for name, entry in MENU.items() if entry.ddil])
def test_states_that_have_no_place_are_refused(name: str) -> None:
    """A method with states of its own takes none of DDIL's options, and says why."""
    values = {"collected": (0.25, 0.5), "beta": (0.1, 0.9), "mixing": "sample", "capacity": 64, "reuse": 2.0}
    values |= {"reach": 0.2}
    assert values.keys() == WhoseStates.model_fields.keys()
    with pytest.raises(UnusableValues) as refusal:
        Plan(method=name, **values)
    for option in values:
        assert f"{option} = {values[option]!r}: {name} takes no DDIL: {MENU[name].ddil}" in str(refusal.value)


def test_an_option_of_another_problem_is_refused() -> None:
    """With the problem that it belongs to."""
    with pytest.raises(UnusableValues, match="size = 32: it is an option of model, scenes, not of .* on digits"):
        Plan(problem="digits", size=32)


def test_all_that_is_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Faults of the plan, of the method and of the problem are lines of one message, with status 2."""
    faults = {"problem": "atoms", "method": "sfd", "stages": (8, 3), "batch": 0, "distance": "l3", "count": 5000}
    assert distilled(faults) == 2
    message = capsys.readouterr().err
    for name in ("stages", "batch = '0'", "distance = 'l3'", "count = '5000'"):
        assert name in message


def test_a_refused_plan_leaves_the_folder_as_it_is(run_of: Callable[[str, str], dict[str, Any]]) -> None:
    """What lies beside the students is the plan that they were trained by."""
    values = run_of("atoms", "progressive")
    file = Path(values["output"]) / "plan.yaml"
    before = file.read_text()
    assert read_plan(file) == Plan(**values).but(bound=1.0)  # which was measured
    with pytest.raises(ValueError, match="was made otherwise: updates 3 there, 4 here"):
        carry_out(Plan(**{**values, "updates": 4}))
    assert file.read_text() == before


# The menu in words


def test_the_menu_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Each method with its other names, its papers and its options."""
    assert cli.main(["methods"]) == 0
    blocks = {block.split()[0]: block for block in capsys.readouterr().out.split("\n\n")}
    assert list(blocks) == list(MENU)
    for name, entry in MENU.items():
        for part in (*entry.aliases, *entry.papers, *entry.options.model_fields, entry.cost):
            assert part in blocks[name]


@pytest.mark.parametrize("name", MENU)
def test_other_names_mean_the_same(name: str) -> None:
    """An alias, in any case, with spaces for hyphens, makes the same plan."""
    for alias in (name.upper(), name.replace("-", " "), *MENU[name].aliases):
        assert Plan(method=alias) == Plan(method=name)


# Four ways to say a plan


def every_option(name: str) -> dict[str, Any]:
    """A plan that says everything that it can, each of the method's own options too."""
    some = {"scales": (2.0, 8.0), "lengths": (2, 4), "denoising": 0.5}
    entry = MENU[name]
    own = {option: some.get(option, field.default) for option, field in entry.options.model_fields.items()}
    values = {**asked(name, Path("runs/some")), **own, "problem": "scenes", "data": "scenes:64", "guidance_scale": 2.0}
    return {**values, "betas": (0.5, 0.9), "ema": None, "learning_rate": 1e-5, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    "form",
    [*(entry.options for entry in MENU.values()), *(kind.form for kind in KINDS_OF_PROBLEM.values())],
    ids=lambda form: form.__name__,
)
def test_no_option_has_two_meanings(form: type[Form]) -> None:
    """What a method or a problem calls its own, no plan has already."""
    assert not form.model_fields.keys() & Plan.model_fields.keys()


@pytest.mark.parametrize("name", MENU)
def test_four_ways_to_say_a_plan(name: str, tmp_path: Path) -> None:
    """Python, YAML, JSON and the command line make the same plan; so does the plan as it is written."""
    values = every_option(name)
    plain = json.loads(json.dumps(values))
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plain))
    (tmp_path / "plan.json").write_text(json.dumps(plain))
    parser, plan = ArgumentParser(), Plan(**values)
    distil_options(parser)
    (tmp_path / "written.yaml").write_text(write_plan(plan))
    assert plan_of(parser.parse_args(words(values))) == plan
    for file in ("plan.yaml", "plan.json", "written.yaml"):
        assert read_plan(tmp_path / file) == plan, file


def test_the_command_line_has_the_last_word(tmp_path: Path) -> None:
    """Over a file, and a file over a preset."""
    (tmp_path / "plan.yaml").write_text("preset: scenes-dmd2\nratio: 3\nupdates: 7\n")
    parser = ArgumentParser()
    distil_options(parser)
    plan = plan_of(parser.parse_args([str(tmp_path / "plan.yaml"), "--updates", "9"]))
    assert (plan.method, plan.options.ratio, plan.updates, plan.problem) == ("dmd2", 3, 9, "scenes")


# Something new


class Straight(Form):
    """The options of a new method."""

    straightness: float = Field(0.5, gt=0, description="of nothing in particular")


def straight(stage: Stage) -> Method:
    """A question that only this test asks."""
    assert stage.options.straightness == 0.25
    return Regression(stage.teacher, "l1")


@pytest.fixture
def new_method() -> Iterator[str]:
    """A method that is on the menu for the time of a test."""
    enter(Entry("straight", "A new one", ("Nobody 2026",), ddil_states, straight, "nothing", options=Straight))
    yield "straight"
    del MENU["straight"]


@pytest.mark.parametrize("kind", ["digits", "text"])
def test_a_new_method(
    kind: str, new_method: str, text: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One entry is enough: the command knows it and its option, and it works on every problem."""
    problem = {"problem": "digits"} if kind == "digits" else text
    assert distilled(asked(new_method, tmp_path, straightness=0.25, **problem)) == 0
    assert f"{new_method} (Nobody 2026), 4 → 2 steps, 3 updates, with DDIL" in capsys.readouterr().out
    assert (tmp_path / "student").is_dir()
    with pytest.raises(UnusableValues, match="straightness = 1.0: it is an option of straight, not of lcm"):
        Plan(method="lcm", straightness=1.0)


def test_a_name_is_taken_once(new_method: str) -> None:
    """Neither a name nor an alias can be entered twice."""
    for name in (new_method, "PD"):
        with pytest.raises(ValueError, match=f"there is a method '{name}' on the menu already"):
            enter(Entry(name, "", (), ddil_states, straight, ""))


def test_an_option_with_the_name_of_a_plans_own_is_refused(new_method: str) -> None:
    """Else it could not be said which of them is meant."""

    class Fast(Form):
        learning_rate: float = 1.0

    MENU[new_method] = replace(MENU[new_method], options=Fast)
    with pytest.raises(UnusableValues, match="Fast has options of the names learning_rate, which plans have already"):
        Plan(method=new_method)


class FewOptions(Form):
    """What may be said of a new kind of problem."""

    few: int = Field(10, ge=1, description="atoms")


@pytest.fixture
def new_problem() -> Iterator[str]:
    """A kind of problem that is there for the time of a test."""

    @problem_kind("few", FewOptions, "a few atoms", stages=(4, 2), updates=5, batch=4)
    def few(options: FewOptions, accelerator: Any, bar: Any, pictures: bool, output: str) -> Problem:
        return atoms_problem(options.few, width=8, depth=1, device=accelerator.device)

    yield "few"
    del KINDS_OF_PROBLEM["few"]


def test_a_new_problem(new_problem: str, tmp_path: Path) -> None:
    """One function is enough: the command knows it and its option, and its defaults are the plan's."""
    options = ["--problem", new_problem, "--few", "12", "--capacity", "16", "--output", str(tmp_path)]
    assert cli.main(["distil", *options]) == 0
    assert read_log(tmp_path / "4-to-2")[-1]["update"] == 5
    student = Sampler.load(tmp_path / "student")
    assert student.provenance["made by"]["count"] == 12
    assert student.sample(range(3)).shape == (3, 64)


def test_the_next_stage_takes_its_inputs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student of a range of guidance scales is told one where it is sampled, and each row's own where it teaches."""
    taken, train = [], stages.train_stage

    def recorded(problem: Problem, plan: Plan, index: int, before: Any, *rest: Any) -> None:
        taken.append(before and before.inputs)
        train(problem, plan, index, before, *rest)

    monkeypatch.setattr(stages, "train_stage", recorded)
    plan = Plan(stages=(4, 2, 1), scales=(1.0, 6.0), updates=1, batch=8, capacity=64, checkpoint_every=0)
    students = stages.distil(digits_problem(2.0), plan, tmp_path)
    assert taken == [None, ("guidance_scale",)]
    assert students[1].denoiser.inputs == ()


def test_the_seed_decides_new_layers() -> None:
    """Layers for further inputs depend on the plan's seed, and not on what was drawn before."""
    weights = []
    for seed in (0, 0, 1):
        torch.rand(3)
        ready = stages.stage_of(digits_problem(), Plan(method="ctm", stages=(4, 2), batch=8, capacity=64, seed=seed))
        further = innermost(ready.stage.student).further
        weights.append(torch.cat([p.detach().flatten() for p in further.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_another_prediction_of_the_digits(tmp_path: Path) -> None:
    """A student that takes the guidance scale is converted with it; and what is not sensible is refused."""
    problem = digits_problem(2.0)
    changes = {"scales": (1.0, 3.0), "prediction": "x", "conversion_updates": 2, "updates": 1, "learning_rate": 1e-5}
    plan = Plan(stages=(4, 2, 1), batch=8, capacity=64, **changes)
    students = stages.distil(problem, plan, tmp_path)
    assert [innermost(student.denoiser).prediction for student in students.values()] == ["x", "x"]
    gap = students[1].provenance["conversion"]["gap"]
    assert max(gap["before"].values()) < 0.6
    assert max(gap["after"].values()) < 0.6
    assert stages.distil(problem, plan, tmp_path)[1].provenance == students[1].provenance
    with pytest.raises(ValueError, match="times the error of eps"):
        stages.check(problem, plan.but(prediction="eps"))
    with pytest.raises(ValueError, match="pays for no conversion"):
        spend(1000, problem, plan)
    with pytest.raises(UnusableValues, match="only a conversion has them"):
        Plan(conversion_updates=3)


def test_conversion_of_captions_alone(tmp_path: Path) -> None:
    """Where there is nothing to noise, the student is converted at states of the teacher's walks."""
    problem = digits_problem()
    problem.data = Conditions(problem.data)
    plan = Plan(stages=(4, 2), batch=8, capacity=64, collected=(1, 1), prediction="x", conversion_updates=2, updates=1)
    student = stages.distil(problem, plan, tmp_path)[2]
    assert read_plan(tmp_path / "conversion" / "plan.yaml").beta == (0.0, 0.0)
    assert max(student.provenance["conversion"]["gap"]["after"].values()) < 1


def test_data_beyond_the_bound_are_not_clipped_silently() -> None:
    """Static reflection is refused where the data lie beyond its bound, and goes with a greater one."""
    problem = digits_problem()
    problem.data = TensorData(3 * digits().x, digits().cond)
    with pytest.raises(ValueError, match="bound = 2: one in a thousand of the data's numbers lies beyond 3"):
        stages.check(problem, Plan(stages=(4, 2), bound=2.0))
    stages.check(problem, Plan(stages=(4, 2), bound=3.0))
    assert stages.settled(problem, Plan(stages=(4, 2))).bound == 3.0


def test_the_measured_bound_of_captions_alone() -> None:
    """Where no clean samples are known, the teacher's take their place; the rehearsal measures nothing."""
    problem = digits_problem(guidance_scale=3.0)
    before, problem.data = innermost(problem.teacher).evaluations, Conditions(problem.data)
    plan = stages.settled(problem, Plan(stages=(4, 2), collected=(1, 1)))
    assert innermost(problem.teacher).evaluations - before == 2 * 32 * 32
    assert 1.0 <= plan.bound < 1.5
    assert stages.settled(problem, Plan(stages=(4, 2))).bound == plan.bound
    assert innermost(problem.teacher).evaluations - before == 2 * 32 * 32
    assert stages.settled(replace(problem, bound=2.0), Plan(stages=(4, 2))).bound == 2.0


class Conditions:
    """Data that know conditions alone."""

    def __init__(self, data: TensorData):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def conditions(self, rows: np.ndarray) -> Tensor:
        return self.data.conditions(rows)

    def __getitem__(self, rows: np.ndarray) -> None:
        raise ValueError("captions alone")
