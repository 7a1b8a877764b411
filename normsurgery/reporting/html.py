"""The report as one page: no network, no other file, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from math import isnan
from typing import TYPE_CHECKING

from normsurgery.reporting import content, plot, written
from normsurgery.reporting.content import Subject, Table

if TYPE_CHECKING:
    from normsurgery.exporting.facts import OnnxFacts
    from normsurgery.plans import Plan
    from normsurgery.report import Report
    from normsurgery.verifying import Evidence
    from normsurgery.verifying.judge import Verdict

# Nothing may be fetched, whatever a model's names hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
LONG = frozenset({"reason", "why", "source", "worst at", "where"})
MEANING = "A mark is the error of one operation alone, for what those before it gave to it."
LISTED = 2000  # as many inner values are still listed in the page


def page(result: Report | Evidence, *, title: str = "", command: str = "") -> str:
    """The whole page. title: what was compared or exported. command: the line that repeats it."""
    about = content.subject(result)
    name = content.heading(about, title)
    style, script = (_resource(file) for file in ("page.css", "page.js"))
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: {about.word}</title>\n<style>\n{style}</style></head>\n<body>\n"
        f"{_body(about, name, command)}\n<script>\n{script}</script>\n</body></html>\n"
    )


def _resource(name: str) -> str:
    return files("normsurgery.reporting").joinpath(name).read_text(encoding="utf-8")


def _body(about: Subject, name: str, command: str) -> str:
    pill = f'<span class="pill {about.word}">{about.word}</span>'
    head = f"<header>{pill}<h1>{escape(name)}</h1></header>"
    parts = [head, f'<p class="soft">{escape(content.sentence(about))}</p>', *_tiles(about)]
    if about.evidence is not None:
        parts += _judged(about, about.evidence)
    if about.report is not None and about.report.onnx is not None:
        parts += _file(about.report.onnx, about.report.plan)
    parts.append(_section("How to repeat it", _pairs(content.repeat_rows(about, command))))
    if about.notes:
        parts.append(_section("Notes", _list(about.notes)))
    return "\n".join(parts)


def _tiles(about: Subject) -> Iterator[str]:
    tiles = [
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for value, text in _figures(about)
    ]
    if tiles:
        yield f'<div class="tiles">{"".join(tiles)}</div>'


def _figures(about: Subject) -> Iterator[tuple[str, str]]:
    """The few numbers that are read first."""
    evidence, onnx = about.evidence, about.onnx
    if evidence is not None and evidence.comparisons:
        passed, count = evidence.count("passed"), len(evidence.comparisons)
        cases = len({c.case for c in evidence.comparisons})
        inputs = "1 input" if cases == 1 else f"{cases} inputs"
        yield f"{passed} of {count}", f"comparisons passed, on {inputs}"
        if evidence.worst is not None:
            factor = content.number(evidence.worst.verdict.factor)
            yield f"{factor} ×", "of what is allowed, at worst"  # noqa: RUF001
    if evidence is not None and evidence.coverage is not None:
        share = evidence.coverage
        yield f"{share.share:.0%}", f"of {share.floating} values inside compared"
    if onnx is not None:
        yield f"opset {onnx.opset}", f"{onnx.nodes} nodes, {content.size(onnx.bytes)}"


def _judged(about: Subject, evidence: Evidence) -> Iterator[str]:
    if evidence.blamed is not None:
        rows = content.blame_rows(evidence.blamed)
        yield _section("The first operation that diverges", _pairs(rows), alarm=True)
    if evidence.inner:
        yield _section("Error inside the graph", _inside(about, evidence))
    if evidence.failures:
        many = f"What failed ({len(evidence.failures)})"
        yield _section(many, _shortened(evidence.failures), alarm=True)
    if evidence.stages:
        table = _table(content.stage_table(evidence), chips="norm operators")
        yield _section("Stages, each judged alone", table)
    if evidence.comparisons:
        yield _section("Outputs, by input", _grid(content.input_grid(evidence)))
        yield _section("Outputs at their worst", _table(content.output_table(evidence)))
    if evidence.drifts:
        yield _section("How far outputs moved", _table(content.drift_table(evidence)))
    if evidence.left_out:
        yield _section("Not compared, which is no pass", _table(content.left_out_table(evidence)))


def _inside(about: Subject, evidence: Evidence) -> str:
    norms = {norm.site for norm in about.onnx.norms} if about.onnx is not None else set()
    marks = plot.points(evidence.inner, norms - {""}, evidence.blamed)
    covered = "" if evidence.coverage is None else f"<p>{escape(str(evidence.coverage))}.</p>"
    listed = evidence.inner[:LISTED]
    more = "" if len(listed) == len(evidence.inner) else f", the first {LISTED} of them"
    values = f"<details><summary>All {len(evidence.inner)} values{more}</summary>"
    return (
        f"{covered}<figure>{plot.error_plot(marks)}"
        f'<div id="told" role="status"></div>{_key(marks)}'
        f"<figcaption>{MEANING}</figcaption></figure>"
        f"{values}{_table(content.inner_table(listed))}</details>"
    )


def _key(marks: Sequence[plot.Point]) -> str:
    """What the marks mean, for those that are there."""
    line = '<path class="total" d="M0 11L5 6L9 8L14 3"/>'
    meanings = [
        ("passed", '<circle cx="7" cy="7" r="3.4"/>', "passed", any(not m.is_norm for m in marks)),
        (
            "norm",
            '<path d="M7 2L12 7L7 12L2 7Z"/>',
            "part of a norm",
            any(m.is_norm for m in marks),
        ),
        ("failed", '<path d="M3 3L11 11M3 11L11 3"/>', "failed", _any(marks, "failed")),
        ("undecided", '<circle cx="7" cy="7" r="3.4"/>', "undecided", _any(marks, "undecided")),
        (
            "line",
            line,
            "with what it inherited, which is not judged",
            any(not isnan(m.total) for m in marks),
        ),
        (
            "graph",
            '<circle cx="7" cy="7" r="3.4"/>',
            "paler: held against the graph's own float64 run, the source has no such value",
            any(m.value.against == "graph" for m in marks),
        ),
    ]
    shown = "".join(
        f'<span><svg viewBox="0 0 14 14" aria-hidden="true"><g class="mark {kind}">{shape}</g>'
        f"</svg>{escape(meaning)}</span>"
        for kind, shape, meaning, there in meanings
        if there
    )
    return f'<div class="key">{shown}</div>'


def _any(marks: Sequence[plot.Point], word: str) -> bool:
    return any(mark.word == word for mark in marks)


def _file(facts: OnnxFacts, folded: Plan) -> Iterator[str]:
    yield _section("The file", _pairs(written.file_rows(facts, folded)))
    if facts.norms:
        yield _section("Norms as they are written", _table(written.norm_table(facts)))


def _section(title: str, inner: str, *, alarm: bool = False) -> str:
    kind = ' class="alarm"' if alarm else ""
    return f"<section{kind}><h2>{escape(title)}</h2>{inner}</section>"


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    told = "".join(
        f'<dt>{escape(name)}</dt><dd class="code">{escape(text)}</dd>' for name, text in rows
    )
    return f"<dl>{told}</dl>"


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _shortened(lines: Sequence[str]) -> str:
    """The first lines; the others where somebody asks for them."""
    first, rest = lines[: content.FIRST], lines[content.FIRST :]
    more = f"<details><summary>{len(rest)} more</summary>{_list(rest)}</details>" if rest else ""
    return _list(first) + more


def _table(table: Table, chips: str = "") -> str:
    """Without the columns that are empty in every row. chips: a column of comma-separated words."""
    used = [i for i in range(len(table.headers)) if any(row[i] for row in table.rows)]
    head = "".join(f"<th>{escape(table.headers[i])}</th>" for i in used)
    marks = table.marks or ("",) * len(table.rows)
    body = "".join(
        "<tr>" + "".join(_cell(table.headers[i], row[i], mark, chips) for i in used) + "</tr>"
        for row, mark in zip(table.rows, marks, strict=True)
    )
    return _scrolling(head, body)


def _scrolling(head: str, body: str, kind: str = "") -> str:
    """A table that is scrolled where it is wider than the page."""
    rows = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{kind}">{rows}</table></div>'


def _cell(header: str, text: str, mark: str, chips: str) -> str:
    kinds = [mark] * (header == "verdict") + ["long"] * (header in LONG and len(text) > 40)
    shown = escape(text)
    if header == chips:
        shown = "".join(f'<span class="chip">{escape(word)}</span>' for word in text.split(", "))
    return f'<td class="{" ".join(kinds)}">{shown}</td>' if kinds else f"<td>{shown}</td>"


def _grid(grid: content.Grid) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in grid.columns)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(map(_grid_cell, cells))}</tr>"
        for name, cells in zip(grid.inputs, grid.cells, strict=True)
    )
    more = f" {grid.left_out} more quantities came no closer to failing." if grid.left_out else ""
    meaning = f"The largest error as a multiple of what is allowed: up to 1 passes.{more}"
    table = _scrolling(f"<th>input</th>{head}", rows, "grid")
    return f'{table}<p class="soft">{escape(meaning)}</p>'


def _grid_cell(verdict: Verdict | None) -> str:
    """The share of what is allowed, as a bar that is full where nothing more would pass."""
    if verdict is None:
        return '<td class="soft" title="not compared">–</td>'  # noqa: RUF001
    shown = content.number(verdict.factor) if verdict.passed is not None else verdict.word
    share = min(verdict.factor, 1.0) if verdict.passed is not None else 0.0
    bar = f'<i class="bar" style="width:{100 * share:.0f}%"></i>' if share > 0 else ""
    told = f'title="{escape(str(verdict))}"'
    return f'<td class="{verdict.word}" {told}>{shown or verdict.word}<b>{bar}</b></td>'
