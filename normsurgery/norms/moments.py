"""The family that subtracts a mean over some axes and divides by the deviation over them.

How eps stands in the deviation, and whether the variance is the unbiased one, are its spellings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.norms.carry import PerChannel, identical_if, present, shares_eps, space
from normsurgery.spec import Fidelity, Law, Reading, Source

LAWS = frozenset(
    {Law.SHIFT_INVARIANT, Law.SCALE_INVARIANT, Law.BATCH_INDEPENDENT, Law.PERMUTATION_EQUIVARIANT}
)

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


def spelling_of(settings: Mapping[str, Any]) -> dict[str, bool]:
    """The spelling in a norm's settings, or in the attributes of its module."""
    return {name: settings.get(name, False) for name in SPELLINGS[0]}


class ByDeviation(PerChannel):
    """(x - mean) / deviation over some dimensions, times a weight, plus a bias per channel.

    unbiased: the variance divides by n - 1. eps_outside: eps is added to the standard deviation and
    not to the variance. Raises WrongShape unless the size of the channel axis is `features`.
    """

    axis = 1
    cure = ""

    def __init__(
        self, features: int, eps: float = 1e-6, *, unbiased: bool = False, eps_outside: bool = False
    ) -> None:
        super().__init__(features, self.axis)
        self.eps, self.unbiased, self.eps_outside = eps, unbiased, eps_outside

    def over(self, x: Tensor) -> list[int]:
        return [self.axis]

    def forward(self, x: Tensor) -> Tensor:
        self.require_channels(x, self.cure)
        over = self.over(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        centred = wide - wide.mean(over, keepdim=True)
        if self.eps_outside:  # torch's own std has a gradient where the variance is zero
            deviation = wide.std(over, unbiased=self.unbiased, keepdim=True) + self.eps
        else:
            deviation = (wide.var(over, unbiased=self.unbiased, keepdim=True) + self.eps).sqrt()
        return self.affined(centred / deviation).to(x.dtype)

    def extra_repr(self) -> str:
        spelling = f"unbiased={self.unbiased}, eps_outside={self.eps_outside}"
        return f"{self.features}, eps={self.eps}, {spelling}"


def read(module: nn.Module) -> Reading:
    """Of a module whose channels are second: one of ours, or a `torch.nn.GroupNorm`."""
    features = module.features if isinstance(module, ByDeviation) else module.num_channels
    settings = {"eps": module.eps, "channel_axis": 1, "features": features}
    return Reading(present(module, "weight", "bias"), {**settings, **spelling_of(vars(module))})


def hypotheses(shape: tuple[int, ...], tensors: Mapping[str, tuple[int, ...]]) -> Iterator[Reading]:
    """Of at least three dimensions the second has the channels; vectors of C in either role."""
    if len(shape) > 2:
        settings = {"channel_axis": 1, "features": shape[1]}
        yield from spelled_readings(tensors, shape[1], settings)


def within_position(source: Source, options: Mapping[str, Any]) -> Fidelity:
    """One group whose statistics see one position only is a layer norm."""
    alone = source.channel_axis == -1 or (source.shape is not None and space(source) == 1)
    one = source.settings.get("num_groups", 1) == 1
    return identical_if(alone and one and shares_eps(source))


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
