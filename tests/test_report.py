"""Results collated into tables, curves and pages; the pages and the site in a real browser, from a folder, without
a network.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

import ddil.cli
import ddil.lab.report
import ddil.lab.site
from ddil.lab.collate import (
    MetricTable,
    as_csv,
    collate,
    digits_of,
    find_results,
    latex,
    markdown,
    one_table,
    protocols_apart,
    published,
    tables,
)
from ddil.lab.pages import dead_links
from ddil.lab.results import read_results, row, write_results

ROOT = Path(__file__).resolve().parent.parent
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PLAIN = {0: 0.503, 1: 0.611, 2: 0.557}
WITH = {0: 0.402, 1: 0.533, 2: 0.448}


def run(
    folder: Path, seeds: tuple[int, ...], protocol: dict[str, Any] | None = None, updates: int = 10, values: bool = True
) -> Path:
    """A folder of results of the experiment "toy" on some of the seeds."""
    of = lambda figures: {seed: figures[seed] for seed in seeds}
    rows = [
        row("PD", 4, "error", of(PLAIN)),
        row("PD", 2, "error", {seed: 2 * value for seed, value in of(PLAIN).items()}),
        row("PD + DDIL", 4, "error", of(WITH)),
    ]
    rows = rows if values else [{key: value for key, value in entry.items() if key != "values"} for entry in rows]
    command = (
        f"mkdir -p {folder} && python -m papermill toy.ipynb {folder}/toy.ipynb -p updates {updates} -y "
        f"'{{seeds: [{', '.join(map(str, seeds))}]}}' -p output {folder}"
    )
    return write_results(
        folder, "toy", {"error": protocol or {"samples": 500, "reference": "the teacher"}}, command, rows
    )


# The frame


def test_seeds_of_separate_runs_become_one_arm(tmp_path: Path) -> None:
    """Three runs of a seed each are one arm of three, with Student's interval; the same seeds again, or other
    parameters, are not mixed in.
    """
    for seed in (0, 1, 2):
        run(tmp_path / f"seed-{seed}", (seed,))
    (table,) = tables(collate(find_results([tmp_path])))
    entry = table.rows[(table.rows["label"] == "PD") & (table.rows["steps"] == 4)].iloc[0]
    low, high = stats.t.interval(0.95, 2, stats.tmean(list(PLAIN.values())), stats.sem(list(PLAIN.values())))
    assert (
        entry["n"] == 3 and entry["seeds"] == (0, 1, 2) and (entry["low"], entry["high"]) == pytest.approx((low, high))
    )
    run(tmp_path / "again", (1, 2))
    run(tmp_path / "longer", (0, 1, 2), updates=20)
    labels = set(collate(find_results([tmp_path]))["label"])
    assert {"PD (seed-0)", "PD (again)", "PD (longer)"} <= labels and "PD" not in labels


def test_files_without_values_are_read(tmp_path: Path) -> None:
    """Old files are collated as they are, and never pooled."""
    for seeds in ((0,), (1,)):
        run(tmp_path / f"seeds-{seeds[0]}", seeds, values=False)
    frame = collate(find_results([tmp_path]))
    assert set(frame["n"]) == {1} and len(frame) == 6 and frame["values"].isna().all()


def test_the_kept_results_can_be_collated() -> None:
    """Every row of experiments/reference is in the frame and in exactly one table, under its own name."""
    paths = find_results([ROOT / "experiments" / "reference" / name for name in ("ddil", "declared-teacher")])
    frame, rows = collate(paths), sum(len(read_results(path)["rows"]) for path in paths)
    made = tables(frame)
    assert len(frame) == rows == sum(len(table.rows) for table in made)
    assert not frame.duplicated(["experiment", "metric", "protocol", "label", "steps", "paired"]).any()
    stored = next(table for table in made if table.experiment == "ddil" and table.metric == "Fréchet to data (atoms)")
    assert list(stored.differences["label"].unique()) == ["PD + DDIL − PD"]


# Tables


def numbers(text: str) -> list[float]:
    """The numbers of a cell."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text.replace("$-$", "-"))]


def parsed(form: str, text: str) -> dict[str, list[list[float]]]:
    """The lines of tables in Markdown or LaTeX: the numbers in each cell by the name of the line."""
    lines = (
        [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
        if form == "markdown"
        else [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if " & " in line]
    )
    return {
        cells[0].replace("$-$", "−"): [numbers(cell) for cell in cells[1:]]
        for cells in lines
        if cells[0] not in ("arm", "difference", "---")
    }


@pytest.fixture
def table(tmp_path: Path) -> MetricTable:
    """The table of a run on three seeds."""
    run(tmp_path / "run", (0, 1, 2))
    return tables(collate(find_results([tmp_path])))[0]


@pytest.mark.parametrize(("form", "write"), [("markdown", markdown), ("latex", latex)])
def test_tables_hold_the_numbers(table: MetricTable, form: str, write: Any) -> None:
    """What Markdown and LaTeX print, read back, is each mean with its interval to the digits printed, in the column
    of its steps.
    """
    found = parsed(form, write(table))
    assert list(found) == ["PD", "PD + DDIL", "PD + DDIL − PD"] and found["PD + DDIL"][1] == []
    for label, column, steps in (("PD", 0, 4), ("PD", 1, 2), ("PD + DDIL", 0, 4)):
        entry = table.rows[(table.rows["label"] == label) & (table.rows["steps"] == steps)].iloc[0]
        assert found[label][column] == pytest.approx(
            [entry["mean"], entry["low"], entry["high"]], abs=0.5001 * 10 ** -digits_of(table.rows)
        ), (label, steps)
    assert "500" in write(table) and "the teacher" in write(table)


def test_csv_holds_every_digit(table: MetricTable) -> None:
    """CSV read back is what was measured, exactly."""
    back = pd.read_csv(io.StringIO(as_csv([table])))
    arms = back[back["kind"] == "arm"].set_index(["arm", "steps"])
    for entry in table.rows.to_dict("records"):
        assert [arms.loc[(entry["label"], entry["steps"]), key] for key in ("mean", "low", "high")] == [
            entry[key] for key in ("mean", "low", "high")
        ]


def test_paired_differences(table: MetricTable, tmp_path: Path) -> None:
    """PD + DDIL minus PD is the mean and Student's interval of the differences seed by seed, as SciPy has it, also
    across folders.
    """
    by_hand = stats.ttest_rel(list(WITH.values()), list(PLAIN.values())).confidence_interval(0.95)
    (change,) = table.differences.to_dict("records")
    assert (
        change["steps"] == 4
        and change["n"] == 3
        and (change["low"], change["high"]) == pytest.approx((by_hand.low, by_hand.high))
    )
    assert change["mean"] == pytest.approx(sum(WITH[seed] - PLAIN[seed] for seed in WITH) / 3)
    other = write_results(
        tmp_path / "b",
        "toy",
        {"error": {"samples": 500, "reference": "the teacher"}},
        "make b",
        [row("CTM", 4, "error", {2: 0.3, 0: 0.2, 7: 9.0})],
    )
    frame = collate(find_results([tmp_path / "run", other]))
    found = {entry["label"]: entry for entry in tables(frame, against="PD")[0].differences.to_dict("records")}
    assert (
        found["CTM − PD"]["mean"] == pytest.approx((0.2 - PLAIN[0] + 0.3 - PLAIN[2]) / 2)
        and found["CTM − PD"]["n"] == 2
    )


def test_mixed_protocols_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One table of both is refused with the fields that differ and no other; a report gives each its own and says
    so.
    """
    run(tmp_path / "a", (0, 1))
    run(tmp_path / "b", (0, 1), {"samples": 64, "reference": "the teacher", "guidance": 2})
    frame = collate(find_results([tmp_path]))
    with pytest.raises(
        ValueError,
        match="samples is 500 and 64.*guidance is not said and 2|guidance is not said and 2.*samples is 500 and 64",
    ) as refused:
        one_table(frame, "error")
    assert "reference" not in str(refused.value)
    assert len(tables(frame)) == 2 and len(protocols_apart(frame)) == 1
    assert (
        ddil.cli.main(["report", str(tmp_path), "--metric", "error"]) == 2
        and "samples is 500 and 64" in capsys.readouterr().err
    )
    assert ddil.cli.main(["report", str(tmp_path), "--output", str(tmp_path / "report")]) == 0
    assert (
        "kept apart" in capsys.readouterr().err
        and "samples is 500 and 64" in (tmp_path / "report/toy.html").read_text()
    )


def test_published_figures_have_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    """Each has source and protocol, belongs beside a metric that our kept results have, and is printed in a column
    of its own.
    """
    entries = json.loads((ROOT / "ddil" / "assets" / "paper.json").read_text())
    assert len(entries) >= 9
    for entry in entries:
        assert (
            re.search(r"arXiv \d{4}\.\d{5}", entry["source"]) and {"data", "figure", "runs"} <= entry["protocol"].keys()
        )
        for experiment, metric in entry["beside"]:
            arms = {
                kept["arm"]
                for kept in read_results(ROOT / "experiments" / "reference" / experiment)["rows"]
                if kept["metric"] == metric
            }
            assert any(paper.source == entry["source"] for paper in published(experiment, metric, arms)), (
                experiment,
                metric,
            )
    (table,) = (
        table
        for table in tables(collate(find_results([ROOT / "experiments" / "reference" / "text2image"])))
        if table.metric == "Fréchet distance"
    )
    head, _, *lines = [line for line in markdown(table).splitlines() if line.startswith("|")]
    cells = next(line for line in lines if line.startswith("| PD |")).split(" | ")
    assert (
        cells[head.split(" | ").index("4 steps, paper")] == "14.72 (a)"
        and "2410.11971" in table.note
        and "not to be ranked" in table.note
    )


# Pages


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Headless chromium that logs what it prints to the console and what it asks for."""
    if not (BROWSER and DRIVER):
        pytest.skip("needs Debian's chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


def wide(driver: Any, width: int) -> None:
    """Make the page as wide as a phone (narrower than a window can be) or a screen."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )


def quiet(driver: Any) -> None:
    """No word on the console, and nothing asked for but files."""
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent" and event["params"]["documentURL"].startswith("file:")
    ]  # not by the empty tab
    assert asked and all(url.startswith(("file:", "data:")) for url in asked), asked


def fits(driver: Any, page: Path) -> None:
    """Nothing sticks out on a phone or on a wide screen."""
    for width in (390, 1440):
        wide(driver, width)
        driver.get(page.as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width, (page, width)


def column(driver: Any, place: int) -> list[str]:
    """What the first table shows in a column, from top to bottom."""
    return driver.execute_script(
        "return [...document.querySelector('table.sortable tbody').rows].map((row) "
        "=> row.cells[arguments[0]].textContent)",
        place,
    )


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A report of two runs, with an executed notebook and samples."""
    for updates, seeds in ((10, (0, 1, 2)), (20, (0, 1))):
        run(tmp_path / f"runs/{updates}", seeds, updates=updates)
    shutil.copy(ROOT / "experiments/reference/teacher/teacher.ipynb", tmp_path / "runs/10")
    shutil.copy(ROOT / "experiments/reference/teacher/samples.png", tmp_path / "runs/10")
    index, apart = ddil.lab.report.write_report([tmp_path / "runs"], tmp_path / "report")
    assert not apart
    return index


def test_the_report_in_a_browser(report: Path, browser: Any) -> None:
    """Offline from its folder: nothing on the console, nothing fetched, nothing sticks out, tables sort by mouse
    and by keys, both colour schemes are there.
    """
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    assert list(dead_links(report.parent)) == []
    for page in (report, report.with_name("toy.html"), report.parent / "notebooks/10.html"):
        fits(browser, page)
    browser.get(report.with_name("toy.html").as_uri())
    heads = browser.find_elements(By.CSS_SELECTOR, "table.sortable thead th")[:3]
    heads[1].find_element(By.TAG_NAME, "button").click()
    means = [float(text.split("[")[0]) for text in column(browser, 1)]
    assert means == sorted(means) and len(means) == 4 and heads[1].get_attribute("aria-sort") == "ascending"
    heads[1].find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert [float(text.split("[")[0]) for text in column(browser, 1)] == means[::-1] and heads[1].get_attribute(
        "aria-sort"
    ) == "descending"
    heads[2].find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    assert column(browser, 2)[-2:] == ["–", "–"]  # without a value: last, whichever way
    assert "papermill" in browser.find_element(By.CSS_SELECTOR, "figure details.command pre").get_attribute(
        "textContent"
    )
    colours = []
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        colours.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    browser.find_element(By.CSS_SELECTOR, "button.theme").click()
    assert (
        colours[0] != colours[1]
        and browser.execute_script("return getComputedStyle(document.body).backgroundColor") == colours[0]
    )
    quiet(browser)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The site of a repository with the README and three of our notebooks, and one of our experiments."""
    clone = tmp_path / "clone"
    for name in (
        "nbs/01_diffusion/01_schedule.ipynb",
        "nbs/03_rollins/01_states.ipynb",
        "nbs/04_methods/11_your_own_method.ipynb",
        "experiments/reference/teacher/teacher.ipynb",
        "experiments/reference/teacher/results.json",
    ):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    shutil.copy(ROOT / "index.ipynb", clone)
    return ddil.lab.site.build(clone, tmp_path / "site")


def test_the_site_in_a_browser(site: Path, browser: Any) -> None:
    """Home, a notebook and the results: formulas are drawn, search finds a section by keys alone, the way leads on
    to the next notebook and to the guide.
    """
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    assert list(dead_links(site.parent)) == []
    for page in (site, site.parent / "notebooks/01_diffusion-01_schedule.html", site.parent / "results/teacher.html"):
        fits(browser, page)
    browser.get((site.parent / "notebooks/01_diffusion-01_schedule.html").as_uri())
    formulas = browser.find_elements(By.CSS_SELECTOR, "div.formula math")
    assert (
        formulas
        and all(one.rect["height"] > 10 for one in formulas)
        and not browser.find_elements(By.CSS_SELECTOR, "code.formula")
    )
    assert "$" not in "".join(one.text for one in browser.find_elements(By.CSS_SELECTOR, "article > p"))
    browser.find_element(By.CSS_SELECTOR, "a[rel=next]").click()
    assert browser.current_url.endswith("03_rollins-01_states.html")
    browser.find_element(By.TAG_NAME, "body").send_keys("/")
    browser.switch_to.active_element.send_keys("shortcut halvings")
    WebDriverWait(browser, 30).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, "#found a"))
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    WebDriverWait(browser, 30).until(lambda driver: "04_methods-11_your_own_method.html" in driver.current_url)
    wide(browser, 390)
    browser.get(site.as_uri())
    assert not browser.find_element(By.ID, "pages").is_displayed()
    browser.find_element(By.CSS_SELECTOR, "button.menu").send_keys(Keys.ENTER)
    assert (
        browser.find_element(By.ID, "pages").is_displayed()
        and browser.find_element(By.CSS_SELECTOR, "p.prominent a").text == "Write your own method"
    )
    quiet(browser)


def test_only_our_own_pages_are_replaced(report: Path, tmp_path: Path) -> None:
    """A second report takes the place of the first; a folder of something else is refused, and nothing in it is
    touched.
    """
    (report.parent / "stale.html").write_text("old")
    ddil.lab.report.write_report([tmp_path / "runs"], report.parent)
    assert report.is_file() and not report.with_name("stale.html").exists()
    with pytest.raises(ValueError, match="not made by ddil"):
        ddil.lab.report.write_report([tmp_path / "runs"], tmp_path / "runs")
    assert (tmp_path / "runs/10/results.json").is_file() and not [
        path for path in tmp_path.iterdir() if path.name.startswith(".")
    ]
