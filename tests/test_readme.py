"""Every block of the README runs as it stands: Python in a fresh process, commands up to the point where they would
compute.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ddil import FACE
from ddil.cli import parser
from ddil.distil.command import plan_of

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
SHELL = [
    line.split("  #")[0].strip()
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.S | re.M)
    for line in block.splitlines()
]


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_runs_as_it_stands(block: str, tmp_path: Path) -> None:
    """A reader who pastes one block alone, in an empty folder, meets no NameError."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("ddil ")])
def test_commands_are_plans(line: str) -> None:
    """Each command of `ddil` is read without complaint."""
    words = shlex.split(line)[1:]
    given = parser(words[0]).parse_args(words)
    assert words[0] == "methods" or plan_of(given).output


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_targets_exist(line: str) -> None:
    """Each target of make is one of the Makefile's."""
    assert re.search(rf"^{shlex.split(line)[1]}:", (ROOT / "Makefile").read_text(), re.M)


def test_there_are_blocks() -> None:
    """The blocks are found: a change of the fences would leave nothing to test."""
    assert len(PYTHON) >= 3
    assert len(SHELL) >= 6


def test_the_face_has_its_names() -> None:
    """Everything that `import ddil` promises is there."""
    import ddil

    for names in FACE.values():
        for name in names.split():
            assert getattr(ddil, name) is not None


def test_importing_is_light() -> None:
    """`import ddil` and the parser of a command load neither PyTorch nor pydantic."""
    code = (
        "import sys, ddil; from ddil.cli import parser; parser(); print(sorted({'torch', 'pydantic', "
        "'diffusers'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
