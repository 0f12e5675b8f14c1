"""Every notebook of the library runs: as read, and with its own cells against the module that users import."""

from __future__ import annotations

import dis
import importlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in path.parts)
# one thread for each process, as two run at a time; the checkout's code, whatever is installed
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "IN_TEST": "1"}
EXPORTS = ("export", "exporti", "exports")
TIMEOUT = 900  # seconds


def run_against_module(notebook: Path) -> None:
    """Run the cells that are not exported; in place of the others, take what they define from the module."""
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import NBProcessor

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

    os.chdir(notebook.parent)
    try:
        shell.run_all(nb, exc_stop=True, preproc=replaced)
    except Exception:
        sys.exit(shell.prettytb(fname=notebook.name))


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[Path, Future]]:
    """The selected notebooks' runs, each in a process of its own, two at a time."""
    items = [item for item in request.session.items if "runs" in getattr(item, "fixturenames", ())]
    with ThreadPoolExecutor(2) as pool:
        def start(notebook: Path) -> Future:
            return pool.submit(subprocess.run, [sys.executable, __file__, notebook], cwd=ROOT, env=ENV, timeout=TIMEOUT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        yield {notebook: start(notebook) for notebook in (item.callspec.params["notebook"] for item in items)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_against_the_module(notebook: Path, runs: dict[Path, Future]) -> None:
    """The checks in the notebook hold for the module that users import."""
    done = runs[notebook].result()
    assert done.returncode == 0, f"fails against the exported module (after an edit: `make export`):\n{done.stdout}"


@pytest.mark.parametrize("path", ["nbs", "index.ipynb"])
def test_as_read(path: str) -> None:
    """The notebooks run from top to bottom as a reader runs them."""
    command = [Path(sysconfig.get_path("scripts"), "nbdev_test"), "--path", path, "--n_workers", "2"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and "Success." in done.stdout, f"{done.stdout}{done.stderr}"


if __name__ == "__main__":
    run_against_module(Path(sys.argv[1]))
