# SPDX-License-Identifier: Apache-2.0
"""No link of the README or of docs/ leads nowhere, and every page can be found. Addresses elsewhere are not opened."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from pages import PAGES, ROOT

DOCS = ROOT / "docs"


def prose(page):
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)


def anchors(page):
    """The names that headings get: words in lower case with dashes between them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for heading in re.findall(r"^#+ +(.*)$", text, re.M):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
        yield re.sub(r"[\s-]+", "-", words)


def wrong_links(page):
    found = re.findall(r"\]\(([^()\s]+)\)|<(https?://[^>\s]+)>", prose(page))
    for target in (inside or outside for inside, outside in found):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            if parts.scheme not in ("http", "https", "mailto") or not (parts.netloc or parts.path):
                yield f"{target} is no address"
            continue
        file = (page.parent / parts.path).resolve() if parts.path else page
        if not file.exists():
            yield f"{target} is not there"
        elif page.parent == DOCS and not file.is_relative_to(DOCS):
            yield f"{target} lies outside of docs/, which the site does not have: write its name as code"
        elif parts.fragment and parts.fragment not in anchors(file):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    assert list(wrong_links(page)) == []


def test_a_wrong_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](none.md) ![b](none.png) [c](#a-heading) [d](#no-heading) [e](https://)\n")
    assert len(list(wrong_links(page))) == 4


def test_every_page_is_in_the_navigation():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [file for inside in (entry.values() if isinstance(entry, dict) else entry) for file in files(inside)]

    listed = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(Path(page).name for page in DOCS.glob("*.md")), "mkdocs.yml: nav and docs/ differ"
