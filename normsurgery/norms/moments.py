"""The family that subtracts a mean over some axes and divides by the deviation over them.

How eps stands in the deviation, and whether the variance is the unbiased one, are its spellings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from normsurgery.spec import Reading

SPELLINGS = tuple(
    {"eps_outside": outside, "unbiased": unbiased}
    for outside, unbiased in ((False, False), (True, True), (True, False), (False, True))
)
ROLES = (("weight", "bias"), ("weight",), ("bias",), ())


def standardised(x: Tensor, over: list[int], settings: Mapping[str, Any]) -> Tensor:
    """Truth: before weight and bias."""
    centred = x - x.mean(over, keepdim=True)
    variance = x.var(over, unbiased=settings.get("unbiased", False), keepdim=True)
    outside, eps = settings.get("eps_outside", False), settings["eps"]
    y: Tensor = centred / (variance.sqrt() + eps if outside else (variance + eps).sqrt())
    return y


def by_deviation(
    x: Tensor, over: list[int], eps: float, *, unbiased: bool, eps_outside: bool
) -> Tensor:
    """What a module computes before weight and bias; of half precision in float32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    centred = wide - wide.mean(over, keepdim=True)
    if eps_outside:  # torch's own std has a gradient where the variance is zero
        deviation = wide.std(over, unbiased=unbiased, keepdim=True) + eps
    else:
        deviation = (wide.var(over, unbiased=unbiased, keepdim=True) + eps).sqrt()
    y: Tensor = centred / deviation
    return y


def affine_readings(
    sizes: Mapping[str, tuple[int, ...]], elements: int, settings: Mapping[str, Any]
) -> Iterator[Reading]:
    """Tensors of so many elements as weight and bias, in either role, or neither."""
    fitting = [name for name, size in sizes.items() if torch.Size(size).numel() == elements]
    for roles in ROLES:
        for names in permutations(fitting, len(roles)):
            yield Reading(dict(zip(roles, names, strict=True)), settings)


def spelled_readings(
    sizes: Mapping[str, tuple[int, ...]], elements: int, settings: Mapping[str, Any]
) -> Iterator[Reading]:
    """The same in every spelling, and with a weight that is stored around zero."""
    for reading in affine_readings(sizes, elements, settings):
        for spelling in SPELLINGS:
            spelled = {**settings, **spelling}
            yield Reading(reading.tensors, {**spelled, "weight_offset": 0.0})
            if "weight" in reading.tensors:
                yield Reading(reading.tensors, {**spelled, "weight_offset": 1.0})
