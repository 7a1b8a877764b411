"""What `fold` prints: how many norms went where, how many stayed and why, counts first.

Sites whose rows would differ in numbers alone share one, with a star for each number that differs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .render import NOT_SELECTED, WHOLE_MODEL, evidence, notes, print_json, tensors
from .tables import table

if TYPE_CHECKING:
    from normsurgery.plan import MeasuredCall, Plan
    from normsurgery.report import Report
    from normsurgery.steps import Step
    from normsurgery.survey import Skip

Row = tuple[str, ...]

NAMES = 4  # as many weights as are named where a norm goes into more
AFFINE = "affine"
NUMBER = re.compile(r"\d+")
QUOTES = "'\""
PARAMETER = re.compile(rf"\b(untie|rmsnorm|prune|eval|pad)=(True|[{QUOTES}]\w+[{QUOTES}])")


def plan(made: Plan, as_json: bool) -> None:
    """Print what a fold would do, and what it would leave alone."""
    if as_json:
        return print_json(made.to_json())
    return _decisions(made)


def report(done: Report, as_json: bool, written: Sequence[Path] = ()) -> None:
    """Print what was folded and left, what was measured, and what was written."""
    if as_json:
        return print_json({**done.to_json(), "written": [str(path) for path in written]})
    _decisions(done.plan)
    if done.plan.steps:
        print()
        tensors(done.keymap)
        if done.evidence is None:
            print("nothing was measured")
        else:
            evidence(done.evidence, as_json=False)
    if done.speed is not None:
        print(done.speed)
    notes(done.notes)
    if written:
        print("wrote " + ", ".join(str(path) for path in written))
    return None


def _decisions(made: Plan) -> None:
    counts = Counter(map(_outcome, made.steps))
    told = [f"{count} {outcome}" for outcome, count in counts.items()]
    told += [f"{len(made.skips)} left alone"] if made.skips else []
    print(f"{made.model}: {', '.join(told) or 'no norms'}")
    if made.steps:
        print()
        headers = ["n", "where", "norm", "what became of it", "by rule", "into", "and no further"]
        table(headers, _summed(map(_step_row, made.steps)))
        _said(made.steps)
    _left_alone(made.skips)
    if made.steps and made.calls:
        print()
        _measured(made.calls)


def _measured(calls: Sequence[MeasuredCall]) -> None:
    """On which calls the plan was made, and what else they give that is other than before."""
    print("planned on " + ", ".join(call.name for call in calls if call.ran))
    notes(
        f"{call.name} also gives {', '.join(call.changed)}, which will hold other numbers"
        for call in calls
        if call.changed
    )


def _said(steps: Sequence[Step]) -> None:
    """What is to be known of folds, each note with the norms it is about."""
    told = [(_label(step), text) for step in steps if step.to != AFFINE for text in step.notes]
    notes(
        f"{where}{f' ({n} norms)' if n != '1' else ''}: {text}" for n, where, text in _summed(told)
    )


def _left_alone(skips: Sequence[Skip]) -> None:
    told = [skip for skip in skips if skip.reason != NOT_SELECTED]
    if skips:
        print()
    if told:
        rows = [
            (skip.path or WHOLE_MODEL, skip.kind, skip.reason, _as_typed(skip.hint))
            for skip in told
        ]
        table(["n", "left alone", "norm", "why", "hint"], _summed(rows))
    if len(told) < len(skips):
        print(f"{len(skips) - len(told)} left alone: {NOT_SELECTED}")


def _step_row(step: Step) -> Row:
    return (
        _label(step),
        step.site.kind,
        _outcome(step),
        step.rule,
        _targets(step),
        _as_typed("; ".join(step.notes)) if step.to == AFFINE else "",
    )


def _label(step: Step) -> str:
    return step.site.label or WHOLE_MODEL


def _as_typed(hint: str) -> str:
    """A hint that names a parameter of `fold`, with the option of that name instead."""
    return PARAMETER.sub(lambda found: _option(found[1], found[2]), hint)


def _option(name: str, value: str) -> str:
    option = f"--{name.replace('_', '-')}"
    return option if value == "True" else f"{option} {value.strip(QUOTES)}"


def _outcome(step: Step) -> str:
    """What became of the norm, in words."""
    if step.to == "identity":
        return "folded"
    if step.to == AFFINE:
        return "reduced to an affine"
    if step.to != step.site.kind:
        return f"turned into {step.to}"
    return "affine folded" if step.options.get("affine") is False else "folded to neutral"


def _targets(step: Step) -> str:
    """The modules whose tensors take up the norm; those of one parent as `parent.{a,b}`."""
    from normsurgery.fold.edits import Drop

    own = set(step.site.parameters.values())
    kept = (edit.target for edit in step.edits if not isinstance(edit, Drop))
    changed = (target for target in kept if target not in own)
    names: dict[str, list[str]] = {}
    for module in dict.fromkeys(target.rpartition(".")[0] for target in changed):
        parent, _, name = module.rpartition(".")
        names.setdefault(parent, []).append(name)
    shown = [_braced(parent, children) for parent, children in names.items()]
    more = f" and {len(shown) - NAMES} more" if len(shown) > NAMES else ""
    return ", ".join(shown[:NAMES]) + more


def _braced(parent: str, children: Sequence[str]) -> str:
    inner = children[0] if len(children) == 1 else "{" + ",".join(children) + "}"
    return f"{parent}.{inner}" if parent else inner or WHOLE_MODEL


def _summed(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ in numbers alone as one, in front how many they are."""
    groups: dict[Row, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(map(_starred, row)), []).append(row)
    return [
        (str(len(group)), *(_shared(cells) for cells in zip(*group, strict=True)))
        for group in groups.values()
    ]


def _starred(text: str) -> str:
    return NUMBER.sub("*", text)


def _shared(cells: Sequence[str]) -> str:
    """Cells that differ in numbers alone, with a star for each number that is not the same."""
    if len(set(cells)) == 1:
        return cells[0]
    numbers = zip(*(NUMBER.findall(cell) for cell in cells), strict=True)
    same = iter([column[0] if len(set(column)) == 1 else "*" for column in numbers])
    return NUMBER.sub(lambda _: next(same), cells[0])
