"""The one cast of an edited tensor to the dtype it is kept in, and what is lost by it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from normsurgery.errors import UsageError

NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
WIDER = (torch.float32, torch.float64)
BLOCK = 1 << 18  # elements judged at once, so that judging a large tensor needs little memory


@dataclass(frozen=True)
class Loss:
    """What a cast loses beyond rounding.

    kind: "not finite": in float64 already; "overflow": finite values become infinite; "underflow":
        values too small for full precision are off by more than rounding.
    elements, total: how many of how many.
    error: the largest relative error among them; infinite but for underflow.
    share: their largest error as a share of what rounding does to the largest value of the tensor.
    dtype: what was cast to. wider: a dtype that holds the values, None where none does.
    """

    kind: Literal["not finite", "overflow", "underflow"]
    elements: int
    total: int
    error: float
    share: float
    dtype: str
    wider: str | None

    @property
    def serious(self) -> bool:
        """Whether some value is off by more than rounding the largest one may be.

        In fp16 many weights near zero lie where it has fewer bits: each of them loses more than
        rounding, and next to the rounding of the others that is nothing.
        """
        return self.share > 1.0

    def __str__(self) -> str:
        count = f"{self.elements} of {self.total} values"
        if self.kind == "not finite":
            return f"{count} are not finite in float64, so no dtype holds them"
        cure = f"; {self.wider} holds them" if self.wider else ""
        if self.kind == "overflow":
            return f"{count} are too large for {self.dtype}{cure}"
        return (
            f"{count} are too small for {self.dtype} and would be off by up to "
            f"{self.error:.1%}, more than rounding{cure}"
        )


def cast(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Loss | None]:
    """A float64 tensor in `dtype`, and what that loses beyond rounding, if anything.

    For float64 it is `value` itself. Raises UsageError for a dtype that is not floating.
    """
    if not dtype.is_floating_point:
        raise UsageError(
            f"an edited tensor cannot be kept as {_name(dtype)}, which is not a floating type. "
            "Leave this site out, or convert the weight first."
        )
    return value.to(dtype), _loss(value, dtype)


def _loss(value: Tensor, dtype: torch.dtype) -> Loss | None:
    suspects, largest = _outside(value, dtype)
    found = partial(Loss, total=value.numel(), dtype=_name(dtype))
    endless = float("inf")
    not_finite = int((~suspects.isfinite()).sum())
    if not_finite:
        return found("not finite", not_finite, error=endless, share=endless, wider=None)
    kept = suspects.to(dtype).double()
    overflowed = int((~kept.isfinite()).sum())
    if overflowed:
        wider = _wider(suspects, dtype)
        return found("overflow", overflowed, error=endless, share=endless, wider=wider)
    off = (kept - suspects).abs()
    rounding = torch.finfo(dtype).eps / 2
    lost = off > rounding * suspects.abs()
    if not lost.any():
        return None
    return found(
        "underflow",
        int(lost.sum()),
        error=float((off / suspects.abs()).max()),
        share=float(off.max()) / (rounding * largest),
        wider=_wider(suspects, dtype),
    )


def _outside(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The elements outside the normal range of `dtype`, where alone a cast does more than round,
    and the largest size of an element. Zero is inside."""
    kind, flat = torch.finfo(dtype), value.reshape(-1)
    found: list[Tensor] = [flat[:0]]
    largest = 0.0
    for start in range(0, flat.numel(), BLOCK):
        block = flat[start : start + BLOCK]
        low, high = (float(end) for end in block.abs().aminmax())
        largest = max(largest, high)
        if not (low >= kind.tiny and high <= kind.max):
            size = block.abs()
            found.append(block[~((size >= kind.tiny) & (size <= kind.max) | (size == 0))])
    return torch.cat(found), largest


def _wider(suspects: Tensor, dtype: torch.dtype) -> str | None:
    """The first wider dtype that loses nothing; float64 holds every finite value."""
    wider = (other for other in WIDER if torch.finfo(other).bits > torch.finfo(dtype).bits)
    return next((NAMES[other] for other in wider if _loss(suspects, other) is None), None)


def _name(dtype: torch.dtype) -> str:
    return NAMES.get(dtype, str(dtype).removeprefix("torch."))
