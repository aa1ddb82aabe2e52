# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser without a window: a picture is dropped, classes and maps appear, a tile changes the cost.

Needs gradio, playwright and a Chromium of the system (SOLA_SCREENSHOTS names a folder for pictures of the page).
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from saved import save_classifier, save_detector

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page's address; a classifier is offered first, a detector second."""
    folder = tmp_path_factory.mktemp("app")
    checkpoints = [save_classifier(folder / "a" / "best.safetensors"), save_detector(folder / "b" / "best.safetensors")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sola_vision", "app", *map(str, checkpoints), "--port", str(port)]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", port, checkpoints
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, served):
    opened = browser.new_page(viewport={"width": 1300, "height": 1500})
    opened.set_default_timeout(120_000)
    opened.foreign = []
    opened.on("request", lambda request: _note(opened.foreign, request.url, served[0]))
    opened.goto(served[0])
    yield opened
    opened.close()


def _note(foreign, url, own):
    if not url.startswith((own, own.replace("http", "ws"), "data:", "blob:")):
        foreign.append(url)


def shot(page, name):
    folder = os.environ.get("SOLA_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((192, 120), Image.Resampling.BICUBIC).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_picture_gets_classes_and_maps(page, served, picture):
    page.locator("#picture input[type=file]").set_input_files(str(picture))
    page.wait_for_selector("#cams button img")
    page.wait_for_function("document.querySelectorAll('#cams button img').length == 2")
    classes = page.locator("#classes").inner_text()
    assert set(re.findall(r"ant|bee|cat", classes)) == {"ant", "bee", "cat"}
    assert "2.1 S" in page.locator("#cams").inner_text()
    shot(page, "classifier")
    # the detector draws
    page.locator("#source input").click()
    page.get_by_role("option", name=str(served[2][1])).click()
    page.wait_for_selector("#drawn img")
    page.wait_for_function("document.querySelectorAll('#cams button img').length == 4")
    shot(page, "detector")
    assert page.foreign == []


def test_a_tile_changes_the_cost(page):
    tab = page.get_by_role("tab", name="Schedule")
    while tab.get_attribute("aria-selected") != "true":  # until the page's scripts listen, a click is lost
        tab.click()
        page.wait_for_timeout(300)
    page.wait_for_selector("#tile-1-1")
    before = page.locator("#cost").inner_text()
    assert "(+0 %)" in before
    assert page.locator("button.tile").count() == 12
    page.locator("#tile-1-1").click()
    page.wait_for_function("document.querySelector('#schedule textarea, #schedule input').value == 'SL/LL/LLSLLS/LS'")
    page.wait_for_function(
        f"document.querySelector('#cost') && document.querySelector('#cost').innerText != {before!r}"
    )
    shot(page, "schedule")
    assert page.locator("#tile-1-1").inner_text().startswith("S")
    after = page.locator("#cost").inner_text()
    assert float(after.split()[0]) > float(before.split()[0])
    # back again
    page.locator("#tile-1-1").click()
    page.wait_for_function(f"document.querySelector('#cost').innerText == {before!r}")
    # a text that is no schedule says why
    page.locator("#schedule textarea, #schedule input").fill("LX")
    page.wait_for_function("document.querySelector('#cost').innerText.includes('not a layer')")
    shot(page, "wrong")


def test_only_this_machine_reaches_it(served):
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1"}:
        if address.startswith("127."):
            continue
        with socket.socket() as probe:
            probe.settimeout(5)
            assert probe.connect_ex((address, served[1])) != 0


@pytest.mark.parametrize("header", [("Host", "evil.com"), ("Origin", "http://evil.com")], ids=" ".join)
def test_other_websites_do_not_reach_it(served, header):
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(f"{served[0]}/config", headers=dict([header])))


def test_a_source_that_was_not_offered_is_refused(served):
    client = pytest.importorskip("gradio_client").Client(served[0], verbose=False)
    with pytest.raises(Exception, match="not in the list of choices"):
        client.predict("/etc/hostname", None, 224, fn_index=0)
