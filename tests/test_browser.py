"""The explorer in a real browser: a page of JupyterLab, its sliders moved by keys, the picture that follows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs Debian's chromium and chromium-driver")
SOURCE = """
from ddil.solvers.sampler import Sampler
from ddil.diffusion.exact import Gaussian
from ddil.diffusion.grids import uniform_grid
from ddil.measure.explorer import Explorer
plane = Gaussian(0.0, 0.5)
Explorer(Sampler(plane, uniform_grid(8), (2,)), Sampler(plane, uniform_grid(4), (2,)), range(10))
""".strip()
PATIENCE = 180  # seconds for a page, a kernel and its imports on a busy machine


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    """The address of a notebook with an explorer, on a server of its own."""
    cell = {
        "cell_type": "code",
        "id": "explore",
        "execution_count": None,
        "metadata": {},
        "outputs": [],
        "source": SOURCE,
    }
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    (tmp_path / "explore.ipynb").write_text(
        json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={tmp_path}",
    ]
    home = {
        name: str(tmp_path / "home" / name)
        for name in (
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_RUNTIME_DIR",
            "JUPYTERLAB_SETTINGS_DIR",
            "JUPYTERLAB_WORKSPACES_DIR",
        )
    }
    server = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), **home},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _reach(f"http://127.0.0.1:{port}/api", server)
        yield f"http://127.0.0.1:{port}/doc/tree/explore.ipynb"
    finally:
        server.send_signal(signal.SIGINT)  # twice: without asking
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _reach(address: str, server: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the Jupyter server did not start")


def test_the_explorer_in_a_browser(page: str, tmp_path: Path) -> None:
    """The cell is run by its key; the picture changes with the slider of the teacher's share and with the choice of
    who drives.
    """
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1200,1400",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        wait = WebDriverWait(driver, PATIENCE)
        driver.get(page)
        editors = lambda d: [
            editor for editor in d.find_elements(By.CSS_SELECTOR, ".jp-CodeCell .cm-content") if editor.is_displayed()
        ]
        wait.until(editors)[0].click()
        picture = lambda: next(
            (image.get_attribute("src") for image in driver.find_elements(By.CSS_SELECTOR, "img.widget-image")), None
        )

        def ran(d) -> bool:
            if picture() is None and time.monotonic() % 10 < 1:  # until the kernel is there a key may be lost
                webdriver.ActionChains(d).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
            return picture() is not None

        wait.until(ran)
        first = picture()
        share = driver.find_elements(By.CSS_SELECTOR, ".widget-slider .noUi-handle")[1]
        webdriver.ActionChains(driver).click(share).send_keys(Keys.ARROW_RIGHT).perform()
        wait.until(lambda d: picture() != first)
        second = picture()
        Select(driver.find_element(By.CSS_SELECTOR, ".widget-dropdown select")).select_by_visible_text(
            "teacher first, then student"
        )
        wait.until(lambda d: picture() != second)
        assert len({first, second, picture()}) == 3
        driver.save_screenshot(str(tmp_path / "page.png"))
    finally:
        driver.quit()
