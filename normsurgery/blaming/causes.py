"""Of the values that are not what they should be, those that explain the wrong outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from normsurgery.blaming.setting import Looked, Setting, outputs_judged, worst
from normsurgery.blaming.sweep import Sweep
from normsurgery.blaming.views import Values
from normsurgery.verifying.alignment import same_value
from normsurgery.verifying.judge import Verdict, judge


def causes(setting: Setting, swept: Sweep) -> list[str]:
    """The suspects that are at fault, in graph order.

    A suspect may have been taken for a value of the source that it is not meant to be, or what it
    reads may have been. So each is put to the proof, the first one first: with those before it
    repaired it must still be wrong, and with the source's value in its place the outputs must come
    nearer to what they should be, unless there is no doubt about what it stands for.
    """
    suspects = swept.apart()
    if not suspects:
        return []
    errors = repaired(setting, swept, ())
    if _right(errors):
        return []  # whatever these values are, the outputs do not depend on it
    blamed: list[str] = []
    for suspect in suspects:
        if _is_right(setting, swept, suspect, blamed):
            continue
        after = repaired(setting, swept, [*blamed, suspect])
        if _right(after) or _helps(after, errors) or _is_placed(setting, swept, suspect):
            blamed.append(suspect)
            errors = after
        if _right(errors):
            return blamed
    return blamed or suspects


def _is_placed(setting: Setting, swept: Sweep, name: str) -> bool:
    """Whether a value is made by the operator that makes it in the reference, of the same values:
    then it is meant to be that one, however the outputs take it while more is wrong."""
    graph, reference = setting.graph, setting.reference
    position, producer = graph.producer[name], reference.producer(swept.pairs[name])
    if producer is None or producer.op_type != graph.nodes[position].op_type:
        return False
    read = [swept.pairs.get(one, "") for one in graph.computed(position)]
    return bool(read) and all(one in producer.input for one in read)


def _is_right(setting: Setting, swept: Sweep, name: str, others: Sequence[str]) -> bool:
    """Whether a value is what it should be once `others` are."""
    dtype = setting.graph.dtype(name) or torch.float32
    return all(
        name in values and same_value(values[name], case[swept.pairs[name]], dtype)
        for values, case in zip(_runs(setting, swept, others), setting.reference.cases, strict=True)
    )


def _runs(setting: Setting, swept: Sweep, names: Sequence[str]) -> Iterator[Values]:
    """The graph's values in each case, with the reference's in the place of `names`."""
    for one, truth in zip(setting.looked, setting.reference.cases, strict=True):
        instead = {name: truth[swept.pairs[name]] for name in names}
        yield setting.graph.run(one.fed, instead) if instead else one.plain


def repaired(setting: Setting, swept: Sweep, names: Sequence[str]) -> list[float]:
    """How far off the outputs of each case are, in units of what is allowed, with the reference's
    values in the place of `names`."""
    runs = _runs(setting, swept, names)
    return [_error(setting, v, one) for v, one in zip(runs, setting.looked, strict=True)]


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
