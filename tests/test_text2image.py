"""Text-to-image models: SDXL's conditions through every part, interruption at any update, and what the command line refuses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ddil import cli
from ddil.solvers.sampler import Sampler
from ddil.rollins.data import TensorData
from ddil.diffusion.denoiser import Denoiser
from ddil.diffusion.wrappers import Guided, innermost
from ddil.files import read_tensors
from ddil.solvers import walk
from ddil.datasets.scenes import tiny_pipeline
from ddil.models.export import export_pipeline
from ddil.models.pipeline import TextToImage
from ddil.distil.recipe import Plan, distil_text
from ddil.training.journal import read_log

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
    return TensorData(noise, {key: value.clone() for key, value in cond.items()} if isinstance(cond, dict) else cond.clone())


def plan(model: Path, output: Path, **changes) -> Plan:
    """A plan of a few updates."""
    small = dict(size=32, stages=(4, 2), updates=6, batch=4, guidance_scale=3.0, capacity=16, checkpoint_every=2, check_weights=False, learning_rate=1e-3, rank=4, device="cpu")
    return Plan(str(model), "given", str(output), **{**small, **changes})


def weights(sampler: Sampler) -> dict[str, Tensor]:
    return innermost(sampler.denoiser).network.state_dict()


@pytest.mark.parametrize("method", ["PD", "LCM", "SFD", "DMD2"])
def test_sdxl_from_plan_to_plain_diffusers(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    """Pooled embeddings and sizes travel through roll-ins, replay and guidance, and plain diffusers draws the student's pictures."""
    data = latents(models["StableDiffusionXL"])
    student = distil_text(plan(models["StableDiffusionXL"], tmp_path / "run", method=method), data=data)[2]
    moved = max((after - before).abs().max() for after, before in zip(weights(student).values(), TextToImage.load(models["StableDiffusionXL"]).network.state_dict().values()))
    assert moved > 1e-4
    folder = export_pipeline(student, TextToImage.load(models["StableDiffusionXL"]), tmp_path / "out")
    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True)
    plain.set_progress_bar_config(disable=True)
    noise, draw = torch.randn(2, 4, 8, 8), torch.Generator().manual_seed(3)
    theirs = plain(PROMPTS[:2], num_inference_steps=2, guidance_scale=1.0, latents=noise.clone(), generator=draw, output_type="latent", height=32, width=32).images
    draw = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        ours = list(walk(student.denoiser, noise, student.grid, data.conditions(np.arange(2)), student.step, lambda z: torch.randn(z.shape, generator=draw)))[-1]
    assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()


class Stopped(Exception):
    """Stands for a kill between two updates."""


@pytest.mark.parametrize(("method", "adapters"), [("PD", "full"), ("PD", "lora"), ("DMD2", "lora")])
@pytest.mark.parametrize("stop", [1, 3])
def test_interrupted_and_gone_on_with(models: dict[str, Path], tmp_path: Path, method: str, adapters: str, stop: int) -> None:
    """The student is the same to the last bit, whether or not its training was interrupted."""

    def interrupted(updates: Iterable[int], stage: str) -> Iterator[int]:
        for count, update in enumerate(updates):
            if count == stop:
                raise Stopped
            yield update

    data, asked = latents(models["StableDiffusion"]), plan(models["StableDiffusion"], tmp_path / "whole", method=method, adapters=adapters)
    whole = distil_text(asked, data=data)[2]
    with pytest.raises(Stopped):
        distil_text(replace(asked, output=str(tmp_path / "parts")), bar=interrupted, data=data)
    again = distil_text(replace(asked, output=str(tmp_path / "parts")), data=data)[2]
    assert all(torch.equal(one, other) for one, other in zip(weights(whole).values(), weights(again).values()))


def test_adapters_alone_are_checkpointed(models: dict[str, Path], tmp_path: Path) -> None:
    """The frozen base is not written at every checkpoint."""
    distil_text(plan(models["StableDiffusion"], tmp_path, adapters="lora"), data=latents(models["StableDiffusion"]))
    kept = read_tensors(next((tmp_path / "4-to-2" / "checkpoints").glob("update-*")) / "network-student.safetensors")
    assert kept and all("lora_" in name or name.startswith("null_") for name in kept)


@pytest.mark.parametrize("states", ["mixture", "simulated"])
def test_roles_of_dmd2_in_plain_diffusers(models: dict[str, Path], tmp_path: Path, states: str) -> None:
    """Three roles on one network: the student's LoRA file on the untouched base, and its folder, give its pictures at 999, 749, 499, 249."""
    source, shares = models["StableDiffusion"], {"collected": (1.0, 1.0), "beta": (1.0, 1.0)} if states == "simulated" else {}
    data = latents(source)
    student = distil_text(plan(source, tmp_path / "run", method="DMD2", adapters="lora", alpha=2.0, stages=(8, 4), updates=12, ratio=2, learning_rate=1e-2, **shares), data=data)[4]
    told = read_log(tmp_path / "run" / "8-to-4")[-1]
    assert (told["beta used"] == 1.0 and "forward used" not in told) if states == "simulated" else told["forward used"] + told["collected used"] == 1.0
    folder, model = export_pipeline(student, TextToImage.load(source), tmp_path / "out"), TextToImage.load(source)
    card = (folder / "README.md").read_text()
    assert "[999, 749, 499, 249]" in card and "**guidance_scale=1.0**" in card and "DMD2" in card
    whole, light = (diffusers.StableDiffusionPipeline.from_pretrained(place, use_safetensors=True) for place in (folder, source))
    light.load_lora_weights(tmp_path / "run" / "8-to-4" / "lora")
    light.scheduler = diffusers.LCMScheduler.from_pretrained(tmp_path / "run" / "8-to-4" / "lora", subfolder="scheduler")
    noise, cond = torch.randn(2, 4, 8, 8), data.conditions(np.arange(2))

    def walked(denoiser: Denoiser) -> Tensor:
        draw = torch.Generator().manual_seed(3)
        with torch.inference_mode():
            return list(walk(denoiser, noise, student.grid, cond, student.step, lambda z: torch.randn(z.shape, generator=draw)))[-1]

    ours = walked(student.denoiser)
    assert (walked(model.denoiser()) - ours).abs().max() > 1e-2 * ours.abs().max()
    for plain in (whole, light):
        plain.set_progress_bar_config(disable=True)
        theirs = plain(PROMPTS[:2], num_inference_steps=4, guidance_scale=1.0, latents=noise.clone(), generator=torch.Generator().manual_seed(3), output_type="latent", height=32, width=32).images
        assert plain.scheduler.timesteps.tolist() == [999, 749, 499, 249]
        assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()


def test_a_student_is_not_guided_twice(models: dict[str, Path], tmp_path: Path) -> None:
    """Ours refuses, and the card says what to do in diffusers."""
    student = distil_text(plan(models["StableDiffusion"], tmp_path / "run"), data=latents(models["StableDiffusion"]))[2]
    with pytest.raises(ValueError, match="guidance twice"):
        Guided(student.denoiser, 2.0)
    card = (export_pipeline(student, TextToImage.load(models["StableDiffusion"]), tmp_path / "out") / "README.md").read_text()
    assert "**2 steps**" in card and "**guidance_scale=1.0**" in card and "[999, 499]" in card


def test_another_plan_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """A run does not go on under other values, nor with another model."""
    data, asked = latents(models["StableDiffusion"]), plan(models["StableDiffusion"], tmp_path / "run")
    distil_text(asked, data=data)
    with pytest.raises(ValueError, match="guidance_scale 3.0 there, 2.0 here"):
        distil_text(replace(asked, guidance_scale=2.0), data=data)
    other = tiny_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="model"):
        distil_text(replace(asked, model=str(other)), data=data)


def test_processes_must_be_launched(models: dict[str, Path], tmp_path: Path) -> None:
    """A plan for two processes is not quietly carried out by one."""
    with pytest.raises(RuntimeError, match="asks for 2 processes"):
        distil_text(plan(models["StableDiffusion"], tmp_path, processes=2), data=latents(models["StableDiffusion"]))


@pytest.mark.parametrize(("arguments", "told"), [
    (["--preset", "sd15-coco"], "a plan needs model and data"),
    (["--model", "m", "--data", "d", "--updates", "many"], "--updates must be of the kind int"),
    (["--model", "m", "--data", "d", "--method", "LCN"], "did you mean LCM?"),
    (["no-such.yaml"], "there is no file no-such.yaml"),
])
def test_command_line_refuses(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that cannot be read is told, with status 2."""
    assert cli.main(["distil", *arguments]) == 2
    assert told in capsys.readouterr().err
