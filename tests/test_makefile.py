"""The Makefile says what it can do, keeps the environment up to date, and refuses an old Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "help",
    "venv",
    "demo",
    "test",
    "lab",
    "claims",
    "export",
    "readme",
    "bench",
    "bench-gpu",
    "teacher",
    "scenes",
    "text2image",
    "reference",
    "test-slurm",
    "report",
    "site",
    "clean",
}


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run make, untouched by the make that may have started these tests."""
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "ARGS", "VENV"}
    }
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with just what make reads."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_help_lists_every_target() -> None:
    """`make` alone prints every target with a line about it."""
    done = make()
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"^  make ([\w-]+) +\S", done.stdout, re.M)) == TARGETS


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_dry_run(target: str) -> None:
    """Every target's recipe can be read, with an environment from elsewhere."""
    done = make(f"VENV={sys.prefix}", "-n", target)
    assert done.returncode == 0, done.stderr
    assert target != "test" or f"{sys.prefix}/bin/python -m pytest" in done.stdout


def test_dependencies_are_seen_to_once(clone: Path) -> None:
    """They are installed for a new environment, after a change of pyproject.toml, and not otherwise."""
    log = clone / "log"
    for venv in ("one", "two"):
        script(clone / venv / "bin/python", f'echo {venv} >> "{log}"')

    def installs(venv: str) -> bool:
        before = log.read_text() if log.exists() else ""
        done = make(f"VENV={venv}", "venv", cwd=clone)
        assert done.returncode == 0, done.stderr
        return log.read_text() != before

    assert [installs("one"), installs("one")] == [True, False]
    assert [installs("two"), installs("two"), installs("one")] == [True, False, True]
    stamp = (clone / ".installed").stat().st_mtime
    os.utime(clone / "pyproject.toml", (stamp + 10, stamp + 10))
    assert installs("one")


def test_shared_environment_gets_dependencies_only(clone: Path) -> None:
    """An environment from elsewhere is given all requirements, and no editable install of this clone."""
    python = clone / "other/bin/python"
    as_other = f"import sys; sys.executable = '{python}'; exec(sys.argv[2])"
    script(
        python,
        f"""
if [ "$1" = -m ]; then echo "$@" >> "{clone}/pip"
else exec "{sys.executable}" -c "{as_other}" "$@"
fi""",
    )
    done = make("VENV=other", "venv", cwd=clone)
    assert done.returncode == 0, done.stderr
    arguments, reference = (line.split() for line in (clone / "pip").read_text().splitlines())
    assert arguments[:3] == ["-m", "pip", "install"] and {"nbdev==2.4.14", "scipy>=1.11,<1.18"} <= set(arguments)
    assert not {"-e", "--editable", "."} & set(arguments)
    assert reference == "-m pip install --quiet --no-deps k-diffusion==0.1.1.post1".split()


def test_own_environment_is_editable(clone: Path) -> None:
    """The clone's own environment is given this clone, editable, with its extra requirements, and k-diffusion
    without its own.
    """
    script(clone / ".venv/bin/python", 'echo "$@" >> pip')
    done = make("VENV=.venv", "venv", cwd=clone)
    assert done.returncode == 0, done.stderr
    assert (clone / "pip").read_text().splitlines() == [
        "-m pip install --quiet --editable .[dev]",
        "-m pip install --quiet --no-deps k-diffusion==0.1.1.post1",
    ]


def test_old_python_is_refused(clone: Path) -> None:
    """Python 3.8 is named as the reason, with the remedy, and no environment is made."""
    patched = "import sys; sys.version_info = (3, 8, 20, 'final', 0); exec(sys.argv[2])"
    old = script(clone / "old/python3.8", f'exec "{sys.executable}" -c "{patched}" "$@"')
    done = make(f"PYTHON={old}", "test", cwd=clone)
    assert done.returncode != 0
    assert "needs Python 3.10 or newer" in done.stderr and "is 3.8" in done.stderr and "make PYTHON=" in done.stderr
    assert not (clone / ".venv").exists()
