"""The report as Markdown, to paste into a pull request or an issue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from normsurgery.reporting import content, written
from normsurgery.reporting.content import Subject, Table

if TYPE_CHECKING:
    from normsurgery.report import Report
    from normsurgery.verifying import Evidence

# An underscore within a word stands for itself.
SPECIAL = re.compile(r"[\\`*<>|\[\]#]|(?<!\w)_|_(?!\w)")


def markdown(result: Report | Evidence, *, title: str = "", command: str = "") -> str:
    """The whole text. title: what was compared or exported. command: the line that repeats it."""
    about = content.subject(result)
    blocks = [
        f"# {_plain(content.heading(about, title))}: {about.word}",
        _plain(content.sentence(about)),
        *_judged(about),
    ]
    if about.report is not None and about.report.onnx is not None:
        facts, folded = about.report.onnx, about.report.plan
        blocks += ["## The file", _pairs(written.file_rows(facts, folded))]
        if facts.norms:
            blocks += ["## Norms as they are written", _table(written.norm_table(facts))]
    blocks += ["## How to repeat it", _pairs(content.repeat_rows(about, command))]
    if about.notes:
        blocks += ["## Notes", _list(about.notes)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _judged(about: Subject) -> Iterator[str]:
    evidence = about.evidence
    if evidence is None:
        return
    if evidence.failures:
        yield f"## What failed ({len(evidence.failures)})"
        yield _list(evidence.failures[: content.WORST])
        more = len(evidence.failures) - content.WORST
        yield f"and {more} more" if more > 0 else ""
    if evidence.blamed is not None:
        yield "## The first operation that diverges"
        yield _pairs(content.blame_rows(evidence.blamed))
    if evidence.coverage is not None:
        yield "## Inside the graph"
        yield f"{evidence.coverage}."
        failed = content.failed_inside(evidence)
        yield _table(content.inner_table(failed)) if failed else ""
    tables = (
        ("Stages, each judged alone", content.stage_table(evidence)),
        ("Outputs at their worst", content.output_table(evidence)),
        ("How far outputs moved", content.drift_table(evidence)),
        ("Not compared, which is no pass", content.left_out_table(evidence)),
    )
    for title, table in tables:
        if table.rows:
            yield f"## {title}"
            yield _table(table)


def _table(table: Table) -> str:
    """Without the columns that are empty in every row."""
    used = [i for i in range(len(table.headers)) if any(row[i] for row in table.rows)]
    lines = [[table.headers[i] for i in used], ["---"] * len(used)]
    lines += [[_plain(row[i]) for i in used] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {_code(text)}" for name, text in rows)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return SPECIAL.sub(lambda mark: f"\\{mark[0]}", " ".join(text.split()))


def _code(text: str) -> str:
    """A code span around text that may hold backticks itself."""
    text = " ".join(text.split())
    fence = "``" if "`" in text else "`"
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
