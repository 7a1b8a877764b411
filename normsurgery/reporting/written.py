"""What a report says of the ONNX file that was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from normsurgery.reporting.content import WHOLE_MODEL, Table, counted, grouped, size

if TYPE_CHECKING:
    from normsurgery.exporting.facts import Canonical, OnnxFacts
    from normsurgery.plans import Plan

NAMES = 3  # as many modules are named where there are more


def file_rows(facts: OnnxFacts, plan: Plan | None = None) -> list[tuple[str, str]]:
    """What is known of the written file, a name and a text each. plan: what was folded before."""
    outside = f", weights in {facts.external_data}" if facts.external_data else ""
    rows = [
        ("file", f"{facts.path}, {size(facts.bytes)}{outside}"),
        ("opset", f"{facts.opset}" + (f": {facts.opset_reason}" if facts.opset_reason else "")),
        ("graph", f"{facts.nodes} nodes in {facts.dtype}"),
    ]
    rows += [("input", f"{name}  {text}") for name, text in facts.inputs.items()]
    rows += [("output", f"{name}  {text}") for name, text in facts.outputs.items()]
    if plan is not None and plan.steps:
        kinds = Counter(step.site.kind for step in plan.steps)
        rows.append(("folded before", counted(kinds.items())))
    rows.append(("norm operators", counted(facts.operators.items()) or "none"))
    if facts.eps:
        rows.append(("eps", eps_line(facts)))
    if facts.switched:
        rows.append(("switched to eval", named(facts.switched)))
    return rows


def eps_line(facts: OnnxFacts) -> str:
    found = sum(eps.found for eps in facts.eps)
    missing = [f"{eps.site or WHOLE_MODEL} ({eps.eps:.3g})" for eps in facts.eps if not eps.found]
    told = f"{found} of {len(facts.eps)} are in the file"
    return told + (f"; missing: {', '.join(missing)}" if missing else "")


def named(names: Sequence[str], count: int = NAMES) -> str:
    """The first names, and how many more there are."""
    shown = [name or WHOLE_MODEL for name in names[:count]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def norm_table(facts: OnnxFacts) -> Table:
    """The norms as they are written, alike ones in one row."""
    groups = grouped(facts.norms, lambda n: (n.kind, n.operator, n.note))
    rows = tuple(_norm_row(group) for group in groups)
    return Table(("n", "norm", "written as", "why", "where"), rows)


def _norm_row(group: Sequence[Canonical]) -> tuple[str, ...]:
    first = group[0]
    return (
        str(len(group)),
        first.kind,
        first.operator or "a decomposition",
        first.note,
        named([norm.site for norm in group], 1),
    )
