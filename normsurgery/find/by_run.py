"""Third rung: calls of the norm functions and norm operators, with what their arguments say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import fx

from normsurgery.find.events import Event
from normsurgery.graph import Flow
from normsurgery.graph.nodes import (
    frames,
    function_call,
    is_constant,
    operator,
    outputs_of,
    shape,
    tensor,
)
from normsurgery.spec import NormSpec, Spelling, specs

Known = tuple[NormSpec, Spelling]


def spellings() -> Mapping[Callable[..., Any] | str, Known]:
    """Every registered function, and operator by name, with the norm that it computes."""
    return {
        call: (known, spelling)
        for known in specs()
        for spelling in known.spellings
        for call in spelling.calls
    }


def functions() -> frozenset[Callable[..., Any]]:
    """The functions of torch that compute a norm."""
    return frozenset(call for call in spellings() if not isinstance(call, str))


def events(recording: Flow) -> Iterator[Event]:
    """Every call of a norm function, then every norm operator outside such a call."""
    known = spellings()
    for call in recording.calls:
        if call.function in known and isinstance(call.output, fx.Node):
            given = _given(call.function, call.args, call.kwargs)
            yield _event(known[call.function], given, call.output, call.frames, call.operations)
    for op in recording.operations:
        if function_call(op) is None and operator(op) in known and outputs_of(op):
            assert not isinstance(op.target, str)
            given = _given(op.target, op.args, op.kwargs)
            yield _event(known[operator(op)], given, outputs_of(op)[0], frames(op), (op,))


def _given(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, those left out as they are by default."""
    defaults = _defaults(function)
    return {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}


@cache
def _defaults(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The names of the arguments in order, with what each is by default (None where it must be
    given), by the function's signature or the operator's schema."""
    schema = getattr(function, "_schema", None)
    if schema is None and inspect.isbuiltin(function):
        schema = getattr(torch.ops.aten, function.__name__).default._schema
    if schema is not None:
        return {argument.name: argument.default_value for argument in schema.arguments}
    parameters = inspect.signature(function).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def _event(
    known: Known,
    given: Mapping[str, Any],
    output: fx.Node,
    frames: Any,
    operations: tuple[fx.Node, ...],
) -> Event:
    spec, spelling = known
    value = given["input"]
    reading = spelling.read(given, shape(value), tensor(value).dtype)
    refusal = reading if isinstance(reading, str) else ""
    found = {} if isinstance(reading, str) else reading.tensors
    return Event(
        input=value,
        output=output,
        operations=operations,
        frames=frames,
        constant=is_constant(value),
        kind=spec.name,
        settings={} if isinstance(reading, str) else dict(reading.settings),
        tensors={r: given[n] for r, n in found.items() if isinstance(given.get(n), fx.Node)},
        refusal=refusal,
    )
