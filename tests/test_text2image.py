"""Text-to-image models: SDXL's conditions in every part, interruption at any update, what the command line refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ddil import cli
from ddil.solvers.sampler import Sampler
from ddil.rollins.data import TensorData
from ddil.diffusion.denoiser import Denoiser, map_cond
from ddil.diffusion.wrappers import Guided, innermost
from ddil.files import read_tensors
from ddil.solvers import walk
from ddil.datasets.scenes import tiny_pipeline
from ddil.models.export import export_pipeline
from ddil.models.pipeline import TextToImage
from ddil.models.prediction import output_layer, with_prediction
from ddil.distil.doctor import alike
from ddil.distil.plan import Plan, preset, read_plan
from ddil.distil.problem import Bar, ModelOptions, no_bar, problem_of_model
from ddil.distil.stages import distil, stage_of
from ddil.training.journal import read_log
from tiny import largest_difference

PROMPTS = ["a red square above a blue circle", "three green triangles", "a small white circle", "two pink squares"] * 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each kind."""
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_pipeline(root / kind, kind) for kind in ("StableDiffusion", "StableDiffusionXL")}


def latents(model: Path) -> TensorData:
    """Sixteen latents with the conditions of the prompts."""
    cond = TextToImage.load(model).conditions(PROMPTS, 32)
    noise = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorData(noise, map_cond(Tensor.clone, cond))


def plan(model: Path, output: Path, **changes) -> Plan:
    """A plan of a few updates."""
    asked = {"model": str(model), "data": "given", "output": str(output), "device": "cpu"}
    asked |= {"size": 32, "guidance_scale": 3.0, "check_weights": False, "stages": (4, 2), "updates": 6, "batch": 4}
    return Plan(**{**asked, "checkpoint_every": 2, "learning_rate": 1e-3, **changes})


LORA = {"adapters": "lora", "rank": 4}
SMALL = {"capacity": 16}  # where there is a replay


def carried_out(asked: Plan, data: TensorData, bar: Bar = no_bar) -> dict[int, Sampler]:
    """The students of a plan, with data that are encoded already."""
    options = ModelOptions(**asked.problem_options)
    problem = problem_of_model(TextToImage.load(options.model), data, options)
    return distil(problem, asked, bar=bar)


def walked(denoiser: Denoiser, noise: Tensor, student: Sampler, cond: object) -> Tensor:
    """Where a walk on the student's grid ends."""
    draw = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        states = walk(denoiser, noise, student.grid, cond, student.step, lambda z: torch.randn(z.shape, generator=draw))
        return list(states)[-1]


def drawn(plain: diffusers.DiffusionPipeline, noise: Tensor, steps: int) -> Tensor:
    """The latents that plain diffusers draws of the first two prompts."""
    plain.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(3)
    sizes = {"height": 32, "width": 32, "output_type": "latent"}
    return plain(
        PROMPTS[:2], num_inference_steps=steps, guidance_scale=1.0, latents=noise.clone(), generator=draw, **sizes
    ).images


def weights(sampler: Sampler) -> dict[str, Tensor]:
    return innermost(sampler.denoiser).network.state_dict()


@pytest.mark.parametrize("method", ["PD", "LCM", "SFD", "DMD2"])
def test_sdxl_from_plan_to_plain_diffusers(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    """Pooled embeddings and sizes travel through roll-ins, replay and guidance; plain diffusers draws the same."""
    source, changes = models["StableDiffusionXL"], {"method": method, **({} if method == "SFD" else SMALL)}
    data = latents(source)
    student = carried_out(plan(source, tmp_path / "run", **changes), data)[2]
    before = TextToImage.load(source).network.state_dict()
    assert max((after - before[name]).abs().max() for name, after in weights(student).items()) > 1e-4
    folder = export_pipeline(student, TextToImage.load(source), tmp_path / "out")
    noise = torch.randn(2, 4, 8, 8)
    ours = walked(student.denoiser, noise, student, data.conditions(np.arange(2)))
    assert (ours - drawn_by_the_card(folder, source, noise)).abs().max() < 1e-4 * ours.abs().max()


@pytest.mark.parametrize(("method", "kind"), [("PD", {}), ("PD", LORA), ("LCM", LORA)])
def test_the_bound_travels(models: dict[str, Path], tmp_path: Path, method: str, kind: dict) -> None:
    """What was measured on the data is kept in plan, identity and student; plain diffusers draws the same with it."""
    source = models["StableDiffusion"]
    data, asked = latents(source), plan(source, tmp_path / "run", method=method, updates=2, **SMALL, **kind)
    assert asked.bound == "measured"
    student = carried_out(asked, data)[2]
    effective = read_plan(tmp_path / "run" / "plan.yaml")
    assert 2.7 < effective.bound < 4
    assert student.denoiser.threshold.bound == effective.bound == student.provenance["made by"]["bound"]
    assert carried_out(effective, data)[2].provenance == carried_out(asked, data)[2].provenance == student.provenance
    with pytest.raises(ValueError, match="made otherwise: bound"):
        carried_out(asked.but(bound=5.0), data)
    places = [export_pipeline(student, TextToImage.load(source), tmp_path / "out")]
    places += [tmp_path / "run" / "4-to-2" / "lora"] if kind else []
    noise, cond = 3 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), data.conditions(np.arange(2))
    ours, free = (walked(one, noise, student, cond) for one in (student.denoiser, student.denoiser.denoiser))
    assert (ours - free).abs().max() > 0.01 * ours.abs().max()  # the bound acts
    for place in places:
        assert (ours - drawn_by_the_card(place, source, noise)).abs().max() < 1e-5 * ours.abs().max()


def drawn_by_the_card(folder: Path, source: Path, noise: Tensor) -> Tensor:
    """The latents that the code on a card draws, in a process of its own that knows diffusers alone."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("\n```")[0]
    torch.save(noise, folder / "noise.pt")
    more = f'latents=torch.load("{folder}/noise.pt"), height=32, width=32, output_type="latent", '
    code = code.replace('"a prompt",', f"{PROMPTS[:2]}, {more} generator=torch.Generator().manual_seed(3),")
    code = code.replace("this folder", str(folder)).replace(f'"{source.name}"', f'"{source}"').replace("[0]", "")
    code = f'import sys, torch\n{code}\nassert "ddil" not in sys.modules\ntorch.save(image, "{folder}/image.pt")'
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return torch.load(folder / "image.pt")


def test_a_v_student_of_an_eps_teacher(models: dict[str, Path], tmp_path: Path) -> None:
    """It is converted first, says how near it came, and plain diffusers draws the same, told that it predicts v."""
    source = models["StableDiffusion"]
    data, asked = latents(source), plan(source, tmp_path / "run", updates=2, **SMALL, **TO_V)
    student = carried_out(asked, data)[2]
    assert TextToImage.load(source).prediction == "eps"
    assert innermost(student.denoiser).prediction == "v"
    told = student.provenance["conversion"]
    assert (told["from"], told["to"], told["updates"]) == ("eps", "v", 4)
    assert told["gap"]["before"].keys() == told["gap"]["after"].keys()
    made = Sampler.load(tmp_path / "run" / "conversion" / "4-to-4" / "student")
    assert innermost(made.denoiser).prediction == "v"
    folder = export_pipeline(student, TextToImage.load(source), tmp_path / "out")
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    noise, cond = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), data.conditions(np.arange(2))
    ours = walked(student.denoiser, noise, student, cond)
    assert (ours - drawn_by_the_card(folder, source, noise)).abs().max() < 1e-5 * ours.abs().max()


def test_adapters_keep_the_prediction(models: dict[str, Path], tmp_path: Path) -> None:
    """Adapters of an eps-network do not begin with a conversion to v; that they predict eps may be said."""
    source = models["StableDiffusion"]
    with pytest.raises(ValueError, match="prediction = 'v': adapters sit on the teacher's own network"):
        carried_out(plan(source, tmp_path, **SMALL, **LORA, prediction="v"), latents(source))
    student = carried_out(plan(source, tmp_path, **SMALL, **LORA, prediction="eps", updates=1), latents(source))[2]
    assert "conversion" not in student.provenance
    assert preset("sd15-coco", model="m", data="d").prediction == "v"
    assert preset("sd15-coco", model="m", data="d", adapters="lora").prediction == "teacher"


@pytest.mark.parametrize(("prediction", "expected"), [("eps", 213.6), ("v", 0.9953), ("x", 1.0)])
def test_the_weight_of_an_output_error(
    models: dict[str, Path], tmp_path: Path, prediction: str, expected: float
) -> None:
    """At the noisiest time progressive distillation weighs the squared error of an eps-network's output by 214, of a
    v-network's by 1: measured through the method that the plan makes.
    """
    source = models["StableDiffusion"]
    asked = plan(source, tmp_path, reflection="off", collected=(0, 0))
    problem = problem_of_model(TextToImage.load(source), latents(source), ModelOptions(**asked.problem_options))
    problem.student = with_prediction(innermost(problem.student), prediction)
    ready = stage_of(problem, asked)
    states, student, shift = alike(ready, 4), ready.stage.student, [0.0]
    output_layer(student.network).register_forward_hook(lambda layer, inputs, output: output + shift[0])

    def loss(moved: float) -> float:
        shift[0] = moved
        return next(iter(ready.method.turns(0))).loss({"student": student}, states)[0].item()

    curvature = (loss(0.5) + loss(-0.5) - 2 * loss(0.0)) / 2 / 0.5**2
    assert curvature == pytest.approx(expected, rel=2e-3)


class Stopped(Exception):
    """Stands for a kill between two updates."""


TO_V = {"prediction": "v", "conversion_updates": 4}


@pytest.mark.parametrize(("method", "kind"), [("PD", {}), ("PD", LORA), ("DMD2", LORA), ("PD", TO_V)])
@pytest.mark.parametrize("stop", [1, 3])
def test_interrupted_and_gone_on_with(
    models: dict[str, Path], tmp_path: Path, method: str, kind: dict, stop: int
) -> None:
    """The student is the same to the last bit, whether or not its training was interrupted."""

    def interrupted(updates: Iterable[int], stage: str) -> Iterator[int]:
        for count, update in enumerate(updates):
            if count == stop:
                raise Stopped
            yield update

    source = models["StableDiffusion"]
    data, asked = latents(source), plan(source, tmp_path / "whole", method=method, **SMALL, **kind)
    whole = carried_out(asked, data)[2]
    parts = asked.but(output=str(tmp_path / "parts"))
    with pytest.raises(Stopped):
        carried_out(parts, data, interrupted)
    again = carried_out(parts, data)[2]
    assert largest_difference(weights(whole), weights(again)) == 0


def test_adapters_alone_are_checkpointed(models: dict[str, Path], tmp_path: Path) -> None:
    """The frozen base is not written at every checkpoint."""
    source = models["StableDiffusion"]
    carried_out(plan(source, tmp_path, **SMALL, **LORA), latents(source))
    place = next((tmp_path / "4-to-2" / "checkpoints").glob("update-*"))
    names = read_tensors(place / "network-student.safetensors")
    assert any("lora_" in name for name in names)
    assert [name for name in names if "lora_" not in name and ".null_" not in f".{name}"] == []


@pytest.fixture(scope="module", params=[{}, {"collected": (0, 0)}], ids=["mixture", "simulated"])
def dmd2(request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of DMD2 on three roles of one network: on DDIL's states, and on the published ones."""
    source, place = models["StableDiffusion"], tmp_path_factory.mktemp("dmd2")
    how = {"method": "DMD2", "ratio": 2, "stages": (8, 4), "updates": 12, "learning_rate": 1e-2, **request.param}
    how |= {} if request.param else SMALL
    carried_out(plan(source, place, **how, **LORA, alpha=2.0), latents(source))
    return place


def test_states_of_dmd2(dmd2: Path, request: pytest.FixtureRequest) -> None:
    """The published method looks at its own walk alone; with DDIL, states of data and of roll-outs share a batch."""
    line = read_log(dmd2 / "8-to-4")[-1]
    if "simulated" in request.node.name:
        assert line["driven by student served"] == 1.0
        assert "forward served" not in line
    else:
        assert line["forward served"] + line["collected served"] == 1.0


def test_roles_of_dmd2_in_plain_diffusers(dmd2: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """The student's LoRA file on the untouched base, and its folder, give its pictures at 999, 749, 499, 249."""
    source, stage = models["StableDiffusion"], dmd2 / "8-to-4"
    student, model = Sampler.load(stage / "student"), TextToImage.load(source)
    folder = export_pipeline(student, TextToImage.load(source), tmp_path / "out")
    whole, light = (
        diffusers.StableDiffusionPipeline.from_pretrained(place, use_safetensors=True) for place in (folder, source)
    )
    light.load_lora_weights(stage / "lora")
    light.scheduler = diffusers.LCMScheduler.from_pretrained(stage / "lora", subfolder="scheduler")
    noise, cond = torch.randn(2, 4, 8, 8), latents(source).conditions(np.arange(2))
    ours, base = (walked(denoiser, noise, student, cond) for denoiser in (student.denoiser, model.denoiser()))
    assert (base - ours).abs().max() > 1e-2 * ours.abs().max()
    for plain in (whole, light):
        assert (ours - drawn(plain, noise, 4)).abs().max() < 1e-4 * ours.abs().max()
        assert plain.scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_the_card_of_dmd2(dmd2: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """It says which times, without guidance, and by which method."""
    student = Sampler.load(dmd2 / "8-to-4" / "student")
    card = (export_pipeline(student, TextToImage.load(models["StableDiffusion"]), tmp_path) / "README.md").read_text()
    assert "[999, 749, 499, 249]" in card
    assert "**guidance_scale=1.0**" in card
    assert "dmd2" in card


def test_a_student_is_not_guided_twice(models: dict[str, Path], tmp_path: Path) -> None:
    """Ours refuses, and the card says what to do in diffusers."""
    source = models["StableDiffusion"]
    student = carried_out(plan(source, tmp_path / "run", **SMALL), latents(source))[2]
    with pytest.raises(ValueError, match="guidance twice"):
        Guided(student.denoiser, 2.0)
    card = (export_pipeline(student, TextToImage.load(source), tmp_path / "out") / "README.md").read_text()
    assert "**2 steps**" in card
    assert "**guidance_scale=1.0**" in card
    assert "[999, 499]" in card


def test_another_plan_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """A run does not go on under other values, nor with another model."""
    source = models["StableDiffusion"]
    data, asked = latents(source), plan(source, tmp_path / "run", **SMALL)
    carried_out(asked, data)
    with pytest.raises(ValueError, match="guidance_scale 3.0 there, 2.0 here"):
        carried_out(asked.but(guidance_scale=2.0), data)
    other = tiny_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="model"):
        carried_out(asked.but(model=str(other)), data)


def test_processes_must_be_launched(models: dict[str, Path], tmp_path: Path) -> None:
    """A plan for two processes is not quietly carried out by one."""
    source = models["StableDiffusion"]
    with pytest.raises(RuntimeError, match="asks for 2 processes"):
        carried_out(plan(source, tmp_path, processes=2, **{**SMALL, "batch": 8}), latents(source))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "sd15-coco"], "model is missing: name a folder in diffusers' format"),
        (["--preset", "sd15-coco"], "data is missing: name captioned pictures"),
        (["--model", "m", "--data", "d", "--updates", "many"], "updates = 'many': must be a whole number ≥ 1"),
        (["--model", "m", "--data", "d", "--method", "LCN"], "did you mean lcm?"),
        (["no-such.yaml"], "there is no file no-such.yaml"),
    ],
)
def test_command_line_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that cannot be read is told, with status 2."""
    assert cli.main(["distil", *arguments]) == 2
    assert message in capsys.readouterr().err
