"""The experiments on captioned scenes, as small as can be: training the pipeline and distilling it by several
methods.
"""

from __future__ import annotations

import math
from pathlib import Path

import diffusers
from forked import ROOT, alone, run_experiment

from ddil.files import unseal
from ddil.lab.results import read_results


def test_the_pipeline_is_trained(tmp_path: Path) -> None:
    """All networks are made and kept, plain diffusers reads the folder, and a second run makes none of them again."""
    parameters = {
        "pictures": 128,
        "reader_updates": 3,
        "clip_updates": 3,
        "vae_updates": 3,
        "updates": 4,
        "batch": 8,
        "samples": 40,
        "output": str(tmp_path),
    }
    assert not alone(run_experiment, ROOT / "experiments/scenes.ipynb", parameters)
    kept = {name: (tmp_path / name / "sealed.json").stat().st_mtime_ns for name in ("reader", "clip", "vae")}
    assert all(unseal(tmp_path / name) for name in (*kept, "pipeline"))
    assert (
        diffusers.StableDiffusionPipeline.from_pretrained(
            tmp_path / "pipeline", use_safetensors=True
        ).unet.config.sample_size
        == 8
    )
    assert not alone(run_experiment, ROOT / "experiments/scenes.ipynb", parameters)
    assert kept == {name: (tmp_path / name / "sealed.json").stat().st_mtime_ns for name in kept}


def test_the_pipeline_is_distilled(tmp_path: Path) -> None:
    """Stages, adapters and a walk; figures for teacher and students; folders that plain diffusers reads; an unknown
    arm is refused before anything is trained.
    """
    parameters = {
        "arms": "PD + DDIL, LCM-LoRA, SFD",
        "changes": {"updates": 2, "batch": 4, "stages": [8, 4, 2], "data": "scenes:32", "capacity": 32},
        "samples": 40,
        "diverse_prompts": 2,
        "per_prompt": 2,
        "output": str(tmp_path),
    }
    assert not alone(run_experiment, ROOT / "experiments/text2image.ipynb", parameters)
    rows = {(row["arm"], row["metric"]): row["mean"] for row in read_results(tmp_path)["rows"]}
    assert {arm for arm, _ in rows} == {
        "teacher, 50 steps",
        "teacher, 32 steps",
        "teacher, 2 steps",
        "PD + DDIL",
        "LCM-LoRA",
        "SFD",
    } and all(map(math.isfinite, rows.values()))
    assert rows["teacher, 32 steps", "all right"] > 0.25 > rows["teacher, 2 steps", "all right"], (
        "the shipped teacher draws what it is told"
    )
    schedulers = {
        arm: type(
            diffusers.DiffusionPipeline.from_pretrained(
                tmp_path / "exported" / arm / "seed-0" / "pipeline", use_safetensors=True
            ).scheduler
        ).__name__
        for arm in ("PD-DDIL", "LCM-LoRA", "SFD")
    }
    assert schedulers == {"PD-DDIL": "DDIMScheduler", "LCM-LoRA": "LCMScheduler", "SFD": "DDIMScheduler"}
    told = alone(
        run_experiment,
        ROOT / "experiments/text2image.ipynb",
        {**parameters, "arms": "PD, LCN", "output": str(tmp_path / "other")},
    )
    assert "'LCN' unknown" in told and not (tmp_path / "other").exists()
