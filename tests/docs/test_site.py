# SPDX-License-Identifier: Apache-2.0
"""The site builds without a warning and loads nothing from elsewhere. Needs the extra [docs]."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, ROOT

pytest.importorskip("zensical", reason="the site needs the extra [docs]")

LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?(https?:)?//[^>]*>")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A copy is built, so that no cache or older site can be in the way."""
    root = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", root)
    shutil.copytree(ROOT / "docs", root / "docs")
    (root / "sola_vision").symlink_to(ROOT / "sola_vision")
    zensical = Path(sys.executable).with_name("zensical")
    built = subprocess.run([zensical, "build", "--strict"], cwd=root, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return root / "site"


def test_every_page_is_built_and_found(site):
    index = (site / "search.json").read_text()
    for page in PAGES[1:]:
        assert (site / page.with_suffix(".html").name).is_file()
        assert page.with_suffix(".html").name in index or page.stem == "index"


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.glob("*.html"):
        assert LOADED.findall(page.read_text()) == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text()), style


def test_the_reference_has_its_docstrings(site):
    page = (site / "reference.html").read_text()
    for name in ("sola_vision.wkv", "sola_vision.SolaConfig", "sola_vision.ops.use", "sola_vision.export.export"):
        assert f'id="{name}"' in page
    assert "divided by N here" in page
