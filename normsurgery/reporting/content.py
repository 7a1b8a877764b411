"""What a report says, as words and rows: the page, the Markdown and the terminal show the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from normsurgery.verifying.judge import FREE_ULPS, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from normsurgery.exporting.facts import OnnxFacts
    from normsurgery.report import Report
    from normsurgery.verifying.evidence import Comparison, Evidence
    from normsurgery.verifying.stages import Blame, InnerValue

T = TypeVar("T")

WHOLE_MODEL = "(the model itself)"
COLUMNS = 8  # as many quantities stand side by side where there are more
WORST = 10  # as many inner values are listed by themselves
FIRST = 5  # as many failures are told before somebody asks for the others
SEVERITY = {None: 0, True: 1, False: 2}  # what was decided is told before what was not


class Table(NamedTuple):
    """Rows of cells under headers. marks: the verdict of each row, or "" where it has none."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """What is reported on: the report of a verb, or evidence alone."""

    evidence: Evidence | None
    report: Report | None = None

    @property
    def onnx(self) -> OnnxFacts | None:
        return None if self.report is None else self.report.onnx

    @property
    def word(self) -> str:
        """ "passed", "failed" or "not verified"."""
        if self.evidence is None:
            return "not verified"
        return "passed" if self.evidence.passed else "failed"

    @property
    def notes(self) -> tuple[str, ...]:
        of_report = () if self.report is None else self.report.notes
        return of_report + (() if self.evidence is None else self.evidence.notes)


def subject(result: Report | Evidence) -> Subject:
    from normsurgery.verifying.evidence import Evidence

    if isinstance(result, Evidence):
        return Subject(result)
    return Subject(result.evidence, result)


def heading(about: Subject, title: str = "") -> str:
    if title or about.report is None:
        return title or "verification"
    written = f" to {about.onnx.path}" if about.onnx is not None and about.onnx.path else ""
    return f"{about.report.verb} {about.report.plan.model}{written}"


def sentence(about: Subject) -> str:
    """One sentence on how it went."""
    evidence = about.evidence
    if evidence is None:
        return "Nothing was measured, so nothing is known of what it computes."
    if not evidence.passed:
        return _failed(evidence)
    worst = evidence.worst
    if worst is None:
        return "Nothing was promised to stay the same; what moved was measured."
    return (
        f"No output is farther from the float64 truth than it may be. Closest to failing: "
        f"{worst.quantity} on the input {worst.case}, at {number(worst.verdict.factor)} of what "
        "is allowed."
    )


def _failed(evidence: Evidence) -> str:
    """What failed, by sort: outputs, stages, values inside, and what has no sort in full."""
    sorts = (
        ("comparisons of outputs", evidence.comparisons),
        ("stages", evidence.stages),
        ("values inside", evidence.inner),
    )
    told, judged = [], 0
    for name, items in sorts:
        failed = sum(item.verdict.passed is False for item in items)
        judged += failed
        if failed:
            told.append(f"{failed} of {len(items)} {name}")
    others = evidence.failures[judged:]  # they come last
    return f"Failed: {', '.join((*told, *others))}."


def number(value: float) -> str:
    """Three digits; nothing for a number that was not measured."""
    return "" if math.isnan(value) else f"{value:.3g}"


def size(count: int) -> str:
    """Bytes as a person reads them."""
    for unit, bytes_of_it in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bytes_of_it:
            return f"{count / bytes_of_it:.3g} {unit}"
    return f"{count} bytes"


def counted(operators: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count} {name}" for name, count in operators)


def allowed_ulps(verdict: Verdict) -> float:
    """The largest error that passes, in ulp; of an exact value what every value is allowed."""
    if verdict.max_error > 0 and verdict.ulps > 0:
        return verdict.allowed * (verdict.ulps / verdict.max_error)
    return float(FREE_ULPS)


def worst_of(compared: Iterable[Comparison]) -> Comparison:
    """What failed, else what was decided, that would need the largest tolerance."""
    return max(compared, key=lambda c: (SEVERITY[c.verdict.passed], _rank(c.verdict.factor)))


def _rank(factor: float) -> float:
    return math.inf if math.isnan(factor) else factor


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Items of the same key together, in the order in which the keys come up."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def quantities(evidence: Evidence) -> list[list[Comparison]]:
    """The comparisons of each quantity, mode and runner."""
    return grouped(evidence.comparisons, lambda c: (c.where, c.quantity, c.mode, c.runner))


def output_table(evidence: Evidence) -> Table:
    """For each quantity, mode and runner the comparison that came closest to failing."""
    worst = [(worst_of(group), group) for group in quantities(evidence)]
    headers = (
        "compared", "mode", "on", "verdict", "passed", "largest error", "allowed",
        "of allowed", "worst at", "on the input", "median", "99%", "SNR", "cosine", "reason",
    )  # fmt: skip
    rows = tuple(_output_row(comparison, group) for comparison, group in worst)
    return Table(headers, rows, tuple(c.verdict.word for c, _ in worst))


def _output_row(comparison: Comparison, group: Sequence[Comparison]) -> tuple[str, ...]:
    verdict = comparison.verdict
    passed = sum(c.verdict.passed is True for c in group)
    return (
        quantity(comparison),
        comparison.mode,
        comparison.runner,
        verdict.word,
        f"{passed} of {len(group)}",
        error(verdict),
        number(verdict.allowed),
        number(verdict.factor),
        worst_place(verdict),
        f"{comparison.case} ({comparison.run})",
        number(verdict.median_error),
        number(verdict.p99_error),
        f"{number(verdict.snr_db)} dB" if not math.isnan(verdict.snr_db) else "",
        "" if math.isnan(verdict.cosine) else f"{verdict.cosine:.9g}",
        verdict.reason,
    )


def quantity(comparison: Comparison) -> str:
    place = f"{comparison.where}: " if comparison.where else ""
    return place + comparison.quantity


def error(verdict: Verdict) -> str:
    if math.isnan(verdict.max_error):
        return ""
    return f"{number(verdict.max_error)} ({number(verdict.ulps)} ulp)"


def worst_place(verdict: Verdict) -> str:
    """The worst index and the two values there."""
    if verdict.worst is None:
        return ""
    values = f"{verdict.worst_candidate:.9g}, truth {verdict.worst_reference:.9g}"
    return f"{list(verdict.worst)}: {values}"


class Grid(NamedTuple):
    """Inputs by quantities. cells: the worst verdict of each, None where nothing was compared."""

    inputs: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Verdict | None, ...], ...]
    left_out: int


def input_grid(evidence: Evidence) -> Grid:
    """What each input gave for each quantity; of many quantities the worst are shown."""
    groups = quantities(evidence)
    order = sorted(range(len(groups)), key=lambda i: _badness(groups[i]), reverse=True)
    shown = [groups[index] for index in sorted(order[:COLUMNS])]
    inputs = tuple(dict.fromkeys(c.case for c in evidence.comparisons))
    cells = tuple(tuple(_cell(group, case) for group in shown) for case in inputs)
    runners = {c.runner for c in evidence.comparisons}
    modes = {c.mode for c in evidence.comparisons}
    columns = []
    for group in shown:
        beside = [group[0].runner] * (len(runners) > 1) + [group[0].mode] * (len(modes) > 1)
        columns.append(quantity(group[0]) + (f" ({', '.join(beside)})" if beside else ""))
    return Grid(inputs, tuple(columns), cells, len(groups) - len(shown))


def _badness(group: Sequence[Comparison]) -> tuple[int, float]:
    verdict = worst_of(group).verdict
    return SEVERITY[verdict.passed], _rank(verdict.factor)


def _cell(group: Sequence[Comparison], case: str) -> Verdict | None:
    found = [comparison for comparison in group if comparison.case == case]
    return worst_of(found).verdict if found else None


def stage_table(evidence: Evidence) -> Table:
    """Each form of the model, with the norm operators that it has."""
    rows = tuple(
        (
            stage.name,
            stage.runner,
            str(stage.nodes) if stage.nodes else "",
            counted(stage.operators.items()) or "none",
            stage.verdict.word,
            error(stage.verdict),
            number(stage.verdict.factor),
            stage.verdict.reason,
        )
        for stage in evidence.stages
    )
    headers = ("stage", "on", "nodes", "norm operators", "verdict", "largest error", "of allowed")
    return Table((*headers, "reason"), rows, tuple(s.verdict.word for s in evidence.stages))


def inner_table(values: Sequence[InnerValue]) -> Table:
    rows = tuple(
        (
            value.value,
            value.operator,
            value.module or "",
            value.verdict.word,
            number(value.verdict.ulps),
            number(allowed_ulps(value.verdict)),
            value.against,
            value.source,
            value.verdict.reason,
        )
        for value in values
    )
    headers = ("value", "operator", "module", "verdict", "ulp", "allowed ulp", "held against")
    return Table((*headers, "source", "reason"), rows, tuple(v.verdict.word for v in values))


def failed_inside(evidence: Evidence) -> list[InnerValue]:
    """The values inside that failed, in graph order, so that the first is the one to look at."""
    return [value for value in evidence.inner if value.verdict.passed is False][:WORST]


def left_out_table(evidence: Evidence) -> Table:
    rows = tuple(
        (left.kind, left.where, left.case, left.mode, left.runner, left.reason)
        for left in evidence.left_out
    )
    return Table(("not compared", "module", "input", "mode", "on", "why"), rows)


def drift_table(evidence: Evidence) -> Table:
    rows = tuple(
        (
            drift.output,
            drift.case,
            number(drift.relative),
            "" if drift.top1 is None else f"{drift.top1:.1%}",
        )
        for drift in evidence.drifts
    )
    return Table(("output", "on the input", "relative change", "top-1 agrees"), rows)


def blame_rows(blame: Blame) -> list[tuple[str, str]]:
    """The first operation that diverges, a name and a text each, leaving out what is unknown."""
    kinds = {
        "graph": "the operation says something else than the source",
        "kernel": "the operation says the same, and the runner computes it badly",
        "input": "an input or a constant is another",
    }
    rows = [
        ("operation", f"{blame.node} ({blame.operator})"),
        ("value", blame.value),
        ("fault", kinds[blame.kind]),
        ("detail", blame.detail),
        ("module", blame.module),
        ("source", blame.source),
        ("node of the trace", blame.fx_node),
        ("its own error", str(blame.verdict)),
        ("inherited", _inherited(blame.inherited)),
        ("on the input", blame.case),
    ]
    return [(name, text) for name, text in rows if text]


def _inherited(relative: float) -> str:
    return "" if math.isnan(relative) else f"its inputs were off by {relative:.3g}, relative"


def repeat_rows(about: Subject, command: str = "") -> list[tuple[str, str]]:
    """What somebody else needs to get the same numbers."""
    rows = [("command", command)] if command else []
    if about.evidence is not None:
        rows.append(("seed", str(about.evidence.seed)))
        if about.evidence.inputs:
            rows.append(("input", about.evidence.inputs))
    if about.report is not None:
        told = ", ".join(f"{name} {text}" for name, text in about.report.versions.items())
        rows.append(("versions", told))
    return rows
