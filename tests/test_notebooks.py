"""Every notebook of the library runs, with its own cells against the module that users import; index.ipynb runs as read."""

from __future__ import annotations

import dis
import importlib
import multiprocessing
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in path.parts)
EXPORTS = ("export", "exporti", "exports")
TIMEOUT = 900  # seconds

# A server that has imported what all notebooks need forks a process for each, which spares it these imports.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["ddil.distil", "ddil.metrics", "matplotlib.pyplot", "nbdev.process", "execnb.shell"])


def run_against_module(notebook: Path) -> str:
    """Run the cells that are not exported; in place of the others, take what they define from the module. As the exported code is the notebook's
    (tests/test_in_step.py), this is what a reader runs, and more: a name that the module lacks is missed. Returns the traceback, or nothing."""
    import torch
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import NBProcessor

    os.environ["IN_TEST"] = "1"
    os.chdir(notebook.parent)
    torch.set_num_threads(1)  # as two notebooks run at a time
    nb = NBProcessor(notebook, process=True).nb
    skipped = set(get_config().tst_flags.split())
    default = next((cell.directives_["default_exp"][0] for cell in nb.cells if "default_exp" in cell.directives_), None)
    shell = CaptureShell(mpl_format="png")

    def replaced(cell: dict) -> bool:
        """Whether the cell is not to run; an exported one is replaced by the module's names."""
        if cell.cell_type != "code" or "nbdev_export(" in cell.source:
            return True
        export = next((cell.directives_[name] for name in EXPORTS if name in cell.directives_), None)
        if export is not None:
            module = importlib.import_module(f"ddil.{export[0] if export else default}")
            code = dis.get_instructions(compile(cell.source, str(notebook), "exec"))
            shell.user_ns.update({i.argval: vars(module)[i.argval] for i in code if i.opname == "STORE_NAME" and i.argval in vars(module)})
        return export is not None or cell.directives_.get("eval:", [""])[0].lower() == "false" or bool(skipped & cell.directives_.keys())

    try:
        shell.run_all(nb, exc_stop=True, preproc=replaced)
    except Exception:
        return shell.prettytb(fname=notebook.name)
    return ""


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[Path, Future]]:
    """The selected notebooks' runs, each in a process of its own, two at a time."""
    items = [item for item in request.session.items if "runs" in getattr(item, "fixturenames", ())]
    with ProcessPoolExecutor(2, _PROCESSES, max_tasks_per_child=1) as pool:
        yield {notebook: pool.submit(run_against_module, notebook) for notebook in (item.callspec.params["notebook"] for item in items)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_against_the_module(notebook: Path, runs: dict[Path, Future]) -> None:
    """The checks in the notebook hold for the module that users import."""
    traceback = runs[notebook].result(TIMEOUT)
    assert not traceback, f"fails against the exported module (after an edit: `make export`):\n{traceback}"


def test_the_readme_as_read() -> None:
    """index.ipynb runs from top to bottom as a reader runs it."""
    command = [Path(sysconfig.get_path("scripts"), "nbdev_test"), "--path", "index.ipynb"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "IN_TEST": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Success." in done.stdout, f"{done.stdout}{done.stderr}"
