"""Which norm a value is the result of, if it is the result of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from recorder.formulas import (
    CASTS,
    LAYOUTS,
    Formula,
    carried,
    formula_at,
    is_number,
    is_parametric,
    other_factor,
)
from recorder.writing import Frame, Value

LAYER_NORM = "native_layer_norm"
BATCH_NORMS = frozenset(
    {
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_batch_norm_with_update",
        "_batch_norm_no_update",
        "cudnn_batch_norm",
    }
)
GROUP_NORM = "native_group_norm"
RMS_NORM = "_fused_rms_norm"
WEIGHT_NORM = "_weight_norm_interface"
# Where the operators above take their scale.
WEIGHT_OPERAND = {LAYER_NORM: 2, GROUP_NORM: 1, RMS_NORM: 2} | dict.fromkeys(BATCH_NORMS, 1)


@dataclass(frozen=True)
class Norm:
    """One norm that ran, at one place of one module."""

    kind: str
    attach: Literal["norm", "weight"]
    centred: bool
    offset_one: bool
    owner: nn.Module | None
    place: tuple[tuple[int, int], ...]

    @property
    def site(self) -> tuple[Any, ...]:
        return id(self.owner), self.place, self.kind


def norm_of(value: Value, frame: Frame, offsets: set[int]) -> Norm | None:
    if value.result:
        return None
    parametric = "input" not in value.depends
    attach: Literal["norm", "weight"] = "weight" if parametric else "norm"
    offset_one = id(value) in offsets or is_offset(_operand(value, WEIGHT_OPERAND))
    kind, centred = _operator_kind(value, frame), value.operator not in (RMS_NORM, WEIGHT_NORM)
    if kind is None:
        if parametric and "parameter" not in value.depends:
            return None
        formula = formula_at(value)
        if formula is None:
            return frozen_norm(value)
        kind, centred = _formula_kind(value, formula, frame), formula.centred
    return Norm(kind, attach, centred, offset_one, value.owner, value.place)


def _operand(value: Value, positions: Mapping[str, int]) -> Any:
    position = positions.get(value.operator)
    if position is None or position >= len(value.operands):
        return None
    return value.operands[position]


def _operator_kind(value: Value, frame: Frame) -> str | None:
    if value.operator == LAYER_NORM:
        last_only = len(value.operands[1]) == 1
        over_channels = last_only and _over_channels(value.operands[0], value, frame)
        return "layernorm2d" if over_channels else "layernorm"
    if value.operator in BATCH_NORMS:
        return "instancenorm" if _one_channel_per_sample(value.operands[0]) else "batchnorm"
    return {GROUP_NORM: "groupnorm", RMS_NORM: "rmsnorm", WEIGHT_NORM: "weightnorm"}.get(
        value.operator
    )


def _one_channel_per_sample(source: Value) -> bool:
    """Whether (N, C, ...) was seen as (1, N C, ...), which is how an instance norm is computed."""
    if source.operator not in LAYOUTS or "input" not in source.depends or source.shape[0] != 1:
        return False
    before = source.operands[0].shape
    return len(before) == len(source.shape) and before[0] > 1 and before[2:] == source.shape[2:]


def _formula_kind(value: Value, formula: Formula, frame: Frame) -> str:
    rank, axes = len(formula.moment.source.shape), formula.moment.axes
    if not formula.centred:
        return "l2norm" if formula.moment.kind == "sum" else "rmsnorm"
    if rank == 4 and (
        axes == (1,) or (axes == (3,) and _over_channels(formula.numerator, value, frame))
    ):
        return "layernorm2d"
    if rank > 2 and axes == tuple(range(2, rank)):
        if _in_groups(formula.moment.source):
            return "groupnorm"
        return "instancenorm" if len(axes) > 1 else "layernorm"
    if rank > 2 and axes == tuple(range(1, rank)):
        return "layernorm_chw"
    return "batchnorm" if 0 in axes else "layernorm"


def _in_groups(source: Value) -> bool:
    """Whether the channels of (N, C, ...) were split into fewer groups, (N, G, ...)."""
    before = source.operands[0].shape if source.operator in LAYOUTS else ()
    if len(before) < 3 or before[0] != source.shape[0]:
        return False
    return before[1] > source.shape[1] > 1 and before[1] % source.shape[1] == 0


def _over_channels(source: Value, value: Value, frame: Frame) -> bool:
    """Whether the last axis of a norm is axis 1 of the 4-d maps its module takes and gives back."""
    if len(value.shape) != 4:
        return False
    into = any(_axis_in(source, 3, given) == 1 for given in frame.given)
    return into and any(_axis_in(back, 1, value) == 3 for back in frame.returned)


def _axis_in(value: Value, axis: int, earlier: Value) -> int | None:
    """Which axis of `earlier` is `axis` of `value`, if only permutations and scales lie between."""
    while value is not earlier:
        if value.operator == "permute":
            axis = value.operands[1][axis] % len(value.shape)
        elif value.operator == "transpose":
            first, second = (other % len(value.shape) for other in value.operands[1:3])
            axis = {first: second, second: first}.get(axis, axis)
        elif value.operator not in CASTS | {"mul", "add", "sub"}:
            return None
        activations = [
            o for o in value.operands[:2] if isinstance(o, Value) and "input" in o.depends
        ]
        if len(activations) != 1:
            return None
        value = activations[0]
    return axis


def frozen_norm(value: Value) -> Norm | None:
    """A norm by stored statistics written out: an activation times an inverse root of a buffer."""
    if value.operator not in ("mul", "div") or "input" not in value.depends:
        return None
    first, second = value.operands[:2]
    factors = ((first, second), (second, first)) if value.operator == "mul" else ((first, second),)
    for activation, factor in factors:
        if is_parametric(activation) or not isinstance(factor, Value):
            continue
        if is_parametric(factor) and has_inverse_root(factor, value.operator == "div"):
            return Norm("batchnorm", "norm", True, False, value.owner, value.place)
    return None


def has_inverse_root(value: Any, inverted: bool) -> bool:
    """Whether a value from parameters is the inverse root (a root, if inverted) of a parameter."""
    value = carried(value)
    if not isinstance(value, Value) or "parameter" not in value.depends:
        return False
    if value.operator == "mul":
        return any(has_inverse_root(operand, inverted) for operand in value.operands[:2])
    if value.operator == "div":
        return has_inverse_root(value.operands[1], not inverted)
    if value.operator == "reciprocal":
        return has_inverse_root(value.operands[0], not inverted)
    roots = ("sqrt",) if inverted else ("rsqrt",)
    return value.operator in roots and not is_number(value)


def is_offset(value: Any) -> bool:
    """Whether a scale is a parameter plus one."""
    value = carried(value)
    if not isinstance(value, Value) or value.operator != "add" or not is_parametric(value):
        return False
    return any(isinstance(one, (int, float)) and one == 1 for one in value.operands[:2])


def scaled_by_offset(values: list[Value]) -> set[int]:
    """Identities of the values that are multiplied by a parameter plus one."""
    found = set()
    for value in values:
        if value.operator != "mul":
            continue
        scaled = other_factor(value, is_offset)
        if isinstance(scaled, Value):
            found.add(id(carried(scaled)))
    return found
