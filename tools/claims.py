"""What README and the chapter of results say, held to the kept results.

Every sentence of the pages with a number or a comparison has a claim in `nbs/12_results/claims.yaml`: expressions for
its numbers, in their order, and conditions for what it says in words. Without arguments: say what no longer holds.
With --mend: write the numbers of the kept results into the sentences (what is said in words is mended by hand), and
README's tables of the menu and the chapters anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = "nbs/12_results/claims.yaml"
ASIDE = (  # code, formulas, pictures, links, references, headings, tables, years
    r"```.*?```|`[^`\n]*`|\$[^$\n]*\$|!?\[[^\]]*\]\([^)]*\.png\)|\]\([^)]*\)"
    r"|arXiv [\d.]+|^[#|].*?$|\b(?:19|20)[0-2]\d\b"
)
NUMBER = re.compile(r"(?<![\w.+)×-])[−+]?(?:\d{1,3}(?: \d{3})+|\d+(?:\.\d+)?|\.\d+)(?:e-?\d+)?(?=th\b|(?![\w×]))")
END = re.compile(r"(?<=[.!?])[*)\"]*\s+(?=[*(\[\"“]*[A-Z$])|\n\s*\n|\n(?=\s*[-*>])")
WORDS = re.compile(  # what compares, changes or counts
    r"""\b(more|less|fewer|most|least|better|worse|best|worst|lower|higher|nearer|nearest|further|closer|above|below|far
    |faster|slower|falls?|fell|rises?|raises?|grows?|gains?|loses?|loss|costs?|buys?|helps?|trades?|ruins?|wins?|halves
    |agrees?|repair|steady|unsteady|alike|same|equal|differences?|only|nothing|nobody|never|always|every|each|all|hardly
    |both|none|change[sd]?|begins?|misses|reached|seen|told|decide[sd]?|falls\ apart|keeps?|as\ (?:much|good|well)
    |matters?|interpolates
    |two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|half|third|quarter|tenth|twice)\b""",
    re.I | re.X,
)


def number(text: str) -> float:
    """The value of a number as it is printed: '−.040', '+3', '60 000'."""
    return float(text.replace("−", "-").replace(" ", ""))


def printed(value: float, like: str) -> str:
    """A value in the form of a printed number: its decimals, its sign, its leading zero or none, its thousands."""
    if "e" in like:
        return f"{value:.1e}".replace("e-0", "e-")
    text = f"{abs(value):.{len(like.partition('.')[2])}f}"
    text = text.removeprefix("0") if re.match(r"[−+]?\.", like) else text
    text = f"{int(text):,}".replace(",", " ") if " " in like else text
    sign = "−" if value < 0 and number(text) else "+" if like.startswith("+") else ""
    return sign + text


def agrees(text: str, value: float) -> bool:
    """Whether a printed number is this value, rounded (a half may go either way)."""
    if "e" in text:
        return printed(value, text) == text
    return abs(value - number(text)) <= 0.50001 * 10.0 ** -len(text.partition(".")[2])


@dataclass
class Sentence:
    """A sentence of a page, where it stands, and its numbers (what is code, formula, link or heading has none)."""

    page: str
    cell: int
    start: int
    text: str
    numbers: list[tuple[int, str]] = field(default_factory=list)

    @property
    def speaks(self) -> bool:
        """Whether it holds a number or a word that compares or counts."""
        return bool(self.numbers or WORDS.search(self.text))


def sentences(page: str, cells: list[dict]) -> Iterator[Sentence]:
    """The sentences of a page's prose, in order."""
    for cell, content in enumerate(cells):
        source = "".join(content["source"])
        if content["cell_type"] != "markdown":
            continue
        plain = re.sub(ASIDE, lambda aside: "·" * len(aside[0]), source, flags=re.S | re.M)
        edges = [0, *(end.end() for end in END.finditer(plain)), len(plain)]
        for start, stop in zip(edges, edges[1:]):
            if plain[start:stop].strip():
                found = [(start + hit.start(), hit[0]) for hit in NUMBER.finditer(plain[start:stop])]
                yield Sentence(page, cell, start, plain[start:stop].strip(), found)


@cache
def results(experiment: str) -> dict[str, Any]:
    """The kept results of an experiment; rows by arm, steps and metric."""
    kept = json.loads((ROOT / "experiments/reference" / experiment / "results.json").read_text(encoding="utf-8"))
    return kept | {"by": {(row["arm"], row["steps"], row["metric"]): row for row in kept["rows"]}}


@dataclass
class Figures:
    """What a claim's expressions may ask of one experiment's kept results; steps and metric have defaults."""

    experiment: str
    steps: int | None = None
    metric: str = ""

    def row(self, arm: str, steps: int | None = None, metric: str | None = None) -> dict:
        """One kept row; raises a KeyError that names it where there is none."""
        key = (arm, steps or self.steps, metric or self.metric)
        if key not in results(self.experiment)["by"]:
            raise KeyError(f"experiments/reference/{self.experiment} holds no row {key}")
        return results(self.experiment)["by"][key]

    def rows(self, arm: str = "", steps: str = "", metric: str = "") -> list[dict]:
        """The kept rows whose arm, steps and metric match these patterns as a whole (none: any)."""
        patterns = {"arm": arm or ".*", "steps": steps or ".*", "metric": metric or ".*"}
        kept = results(self.experiment)["rows"]
        return [row for row in kept if all(re.fullmatch(what, str(row[key])) for key, what in patterns.items())]

    def mean(self, *key: Any) -> float:
        """The mean over the seeds."""
        return self.row(*key)["mean"]

    def low(self, *key: Any) -> float:
        """The lower end of the 95 % interval."""
        return self.row(*key)["ci95"][0]

    def high(self, *key: Any) -> float:
        """The upper end of the 95 % interval."""
        return self.row(*key)["ci95"][1]

    def values(self, *key: Any) -> list[float]:
        """The value of each seed, where they are kept."""
        return self.row(*key)["values"]

    def n(self, *key: Any) -> int:
        """The number of seeds."""
        return self.row(*key)["n"]

    def rises(self, *key: Any) -> bool:
        """Whether a difference's interval lies above 0."""
        return self.low(*key) > 0

    def falls(self, *key: Any) -> bool:
        """Whether a difference's interval lies below 0."""
        return self.high(*key) < 0

    def open(self, *key: Any) -> bool:
        """Whether a difference's interval holds 0: nothing can be told from chance."""
        return self.low(*key) <= 0 <= self.high(*key)

    def percent(self, arm: str, base: str, *key: Any) -> float:
        """By how many percent an arm's mean lies above that of another."""
        return 100 * (self.mean(arm, *key) / self.mean(base, *key) - 1)

    def best(self, metric: str, steps: int) -> str:
        """The arm with the lowest mean, baselines and differences left out."""
        rows = self.rows("(?!difference|teacher|not distilled).*", str(steps), re.escape(metric))
        return min(rows, key=lambda row: row["mean"])["arm"]

    def told_apart(self, difference: dict) -> int:
        """1 where a difference's interval lies on the good side of 0, -1 where it lies on the bad one, else 0."""
        low, high = difference["ci95"]
        good = 1 if difference["metric"].startswith("coverage") else -1
        return good * ((low > 0) - (high < 0))

    def paired(self, arm: str, base: str, *key: Any) -> tuple[float, float, float]:
        """The paired difference of two arms from the values of their seeds: mean and the ends of its interval."""
        from ddil.measure.intervals import paired_difference

        change = paired_difference(self.values(base, *key), self.values(arm, *key))
        return change.mean, change.low, change.high

    def told(self, row: str, column: int) -> float:
        """A number of a table in the executed notebook: of the row that begins so, the column counted from 1."""
        folder = ROOT / "experiments/reference" / self.experiment
        table = next(folder.glob("*.ipynb")).read_text(encoding="utf-8")
        (text,) = re.findall(rf"\| {re.escape(row)} \|[^\n\"\\]*", table)
        return number(text.removeprefix(f"| {row} |").split("|")[column - 1].strip().rstrip("%"))

    @property
    def protocol(self) -> dict[str, Any]:
        """The protocol that the results carry."""
        return results(self.experiment)["protocol"]


def bench_rows() -> list[dict[str, Any]]:
    """The kept ratios of the speed bench."""
    return json.loads((ROOT / "experiments/reference/bench.json").read_text(encoding="utf-8"))


def bench(name: str) -> float:
    """The kept ratio whose name begins so. Raises a ValueError unless there is one."""
    (row,) = (row for row in bench_rows() if row["name"].startswith(name))
    return row["ratio"]


@dataclass
class Claim:
    """What stands behind a sentence: `says`, words by which it is found; `figures`, one expression for each of its
    numbers, in their order (a number that is written there is a setting, no result); `holds`, conditions for what it
    says in words; or `why` it needs none. `of` is the experiment, `names` are short words for its long arms.
    """

    says: str
    of: str = ""
    steps: int | None = None
    metric: str = ""
    names: dict[str, str] = field(default_factory=dict)
    figures: str = ""
    holds: list[str] = field(default_factory=list)
    why: str = ""

    def __post_init__(self) -> None:
        self.figures = str(self.figures)  # YAML reads a lone number as one

    def value(self, expression: str) -> Any:
        """The value of an expression in terms of the experiment's kept results."""
        asked = Figures(self.of, self.steps, self.metric)
        names = {name: getattr(asked, name) for name in dir(Figures) if name[0] != "_" and name != "protocol"}
        names |= {"protocol": asked.protocol} if self.of else {}
        names |= {"at": Figures, "bench": bench, "bench_rows": bench_rows, "ROOT": ROOT}
        return eval(expression, names | self.names)

    def numbers(self) -> list[float]:
        """The values of the sentence's numbers, in their order."""
        return list(self.value(f"({self.figures},)")) if self.figures else []


@cache
def claims(page: str) -> tuple[Claim, ...]:
    """The claims of a page."""
    return tuple(Claim(**claim) for claim in yaml.safe_load((ROOT / CLAIMS).read_text(encoding="utf-8"))[page])


def matched(page: str) -> tuple[list[tuple[Sentence, Claim]], list[str]]:
    """Each sentence with its claim, and what is not one to one: a sentence that speaks without a claim, or with two,
    and a claim that no sentence makes any more.
    """
    spoken = list(sentences(page, json.loads((ROOT / page).read_text(encoding="utf-8"))["cells"]))
    pairs = [(one, claim) for one in spoken for claim in claims(page) if claim.says in one.text]
    count = {id(one): sum(pair[0] is one for pair in pairs) for one in spoken}
    wrong = [
        f"{page}: {count[id(one)]} claims, and it needs one, for: {one.text}"
        for one in spoken
        if count[id(one)] > 1 or one.speaks > count[id(one)]
    ]
    made = [pair[1].says for pair in pairs]
    for claim in claims(page):
        if made.count(claim.says) != 1:
            wrong.append(f"{page}: {made.count(claim.says)} sentences, and there must be one, say: {claim.says}")
    return pairs, wrong


def faults(sentence: Sentence, claim: Claim) -> Iterator[tuple[str, tuple[int, str, str] | None]]:
    """What does not hold of a sentence: a message, and for a number where it stands, what it is and should be."""
    try:
        numbers = claim.numbers()
        broken = [condition for condition in claim.holds if not claim.value(condition)]
    except Exception as error:  # a row that is gone, a name that is wrong: said with its sentence like any other fault
        yield f"cannot be asked: {error!r}", None
        return
    if len(numbers) != len(sentence.numbers):
        yield f"{len(numbers)} figures for the numbers {[text for _, text in sentence.numbers]}", None
    if not (claim.holds or claim.why or "(" in claim.figures):
        yield "neither a result nor a reason stands behind it", None
    for (place, text), value in zip(sentence.numbers, numbers):
        if not agrees(text, value):
            kept = printed(value, text)
            yield f"{text} should be {kept} ({value:.6g})", (place, text, kept)
    yield from ((f"does not hold: {condition}", None) for condition in broken)


def stale(page: str) -> list[str]:
    """All that does not hold on a page, each with its sentence."""
    pairs, wrong = matched(page)
    for sentence, claim in pairs:
        wrong += [f"{page}: {message}\n    in: {sentence.text}" for message, _ in faults(sentence, claim)]
    return wrong


def mend(page: str) -> int:
    """Write the kept numbers into a page's sentences; how many were changed."""
    notebook = json.loads((ROOT / page).read_text(encoding="utf-8"))
    pairs, _ = matched(page)
    edits = [(pair[0].cell, *place) for pair in pairs for _, place in faults(*pair) if place]
    for cell, place, old, new in sorted(edits, reverse=True):
        source = "".join(notebook["cells"][cell]["source"])
        assert source[place : place + len(old)] == old
        source = source[:place] + new + source[place + len(old) :]
        notebook["cells"][cell]["source"] = source.splitlines(keepends=True)
    if edits:
        (ROOT / page).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(edits)


def tables(cells: list[dict]) -> Iterator[tuple[dict, str]]:
    """README's tables: each cell that shows one, and what its function makes of the menu and the chapters of today."""
    made: dict[str, Any] = {}
    for source in ("".join(cell["source"]) for cell in cells):
        if re.search(r"^def \w+_table\(", source, re.M):
            exec(source, made)
    for cell in cells:
        if shown := re.search(r"^Markdown\((\w+_table)\(\)\)$", "".join(cell["source"]), re.M):
            yield cell, made[shown[1]]()


def renew_tables(page: str = "index.ipynb") -> None:
    """Store README's tables as they are today."""
    notebook = json.loads((ROOT / page).read_text(encoding="utf-8"))
    for cell, text in tables(notebook["cells"]):
        cell["outputs"][0]["data"]["text/markdown"] = text.splitlines(keepends=True)
    (ROOT / page).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Say what no longer holds, page by page; with --mend, write the kept numbers first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mend", action="store_true", help="write the numbers of the kept results into the sentences")
    mending = parser.parse_args().mend
    pages = list(yaml.safe_load((ROOT / CLAIMS).read_text(encoding="utf-8")))
    for page in pages if mending else ():
        print(f"{page}: {mend(page)} numbers written")
    if mending:
        os.chdir(ROOT)
        renew_tables()
    found = [message for page in pages for message in stale(page)]
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
