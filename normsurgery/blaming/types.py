"""Values that the graph holds in a coarser type than its source does."""

from __future__ import annotations

import torch
from torch import Tensor

from normsurgery.blaming.setting import Setting
from normsurgery.blaming.sweep import Sweep
from normsurgery.verifying.alignment import ValueIndex
from normsurgery.verifying.judge import Verdict, judge


def first_lowered(setting: Setting, swept: Sweep) -> tuple[str, Verdict, str] | None:
    """The first value that loses digits which the source keeps: its name, what is lost by rounding
    the source's value to the type of the graph, and the label of the input."""
    index = ValueIndex(setting.reference.cases)
    for name in swept.bonds:
        coarse, fine = setting.graph.dtype(name), setting.reference.dtype(swept.pairs[name])
        if name not in setting.graph.producer or not _is_coarser(coarse, fine):
            continue
        assert coarse is not None and fine is not None
        truths = [case[swept.pairs[name]] for case in setting.reference.cases]
        others = index.all(truths, swept.pairs[name], torch.float64)
        if any(not _is_coarser(coarse, setting.reference.dtype(other)) for other in others):
            continue  # the source has the same value in this type too
        for truth, one in zip(truths, setting.looked, strict=True):
            verdict = _lost(truth, coarse, fine)
            if verdict.passed is False:
                return name, verdict, one.case.label
    return None


def _is_coarser(one: torch.dtype | None, other: torch.dtype | None) -> bool:
    if one is None or other is None:
        return False
    if not one.is_floating_point or not other.is_floating_point:
        return False
    return torch.finfo(one).eps > torch.finfo(other).eps


def _lost(truth: Tensor, coarse: torch.dtype, fine: torch.dtype) -> Verdict:
    return judge(truth.to(coarse).to(fine), truth)
