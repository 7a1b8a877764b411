"""Second rung: formulas. A statistic of a tensor that flows back into it, scaling it to degree 0.

Every value derived from a tensor t by arithmetic has a degree: f(a t) = a^degree f(t) for a > 0
and eps -> 0. t, t - mean(t) and sqrt(mean(t^2)) have degree 1, t^2 and var(t) degree 2, rsqrt of
those -1. A normalization is a product or quotient of t (unreduced) and a root of a second moment of
t (reduced) with degree 0. Softmax, squeeze-and-excite gates, attention scaling and global response
normalization have no such product, however they are spelled and called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import fx

from normsurgery.finding.events import Event
from normsurgery.flow import Flow
from normsurgery.flow.nodes import (
    arguments,
    frames,
    function_call,
    inputs_of,
    is_constant,
    operator,
    outputs_of,
    position,
)
from normsurgery.flow.operators import SAME_NUMBERS, kind_of


@dataclass(frozen=True)
class Trace:
    """What a value is, seen from the value `base` it was made of.

    reduced: it has lost axes (a statistic); second: it holds a second moment or a length;
    rooted: a root was taken; constant: it comes from parameters alone.
    """

    base: fx.Node
    degree: float = 1.0
    reduced: bool = False
    second: bool = False
    rooted: bool = False
    constant: bool = False

    @property
    def is_statistic(self) -> bool:
        return self.reduced and self.second and self.rooted


@dataclass(frozen=True)
class _Operands:
    """One reading of an operation's tensors, and its number if it has one."""

    traces: tuple[Trace, ...]
    number: float | None


# A value may be seen from several bases: what was pooled from one tensor is data for the next.
# The oldest comes first; only the last few can still matter.
Traces = dict[fx.Node, Trace]
_KEPT = 8


_MEANS = frozenset({"aten::mean", "aten::sum"})
_VARIANCES = {"aten::var": 2.0, "aten::std": 1.0, "aten::var_mean": 2.0, "aten::std_mean": 1.0}
_LENGTHS = frozenset({"aten::linalg_vector_norm", "aten::norm"})
# A part of a tensor counts as the tensor: what it gives is a candidate, which the proof judges.
_KEEPS_DEGREE = frozenset(
    f"aten::{name}" for name in ("clamp", "clamp_min", "maximum", "abs", "slice", "select")
)


def events(flow: Flow) -> Iterator[Event]:
    """Every formula outside the calls of known functions, in the order it ran."""
    traces: dict[fx.Node, Traces] = {}
    for node in flow.operations:
        if not outputs_of(node):
            continue
        readings = list(_readings(traces, node))
        event = None if function_call(node) is not None else _event(node, readings)
        if event is not None:
            yield event
        for place, output in enumerate(outputs_of(node)):
            derived = [] if event is not None else [_derive(node, r, place) for r in readings]
            found = {trace.base: trace for trace in derived if trace is not None}
            if kind_of(node) not in SAME_NUMBERS or not found:
                found[output] = Trace(output, constant=is_constant(output))
            traces[output] = {base: found[base] for base in sorted(found, key=position)[-_KEPT:]}


def _readings(traces: dict[fx.Node, Traces], node: fx.Node) -> Iterator[_Operands]:
    """Every way to see the operands from one base, or from a base and a constant."""
    numbers = [a for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
    number = float(numbers[0]) if numbers else None
    known = [_known(traces, value) for value in inputs_of(node)]
    if len(known) == 1:
        for trace in known[0].values():
            yield _Operands((trace,), number)
        return
    if len(known) != 2:
        return
    first, second = known
    for a in first.values():
        for b in second.values():
            if a.base == b.base or a.constant or b.constant:
                yield _Operands((a, b), number)


def _known(traces: dict[fx.Node, Traces], value: fx.Node) -> Traces:
    if value not in traces:
        traces[value] = {value: Trace(value, constant=is_constant(value))}
    return traces[value]


def _event(node: fx.Node, readings: list[_Operands]) -> Event | None:
    """The operation closes a normalization: unreduced by statistic, degree 0."""
    name = operator(node)
    if name not in ("aten::mul", "aten::div"):
        return None
    sign = 1.0 if name == "aten::mul" else -1.0
    bases: list[fx.Node] = []
    frozen: fx.Node | None = None
    for reading in readings:
        if len(reading.traces) != 2:
            continue
        first, second = reading.traces
        swapped = sign > 0 and (first.reduced or (first.constant and first.rooted))
        x, statistic = (second, first) if swapped else (first, second)
        if statistic.constant and statistic.rooted and not x.constant:
            frozen = inputs_of(node)[1 if swapped else 0]
        same = x.base == statistic.base and not x.reduced and statistic.is_statistic
        if same and x.degree + sign * statistic.degree == 0.0:
            bases.append(x.base)
    inputs = sorted(set(bases), key=position) or ([frozen] if frozen is not None else [])
    if not inputs:
        return None
    return Event(
        input=inputs[0],
        output=outputs_of(node)[0],
        operations=(node,),
        frames=frames(node),
        constant=is_constant(inputs[0]),
        frozen=not bases,
        other_inputs=tuple(inputs[1:]),
    )


def _derive(node: fx.Node, operands: _Operands, place: int) -> Trace | None:
    name = operator(node)
    if not operands.traces:
        return None
    first = operands.traces[0]
    if kind_of(node) in SAME_NUMBERS or name in _KEEPS_DEGREE:
        return first
    if name in _MEANS:
        return replace(first, reduced=True, second=first.second or first.degree == 2.0)
    if name in _VARIANCES and not first.reduced:
        return _moment(first, name, place)
    if name in _LENGTHS:
        return _length(node, first)
    if name in _POWERS:
        return _POWERS[name](first)
    if name == "aten::pow":
        return _power(first, operands.number if len(operands.traces) == 1 else None)
    if name in ("aten::mul", "aten::div"):
        return _product(operands, -1.0 if name == "aten::div" else 1.0)
    if name in ("aten::add", "aten::sub", "aten::rsub"):
        return _sum(operands)
    return None


def _moment(first: Trace, name: str, place: int) -> Trace:
    if place == 1:  # the mean that var_mean gives beside the variance
        return replace(first, reduced=True)
    degree = first.degree * _VARIANCES[name]
    return replace(first, degree=degree, reduced=True, second=True, rooted=_VARIANCES[name] == 1.0)


def _length(node: fx.Node, first: Trace) -> Trace | None:
    given = arguments(node)
    order = given[1] if len(given) > 1 and given[1] is not None else 2
    if isinstance(order, fx.Node) or float(order) != 2.0:
        return None
    return replace(first, reduced=True, second=True, rooted=True)


def _power(first: Trace, exponent: float | None) -> Trace | None:
    if exponent is None:
        return None
    return replace(
        first, degree=first.degree * exponent, rooted=first.rooted or exponent in (0.5, -0.5)
    )


_POWERS: dict[str, Callable[[Trace], Trace | None]] = {
    "aten::sqrt": lambda t: _power(t, 0.5),
    "aten::rsqrt": lambda t: _power(t, -0.5),
    "aten::square": lambda t: _power(t, 2.0),
    "aten::reciprocal": lambda t: _power(t, -1.0),
}


def _product(operands: _Operands, sign: float) -> Trace | None:
    first = operands.traces[0]
    if len(operands.traces) == 1:  # times or over a number
        return first
    second = operands.traces[1]
    if first.base == second.base and first.reduced == second.reduced:
        return replace(
            first,
            degree=first.degree + sign * second.degree,
            second=first.second or second.second,
            rooted=first.rooted or second.rooted,
        )
    # Times a weight, of the tensor or of the statistic: what is scaled is still what it was.
    if second.constant and not first.constant:
        return first
    if sign > 0 and first.constant and not second.constant:
        return second
    # Constants among themselves: weight * rsqrt(running_var + eps).
    if first.constant and second.constant and (first.rooted or second.rooted):
        return first if first.rooted else second
    return None


def _sum(operands: _Operands) -> Trace | None:
    first = operands.traces[0]
    if len(operands.traces) == 1:  # plus eps
        return first if first.reduced or first.constant else None
    second = operands.traces[1]
    if first.constant and second.constant:
        return first if first.rooted else second
    if first.base != second.base or first.degree != second.degree:
        return first if first.reduced and second.constant else None
    if first.reduced and not second.reduced:
        return second
    return replace(first, second=first.second or second.second)
