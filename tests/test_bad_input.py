"""Bad input is refused by name, with the remedy, before anything is computed; damaged files are never unpickled."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from forked import ROOT, alone, run_experiment
from torch import Tensor

import ddil.datasets.digits
import ddil.distil.problem
from ddil.solvers.sampler import Sampler
from ddil.datasets.digits import digits
from ddil.rollins.data import TensorData
from ddil.diffusion.denoiser import Denoiser
from ddil.diffusion.wrappers import Guided, Reflected
from ddil.models.unet import ClassDenoiser
from ddil.distil.problem import atoms_problem, digits_problem, Problem
from ddil.distil.plan import read_plan
from ddil.distil.stages import distil, make_problem
from ddil.forms import UnusableValues
from ddil.diffusion.exact import Gaussian
from ddil.files import unseal
from ddil.methods.progressive import Progressive
from ddil.diffusion.small_networks import MLP
from ddil.diffusion.noise import Shard, shuffled_indices, Source
from ddil.rollins.replay import Replay
from ddil.rollins.rollout import Rollout
from ddil.rollins.teacher import Teacher
from ddil.diffusion.grids import uniform_grid
from ddil.diffusion.schedule import Cosine, RectifiedFlow
from ddil.measure.imitation import covariate_shift
from ddil.training.parallel import make_accelerator
from ddil.training.checkpoints import latest_checkpoint
from ddil.training.journal import NonFiniteLoss, read_log

WEIGHTS = "network/diffusion_pytorch_model.safetensors"


# Parameters of an experiment

BAD_RUNS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "parameters": (
        {
            "updatse": 5,
            "updates": "many",
            "atoms_updates": 2.5,
            "stages": [16, 8, 5],
            "collected": [0.25, 1.5],
            "beta": [-0.1, 0.8],
            "teacher": "nowhere/teacher",
            "mixing": "samples",
            "seeds": [1, 1],
            "processes": 0,
        },
        (
            "the parameters cannot be used",
            "updatse = 5: there is no such name (did you mean updates?)",
            "updates = 'many': must be a whole number ≥ 1",
            "atoms_updates = 2.5: must be a whole number ≥ 1",
            "stages = [16, 8, 5]: must be steps, each half of the one before, and 5 is not half of 8: write 4 after 8",
            "collected = [0.25, 1.5]: must be two numbers in [0, 1], and 1.5 is not",
            "beta = [-0.1, 0.8]: must be two numbers in [0, 1], and -0.1 is not",
            "teacher = 'nowhere/teacher': must be 'digits', 'atoms', 'both' or a folder that exists",
            "mixing = 'samples': must be one of batch, sample (did you mean sample?)",
            "seeds = [1, 1]: must not repeat a number",
            "processes = 0: must be a whole number ≥ 1",
        ),
    ),
    "stages": ({"stages": [24, 12]}, ("the teacher has 32 steps, so the first stage must divide 32, not be 24",)),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_an_experiment_refuses_its_parameters(name: str, tmp_path: Path) -> None:
    """Everything that is wrong is told at once with its remedy, and nothing is written."""
    parameters, told = BAD_RUNS[name]
    message = alone(run_experiment, ROOT / "experiments/ddil.ipynb", {**parameters, "output": str(tmp_path / "out")})
    message = re.sub(r"\x1b\[[\d;]*m", "", message)
    for text in told:
        assert text in message, f"{text!r} is not in\n{message}"
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_none(tmp_path: Path) -> None:
    """A folder that exists and holds no teacher, or a training checkpoint, is named."""
    with pytest.raises(ValueError, match=f"{tmp_path} is not complete.*sealed.json"):
        digits_problem(teacher=tmp_path)
    distil(tiny.problem(), tiny.plan(updates=2, checkpoint_every=1), tmp_path / "run")
    with pytest.raises(ValueError, match="update-00000002 is not a saved sampler.*training checkpoint"):
        digits_problem(teacher=latest_checkpoint(tmp_path / "run" / "8-to-4"))


STRANGE: dict[str, tuple[str, str]] = {
    "a name of no version": ("problem: atoms\nbetta: 0.5", r"betta = 0.5: there is no such option \(did you mean beta"),
    "a problem of no version": (
        "problem: atom",
        r"there is no problem 'atom' \(did you mean atoms\?\); known are digits, atoms",
    ),
    "a method of no version": ("method: progresive", r"there is no method 'progresive' \(did you mean progressive\?\)"),
    "no names": ("- progressive", "must hold names and values, such as 'method: lcm'"),
    "no YAML": ("stages: [4, 2", "cannot be read as YAML"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_plan_of_another_version(name: str, tmp_path: Path) -> None:
    """A file that says what this version does not know is refused as it is read, and nothing is made."""
    text, message = STRANGE[name]
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UnusableValues, match=message):
        read_plan(tmp_path / "plan.yaml", output=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_plan_without_a_problem() -> None:
    """It can be carried out on a problem given in Python alone, and says what to add."""
    with pytest.raises(ValueError, match="the plan names no problem: add problem = 'digits' or another, or model"):
        make_problem(tiny.plan(), make_accelerator("cpu"))


# Pieces that do not fit


class Nothing:
    """A data set of one's own that turns out to be empty."""

    def __len__(self) -> int:
        return 0


class CountingTeacher(Gaussian):
    """A teacher that must not be asked."""

    def predict(self, z: Tensor, t: float | Tensor, cond: Any) -> Tensor:
        raise AssertionError("the teacher was asked before the input was checked")


def mlp(schedule: Any = Cosine(), dim: int = 64, classes: int | None = None) -> Denoiser:
    """A perceptron under `schedule`."""
    return ClassDenoiser(MLP(dim, 16, 1, classes), schedule, "x")


def frozen() -> Denoiser:
    """A perceptron that cannot learn."""
    return mlp().requires_grad_(False)


def digits_with(x: Tensor | None = None, labels: Tensor | None = None) -> Problem:
    """The problem of the digits with other data."""
    made = digits_problem()
    made.data = TensorData(digits().x if x is None else x, labels)
    return made


def without_classes() -> Problem:
    """The problem of points with labels that its teacher does not know."""
    return tiny.problem(data=TensorData(tiny.problem().data.x, torch.zeros(50, dtype=torch.int64)))


def column() -> Problem:
    """The problem of the digits with labels in a column."""
    return digits_with(labels=digits().cond[:, None])


UNFIT: dict[str, tuple[Callable[[], Problem], str]] = {
    "empty data": (lambda: tiny.problem(data=Nothing(), teacher=CountingTeacher()), "the data set is empty"),
    "two schedules": (
        lambda: tiny.problem(student=mlp(RectifiedFlow()), teacher=CountingTeacher()),
        "student and teacher must walk on one schedule.*RectifiedFlow.*Cosine",
    ),
    "a student that cannot learn": (lambda: tiny.problem(student=CountingTeacher()), "has no parameters"),
    "labels out of range": (lambda: digits_with(labels=digits().cond + 5), r"labels must be in \[0, 10\]"),
    "labels that are no whole numbers": (
        lambda: digits_with(labels=digits().cond.float()),
        "integer labels, not torch.float32",
    ),
    "labels in one column": (column, r"integer labels, not torch.int64 of shape"),
    "labels for a teacher without classes": (without_classes, "has no classes"),
    "no labels": (lambda: digits_with(), "label"),
    "a shape that the data do not have": (lambda: tiny.problem(shape=(32,)), r"\(64,\)"),
}
CASES = [pytest.param(case, arm, id=f"{case}, {arm}") for case in UNFIT for arm in ("PD", "PD + DDIL")]


@pytest.mark.parametrize(("case", "arm"), CASES)
def test_pieces_that_do_not_fit(case: str, arm: str, tmp_path: Path) -> None:
    """Distillation with such a problem stops before the first update, and leaves no student."""
    make, message = UNFIT[case]
    collected = (0.0, 0.0) if arm == "PD" else (1.0, 1.0)
    with pytest.raises(ValueError, match=message):
        distil(make(), tiny.plan(updates=3, collected=collected), tmp_path / "run")
    assert not list(tmp_path.rglob("student"))
    assert not any(path.read_text() for path in tmp_path.rglob("log.jsonl"))


NO_PLANS: list[tuple[dict[str, Any], str]] = [
    ({"weighting": "snr+1"}, r"weighting = 'snr\+1': must be one of .*truncated_snr.* \(did you mean snr"),
    ({"reuse": 0.0}, "reuse = 0.0: must be a number > 0"),
    ({"ema": 1.0}, r"ema = 1.0: must be a number in \(0, 1\)"),
    ({"learning_rate": float("nan")}, "learning_rate = nan: must be a number > 0"),
    ({"batch": 0}, "batch = 0: must be a whole number ≥ 1"),
    ({"mixing": "both"}, "mixing = 'both': must be one of batch, sample"),
]


@pytest.mark.parametrize(("changes", "message"), NO_PLANS)
def test_plans_that_cannot_be_followed(changes: dict[str, Any], message: str) -> None:
    """A name or a number that a plan cannot have is refused as the plan is made."""
    with pytest.raises(UnusableValues, match=message):
        tiny.plan(**changes)


def test_a_plan_is_checked_whether_or_not_it_is_used() -> None:
    """A mixing that does not exist is refused for PD too."""
    with pytest.raises(ValueError, match="mixing = 'both': must be one of batch, sample"):
        tiny.plan(mixing="both", collected=(0.0, 0.0))


def test_a_replay_that_does_not_fit() -> None:
    """Too few places, and lanes that cannot be shared, with the numbers that would do."""
    rollout = Rollout(mlp(), Teacher(CountingTeacher(), uniform_grid(8)), (64,), source=Source(shard=Shard(0, 2)))
    message = "capacity 15 cannot hold one collection of 4 walks of 4 states each: at least 16"
    with pytest.raises(ValueError, match=message):
        Replay(rollout, 16, 10, capacity=15)
    Replay(rollout, 16, 10, capacity=16)
    for walks in (3, 1):
        message = f"{walks} roll-outs per collection must divide the batch of 16 and be shared by 2 processes"
        with pytest.raises(ValueError, match=message):
            Replay(rollout, 16, 10, walks=walks)


def test_a_grid_that_was_not_trained() -> None:
    """Other steps, times between the teacher's, and states between the nodes are refused."""
    student, teacher = Sampler(mlp(), uniform_grid(4), (64,)), Sampler(CountingTeacher(), uniform_grid(8), (64,))
    with pytest.raises(ValueError, match=r"made for 4 steps at t = \[1.0, 0.75, 0.5, 0.25, 0.0\], not 5; force=True"):
        student.sample(range(2), steps=5)
    more_steps, another_end, other_times = uniform_grid(16), uniform_grid(4, 1.0, 0.1), [1.0, 0.8, 0.5, 0.2, 0.0]
    for grid in (more_steps, another_end, torch.tensor(other_times)):
        with pytest.raises(ValueError, match="its times must be every k-th of the teacher's"):
            covariate_shift(Sampler(mlp(), grid, (64,)), teacher, range(2))
    method = Progressive(Teacher(CountingTeacher(), uniform_grid(8)))
    states = Rollout(mlp(), Teacher(Gaussian(), uniform_grid(4)), (64,), label=False, beta=1.0).sample(4, 0)
    states.t[:] = 0.875  # a node of the teacher's grid, not of the student's
    with pytest.raises(ValueError, match="not nodes of the student's grid"):
        method.loss(mlp(), states)


def test_a_student_is_not_guided_again(tmp_path: Path) -> None:
    """Not from the disk, not inside its threshold, not as the teacher of the next problem; scale 1 is no guidance."""
    made = digits_problem(2.0)
    Sampler(made.student, uniform_grid(4), made.shape, guidance_scale=2.0).save(tmp_path / "student")
    loaded = Sampler.load(tmp_path / "student").denoiser
    attempts = (
        lambda: Guided(loaded, 2.0),
        lambda: Guided(Reflected(loaded), 0.0),
        lambda: digits_problem(2.0, tmp_path / "student"),
        lambda: Guided.from_weight(loaded, 1.0),
    )
    for attempt in attempts:
        with pytest.raises(ValueError, match="would apply guidance twice; use guidance_scale=1"):
            attempt()
    assert Guided(loaded, 1.0).guidance_distilled


def test_the_student_of_a_distilled_student_is_not_guided_either(tmp_path: Path) -> None:
    """An unguided teacher that imitates a guided one makes students that do."""
    made = digits_problem(2.0)
    Sampler(made.student, uniform_grid(4), made.shape, guidance_scale=2.0).save(tmp_path / "student")
    with pytest.raises(ValueError, match="guidance twice"):
        Guided(digits_problem(1.0, tmp_path / "student").student, 2.0)


def test_a_teacher_with_a_threshold(tmp_path: Path) -> None:
    """A saved student with thresholded estimates may teach the next problem, unless that would guide it again."""
    teacher = digits_problem().teacher.denoiser
    Sampler(Reflected(teacher), uniform_grid(4), (1, 8, 8)).save(tmp_path / "student")
    made = digits_problem(2.0, tmp_path / "student")
    assert made.student.guidance_distilled and not made.teacher.guidance_distilled


@pytest.mark.parametrize("change", ["guidance", "width"])
def test_a_folder_of_another_problem(change: str, tmp_path: Path) -> None:
    """The students of another problem (teacher guided otherwise, other network) are not handed out as this one's."""
    if change == "guidance":
        first, second = digits_problem(1.5), digits_problem(3.0)
    else:
        first, second = tiny.problem(), atoms_problem(**{**tiny.OPTIONS, "width": 16})
    plan = tiny.plan(updates=2, stages=(2, 1), collected=(0.0, 0.0))
    distil(first, plan, tmp_path / "run")
    message = f"student was made otherwise.*{change}.* there, .* here.*Use another folder, or delete it"
    with pytest.raises(ValueError, match=message):
        distil(second, plan, tmp_path / "run")


# Divergence


def test_divergence_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """One bad sample stops the run at the update that meets it; mended, the run goes on as if nothing had been."""
    plan = tiny.plan(collected=(0.0, 0.0), updates=15, batch=4, checkpoint_every=5, reflection="off")
    good, bad = tiny.problem(data=tiny.problem().data), tiny.problem()
    twelfth = shuffled_indices(len(bad.data), 4, 11, plan.settings(4).seed)  # twelve batches of 4 out of 50: all new
    row = twelfth[0]
    bad.data = TensorData(bad.data.x.clone())
    bad.data.x[row] = float("nan")
    message = "loss is nan at update 12 of 15. Last good checkpoint: .*update-00000010. Lower the learning rate"
    with pytest.raises(NonFiniteLoss, match=message):
        distil(bad, plan, tmp_path / "run")
    stage = tmp_path / "run" / "8-to-4"
    assert [line["update"] for line in read_log(stage)] == list(range(1, 12))
    assert not (stage / "student").exists()
    unseal(latest_checkpoint(stage))
    distil(good, plan, tmp_path / "run")
    distil(good, plan, tmp_path / "straight")
    tiny.assert_same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("collected", [(0.0, 0.0), (1.0, 1.0)])
def test_a_rate_that_explodes(collected: tuple[float, float], tmp_path: Path) -> None:
    """A learning rate of 1e30 ends in one error that names it; no student is left that could be taken for one."""
    message = r"at update \d+ of 40\. Last good checkpoint: none\. Lower the learning rate \(now 1e\+30\)"
    with pytest.raises(NonFiniteLoss, match=message):
        distil(tiny.problem(), tiny.plan(learning_rate=1e30, collected=collected, checkpoint_every=0), tmp_path)
    assert not list(tmp_path.rglob("student"))
    assert all(line["loss"] < float("inf") for line in read_log(tmp_path / "8-to-4"))


# Checkpoints


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at updates 10 and 20, ended after 25."""

    class Enough(Exception):
        pass

    def until_25(steps, _):
        for step in steps:
            if step == 25:
                raise Enough
            yield step

    folder = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(Enough):
        distil(tiny.problem(), tiny.plan(), folder, bar=until_25)
    return folder


@pytest.fixture
def resumable(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of the interrupted run, to be damaged."""
    return shutil.copytree(interrupted, tmp_path / "run")


def flip(path: Path) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of the roll-in": (
        lambda place: flip(place / "rollin-0.safetensors"),
        "rollin-0.safetensors in .*update-00000020 is damaged",
    ),
    "a bit of the average": (
        lambda place: flip(place / "average.safetensors"),
        "average.safetensors in .*update-00000020 is damaged",
    ),
    "half an optimiser": (
        lambda place: os.truncate(place / "optimizer-student.safetensors", 1000),
        "optimizer-student.safetensors in .*update-00000020 is damaged",
    ),
    "a lost file": (
        lambda place: (place / "network-student.safetensors").unlink(),
        "update-00000020 is not complete .*network-student.safetensors",
    ),
    "no description": (lambda place: (place / "sealed.json").unlink(), "update-00000020 is not complete .*sealed.json"),
    "half a description": (lambda place: os.truncate(place / "sealed.json", 50), "update-00000020 is not complete"),
    "zeros for a description": (
        lambda place: (place / "sealed.json").write_bytes(bytes(50)),
        "update-00000020 is not complete",
    ),
    "a description that is no text": (
        lambda place: (place / "sealed.json").write_bytes(b"\xff\xfe\x00"),
        "update-00000020 is not complete",
    ),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    distil(tiny.problem(), tiny.plan(), folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(damage: str, resumable: Path, straight: Path) -> None:
    """It is named with the remedy, and the remedy works: the run goes on from the one before, to the same end."""
    place = latest_checkpoint(resumable / "8-to-4")
    DAMAGES[damage][0](place)
    with pytest.raises(ValueError, match=f"{DAMAGES[damage][1]}.*delete it to go on from an earlier checkpoint"):
        distil(tiny.problem(), tiny.plan(), resumable)
    shutil.rmtree(place)
    distil(tiny.problem(), tiny.plan(), resumable)
    tiny.assert_same(resumable, straight)


FOREIGN: dict[str, tuple[dict[str, Any], Callable[[], Problem], tuple[str, ...]]] = {
    "batch": ({"batch": 8}, tiny.problem, ("batch 16 there, 8 here",)),
    "network": ({}, lambda: tiny.problem(student=mlp()), ("parameters '",)),
    "roll-in": ({"collected": (0.0, 0.0)}, tiny.problem, ("roll-in 'Mixture' there, 'Forward' here",)),
    "method": (
        {"weighting": "snr", "seed": 2},
        tiny.problem,
        ("seed 1 there, 2 here", "weighting 'truncated_snr' there, 'snr' here"),
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_checkpoint(name: str, resumable: Path) -> None:
    """Of another batch, network, roll-in or method: refused with what differs, and left as it is."""
    changes, make, differences = FOREIGN[name]
    stage = resumable / "8-to-4"
    before = {path: path.read_bytes() for path in stage.rglob("*") if path.is_file()}
    message = "update-00000020 belongs to another run: .*Use another folder, or delete it to start anew"
    with pytest.raises(ValueError, match=message) as caught:
        distil(make(), tiny.plan(**changes), resumable)
    assert [part for part in differences if part not in str(caught.value)] == [], caught.value
    assert {path: path.read_bytes() for path in stage.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_no_training(resumable: Path) -> None:
    """A saved sampler in the place of a checkpoint is none."""
    Sampler(mlp(), uniform_grid(4), (64,)).save(resumable / "8-to-4" / "checkpoints" / "update-00000030")
    with pytest.raises(ValueError, match="update-00000030 belongs to another run"):
        distil(tiny.problem(), tiny.plan(), resumable)


# Saved samplers


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved student with a threshold."""
    torch.manual_seed(0)
    student = Sampler(Reflected(mlp()).eval().requires_grad_(False), uniform_grid(4), (64,))
    return student.save(tmp_path_factory.mktemp("saved") / "student")


def files_of(*folders: Path) -> list[Path]:
    """All files in some folders that a program reads; templates, style sheet and script of the pages are text."""
    site = ddil.datasets.digits.ASSETS / "site"
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in paths if path.name != ".lock" and path.parent != site]


def check_content(path: Path) -> None:
    """Raise ValueError unless a file is what its name says: text, YAML, JSON, lines of JSON or safetensors."""
    head = path.read_bytes()
    if path.suffix == ".txt":
        head.decode("utf-8")
    elif path.suffix == ".yaml":
        yaml.safe_load(head)
    elif path.suffix == ".safetensors":
        json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])  # a pickle has no such header
    else:
        for part in head.splitlines() if path.suffix == ".jsonl" else [head]:
            json.loads(part)


def test_no_file_is_a_pickle(saved: Path, interrupted: Path) -> None:
    """Samplers, assets and checkpoints are JSON and safetensors, and none is a pickle under another name."""
    paths = files_of(saved, interrupted, ddil.datasets.digits.ASSETS)
    assert {path.suffix for path in paths} == {".json", ".jsonl", ".safetensors", ".txt", ".yaml"}
    for path in paths:
        check_content(path)


def test_nothing_is_unpickled(saved: Path, interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers, assets and checkpoints load without torch.load and pickle."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    pickles = [(torch, "load"), (torch.serialization, "load")]
    pickles += [(pickle, name) for name in ("load", "loads", "Unpickler")]
    for owner, name in pickles:
        monkeypatch.setattr(owner, name, refuse)
    assert Sampler.load(saved).sample(range(2)).shape == (2, 64)
    assert ddil.datasets.digits.digits_teacher().steps == 32
    assert ddil.datasets.digits.digits_classifier() is not None
    begun: list[int] = []
    folder = shutil.copytree(interrupted, tmp_path / "resumed")
    distil(tiny.problem(), tiny.plan(), folder, bar=lambda steps, _: begun.append(steps[0]) or steps)
    assert begun == [20]


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "network": (
        lambda d: d["denoiser"].update(network="UNet9DModel"),
        "holds a ClassDenoiser of a UNet9DModel: known are",
    ),
    "adapter": (lambda d: d["denoiser"].update(adapter="os.system"), "holds a os.system of a MLP: known are"),
    "schedule": (
        lambda d: d["denoiser"]["schedule"].update(name="Cosin"),
        "unknown schedule 'Cosin'; known are Cosine",
    ),
    "field of the schedule": (lambda d: d["denoiser"]["schedule"].update(limits=3), "has no field limits"),
    "prediction": (
        lambda d: d["denoiser"].update(prediction="epsilon"),
        "prediction must be one of x, eps, v, flow, not 'epsilon'",
    ),
    "threshold": (lambda d: d["denoiser"]["wrappers"][0].update(kind="soft"), "'static' or 'dynamic'"),
    "solver": (lambda d: d.update(solver="dimm"), "unknown solver 'dimm'; known are ddim"),
    "grid": (lambda d: d.update(grid=[0.0, 0.5, 1.0]), "must fall strictly"),
    "no denoiser": (lambda d: d.pop("denoiser"), "is not a saved sampler"),
    "no hashes": (lambda d: d.pop("files"), "student is not complete .*files"),
    "wrapper": (lambda d: d["denoiser"]["wrappers"].append({"name": "Clipped"}), "Clipped"),
    "no wrappers": (lambda d: d["denoiser"].pop("wrappers"), "student.*wrappers"),
    "no grid": (lambda d: d.pop("grid"), "student.*grid"),
    "option of a newer version": (lambda d: d["denoiser"].update(memory=1), "student.*memory"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_description_that_makes_no_sense(name: str, saved: Path, tmp_path: Path) -> None:
    """A sampler that asks for what this version does not know, or lacks what it needs, is refused by name."""
    change, message = EDITS[name]
    place = tiny.edited(saved, tmp_path / "student", change)
    with pytest.raises(ValueError, match=message):
        Sampler.load(place)


def configured(place: Path, **changes: Any) -> None:
    """Change the configuration of a saved sampler's network."""
    path = place / "network" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def halve(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of the weights": (lambda place: flip(place / WEIGHTS), f"{WEIGHTS} in .*student is damaged.*save it again"),
    "half the weights": (lambda place: os.truncate(place / WEIGHTS, 500), f"{WEIGHTS} in .*student is damaged"),
    "no weights": (lambda place: (place / WEIGHTS).unlink(), f"student is not complete .*{WEIGHTS}.*save it again"),
    "half a description": (lambda place: halve(place / "sealed.json"), "student is not complete .*save it again"),
    "a description of another kind": (
        lambda place: (place / "sealed.json").write_text("[]"),
        "student is not complete",
    ),
    "another width": (lambda place: configured(place, width=8), "student|expected shape"),
    "fewer layers": (lambda place: configured(place, depth=0), "config.json"),
    "more layers": (lambda place: configured(place, depth=2), "config.json"),
    "half a configuration": (lambda place: os.truncate(place / "network" / "config.json", 20), "config.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_sampler(name: str, saved: Path, tmp_path: Path) -> None:
    """It is refused with the file's name; it never samples from what is left."""
    damage, message = BROKEN[name]
    place = shutil.copytree(saved, tmp_path / "student")
    damage(place)
    with pytest.raises(ValueError, match=message):
        Sampler.load(place)


def test_a_damaged_student_is_not_passed_on(tmp_path: Path) -> None:
    """A finished stage whose student was damaged since is neither loaded nor silently trained anew."""
    plan = tiny.plan(updates=2)
    distil(tiny.problem(), plan, tmp_path / "run")
    flip(tmp_path / "run" / "8-to-4" / "student" / WEIGHTS)
    with pytest.raises(ValueError, match="8-to-4/student is damaged"):
        distil(tiny.problem(), plan, tmp_path / "run")


def with_classes() -> Sampler:
    """A student of ten classes."""
    return Sampler(mlp(classes=11), uniform_grid(2), (64,))


NOT_SAMPLED: dict[str, tuple[bool, Any, Any, str]] = {
    "a student without classes": (False, range(2), torch.zeros(2, dtype=torch.int64), "has no classes: pass cond=None"),
    "no samples": (False, [], None, "nothing to sample"),
    "too many labels": (True, range(2), torch.tensor([1, 2, 3]), "3 rows for 2 samples"),
    "no labels": (True, range(2), None, "2 integer labels, not NoneType"),
    "out of range": (True, range(2), torch.tensor([1, -1]), "labels must be in"),
    "of the wrong type": (True, range(2), torch.tensor([1.0, 2.0]), "not torch.float32"),
}


@pytest.mark.parametrize("name", NOT_SAMPLED)
def test_what_is_sampled_must_fit(name: str, saved: Path) -> None:
    """Labels that do not fit the samples or the student are refused; and no samples at all."""
    classes, ids, cond, message = NOT_SAMPLED[name]
    sampler = with_classes() if classes else Sampler.load(saved)
    with pytest.raises(ValueError, match=message):
        sampler.sample(ids, cond)


# Assets


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the assets, which the library takes for its own."""
    shutil.copytree(ddil.datasets.digits.ASSETS, tmp_path / "assets")
    for module in (ddil.datasets.digits, ddil.distil.problem):
        monkeypatch.setattr(module, "ASSETS", tmp_path / "assets", raising=False)
    return tmp_path / "assets"


def test_a_damaged_teacher(assets: Path) -> None:
    """It is not used."""
    flip(assets / "digits-teacher" / WEIGHTS)
    with pytest.raises(ValueError, match="digits-teacher is damaged"):
        digits_problem()


@pytest.mark.parametrize("name", ["digits-teacher", "digits-classifier"])
def test_missing_assets(name: str, assets: Path) -> None:
    """A teacher or a classifier that is not there is named."""
    shutil.rmtree(assets / name)
    with pytest.raises(FileNotFoundError, match=f"there is no .*{name}"):
        getattr(ddil.datasets.digits, name.replace("-", "_"))()


def test_a_missing_teacher_tells_the_remedy(assets: Path) -> None:
    """`make teacher`, or a reinstallation."""
    shutil.rmtree(assets / "digits-teacher")
    with pytest.raises(FileNotFoundError, match="make teacher"):
        ddil.datasets.digits.digits_teacher()


def test_a_damaged_classifier(assets: Path) -> None:
    """The classifier's weights are held against their hash, as the teacher's are."""
    flip(assets / "digits-classifier" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        ddil.datasets.digits.digits_classifier()
