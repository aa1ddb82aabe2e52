# SPDX-License-Identifier: Apache-2.0
"""Tables on standard output, wide enough for the names of networks and files."""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNLIMITED = 100_000


def new_table(title: str | Text | None, first: str, *others: str) -> Table:
    """Return a table with a left-aligned column of names and right-aligned columns of numbers.

    A title with names of the user's is a `plain` text.
    """
    table = Table(title=title)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def show_table(table: Table, width: int = 110) -> None:
    """Print a table. A terminal limits it to its width, or to `width` columns if more; a pipe or a file does not."""
    console = Console()
    if sys.stdout.isatty():
        console.width = max(console.width, width)
    else:
        # a pipe or a file has no width; rich's 80 columns would break names
        console.width = _UNLIMITED
        if table.title is not None:  # it would be wrapped at the width of the table
            console.print(table.title, soft_wrap=True, highlight=False)
            table.title = None
    console.print(table)
