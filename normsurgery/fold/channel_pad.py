"""What stays of a scale and shift that went into convolutions which pad: the padding, written out.

After the norm a zero is padded in. In front of it that zero is the value to which scale and shift
give zero, -shift / scale: one number per channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normsurgery.fold.casting import cast
from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.edits import Vector
from normsurgery.fold.vectors import values
from normsurgery.norms.carry import AFFINE_ROLES, settled
from normsurgery.spec import Conversion, Fidelity, Source

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PARTS: tuple[Literal["scale", "shift"], ...] = ("scale", "shift")


class ChannelPad(nn.Module):
    """Pads the last dimensions of (N, C, ...) with a constant per channel.

    value: (C,), a buffer. amounts: as F.pad takes them, for every dimension after the channels:
    before and after the last one first. The output has the input's dtype.
    """

    value: Tensor

    def __init__(self, value: Tensor, amounts: Sequence[int]) -> None:
        super().__init__()
        self.amounts = tuple(amounts)
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        dimensions = len(self.amounts) // 2
        value = self.value.reshape(-1, *(1,) * dimensions)
        if value.dtype != x.dtype:
            value = value.to(x.dtype)
        for place in range(dimensions):
            before, after = self.amounts[2 * place : 2 * place + 2]
            parts = [self._border(x, value, place, before), x]
            parts.append(self._border(x, value, place, after))
            axis = x.dim() - 1 - place
            x = torch.cat([part for part in parts if part.shape[axis] != 0], axis)
        return x

    def _border(self, x: Tensor, value: Tensor, place: int, amount: int) -> Tensor:
        shape = list(x.shape)
        shape[-1 - place] = amount
        return value.expand(shape)

    def extra_repr(self) -> str:
        return f"{self.value.numel()}, amounts={self.amounts}"


def zero_before(source: Source) -> Tensor:
    """Per channel, float64, what the norm turns into zero; not finite where its scale is zero."""
    tensors = {role: t.detach().double() for role, t in source.tensors.items()}
    names = {role: role for role in tensors if tensors[role].dim()}
    scale, shift = (
        values(Vector(part, names, source.settings, kind=source.kind), tensors) for part in PARTS
    )
    return -shift / scale


def conversion_to_padding(kept: Conversion | None) -> Conversion:
    """To a ChannelPad; behind what `kept` makes of the norm where it still computes something."""

    def build(
        source: Source, *, init: str = "copy", pad: Sequence[int], affine: bool = True
    ) -> nn.Module:
        if affine or kept is None:
            return settled(ChannelPad(zero_before(source), pad), source, init)
        rest = {role: t for role, t in source.tensors.items() if role not in AFFINE_ROLES}
        norm = kept.build(replace(source, tensors=rest), init=init)
        pads = settled(ChannelPad(zero_before(_tail(source)), pad), source, init)
        return nn.Sequential(norm, pads).train(source.training)

    return Conversion(build, Fidelity.EVAL)


def _tail(source: Source) -> Source:
    """The scale and shift that come last in the norm."""
    own = {role: t for role, t in source.tensors.items() if role in AFFINE_ROLES}
    return replace(source, tensors=own)


def why_not_held(source: Source, options: Mapping[str, Any]) -> NoMatch | None:
    """The check that fails where some channel has no such value, or its dtype cannot hold it."""
    exact = zero_before(source if options.get("affine", True) else _tail(source))
    if exact.is_meta:
        return None
    lost = int((~exact.isfinite()).sum())
    if lost:
        where = f"{lost} of {exact.numel()} channels of {source.where} have a scale of zero"
        return NoMatch(Check.NOT_FINITE, f"{where}, so that no padding in front of it becomes zero")
    loss = cast(exact, source.dtype or torch.get_default_dtype())[1]
    if loss is None or not loss.serious:
        return None
    wider = f"Convert the model to {loss.wider} first." if loss.wider else ""
    return NoMatch(Check.DTYPE, f"of the padding in front of {source.where}, {loss}", wider)


def without_padding(model: nn.Module, options: Mapping[str, Any]) -> None:
    """The convolutions that the options name pad nothing any more, in place."""
    for path in options.get("unpadded", ()):
        convolution = model.get_submodule(path)
        assert isinstance(convolution, CONVOLUTIONS)
        none = (0,) * len(convolution.kernel_size)
        convolution.padding = none
        convolution._reversed_padding_repeated_twice = [0] * (2 * len(none))
