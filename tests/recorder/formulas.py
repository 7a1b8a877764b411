"""Formulas among what was written down: a tensor over the root of its own second moment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from recorder.writing import Value

CASTS = frozenset({"_to_copy", "clone", "alias", "detach", "lift_fresh", "copy"})
LAYOUTS = frozenset(
    {"view", "_unsafe_view", "_reshape_alias", "expand", "unsqueeze", "squeeze", "permute"}
    | {"transpose", "t"}
)
CARRIERS = CASTS | LAYOUTS


class Moment(NamedTuple):
    """A second moment of `source` over `axes`: a mean or a sum of squares, or a variance."""

    source: Value
    axes: tuple[int, ...]
    kind: Literal["mean", "sum", "variance"]


class Formula(NamedTuple):
    """A formula that ran: `numerator` was divided by the root of its `moment`."""

    numerator: Value
    moment: Moment
    centred: bool


def carried(value: Any, through: frozenset[str] = CARRIERS) -> Any:
    """The value before casts and changes of layout."""
    while isinstance(value, Value) and value.operator in through and value.operands:
        value = value.operands[0]
    return value


def is_number(value: Any) -> bool:
    """A Python number, or a tensor of one element that came from no input."""
    if isinstance(value, Value):
        return "input" not in value.depends and all(size == 1 for size in value.shape)
    return isinstance(value, (int, float))


def is_parametric(value: Any) -> bool:
    return not isinstance(value, Value) or "input" not in value.depends


def other_factor(value: Value, accept: Any) -> Any:
    """The factor of a product whose other factor is accepted, or None."""
    first, second = value.operands[:2]
    if accept(second):
        return first
    return second if accept(first) else None


def _squared(value: Value) -> Value | None:
    value = carried(value)
    if value.operator == "pow" and value.operands[1] == 2:
        return _source(value.operands[0])
    if value.operator == "mul" and len(value.operands) == 2:
        first, second = (carried(operand) for operand in value.operands)
        if isinstance(first, Value) and isinstance(second, Value) and same(first, second):
            return _source(value.operands[0])
    return None


def _source(value: Any) -> Value | None:
    """The tensor that is squared, before casts but in the layout in which it is reduced."""
    value = carried(value, CASTS)
    return value if isinstance(value, Value) else None


def _axes(value: Value, position: int) -> tuple[int, ...]:
    rank = len(value.operands[0].shape)
    axes = value.operands[position] if len(value.operands) > position else None
    axes = value.options.get("dim", axes)
    if axes is None or axes == []:
        return tuple(range(rank))
    return tuple(sorted(axis % rank for axis in ([axes] if isinstance(axes, int) else axes)))


def _moment(value: Any) -> Moment | None:
    """The second moment a value is, give or take an epsilon, a floor and a constant factor."""
    value = carried(value)
    if not isinstance(value, Value):
        return None
    if value.operator in ("mean", "sum"):
        source = _squared(value.operands[0])
        if source is None:
            return None
        return Moment(source, _axes(value, 1), "mean" if value.operator == "mean" else "sum")
    if value.operator in ("var", "var_mean"):
        source = _source(value.operands[0])
        if source is None or value.result:
            return None
        return Moment(source, _axes(value, 1), "variance")
    if value.operator == "sub":
        return _one_pass_variance(value)
    if value.operator in ("clamp", "clamp_min"):
        return _moment(value.operands[0])
    if value.operator in ("add", "maximum", "mul"):
        return _moment(other_factor(value, is_number))
    if value.operator == "div" and is_number(value.operands[1]):
        inner = _moment(value.operands[0])
        mean = inner is not None and inner.kind == "sum" and value.operands[1] == _size(inner)
        return inner._replace(kind="mean") if mean and inner else inner
    return None


def _size(moment: Moment) -> int:
    size = 1
    for axis in moment.axes:
        size *= moment.source.shape[axis]
    return size


def _one_pass_variance(value: Value) -> Moment | None:
    """E[x^2] - E[x]^2."""
    of_squares, mean = _moment(value.operands[0]), _squared(value.operands[1])
    if of_squares is None or of_squares.kind != "mean" or mean is None:
        return None
    mean = carried(mean)
    if mean.operator != "mean" or not same(mean.operands[0], of_squares.source):
        return None
    return of_squares._replace(kind="variance")


def _root(value: Any) -> Moment | None:
    """The moment whose square root a value is, give or take an epsilon, a floor and a factor."""
    value = carried(value)
    if not isinstance(value, Value):
        return None
    if value.operator == "sqrt" or (value.operator == "pow" and value.operands[1] == 0.5):
        return _moment(value.operands[0])
    if value.operator in ("std", "std_mean") and not value.result:
        source = _source(value.operands[0])
        return None if source is None else Moment(source, _axes(value, 1), "variance")
    if value.operator in ("linalg_vector_norm", "norm"):
        return _vector_norm(value)
    if value.operator in ("clamp", "clamp_min"):
        return _root(value.operands[0])
    if value.operator == "div" and is_parametric(value.operands[1]):
        return _per_element(_root(value.operands[0]), value.operands[1])
    if value.operator in ("add", "maximum", "mul"):
        return _root(other_factor(value, is_parametric))
    return None


def _per_element(moment: Moment | None, divisor: Any) -> Moment | None:
    """The moment after its root was divided by a number: by root n, a sum became a mean."""
    if moment is None or moment.kind != "sum" or not isinstance(divisor, float):
        return moment
    by_root = round(divisor**2, 6) == _size(moment)
    return moment._replace(kind="mean") if by_root else moment


def _vector_norm(value: Value) -> Moment | None:
    order = value.operands[1] if len(value.operands) > 1 else 2
    source = _source(value.operands[0])
    if source is None or order not in (None, 2):
        return None
    return Moment(source, _axes(value, 2), "sum")


def _inverse_root(value: Any) -> Moment | None:
    """The moment whose inverse square root a value is, give or take factors from parameters."""
    value = carried(value)
    if not isinstance(value, Value):
        return None
    if value.operator == "rsqrt" or (value.operator == "pow" and value.operands[1] == -0.5):
        return _moment(value.operands[0])
    if value.operator == "reciprocal" or (value.operator == "pow" and value.operands[1] == -1):
        return _root(value.operands[0])
    if value.operator == "div" and is_parametric(value.operands[0]):
        return _root(value.operands[1])
    if value.operator == "mul":
        return _inverse_root(other_factor(value, is_parametric))
    return None


def formula_at(value: Value) -> Formula | None:
    """The formula whose last step a value is."""
    if value.operator == "mul":
        first, second = value.operands[:2]
        for numerator, factor in ((first, second), (second, first)):
            moment = _inverse_root(factor)
            if moment is not None:
                return _matched(numerator, moment)
        return None
    if value.operator == "div":
        moment = _root(value.operands[1])
        return None if moment is None else _matched(value.operands[0], moment)
    return None


def _matched(numerator: Any, moment: Moment) -> Formula | None:
    """The formula, if what is divided is what was squared."""
    for unscaled in _unscaled(numerator):
        centred_on = _centred_on(unscaled)
        if moment.kind == "variance":
            if centred_on is not None and same(centred_on, _before_centring(moment.source)):
                return Formula(unscaled, moment, centred=True)
        elif same(unscaled, moment.source):
            return Formula(unscaled, moment, centred=centred_on is not None)
    return None


def _unscaled(value: Any) -> Iterator[Value]:
    """The value, and what it was before each of the factors from parameters that end it."""
    value = carried(value, CASTS)
    while isinstance(value, Value):
        yield value
        if value.operator not in ("mul", "div"):
            return
        if value.operator == "div" and not is_parametric(value.operands[1]):
            return
        factors = [operand for operand in value.operands[:2] if not is_parametric(operand)]
        value = carried(factors[0], CASTS) if len(factors) == 1 else None


def _centred_on(value: Any) -> Value | None:
    """The tensor a value is after its own mean was subtracted from it."""
    value = carried(value)
    if not isinstance(value, Value) or value.operator != "sub":
        return None
    minuend, mean = (carried(operand) for operand in value.operands[:2])
    if not isinstance(minuend, Value) or not isinstance(mean, Value):
        return None
    is_mean = mean.operator == "mean" or (
        mean.operator in ("var_mean", "std_mean") and mean.result == 1
    )
    return minuend if is_mean and carried(mean.operands[0]) is minuend else None


def _before_centring(value: Value) -> Value:
    centred_on = _centred_on(value)
    return value if centred_on is None else centred_on


def same(first: Any, second: Any) -> bool:
    """The same tensor, or each time the same tensor minus its mean, in whatever layout or type."""
    first, second = carried(first), carried(second)
    if first is second:
        return True
    centred = _centred_on(first)
    return centred is not None and centred is _centred_on(second)
