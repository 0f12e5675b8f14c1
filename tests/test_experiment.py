"""A real papermill run refuses parameters that cannot be used, reports its progress, and leaves a result with the
command that makes it anew.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from forked import ROOT, alone, run_experiment

from ddil.lab.parameters import command_line
from ddil.lab.results import read_results

PARAMETERS = """
updates: int = 4
rate: float = 1.0e-3
steps: list = [4, 2, 1]
shuffle: bool = True
name: str = "tiny"
output: str = "runs"
"""
CHECK = """
from ddil.forms import Text
from ddil.lab.parameters import *
from ddil.words import progress
from ddil.lab.results import row, write_results
given = check_parameters(globals(), {
    "updates": whole(), "rate": number(0, 1), "steps": halving_steps(), "shuffle": bool, "name": Text, "output": Text})
"""
RUN = """
reached = [float(update) for update in progress(range(given.updates), "training")]
rows = [row(given.name, steps, "error", {seed: given.rate * seed + steps for seed in (0, 1)}) for steps in given.steps]
protocol = {"error": {"samples": len(reached), "shuffle": given.shuffle}}
write_results(given.output, "tiny", protocol, command_line("tiny.ipynb", given), rows)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an experiment as small as can be."""
    cells = [
        {
            "cell_type": "code",
            "id": f"cell{i}",
            "execution_count": None,
            "metadata": {"tags": ["parameters"]} if i == 0 else {},
            "outputs": [],
            "source": source.strip(),
        }
        for i, source in enumerate((PARAMETERS, CHECK, RUN))
    ]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    (tmp_path / "tiny.ipynb").write_text(
        json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    )
    return tmp_path


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line as `make` would: this environment's python, this checkout's code, progress for a log."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DDIL_PROGRESS": "log",
    }
    return subprocess.run(
        command, shell=True, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
    )


def test_bad_parameters_stop_the_run(folder: Path) -> None:
    """A misspelt name and values of the wrong type are told together, and nothing is computed."""
    done = shell(
        command_line(
            "tiny.ipynb", {"updates": "many", "stpes": [8, 4], "shuffle": "no", "steps": "8,4,3", "output": "out"}
        ),
        folder,
    )
    assert done.returncode == 1
    for line in (
        "the parameters cannot be used",
        "stpes = [8, 4]: there is no such name (did you mean steps?)",
        "updates = 'many': must be a whole number ≥ 1",
        "shuffle = 'no': must be true or false",
        "3 is not half of 4: write 2 after 4",
    ):
        assert line in done.stderr, done.stderr
    assert not (folder / "out/results.json").exists()


def test_a_result_makes_itself_anew(folder: Path) -> None:
    """The command in a result, pasted into a shell, gives the same result; texts that look like something else
    survive it.
    """
    parameters = {
        "updates": 7,
        "rate": 1e-05,
        "steps": [8, 4],
        "shuffle": False,
        "name": 'None of "it"; 1e3 | é',
        "output": "out/with space",
    }
    done = shell(f"{command_line('tiny.ipynb', parameters)} --log-output", folder)
    assert done.returncode == 0, done.stderr
    assert any("training: 100%" in line and "7/7" in line for line in done.stderr.replace("\r", "\n").splitlines()), (
        done.stderr
    )
    file = folder / "out/with space/results.json"
    results = read_results(file)
    assert [(entry["arm"], entry["steps"], entry["mean"], entry["n"]) for entry in results["rows"]] == [
        (parameters["name"], 8, 8.000005, 2),
        (parameters["name"], 4, 4.000005, 2),
    ]
    assert results["protocol"] == {"error": {"samples": 7, "shuffle": False}}
    assert shlex.split(results["command"]) == shlex.split(command_line("tiny.ipynb", parameters))

    first = file.read_bytes()
    file.unlink()
    again = shell(results["command"], folder)
    assert again.returncode == 0, again.stderr
    assert file.read_bytes() == first


def test_the_solvers_experiment(tmp_path: Path) -> None:
    """Tiny, on the mixture: evaluations as counted, every kind of arm, a second run that goes on from what the
    first has kept.
    """
    parameters = {
        "problems": "mixture",
        "nfe": [2, 4, 5],
        "seeds": [0, 1],
        "samples": 40,
        "amed_samples": 128,
        "amed_nfe": [4, 5],
        "output": str(tmp_path),
    }
    assert not alone(run_experiment, ROOT / "experiments/solvers.ipynb", parameters)
    rows = {
        (row["arm"], row["steps"]): row
        for row in read_results(tmp_path)["rows"]
        if row["metric"] == "endpoint error (mixture)"
    }
    assert {arm for arm, _ in rows} >= {"DDIM", "Heun", "RK4", "AMED-Solver", "AMED-Plugin", "GITS, published"} and (
        "consistency",
        4,
    ) not in rows
    assert (
        ("Heun", 5) not in rows and ("DDIM + AFS", 5) in rows and rows["DPM++ 2M", 5]["mean"] < rows["DDIM", 2]["mean"]
    )
    kept = tmp_path / "passes" / "mixture-fixed-0.json"
    before = kept.stat().st_mtime_ns
    assert not alone(run_experiment, ROOT / "experiments/solvers.ipynb", {**parameters, "seeds": [0]})
    assert kept.stat().st_mtime_ns == before


def test_the_experiment_with_every_method(tmp_path: Path) -> None:
    """Tiny, on the mixture: methods of every kind, DDIL beside them where there can be; a second run makes nothing
    again; an unknown method is refused.
    """
    parameters = {
        "problems": "mixture",
        "steps": [1, 2, 4],
        "seeds": [0, 1],
        "samples": 40,
        "budget": 2000,
        "batch": 16,
        "methods": "naive, progressive, consistency, walks",
        "output": str(tmp_path),
    }
    assert not alone(run_experiment, ROOT / "experiments/trajectory_methods.ipynb", parameters)
    rows = {(row["arm"], row["steps"], row["metric"]): row for row in read_results(tmp_path)["rows"]}
    arms = {
        "teacher",
        "not distilled",
        "naive",
        *(
            f"{prefix}{name}{ddil}"
            for name in ("progressive", "consistency", "walks")
            for prefix, ddil in (("", ""), ("", " + DDIL"), ("difference, ", f" + DDIL − {name}"))
        ),
    }
    assert {arm for arm, *_ in rows} == arms
    assert (
        all(row["n"] == 2 for row in rows.values())
        and ("naive", 2, "endpoint error (mixture)") not in rows
        and ("consistency", 4, "endpoint error (mixture)") not in rows
    )
    assert (
        rows["teacher", 4, "endpoint error (mixture)"]["mean"] < rows["teacher", 1, "endpoint error (mixture)"]["mean"]
    )
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "passes").glob("*.json")}
    assert len(kept) == 2 * 9
    assert not alone(run_experiment, ROOT / "experiments/trajectory_methods.ipynb", {**parameters, "seeds": [0]})
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "passes").glob("*.json")}
    assert "did you mean consistency?" in alone(
        run_experiment, ROOT / "experiments/trajectory_methods.ipynb", {**parameters, "methods": "consistancy"}
    )


def test_the_experiment_on_distributions(tmp_path: Path) -> None:
    """Tiny, on the mixture: a method with DDIL's states beside its own, one that has no place for them, and budgets
    that are kept.
    """
    parameters = {
        "methods": "DMD, ADD",
        "budget": 2000,
        "batch": 16,
        "seeds": [0, 1],
        "samples": 40,
        "output": str(tmp_path),
    }
    assert not alone(run_experiment, ROOT / "experiments/distribution_matching.ipynb", parameters)
    rows = {
        (row["arm"], row["steps"], row["metric"].removesuffix(" (mixture)")): row
        for row in read_results(tmp_path)["rows"]
    }
    arms = {"teacher", "not distilled", "DMD", "ADD", "ADD + DDIL", "difference, ADD + DDIL − ADD"}
    assert {arm for arm, *_ in rows} == arms
    assert {steps for arm, steps, _ in rows if arm == "DMD"} == {1}
    assert {steps for arm, steps, _ in rows if arm == "ADD + DDIL"} == {1, 4}
    spent = [row["mean"] for (_, _, metric), row in rows.items() if metric == "evaluations of training"]
    assert all(abs(evaluations / 2000 - 1) < 0.25 for evaluations in spent)
    assert rows["ADD", 4, "shift of own states"]["n"] == 2


def test_the_experiment_on_sfd(tmp_path: Path) -> None:
    """Tiny: two evaluations in every row of the ablation, one in the second stage, every labeller, and the verdict
    on time.
    """
    parameters = {
        "updates": 2,
        "batch": 4,
        "seeds": [0],
        "samples": 40,
        "lengths": [1, 2],
        "stage_updates": 1,
        "output": str(tmp_path),
    }
    assert not alone(run_experiment, ROOT / "experiments/sfd.ipynb", parameters)
    rows = {(row["arm"], row["steps"], row["metric"]): row for row in read_results(tmp_path)["rows"]}
    assert {
        ("vanilla, Heun", 2),
        ("… both, L1", 2),
        ("SFD-v, at 1 its second stage", 1),
        ("SFD", 5),
        ("DAgger", 3),
        ("progressive distillation", 2),
    } <= {(arm, steps) for arm, steps, _ in rows}
    distances = [row["mean"] for (*_, metric), row in rows.items() if metric == "distance to the exact flow (ablation)"]
    assert len(set(distances)) == len(distances) == 13
    cost = {
        (arm, metric.split("(")[1]): row["mean"]
        for (arm, _, metric), row in rows.items()
        if metric.startswith("evaluations")
    }
    assert cost["SFD, 1 updates", "time)"] == 4 * (16 * 2 + 1) and cost["SFD, 2 updates", "time)"] == 4 * (
        16 * 2 + 2
    ), "training alone is counted, by hand: the guided teacher's walk, and the student"
    assert cost["SFD", "labels)"] == cost["forward", "labels)"] == 4 * 6 * (4 + 1)


def test_experiments_refuse_an_unknown_solver(tmp_path: Path) -> None:
    """Where the solver of the teacher is a parameter, a wrong name is refused before anything is computed."""
    for notebook in ("ddil", "teacher"):
        assert "did you mean heun?" in alone(
            run_experiment, ROOT / f"experiments/{notebook}.ipynb", {"solver": "heum", "output": str(tmp_path)}
        )


def test_the_laboratory(tmp_path: Path) -> None:
    """Tiny, on the atoms: the published tables with both ends, ends that agree, and an exact divergence."""
    parameters = {
        "problems": "atoms",
        "stages": [4, 2],
        "atoms_updates": 8,
        "batch": 8,
        "seeds": [0, 1],
        "samples": 40,
        "density_samples": 2,
        "output": str(tmp_path),
    }
    assert not alone(run_experiment, ROOT / "experiments/covariate_shift.ipynb", parameters)
    rows = {(row["arm"], row["metric"].removesuffix(" (atoms)")): row for row in read_results(tmp_path)["rows"]}
    apart = "distance to the teacher's sample"
    assert (
        rows["PD, p_T = 1", apart]["mean"]
        < 1e-5
        < rows["PD, p_T = 0.4", apart]["mean"]
        < rows["PD, p_T = 0", apart]["mean"]
    )
    assert (
        rows["PD, p_T = 1", "share near a digit"]["mean"] > 0.9
        and ("PD + DDIL, student until t = 0.5", "mode KL") in rows
    )
    assert (
        rows["PD", "KL from noised data at t = 0.5, nats"]["mean"] > 0
        and rows["difference, PD + DDIL − PD", "one-step error, own states"]["n"] == 2
    )
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "report-atoms-pd.png",
        "report-atoms-pd-ddil.png",
        "strip-atoms.png",
        "shift.png",
    }


def test_the_ablation(tmp_path: Path) -> None:
    """Tiny: arms that differ in one thing, budgets that are kept, runs that are not made twice, a family that is
    not there.
    """
    parameters = {
        "families": "priors, steps",
        "budget": 8000,
        "batch": 16,
        "width": 8,
        "seeds": [0, 1],
        "samples": 40,
        "declared": "nowhere",
        "output": str(tmp_path),
    }
    assert not alone(run_experiment, ROOT / "experiments/priors.ipynb", parameters)
    rows = {(row["arm"], row["metric"]): row for row in read_results(tmp_path)["rows"]}
    assert {arm for arm, _ in rows} >= {
        "teacher",
        "priors: forward",
        "priors: student alone",
        "steps: + both, 4 steps",
        "difference, priors: + student − forward",
        "difference, steps: + both, 2 steps − forward, 2 steps",
    }
    assert rows["priors: forward", "updates"]["mean"] < rows["priors: student alone", "updates"]["mean"], (
        "stored labels are not paid for twice"
    )
    assert (
        rows["difference, steps: + both, 2 steps − forward, 2 steps", "mode KL"]["steps"] == 2
        and rows["difference, priors: + student − forward", "mode KL"]["steps"] == 8
    )
    spent = {arm: row["mean"] / 8000 for (arm, metric), row in rows.items() if metric == "evaluations of training"}
    assert {arm: share for arm, share in spent.items() if abs(share - 1) > 0.25} == {}
    assert rows["priors: + both", "mode KL"]["mean"] == rows["steps: + both, 8 steps", "mode KL"]["mean"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "passes").glob("*.json")}
    assert len(kept) == 2 * 9
    assert not alone(run_experiment, ROOT / "experiments/priors.ipynb", {**parameters, "seeds": [0]})
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "passes").glob("*.json")}
    assert "did you mean priors?" in alone(
        run_experiment, ROOT / "experiments/priors.ipynb", {**parameters, "families": "prior"}
    )


def test_the_comparison(tmp_path: Path) -> None:
    """Tiny: two budgets by runs of the other experiment, and a third from its stored results; other samples are
    refused.
    """
    parameters = {
        "problem": "mixture",
        "budgets": [1000],
        "methods": "progressive, consistency",
        "steps": [1, 2],
        "seeds": [0, 1],
        "samples": 40,
        "output": str(tmp_path / "first"),
    }
    assert not alone(run_experiment, ROOT / "experiments/compare.ipynb", parameters)
    again = {
        **parameters,
        "budgets": [2000],
        "also": str(tmp_path / "first" / "budget-1000"),
        "output": str(tmp_path / "second"),
    }
    assert not alone(run_experiment, ROOT / "experiments/compare.ipynb", again)
    metrics = {row["metric"] for row in read_results(tmp_path / "second")["rows"]}
    assert {f"Fréchet to data, budget {budget} (mixture)" for budget in (1000, 2000)} <= metrics
    assert "-p samples 40" in alone(run_experiment, ROOT / "experiments/compare.ipynb", {**again, "samples": 50})
    for changed, told in (
        ({"seeds": [0, 2]}, "-p seeds 0,1"),
        ({"steps": [1, 4]}, "no samplers of 4 steps, only of 1, 2"),
        ({"methods": "progressive, walks"}, "no results of walks, only of consistency, progressive"),
        ({"budgets": [1000, 2000]}, "leave it out of -p budgets"),
        ({"problem": "digits"}, "no results on the problem"),
    ):
        assert told in alone(
            run_experiment, ROOT / "experiments/compare.ipynb", {**again, **changed, "output": str(tmp_path / "third")}
        ), changed
    assert not (tmp_path / "third").exists()
