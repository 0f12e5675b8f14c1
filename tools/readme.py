"""Make README.md and its pictures from the stored outputs of index.ipynb; with --check, only compare them."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
PICTURES = "assets/readme"
HEADER = "<!-- Made from index.ipynb by `make readme`: edit that one. -->\n\n"


def render(notebook: Path) -> dict[str, bytes]:
    """The README and its pictures: the contents of each file by its path from the root."""
    nb = nbformat.read(notebook, as_version=4)
    nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean drops it, and the code fences need it
    nb.cells = [
        cell for cell in nb.cells if cell.cell_type != "code" or not re.search(r"^#\s*\|\s*hide\b", cell.source, re.M)
    ]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.metadata["transient"] = {
                "remove_source": bool(re.search(r"^#\s*\|\s*hide_input\b", cell.source, re.M))
            }
            cell.source = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M)
    nb.cells = [cell for cell in nb.cells if cell.source.strip()]
    text, extra = MarkdownExporter().from_notebook_node(nb, {"unique_key": "index", "output_files_dir": PICTURES})
    text = HEADER + re.sub(r"\n{3,}", "\n\n", re.sub(r"^[ \t]+$", "", text, flags=re.M)).strip() + "\n"
    return {"README.md": text.encode(), **extra["outputs"]}


def main() -> None:
    """Write the files that differ and remove pictures no longer used; with --check, name them and exit with 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a file is out of step")
    check = parser.parse_args().check
    fresh = render(ROOT / "index.ipynb")
    paths = [path for path in [ROOT / "README.md", *(ROOT / PICTURES).glob("*")] if path.exists()]
    stored = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths}
    stale = sorted(name for name in fresh.keys() | stored.keys() if fresh.get(name) != stored.get(name))
    if check and stale:
        sys.exit(f"out of step with index.ipynb: {', '.join(stale)}; run `make readme`")
    for path in (ROOT / name for name in stale):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = fresh.get(path.relative_to(ROOT).as_posix())
        path.unlink() if content is None else path.write_bytes(content)


if __name__ == "__main__":
    main()
