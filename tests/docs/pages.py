# SPDX-License-Identifier: Apache-2.0
"""The README and the pages of docs/, their blocks of code, and the commands in these."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("bash", "sh")


@dataclass(frozen=True)
class Block:
    """A block of code: where it begins, its language, its text."""

    place: str
    language: str
    text: str

    def commands(self):
        """Its commands, a line each: continued lines joined, a here-document with the line that opens it."""
        lines = iter(re.sub(r"\\\n\s*", " ", self.text).splitlines())
        for line in lines:
            command = line
            if opened := re.search(r"<<'(\w+)'", line):
                for inside in lines:
                    command += "\n" + inside
                    if inside == opened[1]:
                        break
            if shlex.split(line, comments=True):
                yield command


def blocks(page):
    text = page.read_text()
    for found in re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```$", text, re.M | re.S):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(f"{page.relative_to(ROOT)}:{line}", found[1], found[2])
