"""Tables in a terminal."""

import sys
from collections.abc import Sequence

WIDTH = 160  # of a table that goes to a file or a pipe: seven tasks with intervals


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. The first column is aligned to the left, the others to the right. Text is printed as it is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, emoji=False).print(table)
