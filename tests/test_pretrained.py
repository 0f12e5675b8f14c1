"""The experiments for models of others run on models as small as can be, and leave results of the one form."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import ROOT, alone, run_experiment

from ddil.lab.results import read_results


def tiny_ddpm(folder: str, classes: int | None = None) -> None:
    """A DDPM pipeline of random weights and some pictures of its size; those of a class lie in a subfolder."""
    import numpy as np
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from PIL import Image

    torch.manual_seed(0)
    sides = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "num_class_embeds": None if classes is None else classes + 1,
    }
    network = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4, **sides)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(f"{folder}/teacher")
    for i in range(6):
        place = Path(folder, "images", f"class {i % (classes or 1)}")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(place / f"{i}.png")


def few_steps(folder: str) -> None:
    """The scenes' own model as a student of two steps."""
    from ddil.solvers.sampler import Sampler
    from ddil.datasets.digits import asset
    from ddil.diffusion.grids import trailing_grid
    from ddil.models.pipeline import TextToImage

    base = TextToImage.load(asset("scenes-pipeline"))
    Sampler(base.denoiser().eval(), trailing_grid(2), base.latent_shape(32)).save(folder)


def tables_of(folder: Path, **given: object) -> dict[tuple[str, int], float]:
    """The distances that the experiment finds on the tiny model, by arm and evaluations."""
    small = {"walks": 2, "variable_walks": 2, "second_walks": 2, "updates": 3, "amed_samples": 4, "batch": 4}
    named = {"teacher": f"{folder}/teacher", "images": f"{folder}/images", "output": f"{folder}/out"}
    few = {"halvings_from": 4, "few_nfe": [1, 2], "solver_nfe": [2, 3], "samples": 4}
    failed = alone(run_experiment, ROOT / "experiments/sfd_images.ipynb", {**small, **named, **few, **given})
    assert not failed, failed
    rows = read_results(folder / "out")["rows"]
    return {(row["arm"], row["steps"]): row["mean"] for row in rows if row["metric"].startswith("Fréchet")}


def test_the_tables_of_sfd_on_a_ddpm(tmp_path: Path) -> None:
    """Every row of the published tables that needs no classes; and other parameters in the same folder."""
    alone(tiny_ddpm, str(tmp_path))
    arms = "SFD, SFD-v, PD, CD, CTM, DDIM, DPM-Solver++(3M), AMED, GITS"
    rows = tables_of(tmp_path, arms=arms, nfe=[1, 3])
    assert set(rows) == {
        *((arm, nfe) for arm in ("SFD", "SFD-v") for nfe in (1, 3)),
        ("SFD-v, second stage", 1),
        *((arm, nfe) for arm in ("PD", "CD", "CTM") for nfe in (1, 2)),
        *((arm, nfe) for arm in ("DDIM", "GITS") for nfe in (2, 3)),
        ("DPM-Solver++(3M)", 3),
        ("AMED", 3),
    }
    cost = read_student_cost(tmp_path / "out/students/SFD-3/seed-0/16-to-4/student")
    assert cost["student evaluations"] == 2 * 3 * 4, "two walks of four rows ask three times; the analytic step nothing"
    other = tables_of(tmp_path, arms="SFD, DDIM", nfe=[1, 3], walks=3, sigma_max=40.0)
    assert [key for key in other if other[key] == rows[key]] == []


def test_sfd_of_a_model_with_classes(tmp_path: Path) -> None:
    """Its students take the classes, which the subfolders name; and guided progressive distillation has a place."""
    alone(tiny_ddpm, str(tmp_path), 2)
    rows = tables_of(tmp_path, arms="SFD, guided PD, AMED", nfe=[2], guidance_scale=2.0)
    assert set(rows) == {("SFD", 2), ("guided PD", 1), ("guided PD", 2), ("AMED", 3)}


def read_student_cost(folder: Path) -> dict[str, float]:
    from ddil.files import unseal

    return unseal(folder)["provenance"]["cost"]


def test_who_drives(tmp_path: Path) -> None:
    """Teacher, student, their mixtures and hand-overs on one noise; who always drives is alone."""
    alone(few_steps, str(tmp_path / "student"))
    given = {
        "student": f"{tmp_path}/student",
        "samples": 4,
        "batch": 4,
        "seeds": [0],
        "shares": [1.0, 0.5],
        "teacher_steps": 4,
        "output": f"{tmp_path}/out",
    }
    failed = alone(run_experiment, ROOT / "experiments/who_drives.ipynb", given)
    assert not failed, failed
    found = {row["arm"]: row["mean"] for row in read_results(tmp_path / "out")["rows"] if row["metric"] == "CLIP score"}
    assert set(found) == {
        "teacher alone",
        "student alone",
        "p_T = 1",
        "p_T = 0.5",
        "teacher until t = 0.5",
        "student until t = 0.5",
    }
    assert (
        found["p_T = 1"] == pytest.approx(found["teacher alone"], abs=1e-6)
        and found["student alone"] != found["teacher alone"]
    )
