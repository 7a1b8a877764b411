"""What each verb prints on stdout: tables and sentences for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import render_graph
from .tables import table

if TYPE_CHECKING:
    from normsurgery.plan import Plan
    from normsurgery.report import Report
    from normsurgery.steps import Step
    from normsurgery.surgery.keymap import KeyMap
    from normsurgery.survey import Site, Skip, Survey
    from normsurgery.verify import Comparison, Drift, Evidence

    from .catalog import Entry

T = TypeVar("T")

WHOLE_MODEL = "(the model itself)"
ROWS = 12  # as many passed quantities as are still read one by one
NAMES = 3  # as many tensors as are named where there are more
NOT_SELECTED = "not selected"  # the reason that its reader gave, and knows


def survey(found: Survey, as_json: bool) -> None:
    """Print the count by kind, the sites, the skips and the notes of a survey."""
    if as_json:
        return print_json(found.to_json())
    counts = ", ".join(f"{count} {kind}" for kind, count in found.counts().items())
    print(f"{found.model}: {counts or 'no norms'}")
    if found.sites:
        print()
        headers = ["#", "where", "kind", "class", "form", "input", "calls", "found by", "proof"]
        table([*headers, "notes"], [_site_row(site) for site in found.sites])
    _skips(found.skips)
    notes(found.notes)
    return None


def plan(made: Plan, as_json: bool) -> None:
    """Print what a plan would do, and what it would leave alone."""
    if as_json:
        return print_json(made.to_json())
    print(f"{made.model}: {len(made.steps)} to change, {len(made.skips)} left alone")
    _steps(made)
    return None


def report(
    done: Report, as_json: bool, written: Sequence[Path] = (), following: str | None = None
) -> None:
    """Print what was done and measured; last, where outputs changed, the next command to type."""
    if as_json:
        return print_json({**done.to_json(), "written": [str(path) for path in written]})
    if done.changes_outputs:
        from normsurgery.report import OUTPUTS_CHANGE

        print(OUTPUTS_CHANGE)
    print(f"{done.plan.model}: {len(done.plan.steps)} changed, {len(done.plan.skips)} left alone")
    _steps(done.plan)
    print()
    tensors(done.keymap)
    if done.evidence is None:
        print("nothing was measured")
    else:
        _measured(done.evidence)
    notes(done.notes)
    if written:
        print("wrote " + ", ".join(str(path) for path in written))
    if done.changes_outputs and following is not None:
        print(following)
    return None


def evidence(measured: Evidence, as_json: bool) -> None:
    """Print the verdict on two models, the worst comparison and what was left out."""
    if as_json:
        return print_json(measured.to_json())
    return _measured(measured)


def norms(entries: Sequence[Entry], broken: Mapping[str, str], as_json: bool) -> None:
    """Print the norms, and the installed packages whose norms could not be loaded."""
    if as_json:
        listed = [entry.to_json() for entry in entries]
        return print_json({"norms": listed, "broken_plugins": dict(broken)})
    table(
        ["norm", "attaches to", "also", "what it does", "from"],
        [
            (entry.name, entry.attach, ", ".join(entry.also), entry.summary, _from(entry))
            for entry in entries
        ],
    )
    if broken:
        print()
        table(["package", "could not be loaded because"], list(broken.items()))
    return None


def explanation(entry: Entry, documentation: str, as_json: bool) -> None:
    """Print what a norm's own file says about it."""
    if as_json:
        return print_json({**entry.to_json(), "documentation": documentation})
    return print(documentation)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _site_row(site: Site) -> Sequence[object]:
    others = len(site.paths) - 1
    return (
        site.index,
        (site.label or WHOLE_MODEL) + (f" (+{others} more)" if others else ""),
        site.kind,
        site.class_name.rsplit(".", 1)[-1],
        "" if site.form == "module" else site.form,
        f"{_shape(site)} {(site.dtype or '').removeprefix('torch.')}",
        site.calls,
        site.found_by,
        site.proof_error,
        "; ".join(site.notes),
    )


def _shape(site: Site) -> str:
    return "x".join(map(str, site.shape)) if site.shape is not None else ""


def _steps(made: Plan) -> None:
    if made.steps:
        print()
        headers = ["#", "where", "from", "to", "options", "input", "promise", "notes"]
        table(headers, [_step_row(step) for step in made.steps])
    _skips(made.skips)


def _step_row(step: Step) -> Sequence[object]:
    return (
        step.site.index,
        step.site.label or WHOLE_MODEL,
        step.site.kind,
        step.to,
        " ".join(f"{name}={value}" for name, value in step.options.items()),
        _shape(step.site),
        step.fidelity.name.lower(),
        "; ".join(step.notes),
    )


def _skips(left_alone: Sequence[Skip]) -> None:
    if not left_alone:
        return
    print()
    told = [skip for skip in left_alone if skip.reason != NOT_SELECTED]
    if told:
        rows = [(skip.path or WHOLE_MODEL, skip.kind, skip.reason, skip.hint) for skip in told]
        table(["left alone", "kind", "why", "hint"], rows)
    if len(told) < len(left_alone):
        print(f"{len(left_alone) - len(told)} left alone: {NOT_SELECTED}")


def tensors(keymap: KeyMap) -> None:
    """One line on the state_dict keys that vanish, the first by name, and on new or other ones."""
    dropped, created = keymap.dropped, len(keymap.created)
    more = ", ..." if len(dropped) > NAMES else ""
    counts = {
        f"dropped ({', '.join(dropped[:NAMES])}{more})": len(dropped),
        "created": created,
        "computed from old ones": len(keymap.made) - created,
        "folded into": len(keymap.edited),
    }
    told = [f"{n} tensor{'s' * (n > 1)} {what}" for what, n in counts.items() if n]
    if told:
        print("; ".join(told))


def _measured(measured: Evidence) -> None:
    print(_verdict(measured))
    in_the_table = {*map(str, measured.comparisons), *render_graph.shown(measured)}
    for failure in measured.failures:
        if failure not in in_the_table:
            print(f"failed: {failure}")
    if measured.drifts:
        headers = ["output", "on the input", "relative change", "top-1 agrees"]
        table(headers, [_drift_row(drift) for drift in measured.drifts])
    if measured.comparisons:
        headers = ["compared", "mode", "on", "verdict", "error", "allowed", "passes at"]
        rows = _comparison_rows(measured.comparisons)
        table([*headers, "worst at", "on the input", "reason"], rows)
    render_graph.inside(measured)
    for left in measured.left_out:
        place = " ".join(part for part in (left.where, left.case, left.mode, left.runner) if part)
        print(f"{left.kind}: {place}: {left.reason}")
    notes(measured.notes)


def _verdict(measured: Evidence) -> str:
    counts = ((word, measured.count(word)) for word in ("passed", "failed", "undecided"))
    told = ", ".join(f"{count} {word}" for word, count in counts if count)
    if measured.passed and not told:
        return "nothing was promised to stay the same; measured:"
    promise = f"promised {measured.promise.lower()}; " if measured.promise else ""
    return f"{'passed' if measured.passed else 'FAILED'}: {promise}{told or '0 passed'}"


def _comparison_rows(comparisons: Sequence[Comparison]) -> list[Sequence[object]]:
    """For each quantity, mode and runner the comparison that would need the largest tolerance.

    Where many passed, those of one sort share a row, which shows the worst of them.
    """
    quantities = _grouped(comparisons, lambda c: (c.where, c.quantity, c.mode, c.runner))
    many = sum(_worst(group).verdict.passed is True for group in quantities) > ROWS
    if not many:
        return [_comparison_row(_worst(group)) for group in quantities]
    return [_shared_row(sort) for sort in _grouped(quantities, _sort)]


def _grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Items of the same key together, in the order in which the keys come up."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _sort(quantity: Sequence[Comparison]) -> Hashable:
    """What quantities that share a row have in common; one that has not passed shares none."""
    first, passed = quantity[0], _worst(quantity).verdict.passed
    alone = "" if passed else (first.where, first.quantity)
    return _word(first), first.mode, first.runner, _same_bits(quantity), alone


def _word(comparison: Comparison) -> str:
    """What is compared: an output, a statistic or a gradient."""
    return comparison.quantity.partition(" ")[0]


def _same_bits(compared: Iterable[Comparison]) -> bool:
    return all(comparison.verdict.same_bits for comparison in compared)


def _worst(compared: Iterable[Comparison]) -> Comparison:
    """What failed, else what was decided, that would need the largest tolerance."""
    severity = {None: 0, True: 1, False: 2}
    return max(compared, key=lambda c: (severity[c.verdict.passed], c.verdict.factor))


def _shared_row(sort: Sequence[Sequence[Comparison]]) -> Sequence[object]:
    compared = [comparison for quantity in sort for comparison in quantity]
    row = _comparison_row(_worst(compared))
    if len(sort) == 1:
        return row
    what = f"{len(sort)} {_word(compared[0])}s: "
    if _same_bits(compared):
        return (what + "bit for bit", *row[1:-1], "")
    return (f"{what}at worst {row[0]}", *row[1:])


def _comparison_row(comparison: Comparison) -> Sequence[object]:
    verdict = comparison.verdict
    place = f"{comparison.where}: " if comparison.where else ""
    return (
        place + comparison.quantity,
        comparison.mode,
        comparison.runner,
        verdict.word,
        f"{verdict.max_error:.3g} ({verdict.ulps:.3g} ulp)",
        verdict.allowed,
        f"{verdict.factor:.3g} x allowed",
        "" if verdict.worst is None else list(verdict.worst),
        f"{comparison.case} ({comparison.run})",
        verdict.reason,
    )


def _drift_row(drift: Drift) -> Sequence[object]:
    return drift.output, drift.case, drift.relative, _percent(drift.top1)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def notes(texts: Iterable[str]) -> None:
    for text in texts:
        print(f"note: {text}")


def _from(entry: Entry) -> str:
    return "" if entry.owner == "normsurgery" else entry.owner
