"""No sentence outlives its result: numbers and comparisons in README and in the results, held to what is kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import claims  # noqa: E402

PAGES = ["index.ipynb", *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("nbs/12_results/*.ipynb")))]
WHOLE = ("min(", "max(", "sorted(", "rows(", "sum(")  # of many rows a figure shows only some


def test_every_page_is_held() -> None:
    """README and every page of results has its claims."""
    assert list(yaml.safe_load((ROOT / claims.CLAIMS).read_text(encoding="utf-8"))) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_sentences_have_their_results(page: str) -> None:
    """Each number and comparison is what the kept results say; `python tools/claims.py --mend` writes the numbers."""
    assert not (stale := claims.stale(page)), "\n".join(stale)


def shaken(row: dict) -> dict:
    """A kept row, changed beyond every rounding."""
    change = [None if end is None else 1.3 * end + 0.2 for end in row["ci95"]]
    return row | {"mean": 1.3 * row["mean"] + 0.2, "ci95": change, "values": [v + 0.2 for v in row.get("values", [])]}


def figured() -> Iterator[tuple[claims.Sentence, claims.Claim]]:
    """The sentences whose numbers come from rows of a kept result."""
    for page in PAGES:
        yield from (pair for pair in claims.matched(page)[0] if pair[1].of and "(" in pair[1].figures)


def test_a_changed_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change one row of a results.json, and the sentence that prints it is at fault; row by row, for all of them."""
    kept, read = claims.Figures.row, []
    changed: list[dict] = []

    def row(self: claims.Figures, *key: object) -> dict:
        read.append(found := kept(self, *key))
        return shaken(found) if any(found is one for one in changed) else found

    monkeypatch.setattr(claims.Figures, "row", row)
    tried = 0
    for sentence, claim in figured():
        read.clear()
        claim.numbers()
        mine, noticed = list({id(one): one for one in read}.values()), []
        for one in mine:
            changed[:] = [one]
            noticed.append(bool(list(claims.faults(sentence, claim))))
            changed.clear()
        partly = any(word in claim.figures for word in WHOLE)
        assert any(noticed) if partly and mine else all(noticed), f"{noticed}: {sentence.text}"
        tried += len(mine)
    assert tried > 200


@pytest.mark.parametrize("text", ["It falls to .31.", "PD is nearer to the data.", "Two lose it.", "In 1 step."])
def test_what_speaks_needs_a_claim(text: str) -> None:
    """A number, a comparison and a counted thing are noticed in a new sentence; code, links and years are none."""
    (sentence,) = claims.sentences("a page", [{"cell_type": "markdown", "source": text}])
    assert sentence.speaks


def test_what_does_not_speak() -> None:
    """Code, formulas, figures, headings and years hold no figures."""
    text = "# 3 things\n\nSee `f(3)`, $t=.3$ and ![a 3](3.png) (Luo et al. 2023, arXiv 2310.04378)."
    assert not any(one.speaks for one in claims.sentences("a page", [{"cell_type": "markdown", "source": text}]))


@pytest.mark.parametrize(
    "like, value, text",
    [
        (".18", 0.2746, ".27"),
        ("−.007", 0.004, ".004"),
        ("+3", 2.7, "+3"),
        ("60 000", 61234.2, "61 234"),
        ("9.0", 8.61, "8.6"),
    ],
)
def test_numbers_are_written_as_they_were(like: str, value: float, text: str) -> None:
    """A mended number keeps the form of the one that stood there."""
    assert claims.printed(value, like) == text
    assert claims.agrees(text, value)


def test_tables_of_the_readme_are_as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The menu and the chapters that README shows are those of today; `make claims ARGS=--mend` stores them anew."""
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    found = [("".join(cell["outputs"][0]["data"]["text/markdown"]), text) for cell, text in claims.tables(cells)]
    assert len(found) == 2
    for stored, text in found:
        assert stored == text


def test_tables_of_the_results_are_as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of the chapter of results, computed anew from what is kept, are those that it shows."""
    monkeypatch.chdir(ROOT / "nbs/12_results")
    cells = json.loads((ROOT / PAGES[1]).read_text(encoding="utf-8"))["cells"]
    names, tables = {}, 0
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        source = "".join(cell["source"])
        if source.startswith("Markdown("):
            shown = "".join(cell["outputs"][0]["data"]["text/markdown"])
            assert eval(source, names).data == shown
            tables += 1
        elif not source.startswith("display("):
            exec(source, names)
    assert tables == 3
