"""Keep an executed experiment in the repository: `python tools/keep.py runs/reference/ddil experiments/reference/ddil`.

Copies the notebook (without progress bars and papermill's timings), results.json and the figures; students and checkpoints stay behind.
"""

import json
import shutil
import sys
from pathlib import Path


def without_progress(notebook: dict) -> dict:
    """The notebook without what was written to stderr and without papermill's metadata."""
    notebook["metadata"].pop("papermill", None)
    for cell in notebook["cells"]:
        cell["metadata"].pop("papermill", None)
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    return notebook


def keep(run: Path, place: Path) -> None:
    """Copy what a reader wants of `run` to `place`."""
    if not (run / "results.json").exists():
        sys.exit(f"{run} has no results.json: run the experiment first")
    place.mkdir(parents=True, exist_ok=True)
    for path in [run / "results.json", *run.glob("*.png")]:
        shutil.copy(path, place)
    for path in run.glob("*.ipynb"):
        kept = without_progress(json.loads(path.read_text()))
        (place / path.name).write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    keep(Path(sys.argv[1]), Path(sys.argv[2]))
