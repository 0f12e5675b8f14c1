"""What an installation is made of: all modules, the teacher and the classifier, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 16_000_000  # bytes of all assets

# Run in an empty folder, with the unpacked wheel first on the path.
USE = """
import pathlib, sys
import ddil, torch
from ddil.datasets.digits import digits_classifier, digits_teacher
assert pathlib.Path(ddil.__file__).is_relative_to(sys.argv[1]), ddil.__file__
samples = digits_teacher().sample(range(2), torch.tensor([3, 7]))
print(digits_classifier()(samples).argmax(1).tolist())
"""


def tracked(*patterns: str) -> set[str]:
    """Files of the checkout that git knows or would add."""
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns], cwd=ROOT, text=True
    )
    return {path for path in listed.split("\0") if path and (ROOT / path).is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the checkout (building leaves files beside its source), made offline with this
    environment's setuptools.
    """
    pytest.importorskip(
        "setuptools", minversion="77", reason="the build backend that pyproject.toml asks for is not installed"
    )
    copy = tmp_path_factory.mktemp("copy")
    for path in tracked("ddil", "pyproject.toml", "README.md", "LICENSE"):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes((ROOT / path).read_bytes())
    command = [
        sys.executable,
        "-c",
        "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])",
        str(copy / "dist"),
    ]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((copy / "dist").glob("*.whl"))


def test_wheel_is_complete(wheel: Path) -> None:
    """It holds every tracked file of the package, the nested assets too, and no other file outside its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    assert "ddil/assets/digits-teacher/network/diffusion_pytorch_model.safetensors" in packed
    shipped = {path for path in tracked("ddil") if not path.startswith("ddil/benchmarks/")}
    assert packed == shipped, "mend [tool.setuptools.package-data] in pyproject.toml"


def test_wheel_brings_its_teacher(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, it samples the digits that are asked for, and the classifier knows them."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path / "site")],
        cwd=tmp_path / "elsewhere",
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[3, 7]"


def test_assets_are_small() -> None:
    """The assets, which every clone and every installation carries, stay under the limit; there are some."""
    sizes = {path: (ROOT / path).stat().st_size for path in tracked("ddil/assets")}
    assert 0 < sum(sizes.values()) <= LIMIT, sizes
    assert {Path(path).suffix for path in sizes} == {
        ".json",
        ".safetensors",
        ".txt",
        ".html",
        ".css",
        ".js",
    }  # text: the merges of a tokenizer
