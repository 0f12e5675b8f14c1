"""Every notebook of the library runs, with its own cells against the module that users import; index.ipynb runs as
read.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from forked import ROOT, processes, run_against_module

NOTEBOOKS = sorted(path for path in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in path.parts)


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[Path, Future]]:
    """The selected notebooks' runs, each in a process of its own, two at a time."""
    items = [item for item in request.session.items if "runs" in getattr(item, "fixturenames", ())]
    with processes(2) as pool:
        yield {
            notebook: pool.submit(run_against_module, notebook)
            for notebook in (item.callspec.params["notebook"] for item in items)
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_against_the_module(notebook: Path, runs: dict[Path, Future]) -> None:
    """The checks in the notebook hold for the module that users import."""
    traceback = runs[notebook].result()
    assert not traceback, f"fails against the exported module (after an edit: `make export`):\n{traceback}"


def test_the_readme_as_read() -> None:
    """index.ipynb runs from top to bottom as a reader runs it."""
    command = [Path(sysconfig.get_path("scripts"), "nbdev_test"), "--path", "index.ipynb"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "IN_TEST": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Success." in done.stdout, f"{done.stdout}{done.stderr}"
