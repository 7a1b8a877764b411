"""Which way the code of a model went in one run, and what its names were bound to there.

A tracer under `sys.settrace` follows the Python code that runs below a model's forward: the model's
own, not torch's nor the standard library's. Whatever trace function was set before is set again.
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.graph.controls import Exit, Syntax, syntax_of_code
from normsurgery.graph.positions import functions_within

_DEPTH = 3  # how deep containers are searched for tensors
_ITEMS = 256  # and how many of their items


@dataclass(frozen=True)
class Bound:
    """What a name was bound to: the values in it, and the module or function that it is.

    many: whether it is a list, tuple or dict that holds the values. fields: of a dict with text for
    keys, as transformers' outputs are, the values by key.
    """

    values: frozenset[int] = frozenset()
    held: Any = None
    many: bool = False
    fields: Mapping[str, frozenset[int]] = field(default_factory=dict)


Names = Mapping[str, Bound]


@dataclass(eq=False)
class Visit:
    """One time that a control was reached: the arms entered, and the exit taken inside them.

    number: how many times this activation had reached the control, counted from 1.
    """

    control: int
    number: int
    names: dict[str, Bound]
    entered: set[int] = field(default_factory=set)
    exit: Exit | None = None


@dataclass(eq=False)
class Activation:
    """One run of one function. `syntax` is None where it has no source.

    caller: the activation that called it and the instruction it called with. `direct`: nothing but
    torch's module call stands between the two, so that the arguments are those written there.
    in_container: it is a method of a list, tuple or dict, or runs below one: it hands things on.
    """

    serial: int
    code: CodeType
    syntax: Syntax | None
    module_globals: Mapping[str, Any]
    caller: Activation | None
    caller_offset: int
    direct: bool
    names: Names
    in_container: bool
    visits: list[Visit] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    open: dict[int, Visit] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where an activation stood: the instruction, and (control, arm, visit number) around it."""

    activation: Activation
    offset: int
    around: tuple[tuple[int, int, int], ...]


@dataclass(eq=False)
class Executed:
    """All activations of a run; `places[op index]` is the stack of an operation, outermost first.

    `untaken` is what `graph.branches` has worked out from them.
    """

    activations: list[Activation] = field(default_factory=list)
    places: list[tuple[Place, ...]] = field(default_factory=list)
    untaken: Any = None


class Tracer:
    """Fills an Executed. `known` is the recorder's own map of a tensor's id to its value."""

    def __init__(self, known: Mapping[int, int]) -> None:
        self.executed = Executed()
        self._known = known
        # Frames are kept, so that an id stays theirs.
        self._frames: dict[int, tuple[FrameType, Activation]] = {}
        self._stack: list[tuple[FrameType, Activation]] = []

    @contextmanager
    def tracing(self) -> Iterator[None]:
        # torch imports it inside batch_norm and others: under a tracer that takes most of a minute.
        importlib.import_module("torch._dynamo")
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(before)
            self._frames.clear()
            self._stack.clear()

    def operation(self) -> None:
        """Note where the operation stands that has just been recorded."""
        self.executed.places.append(tuple(_place(*entry) for entry in self._stack))

    def _called(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if not is_model_code(code.co_filename) or _is_generated(code):
            return None
        frame.f_trace_lines = False
        known = self._frames.get(id(frame))
        activation = known[1] if known else self._activation(frame)
        self._frames[id(frame)] = (frame, activation)
        self._stack.append((frame, activation))
        actions = activation.syntax.actions if activation.syntax else {}
        frame.f_trace_opcodes = bool(actions)

        def local(frame: FrameType, event: str, arg: Any) -> Any:
            if event == "opcode":
                if frame.f_lasti in actions:
                    self._act(frame, activation)
            elif event == "return" and self._stack and self._stack[-1][0] is frame:
                self._stack.pop()
            return local

        return local

    def _activation(self, frame: FrameType) -> Activation:
        caller, offset, direct = self._caller(frame)
        made = Activation(
            len(self.executed.activations),
            frame.f_code,
            syntax_of_code(frame.f_code),
            frame.f_globals,
            caller,
            offset,
            direct,
            self._names(frame),
            _is_container_method(frame) or (caller is not None and caller.in_container),
        )
        self.executed.activations.append(made)
        return made

    def _caller(self, frame: FrameType) -> tuple[Activation | None, int, bool]:
        direct = True
        outer = frame.f_back
        while outer is not None and self._stack:
            if outer is self._stack[-1][0]:
                return self._stack[-1][1], outer.f_lasti, direct
            direct = direct and outer.f_code.co_filename == torch.nn.modules.module.__file__
            outer = outer.f_back
        return None, 0, False

    def _act(self, frame: FrameType, activation: Activation) -> None:
        assert activation.syntax is not None
        for action in activation.syntax.actions[frame.f_lasti]:
            if action.what == "open":
                number = activation.counts.get(action.control, 0) + 1
                visit = Visit(action.control, number, self._names(frame))
                activation.counts[action.control] = number
                activation.open[action.control] = visit
                activation.visits.append(visit)
                continue
            opened = activation.open.get(action.control)
            if opened is None:
                continue
            if action.what == "enter":
                opened.entered.add(action.arm)
            elif action.what == "leave":
                opened.exit = action.exit
            else:
                for name, bound in self._names(frame).items():
                    before = opened.names.get(name, bound)
                    opened.names[name] = Bound(before.values | bound.values, bound.held)

    def _names(self, frame: FrameType) -> dict[str, Bound]:
        found = {}
        for name, value in frame.f_locals.items():
            if isinstance(value, (nn.Module, FunctionType, MethodType)):
                found[name] = Bound(held=value)
            elif isinstance(value, (Tensor, list, tuple, dict)):
                values = frozenset(self._values_in(value, _DEPTH))
                if values or not isinstance(value, Tensor):
                    many = not isinstance(value, Tensor)
                    held = value if many and _holds_code(value) else None
                    found[name] = Bound(values, held, many, self._fields(value))
        return found

    def _fields(self, value: Any) -> dict[str, frozenset[int]]:
        if not isinstance(value, dict):
            return {}
        return {
            key: frozenset(self._values_in(item, _DEPTH))
            for key, item in list(value.items())[:_ITEMS]
            if isinstance(key, str)
        }

    def _values_in(self, value: Any, depth: int) -> Iterator[int]:
        if isinstance(value, Tensor):
            if id(value) in self._known:
                yield self._known[id(value)]
        elif depth and isinstance(value, (list, tuple, dict)):
            items = list(value.values()) if isinstance(value, dict) else value
            for item in items[:_ITEMS]:
                yield from self._values_in(item, depth - 1)


def _place(frame: FrameType, activation: Activation) -> Place:
    offset = frame.f_lasti
    around = activation.syntax.around(offset) if activation.syntax else ()
    counts = activation.counts
    return Place(activation, offset, tuple((c, arm, counts.get(c, 0)) for c, arm in around))


def _is_container_method(frame: FrameType) -> bool:
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if not isinstance(first, (list, tuple, dict)):
        return False
    method = getattr(type(first), code.co_name, None)
    return any(function.__code__ is code for function in functions_within(method))


def _holds_code(value: Any) -> bool:
    """Whether a container has modules or functions in it."""
    items = list(value.values()) if isinstance(value, dict) else value
    return any(isinstance(i, (nn.Module, FunctionType, MethodType)) for i in items[:_ITEMS])


def _is_generated(code: CodeType) -> bool:
    """Whether a dataclass has written the code: it binds what it is given, and gives nothing."""
    return code.co_name == "__init__" and code.co_filename == "<string>"


@cache
def is_model_code(filename: str) -> bool:
    """Whether a file may hold a model's code: it is not torch's, Python's, nor this package's."""
    if filename.startswith("<frozen"):
        return False
    path = Path(filename)
    if "site-packages" in path.parts or "dist-packages" in path.parts:
        return not any(path.is_relative_to(folder) for folder in _FOREIGN)
    return not any(path.is_relative_to(folder) for folder in (*_FOREIGN, _STANDARD))


_FOREIGN = (Path(torch.__file__).parent, Path(__file__).parents[1])
_STANDARD = Path(sysconfig.get_paths()["stdlib"])
