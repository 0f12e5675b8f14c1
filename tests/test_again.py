"""An experiment that is run again into the same folder, with any parameter changed, gives the figures that a fresh
folder would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forked import ROOT, alone, run_experiment

from ddil.lab.results import read_results

TEXT = {"updates": 2, "batch": 4, "stages": [4, 2], "data": "scenes:16", "capacity": 32}
# Notebook: parameters of a tiny run, one that changes the training, and one that changes a measure alone.
TINY: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ddil": (
        {"teacher": "atoms", "stages": [4, 2], "atoms_updates": 6, "batch": 8, "seeds": [0, 1], "samples": 64},
        {"atoms_updates": 5},
        {"samples": 72},
    ),
    "distribution_matching": (
        {"methods": "unbiased score", "budget": 1000, "batch": 16, "seeds": [0, 1], "samples": 40},
        {"mixture_learning_rate": 1e-3},
        {"samples": 44},
    ),
    "trajectory_methods": (
        {"problems": "mixture", "methods": "naive", "steps": [1, 2], "budget": 1000, "batch": 16, "seeds": [0, 1]}
        | {"samples": 40},
        {"mixture_learning_rate": 1e-3},
        {"samples": 44},
    ),
    "covariate_shift": (
        {"problems": "atoms", "stages": [4, 2], "atoms_updates": 4, "batch": 8, "seeds": [0, 1], "samples": 40}
        | {"density_samples": 2},
        {"atoms_updates": 3},
        {"density_samples": 3},
    ),
    "priors": (
        {"families": "priors", "budget": 1000, "batch": 16, "width": 8, "seeds": [0, 1], "samples": 40},
        {"learning_rate": 1e-3},
        {"samples": 44},
    ),
    "compare": (
        {"budgets": [1000], "methods": "naive", "steps": [1], "seeds": [0, 1], "samples": 40},
        {"samples": 42},
        {"samples": 44},
    ),
    "prompt_inversion": (
        {"count": 2, "updates": 2, "restarts": 1, "per_prompt": 2, "tokens": 3, "teacher_steps": 2, "few_steps": 1},
        {"tokens": 2},
        {"per_prompt": 3},
    ),
    "adapter": (
        {"updates": 2, "data": "scenes:16", "tuned": [0, 1], "pictures": 8, "seeds": [0], "samples": 40},
        {"learning_rate": 1e-2},
        {"samples": 44},
    ),
    "text2image": (
        {"arms": "PD + DDIL", "changes": TEXT, "samples": 40, "diverse_prompts": 2, "per_prompt": 2},
        {"changes": {**TEXT, "updates": 3}},
        {"per_prompt": 3, "protocol": "paper"},
    ),
    "who_drives": (
        {"student": "a student", "samples": 8, "batch": 4, "seeds": [0], "shares": [0.5], "teacher_steps": 4},
        {"student": "another"},
        {"samples": 6},
    ),
    "scenes": (
        {"pictures": 64, "reader_updates": 2, "clip_updates": 3, "vae_updates": 2, "updates": 2, "batch": 4}
        | {"samples": 40},
        {"clip_updates": 2},
        {"samples": 44},
    ),
}
CLOCK = "seconds"  # what no two runs share


def figures(folder: Path) -> tuple[dict[tuple[str, int, str], Any], dict[str, Any]]:
    """Everything that results say, but for times: rows and protocol."""
    found = read_results(folder)
    rows = {(row["arm"], row["steps"], row["metric"]): row for row in found["rows"] if CLOCK not in row["metric"]}
    return rows, found["protocol"]


def saved(folder: str, name: str) -> None:
    """Save a student of two steps of the scenes' model, moved a little by the name."""
    import torch

    from ddil.datasets.digits import asset
    from ddil.diffusion.grids import trailing_grid
    from ddil.models.pipeline import TextToImage
    from ddil.solvers.sampler import Sampler

    base = TextToImage.load(asset("scenes-pipeline"))
    student = base.denoiser().eval()
    with torch.no_grad():
        next(student.network.parameters()).mul_(1 + len(name) / 100)
    Sampler(student, trailing_grid(2), base.latent_shape(32)).save(folder)


@pytest.mark.parametrize("name", TINY)
def test_the_same_folder_again(name: str, tmp_path: Path) -> None:
    """Other updates first, then other samples: what both left behind changes nothing."""
    parameters, training, measure = TINY[name]
    runs = [
        ("used", parameters | training),
        ("used", parameters),
        ("used", parameters | measure),
        ("fresh", parameters | measure),
    ]
    seen = []
    for place, given in runs:
        given = {**given, "output": str(tmp_path / place)}
        if "student" in given:  # always in the same folder, as if it had been trained anew
            alone(saved, str(tmp_path / "student"), given["student"])
            given["student"] = str(tmp_path / "student")
        assert not alone(run_experiment, ROOT / f"experiments/{name}.ipynb", given)
        seen.append(figures(tmp_path / place))
    other_training, before, used, fresh = seen
    assert used == fresh
    assert before[0] != other_training[0]
    assert before[0] != fresh[0]
