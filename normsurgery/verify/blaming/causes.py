"""Of the values that are not what they should be, those that explain the wrong outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from normsurgery.verify.blaming.setting import Looked, Setting, outputs_judged, worst
from normsurgery.verify.blaming.sweep import Sweep
from normsurgery.verify.judge import Verdict, judge


def causes(setting: Setting, swept: Sweep) -> list[str]:
    """The suspects that are at fault, in graph order.

    A suspect may have been taken for a value of the source that it is not meant to be. So each is
    put to the proof: with the source's value in its place, the outputs must become right, and
    without that they must not.
    """
    suspects = swept.apart()
    if not suspects:
        return []
    untouched = repaired(setting, swept, ())
    if all(error <= 1.0 for error in untouched):
        return []  # whatever these values are, the outputs do not depend on it
    blamed = list(suspects)
    if not _right(repaired(setting, swept, blamed)):
        blamed = [s for s in suspects if _helps(repaired(setting, swept, [s]), untouched)]
    if not _right(repaired(setting, swept, blamed)):
        return blamed or suspects
    for suspect in list(reversed(blamed)):
        rest = [other for other in blamed if other != suspect]
        if rest and _right(repaired(setting, swept, rest)):
            blamed = rest
    return blamed


def repaired(setting: Setting, swept: Sweep, names: Sequence[str]) -> list[float]:
    """How far off the outputs of each case are, in units of what is allowed, with the reference's
    values in the place of `names`."""
    found = []
    for number, one in enumerate(setting.looked):
        truth = setting.reference.cases[number]
        instead = {name: truth[swept.pairs[name]] for name in names}
        values = setting.graph.run(one.fed, instead) if instead else one.plain
        found.append(_error(setting, values, one))
    return found


def _error(setting: Setting, values: dict[str, Tensor], one: Looked) -> float:
    verdict = worst(outputs_judged(setting.graph, values, one.truth))
    if verdict.passed is False and math.isnan(verdict.max_error):
        return math.inf
    return verdict.factor if verdict.passed is False else min(1.0, verdict.factor)


def _right(errors: Sequence[float]) -> bool:
    return all(error <= 1.0 for error in errors)


def _helps(errors: Sequence[float], before: Sequence[float]) -> bool:
    """No output is farther off than before, and some are less."""
    pairs = list(zip(errors, before, strict=True))
    return all(now <= then for now, then in pairs) and any(now < then for now, then in pairs)


def local_verdict(setting: Setting, swept: Sweep, name: str, expected: str) -> tuple[Verdict, str]:
    """The worst of what a node made of the source's own values, and the label of that input."""
    verdicts = {}
    dtype = setting.graph.dtype(name)
    precision = dtype if dtype is not None and dtype.is_floating_point else None
    for made, case, one in zip(swept.made, setting.reference.cases, setting.looked, strict=True):
        truth = case[expected]
        if name not in made:
            verdict = Verdict(False, "the node does not run on what the source has there")
        else:
            verdict = judge(made[name], truth, precision=precision)
        verdicts[one.case.label] = verdict
    chosen = worst(verdicts)
    return chosen, next(label for label, verdict in verdicts.items() if verdict is chosen)


def inherited(setting: Setting, swept: Sweep, position: int) -> float:
    """The largest relative error that the inputs of a node had in the graph's own float64 run."""
    largest = 0.0
    for values, corrected in zip(setting.plain, swept.corrected, strict=True):
        for name in setting.graph.computed(position):
            if name not in values or name not in corrected:
                continue
            found, truth = values[name].double(), corrected[name].double()
            if found.shape != truth.shape:
                return math.inf
            scale = float(truth.abs().max()) if truth.numel() else 0.0
            if scale > 0:
                largest = max(largest, float((found - truth).abs().max()) / scale)
    return largest
