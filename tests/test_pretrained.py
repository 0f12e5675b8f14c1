"""The experiments for models of others run on models as small as can be, and leave results of the one form."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import ROOT, alone, run_experiment

from ddil.lab.results import read_results


def tiny_ddpm(folder: str) -> None:
    """A DDPM pipeline of random weights and some pictures of its size."""
    import numpy as np
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from PIL import Image

    torch.manual_seed(0)
    sides = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    network = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4, **sides)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(f"{folder}/teacher")
    Path(folder, "images").mkdir()
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
            f"{folder}/images/{i}.png"
        )


def few_steps(folder: str) -> None:
    """The scenes' own model as a student of two steps."""
    from ddil.solvers.sampler import Sampler
    from ddil.datasets.digits import asset
    from ddil.diffusion.grids import trailing_grid
    from ddil.models.pipeline import TextToImage

    base = TextToImage.load(asset("scenes-pipeline"))
    Sampler(base.denoiser().eval(), trailing_grid(2), base.latent_shape(32)).save(folder)


def test_sfd_of_a_ddpm(tmp_path: Path) -> None:
    """A student for each number of evaluations, and the teacher at the same cost."""
    alone(tiny_ddpm, str(tmp_path))
    given = {
        "teacher": f"{tmp_path}/teacher",
        "images": f"{tmp_path}/images",
        "nfe": [1, 2],
        "walks": 2,
        "batch": 4,
        "samples": 4,
        "output": f"{tmp_path}/out",
    }
    failed = alone(run_experiment, ROOT / "experiments/sfd_images.ipynb", given)
    assert not failed, failed
    found = read_results(tmp_path / "out")
    arms = {(row["arm"], row["steps"]) for row in found["rows"] if row["metric"] == "Fréchet distance of thumbnails"}
    assert arms == {
        ("SFD", 1),
        ("SFD", 2),
        ("teacher, DDIM", 1),
        ("teacher, DDIM", 2),
        ("teacher, DPM-Solver++(3M)", 50),
    }
    cost = read_student_cost(tmp_path / "out/students/2-evaluations/seed-0/student")
    assert cost["student evaluations"] == 4 * 4, "two walks of four rows ask twice each; the analytic step asks nothing"


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
