"""Processes that spare themselves the imports, for a server that has made them forks each in milliseconds; and
notebooks run in such processes.
"""

from __future__ import annotations

import dis
import faulthandler
import importlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXPORTS = ("export", "exporti", "exports")
TIMEOUT = 1800  # seconds after which a notebook counts as hung
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "ddil.distil.stages",
        "ddil.measure",
        "ddil.distil.doctor",
        "ddil.measure.inversion",
        "diffusers.pipelines.stable_diffusion",
        "matplotlib.pyplot",
        "nbdev.process",
        "execnb.shell",
        "papermill.parameterize",
    ]
)


def processes(count: int) -> ProcessPoolExecutor:
    """At most `count` processes at a time, each for one call."""
    return ProcessPoolExecutor(count, PROCESSES, max_tasks_per_child=1)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, called in a process of its own."""
    with processes(1) as pool:
        return pool.submit(function, *arguments).result()


def _shell(folder: Path) -> Any:
    """A shell in this process, which works in `folder` with one thread. A process that hangs says where, and ends."""
    import torch
    from execnb.shell import CaptureShell

    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    os.chdir(folder)
    os.environ |= {"IN_TEST": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DDIL_PROGRESS": "log"}
    torch.set_num_threads(1)
    return CaptureShell(mpl_format="png")


def _run(shell: Any, nb: Any, name: str, **options: Any) -> str:
    try:
        shell.run_all(nb, exc_stop=True, **options)
    except Exception:
        return shell.prettytb(fname=name)
    return ""


def run_experiment(notebook: Path, parameters: dict[str, Any]) -> str:
    """Run a notebook with papermill's way of giving parameters, in the root of the checkout. Returns the traceback,
    or nothing.
    """
    from execnb.nbio import dict2nb
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    shell = _shell(ROOT)
    nb = parameterize_notebook(load_notebook_node(str(notebook)), parameters, kernel_name="python3", language="python")
    return _run(shell, dict2nb(nb), notebook.name)


def run_against_module(notebook: Path) -> str:
    """Run the cells that are not exported; in place of the others, take what they define from the module. As the
    exported code is the notebook's
    (tests/test_in_step.py), this is what a reader runs, and more: a name that the module lacks is missed. Returns the
    traceback, or nothing."""
    shell = _shell(notebook.parent)
    from nbdev.config import get_config
    from nbdev.process import NBProcessor

    nb = NBProcessor(notebook, process=True).nb
    skipped = set(get_config().tst_flags.split())
    default = next((cell.directives_["default_exp"][0] for cell in nb.cells if "default_exp" in cell.directives_), None)

    def replaced(cell: dict) -> bool:
        """Whether the cell is not to run; an exported one is replaced by the module's names."""
        if cell.cell_type != "code" or "nbdev_export(" in cell.source:
            return True
        export = next((cell.directives_[name] for name in EXPORTS if name in cell.directives_), None)
        if export is not None:
            module = importlib.import_module(f"ddil.{export[0] if export else default}")
            code = dis.get_instructions(compile(cell.source, str(notebook), "exec"))
            shell.user_ns.update(
                {
                    i.argval: vars(module)[i.argval]
                    for i in code
                    if i.opname == "STORE_NAME" and i.argval in vars(module)
                }
            )
        return (
            export is not None
            or cell.directives_.get("eval:", [""])[0].lower() == "false"
            or bool(skipped & cell.directives_.keys())
        )

    return _run(shell, nb, notebook.name, preproc=replaced)
