"""Floating values that make faults of a normalization show, and inputs filled with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from normsurgery.inputs import Inputs

LARGE_MEANS = (30.0, 1e3, 1e4)
TINY_DEVIATION = 3e-3

Make = Callable[[tuple[int, ...], torch.dtype, torch.Generator], Tensor]


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return _normal(shape, generator)


def _mean(mean: float) -> Make:
    def make(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return _normal(shape, generator) + mean

    return make


def _tiny(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return _normal(shape, generator) * TINY_DEVIATION


def _constant_rows(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Constant along the last dimension; many different constants, so that a mean which one of them
    happens to round to exactly does not stand for all."""
    return _constants((*shape[:-1], 1), generator).expand(shape)


def _constant_samples(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    return _constants((*shape[:1], *[1] * (len(shape) - 1)), generator).expand(shape)


def _constants(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of sizes 0.1 to 1000, both signs."""
    signs = _normal(shape, generator).sign()
    exponents = 4 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    return signs * torch.pow(10.0, exponents)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _outlier(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One channel (axis 1 of a map, the last axis of tokens) a thousand times the others."""
    return _with_outlier(shape, generator, 1e3)


def _far_outlier(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return _with_outlier(shape, generator, 1e4)


def _with_outlier(shape: tuple[int, ...], generator: torch.Generator, factor: float) -> Tensor:
    values = _normal(shape, generator)
    if values.dim() > 1 and values.numel():
        values.select(1 if values.dim() > 3 else -1, 0).mul_(factor)
    return values


def _overflowing(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Finite values whose squares are not: around 500 in fp16, around 4e19 in fp32 and bf16."""
    return _normal(shape, generator) * (2 * math.sqrt(torch.finfo(dtype).max))


def _subnormal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return _normal(shape, generator) * (torch.finfo(dtype).smallest_normal / 16)


def _sized(least: float, most: float) -> Make:
    """Both signs, magnitudes spread evenly in their logarithm."""

    def make(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        signs = _normal(shape, generator).sign()
        share = torch.rand(shape, generator=generator, dtype=torch.float64)
        return signs * least * torch.pow(most / least, share)

    return make


def _one(value: float) -> Make:
    """Normal values, and one that is `value` (in the first sample)."""

    def make(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        values = _normal(shape, generator)
        sample = values[0] if values.dim() and len(values) else values
        if sample.numel():
            sample.flatten()[sample.numel() // 2] = value
        return values

    return make


FLOATING: tuple[tuple[str, Make], ...] = (
    ("random", _random),
    *((f"mean {mean:g}", _mean(mean)) for mean in LARGE_MEANS),
    ("tiny variance", _tiny),
    ("constant rows", _constant_rows),
    ("constant samples", _constant_samples),
    ("zeros", _zeros),
    ("outlier channel", _outlier),
    ("squares overflow", _overflowing),
    ("subnormal", _subnormal),
)
# On a graph also. What overflows or vanishes in a lower type shows a cast that should not be there.
MORE_FLOATING: tuple[tuple[str, Make], ...] = (
    ("outlier channel 10000", _far_outlier),
    ("300 to 60000", _sized(300.0, 6e4)),
    ("1e19", _sized(1e19, 1e19)),
    ("1e-20", _sized(1e-20, 1e-20)),
    ("one NaN", _one(math.nan)),
    ("one Inf", _one(math.inf)),
)


def with_floats(inputs: Inputs, make: Make, seed: int, scalars: float = 1.0) -> Inputs:
    """The inputs with new values in every floating tensor; those of no dimension, which are a
    temperature or a scale, are only multiplied by `scalars` (a zero becomes it)."""
    generator = torch.Generator().manual_seed(seed)

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if value.dim() == 0:
            return value if scalars == 1 else _multiplied(value, scalars)
        new = make(tuple(value.shape), value.dtype, generator)
        return new.to(value.dtype).to(value.device)

    return mapped(inputs, change)


def _multiplied(scalar: Tensor, factor: float) -> Tensor:
    exact = scalar.detach().double()
    return torch.where(exact == 0, factor, exact * factor).to(scalar.dtype)


def is_as_meant(label: str, inputs: Inputs) -> bool:
    """False where the type cannot hold such values: 1e19 in fp16 is infinite, 1e-20 is zero. And
    nothing that overflows in float64, which has no wider truth."""
    floats = [t for t in tensors_of(inputs) if t.is_floating_point() and t.dim() and t.numel()]
    if label == "squares overflow" and any(t.dtype is torch.float64 for t in floats):
        return False
    if label in ("one NaN", "one Inf", "zeros"):
        return bool(floats)
    return all(bool(t.isfinite().all() & t.any()) for t in floats)


def mapped(inputs: Inputs, change: Callable[[Any], Any]) -> Inputs:
    return Inputs(*tree_map(change, (inputs.args, dict(inputs.kwargs))))


def tensors_of(inputs: Inputs) -> list[Tensor]:
    leaves = tree_leaves((inputs.args, dict(inputs.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
