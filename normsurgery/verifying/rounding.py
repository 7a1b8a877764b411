"""What is lost where weights are rounded to a coarser type, tensor by tensor.

A reference with the rounded weights agrees with a graph that holds the same, however bad the
rounding was: a running variance above 65504 is infinite in fp16, and its channel constant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normsurgery.verifying.evidence import Comparison
from normsurgery.verifying.judge import Verdict, judge


def losses_of_rounding(master: nn.Module, dtype: torch.dtype) -> list[Comparison]:
    """A failed Comparison for each parameter or saved buffer of `master` that `dtype` cannot hold:
    a finite value becomes infinite, or values become zero or lose digits because the whole tensor
    is near the smallest numbers of the type."""
    state = master.state_dict()
    return [
        Comparison("weights", "float64", "eval", "plain", f"rounding of {name}", verdict)
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and _is_rounded(tensor, dtype)
        for verdict in [_judged(tensor, dtype)]
        if verdict.passed is False
    ]


def _is_rounded(tensor: Tensor, dtype: torch.dtype) -> bool:
    floating = tensor.is_floating_point() and tensor.numel() > 0
    return floating and torch.finfo(tensor.dtype).eps < torch.finfo(dtype).eps


def _judged(tensor: Tensor, dtype: torch.dtype) -> Verdict:
    """Both are scaled so that the largest value is about 1, where the type has all its digits."""
    exact = tensor.detach().cpu().double()
    rounded = exact.to(dtype)
    if not bool(rounded.isfinite().all()):
        return judge(rounded, exact)
    largest = float(exact.abs().max())
    factor = math.ldexp(1.0, -math.frexp(largest)[1])
    verdict = judge(rounded.double() * factor, exact * factor, precision=dtype)
    if verdict.passed is not False:
        return verdict
    name = str(dtype).removeprefix("torch.")
    reason = f"{name} loses more than its rounding: the largest value is {largest:.3g}"
    return Verdict(False, reason, compared=exact.numel(), max_error=verdict.max_error)
