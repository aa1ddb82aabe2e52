# SPDX-License-Identifier: Apache-2.0
"""Prose is wrapped at 120 columns, so that a change of a sentence is a change of few lines."""

import re

import pytest
from pages import PAGES, ROOT

WIDTH = 120


def long_lines(text):
    """The numbers of the lines that are too long. Code, tables, pictures and mkdocstrings' options may be."""
    text = re.sub(
        r"^```.*?^```$|^<!-- table: .*?^<!-- end -->$", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S
    )
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > WIDTH and not line.startswith(("|", "![", "    ")):
            yield number


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_prose_is_wrapped(page):
    assert list(long_lines(page.read_text())) == []


def test_a_long_line_is_found_and_its_exceptions_are_not():
    long = "word " * 30
    assert list(long_lines(f"short\n\n{long}\n")) == [3]
    for text in (f"```\n{long}\n```\n", f"| {long} |\n", f"<!-- table: x -->\n{long}\n<!-- end -->\n"):
        assert list(long_lines(f"{text}\n{long}\n")) == [text.count("\n") + 2]
