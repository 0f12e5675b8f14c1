"""An experiment that is run again into the same folder, with any parameter changed, gives the figures that a fresh
folder would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forked import ROOT, alone, run_experiment

from ddil.lab.results import read_results

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
}
CLOCK = "seconds"  # what no two runs share


def figures(folder: Path) -> dict[tuple[str, int, str], Any]:
    """Everything that results say, but for times."""
    found = read_results(folder)
    rows = {(row["arm"], row["steps"], row["metric"]): row for row in found["rows"] if CLOCK not in row["metric"]}
    return {**rows, **{("protocol", 0, metric): fields for metric, fields in found["protocol"].items()}}


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
        assert not alone(run_experiment, ROOT / f"experiments/{name}.ipynb", given)
        seen.append(figures(tmp_path / place))
    other_training, before, used, fresh = seen
    assert used == fresh
    trained = [key for key in before if key in other_training and before[key] != other_training[key]]
    measured = [key for key in before if key in fresh and before[key] != fresh[key]]
    assert trained
    assert measured
