"""The error per layer as a drawing: inline SVG that needs neither a network nor a library.

Every value inside the graph is a mark, in graph order: its own error in ulp upwards, on a
logarithmic axis; what is allowed as a line; the error with what it inherited as another; norms as
diamonds; failures as crosses. Exact values lie on a line of their own at the bottom, values that
are not finite on one side only on one at the top. Colours come from the page, so that it reads in
light and in dark.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from normsurgery.reporting.content import allowed_ulps, number

if TYPE_CHECKING:
    from normsurgery.verifying.judge import Verdict
    from normsurgery.verifying.stages import Blame, InnerValue

WIDTH, HEIGHT = 1040, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 64  # margins around the plot
MOST_BANDS = 24  # as many modules are told apart along the axis
LETTER = 6.2  # width of a letter of the smallest text, in user units
CROWDED = 400  # from so many marks on they are drawn smaller


@dataclass(frozen=True)
class Point:
    """One mark: its place, what is allowed there, and what the reader is told of it.

    ulps: nan where nothing could be measured (another shape), inf where the sets of non-finite
    values differ. total: with what its inputs were off by; nan where that was not measured.
    """

    index: int
    ulps: float
    total: float
    allowed: float
    word: str
    is_norm: bool
    is_blamed: bool
    value: InnerValue


@dataclass(frozen=True)
class Scale:
    """From index and error to user units of the drawing."""

    count: int
    low: int
    high: int

    def x(self, index: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / max(self.count, 1)

    def y(self, ulps: float) -> float:
        """Ulps of zero stand on the lowest line, what is not finite on the highest."""
        bottom, top = HEIGHT - BOTTOM, TOP
        if not math.isfinite(ulps):
            return top
        if ulps <= 0:
            return bottom
        share = (math.log10(ulps) - self.low + 0.5) / (self.high - self.low + 1)
        return bottom - (bottom - top) * min(max(share, 0.02), 0.98)


def points(
    inner: Sequence[InnerValue], norms: Collection[str], blamed: Blame | None
) -> list[Point]:
    """The marks in graph order. norms: paths of modules whose every operation is part of a norm."""
    return [
        Point(
            index=index,
            ulps=_ulps(value.verdict),
            total=value.total_ulps,
            allowed=_allowed(value.verdict),
            word=value.verdict.word,
            is_norm=is_norm(value, norms),
            is_blamed=blamed is not None and value.value == blamed.value,
            value=value,
        )
        for index, value in enumerate(inner)
    ]


def is_norm(value: InnerValue, norms: Collection[str]) -> bool:
    """Whether a norm operator made the value, or an operation of a norm that is decomposed."""
    from normsurgery.onnxfile.reading import NORM_OPERATORS

    return value.operator in NORM_OPERATORS or bool(value.module and value.module in norms)


def _allowed(verdict: Verdict) -> float:
    """Nothing where torch itself is too far off: what that would allow means nothing."""
    return math.nan if verdict.passed is None else allowed_ulps(verdict)


def _ulps(verdict: Verdict) -> float:
    if math.isnan(verdict.max_error):
        return math.nan
    return math.inf if any((verdict.nonfinite or {}).values()) else verdict.ulps


def error_plot(marks: Sequence[Point]) -> str:
    """The drawing, as one `<svg>` element."""
    scale = _scale(marks)
    failed = sum(mark.word == "failed" for mark in marks)
    label = f"Error of {len(marks)} values inside the graph, {failed} of them failed"
    parts = [
        f'<svg id="error-plot" class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'tabindex="0" aria-label="{escape(label)}">',
        *_bands(marks, scale),
        *_axis(scale),
        *_allowed_line(marks, scale),
        *_total_line(marks, scale),
        *_blamed_line(marks, scale),
        f'<line id="cursor" class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0"/>',
        *(_mark(mark, scale, len(marks)) for mark in marks),
        "</svg>",
    ]
    return "\n".join(parts)


def _scale(marks: Sequence[Point]) -> Scale:
    shown = [ulps for mark in marks for ulps in (mark.ulps, mark.total, mark.allowed)]
    exponents = [math.log10(ulps) for ulps in shown if math.isfinite(ulps) and ulps > 0] or [0.0]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    return Scale(len(marks), max(low, high - 24), max(high, low + 2))


def _axis(scale: Scale) -> Iterator[str]:
    step = 1 + (scale.high - scale.low) // 9
    for exponent in range(scale.low, scale.high + 1, step):
        yield _grid_line(scale.y(10.0**exponent), _power(exponent), "grid")
    yield _grid_line(scale.y(0.0), "exact", "grid base")
    yield _grid_line(scale.y(math.inf), "not finite", "grid")
    yield f'<text class="axis" x="{LEFT - 8}" y="{TOP - 16}" text-anchor="end">ulp</text>'


def _power(exponent: int) -> str:
    if -3 <= exponent <= 4:
        return f"{10.0**exponent:.10g}"
    digits = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"


def _grid_line(y: float, text: str, kind: str) -> str:
    return (
        f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="axis" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _allowed_line(marks: Sequence[Point], scale: Scale) -> Iterator[str]:
    """A step for each value, since what is allowed differs from value to value."""
    half = (scale.x(1) - scale.x(0)) / 2
    steps: list[str] = []
    before: Point | None = None
    for mark in marks:
        if math.isnan(mark.allowed):
            continue
        joined = before is not None and before.index == mark.index - 1
        x, y = scale.x(mark.index), scale.y(mark.allowed)
        steps.append(f"{'L' if joined else 'M'}{x - half:.1f} {y:.1f}H{x + half:.1f}")
        before = mark
    if before is None:
        return
    yield f'<path class="allowed" d="{"".join(steps)}"/>'
    place = f'x="{WIDTH - RIGHT}" y="{scale.y(before.allowed) - 6:.1f}" text-anchor="end"'
    yield f'<text class="allowed-text" {place}>allowed</text>'


def _total_line(marks: Sequence[Point], scale: Scale) -> Iterator[str]:
    """From value to value, broken where it was not measured."""
    known = [mark for mark in marks if not math.isnan(mark.total)]
    if not known:
        return
    steps: list[str] = []
    for mark, before in zip(known, [None, *known], strict=False):
        joined = before is not None and before.index == mark.index - 1
        x, y = scale.x(mark.index), scale.y(mark.total)
        steps.append(f"{'L' if joined else 'M'}{x:.1f} {y:.1f}")
    yield f'<path class="total" d="{"".join(steps)}"/>'


def _blamed_line(marks: Sequence[Point], scale: Scale) -> Iterator[str]:
    """Where the graph leaves its source: what comes after may be right by itself, and is wrong."""
    for mark in marks:
        if mark.is_blamed:
            x = scale.x(mark.index)
            end, shift = ("end", -5) if x > WIDTH / 2 else ("start", 5)
            place = f'x="{x + shift:.1f}" y="{TOP - 14}" text-anchor="{end}"'
            ends = f'y1="{TOP - 22}" y2="{HEIGHT - BOTTOM}"'
            yield f'<line class="blamed" x1="{x:.1f}" x2="{x:.1f}" {ends}/>'
            yield f'<text class="blamed-text" {place}>diverges here</text>'


def _mark(mark: Point, scale: Scale, count: int) -> str:
    x, y = scale.x(mark.index), scale.y(mark.ulps)
    size = 3.0 if count < CROWDED else 2.0
    kind = f"mark {mark.word} {'norm' if mark.is_norm else ''} {mark.value.against}"
    shape = _shape(mark, x, y, size)
    halo = f'<circle class="halo" cx="{x:.1f}" cy="{y:.1f}" r="11"/>' if mark.is_blamed else ""
    return (
        f'<g class="{" ".join(kind.split())}" data-i="{mark.index}" data-x="{x:.1f}" '
        f'data-y="{y:.1f}"><title>{escape(told(mark))}</title>{halo}{shape}</g>'
    )


def _shape(mark: Point, x: float, y: float, size: float) -> str:
    if mark.word == "failed":
        arm = size + 2
        return (
            f'<path d="M{x - arm:.1f} {y - arm:.1f}L{x + arm:.1f} {y + arm:.1f}'
            f'M{x - arm:.1f} {y + arm:.1f}L{x + arm:.1f} {y - arm:.1f}"/>'
        )
    if mark.is_norm:
        arm = size + 1.6
        return (
            f'<path d="M{x:.1f} {y - arm:.1f}L{x + arm:.1f} {y:.1f}L{x:.1f} {y + arm:.1f}'
            f'L{x - arm:.1f} {y:.1f}Z"/>'
        )
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'


def told(mark: Point) -> str:
    """What is said of a mark, a fact per line."""
    value, verdict = mark.value, mark.value.verdict
    measured = f"error {number(verdict.max_error)} = {number(verdict.ulps)} ulp"
    allowed = f"allowed {number(verdict.allowed)} = {number(allowed_ulps(verdict))} ulp"
    inherited = "" if math.isnan(mark.total) else f"with what it inherited: {mark.total:.3g} ulp"
    lines = [
        f"{value.value}  ({value.operator}{', norm' if mark.is_norm else ''})",
        f"{verdict.word}: {measured}; {allowed}" if number(verdict.max_error) else verdict.word,
        inherited,
        verdict.reason,
        f"module {value.module}" if value.module else "",
        value.source,
        f"held against the {value.against}",
        "blamed: the first operation that diverges" if mark.is_blamed else "",
    ]
    return "\n".join(line for line in lines if line)


def _bands(marks: Sequence[Point], scale: Scale) -> Iterator[str]:
    """A shade and a name for each module that the values come from, one after another."""
    half = (scale.x(1) - scale.x(0)) / 2
    top, bottom = TOP - 8, HEIGHT - BOTTOM
    for number_of_band, (name, first, last) in enumerate(_modules(marks)):
        x0, x1 = scale.x(first) - half, scale.x(last) + half
        if number_of_band % 2 == 0:
            yield (
                f'<rect class="band" x="{x0:.1f}" y="{top}" width="{x1 - x0:.1f}" '
                f'height="{bottom - top + 22}"/>'
            )
        text = _fitted(name, x1 - x0 - 6)
        if text:
            yield (
                f'<text class="module" x="{(x0 + x1) / 2:.1f}" y="{bottom + 16}" '
                f'text-anchor="middle"><title>{escape(name)}</title>{escape(text)}</text>'
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield (
        f'<text class="axis" x="{middle:.1f}" y="{HEIGHT - 18}" text-anchor="middle">'
        "values in graph order, by module</text>"
    )


def _modules(marks: Sequence[Point]) -> list[tuple[str, int, int]]:
    """Runs of values of one module: the deepest paths that leave at most `MOST_BANDS` of them."""
    depths = range(6, 0, -1)
    for depth in depths:
        runs = _runs(marks, depth)
        if len(runs) <= MOST_BANDS:
            return runs
    return []


def _runs(marks: Sequence[Point], depth: int) -> list[tuple[str, int, int]]:
    """A value without a module (a constant, a reshape of the exporter) goes with the one before."""
    names: list[str] = []
    for mark in marks:
        path = ".".join(mark.value.module.split(".")[:depth])
        names.append(path or (names[-1] if names else ""))
    runs = []
    for name, group in groupby(zip(names, marks, strict=True), key=lambda pair: pair[0]):
        indices = [mark.index for _, mark in group]
        runs.append((name, indices[0], indices[-1]))
    return runs


def _fitted(name: str, width: float) -> str:
    """The name if there is room, else its end, else nothing."""
    letters = int(width / LETTER)
    if len(name) <= letters:
        return name
    return "…" + name[1 - letters :] if letters >= 5 else ""
