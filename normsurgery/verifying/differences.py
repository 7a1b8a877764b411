"""How two tensors differ: where they are not finite, and by how much otherwise."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 20  # values that are held in float64 at once, where a whole copy is not needed


def ulp(scale: float, dtype: torch.dtype) -> float:
    """The distance from `scale` to the next number of `dtype`; of zero: the smallest subnormal."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    if scale < info.smallest_normal:
        return smallest
    return max(math.ldexp(info.eps, math.frexp(scale)[1] - 1), smallest)


def metrics(
    candidate: Tensor, reference: Tensor, difference: Tensor, dtype: torch.dtype
) -> dict[str, float]:
    """Quantiles, error by row, SNR and cosine, over what is finite in both.

    Outputs may be large: nothing is copied whole but the errors, to rank them.
    """
    truth, found, errors = reference.flatten(), candidate.flatten(), difference.flatten()
    finite = truth.isfinite() & found.isfinite()
    if not bool(finite.all()):
        truth, found, errors = truth[finite], found[finite], errors[finite]
    if errors.numel() == 0:
        return {}
    middle, tail = errors.numel() // 2, math.ceil(0.99 * errors.numel()) - 1
    ranked = np.partition(errors.numpy(), (middle, tail))
    noise, signal = _length(errors) ** 2, _length(truth) ** 2
    lengths = _length(truth) * _length(found)
    return {
        "median_error": float(ranked[middle]),
        "p99_error": float(ranked[tail]),
        "row_ulps": _row_ulps(reference, difference, dtype),
        "snr_db": math.inf if noise == 0 else _decibels(signal, noise) if signal else 0.0,
        "cosine": _product(truth, found) / lengths if lengths else math.nan,
    }


def _length(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _product(a: Tensor, b: Tensor) -> float:
    pairs = zip(torch.split(a, PIECE), torch.split(b, PIECE), strict=True)
    return sum(float(torch.dot(x.double(), y.double())) for x, y in pairs)


def _decibels(signal: float, noise: float) -> float:
    """The quotient of the two may be too small for a float."""
    return 10 * (math.log10(signal) - math.log10(noise))


def _row_ulps(reference: Tensor, difference: Tensor, dtype: torch.dtype) -> float:
    if reference.dim() == 0:
        reference, difference = reference[None], difference[None]
    rows = torch.linalg.vector_norm(reference, math.inf, dim=-1).double()
    if not bool(rows.isfinite().all()):
        rows = torch.where(reference.isfinite(), reference.abs(), 0.0).amax(-1).double()
    info = torch.finfo(dtype)
    units = torch.ldexp(torch.full_like(rows, info.eps), torch.frexp(rows).exponent - 1)
    smallest = info.smallest_normal * info.eps
    units = torch.where(rows < info.smallest_normal, smallest, units)
    return float((difference.amax(-1) / units).max())


def nonfinite_sets(a: Tensor, b: Tensor) -> dict[str, int]:
    return {
        "nan": int((a.isnan() != b.isnan()).sum()),
        "+inf": int((a.isposinf() != b.isposinf()).sum()),
        "-inf": int((a.isneginf() != b.isneginf()).sum()),
    }


def first_set_difference(a: Tensor, b: Tensor) -> tuple[int, ...]:
    differs = (
        (a.isnan() != b.isnan()) | (a.isposinf() != b.isposinf()) | (a.isneginf() != b.isneginf())
    )
    return index_at(int(differs.flatten().int().argmax()), differs.shape)


def index_at(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(position) for position in torch.unravel_index(torch.tensor(flat), shape))
