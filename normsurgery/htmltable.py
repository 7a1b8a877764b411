"""One HTML table, as notebooks show it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def html_table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A `<table>` with every cell escaped."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
