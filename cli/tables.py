"""Rows under headers: a table for a person's window, plain columns for a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under headers, leaving out columns that are empty in every row.

    At a terminal the table fits the window; anywhere else it is plain columns, one line per row,
    never wrapped and without escape codes, so that grep, awk and diff get what they expect.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    used = [index for index in range(len(headers)) if any(row[index] for row in cells)]
    headers = [headers[index] for index in used]
    cells = [[row[index] for index in used] for row in cells]
    if sys.stdout.isatty():
        _fitted(headers, cells)
        return
    widths = [max(len(text) for text in column) for column in zip(headers, *cells, strict=True)]
    for line in (headers, *cells):
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        print("  ".join(padded).rstrip())


def _fitted(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(*headers)
    for row in cells:
        grid.add_row(*(Text(text) for text in row))
    Console().print(grid)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return " ".join(str(value).split())
