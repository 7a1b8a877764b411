"""Bounds on one side, as Max and Min.

torch's exporter writes `clamp(min=c)` as Clip without an upper bound, and ONNX then takes the
largest finite number for it: Inf comes out as 3.4e38. A norm that is bounded from below, as in
`F.normalize`, then gives Inf where torch gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from onnxscript.function_libs.torch_lib.tensor_typing import TReal
from onnxscript.values import Opset


def one_sided_bounds(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translation table of clamps for one opset: ATen overload -> function."""
    op: Any = Opset("", opset)

    def clamp_min(self: TReal, min: float) -> Any:
        return _bounded(op, self, min, None)

    def clamp_max(self: TReal, max: float) -> Any:
        return _bounded(op, self, None, max)

    def clamp(self: TReal, min: Optional[float] = None, max: Optional[float] = None) -> Any:  # noqa: UP045
        return _bounded(op, self, min, max)

    aten = torch.ops.aten
    return {
        aten.clamp_min.default: clamp_min,
        aten.clamp_max.default: clamp_max,
        aten.clamp.default: clamp,
    }


def _bounded(op: Any, x: Any, least: Any, most: Any) -> Any:
    if least is None and most is None:
        return op.Identity(x)
    least = None if least is None else op.CastLike(least, x)
    most = None if most is None else op.CastLike(most, x)
    one_sided = least is None or most is None
    if one_sided and x.dtype is not None and x.dtype.is_floating_point():
        return op.Max(x, least) if most is None else op.Min(x, most)
    return op.Clip(x, least, most)
