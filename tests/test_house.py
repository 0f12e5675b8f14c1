"""The rooms of the package: what may import what."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "ddil"
FLOORS = [
    ("words", "files"),
    ("forms",),
    ("diffusion",),
    ("solvers",),
    ("rollins",),
    ("methods", "measure"),
    ("training",),
    ("models",),
    ("datasets",),
    ("distil",),
    ("lab",),
    ("cli", "benchmarks"),
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module of this package that a module imports, wherever in it."""
    parts = ["ddil", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [".".join([*parts[: -node.level], *([node.module] if node.module else [])])]
        if isinstance(node, ast.ImportFrom) and names == ["ddil"]:
            names = [f"ddil.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from ((node.lineno, name) for name in names if name.startswith("ddil."))


def test_imports_point_down() -> None:
    """A module imports from its own room and from lower floors alone."""
    upward = []
    for path in sorted(PACKAGE.glob("**/*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for line, name in imports(path) if room in FLOOR else ():
            other = name.split(".")[1]
            if other in FLOOR and other != room and FLOOR[other] >= FLOOR[room]:
                upward.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert not upward, "\n".join(upward)


def test_every_module_has_a_room() -> None:
    """The root holds the face, the command line and what every room uses; all else has a room."""
    found = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()
    }
    assert found == FLOOR.keys() | {"__init__", "_modidx"}


def test_methods_and_roll_ins_do_not_know_each_other() -> None:
    """A method knows states, the teacher and data, and no roll-in; a roll-in knows no method."""
    shared = {"states", "teacher", "data"}
    for path in PACKAGE.glob("methods/*.py"):
        assert {name.split(".")[2] for _, name in imports(path) if name.startswith("ddil.rollins.")} <= shared, path
    for path in PACKAGE.glob("rollins/*.py"):
        assert not [name for _, name in imports(path) if name.startswith("ddil.methods")], path


def code(path: Path) -> list[str]:
    """The lines of code of a module or a notebook."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8").splitlines()
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]


def test_lines_are_short() -> None:
    """No line of code is wider than 120 columns, in notebooks and tests alike."""
    root = PACKAGE.parent
    patterns = ("index.ipynb", "nbs/*/*.ipynb", "experiments/*.ipynb", "tests/**/*.py", "tools/*.py")
    paths = [path for pattern in patterns for path in root.glob(pattern)]
    wide = [f"{path.relative_to(root)}: {line[:60]}…" for path in paths for line in code(path) if len(line) > 120]
    assert not wide, "\n".join(wide)


TWICE = {
    "main": "what a module does when it is run as a program",
}


def public_names(path: Path) -> Iterator[str]:
    """The public functions, classes and values that a module defines."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        names = [getattr(target, "id", getattr(target, "name", None)) for target in targets]
        yield from (name for name in names if isinstance(name, str) and not name.startswith("_"))


def test_a_public_name_is_defined_once() -> None:
    """One word for one thing: no two modules define a public name, but for the few that have a reason in TWICE."""
    homes: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.glob("**/*.py")):
        if path.name not in ("__init__.py", "_modidx.py"):
            for name in public_names(path):
                homes.setdefault(name, set()).add(path.relative_to(PACKAGE).as_posix())
    shared = {name: places for name, places in homes.items() if len(places) > 1}
    assert {name: sorted(places) for name, places in shared.items() if name not in TWICE} == {}
    assert shared.keys() == TWICE.keys()  # a reason that is no longer needed goes
