# SPDX-License-Identifier: Apache-2.0
"""Tables of numbers on standard output, wide enough for the names of networks."""

from rich.console import Console
from rich.table import Table


def new_table(title: str | None, first: str, *others: str) -> Table:
    """Return a table with a left-aligned column of names and right-aligned columns of numbers."""
    table = Table(title=title)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def show_table(table: Table, width: int = 110) -> None:
    """Print a table at least `width` columns wide."""
    console = Console()
    # a pipe or a file has no width; 80 columns would cut the names of networks short
    console.width = max(console.width, width)
    console.print(table)
