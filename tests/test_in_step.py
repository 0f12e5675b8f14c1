"""What is generated is in step with its source: modules, cleaned notebooks and the README."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p
    for p in [*ROOT.glob("*.ipynb"), *ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("experiments/**/*.ipynb")]
    if ".ipynb_checkpoints" not in p.parts
)
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|root|Users|tmp|mnt|work|usr|opt|var|private)/\w|\b[A-Z]:\\\\?Users\b")

# Each module is imported as the first of the package; what other packages bring along stays loaded.
IMPORT_EACH = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "ddil"]:
        del sys.modules[loaded]
    importlib.import_module(name)
    found = {m.partition(".")[0] for m in sys.modules} & {"nbdev", "fastcore", "jupyterlab", "execnb"}
    if found:
        sys.exit(f"importing {name} imports {', '.join(sorted(found))}, which only developers have")
"""


def name(path: Path) -> str:
    """The path as seen from the root."""
    return path.relative_to(ROOT).as_posix()


def nbdev(command: str, *arguments: str, cwd: Path) -> None:
    """Run one of nbdev's commands. Where IN_TEST is set nbdev_export does nothing, and says nothing."""
    env = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    done = subprocess.run(
        [Path(sysconfig.get_path("scripts"), command), *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )
    # nbdev_clean only warns of a notebook that it cannot read
    assert done.returncode == 0 and "Failed to clean" not in done.stderr, (
        f"{command} failed:\n{done.stdout}{done.stderr}"
    )


def files(root: Path, *patterns: str) -> dict[str, bytes]:
    """Contents of the files that match, by their path from the root."""
    found = (path for pattern in patterns for path in root.glob(pattern) if ".ipynb_checkpoints" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def differences(fresh: dict[str, bytes], stored: dict[str, bytes]) -> list[str]:
    """Names of the files that are missing on one side or differ."""
    return sorted(key for key in fresh.keys() | stored.keys() if fresh.get(key) != stored.get(key))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with modules exported anew and notebooks cleaned, as `make export` does it."""
    copy = tmp_path_factory.mktemp("fresh")
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for path in filter(None, listed.split("\0")):
        if (ROOT / path).is_file():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, copy / path)
    for module in copy.glob("ddil/**/*.py"):
        if module != copy / "ddil/__init__.py":
            module.unlink()
    nbdev("nbdev_export", cwd=copy)
    nbdev("nbdev_clean", cwd=copy)
    for target in ("index.ipynb", "experiments"):
        nbdev("nbdev_clean", "--fname", target, cwd=copy)
    return copy


def test_modules_are_in_step(fresh: Path) -> None:
    """The modules are what the notebooks export, none missing, none left over."""
    exported = files(fresh, "ddil/**/*.py")
    assert len(exported) > 2, "no notebook exports anything"
    stale = differences(exported, files(ROOT, "ddil/**/*.py"))
    assert not stale, (
        f"out of step with nbs/: {', '.join(stale)}; run `make export` (edit the notebook, never the module)"
    )


def test_notebooks_are_clean(fresh: Path) -> None:
    """The notebooks hold no execution counts, ids or metadata that change from run to run."""
    patterns = ("index.ipynb", "nbs/**/*.ipynb", "experiments/**/*.ipynb")
    stale = differences(files(fresh, *patterns), files(ROOT, *patterns))
    assert not stale, f"not clean: {', '.join(stale)}; run `make export`"


def test_readme_is_in_step() -> None:
    """README.md is what index.ipynb shows."""
    done = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_import_alone() -> None:
    """Every module imports as the first of the package, and without the tools that only developers have."""
    modules = [
        name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in sorted(ROOT.glob("ddil/**/*.py"))
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, *modules], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stderr}\nmend the exported imports in the notebook, then `make export`"


def texts(notebook: Path) -> Iterator[str]:
    """The sources and outputs of a notebook, save encoded pictures."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        yield "".join(cell["source"])
        for output in cell.get("outputs", []):
            yield "".join(output.get("text", []))
            yield from ("".join(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_notebook_is_free_of_traces(notebook: Path) -> None:
    """No notebook shows an error or a path of the machine it ran on."""
    paths = [line.strip() for text in texts(notebook) for line in text.splitlines() if MACHINE_PATH.search(line)]
    assert not paths, (
        f"{name(notebook)} names a path of one machine: {paths[0]!r}; run it again without, then `make export`"
    )
    outputs = [
        output
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        for output in cell.get("outputs", [])
    ]
    failed = any(
        o["output_type"] == "error" or "Traceback (most recent call last)" in "".join(o.get("text", []))
        for o in outputs
    )
    assert not failed, f"{name(notebook)} stores an error; mend the cell, run the notebook again, then `make export`"
