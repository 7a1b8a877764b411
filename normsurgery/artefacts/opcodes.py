"""Reads a pickle without running it: what it would name, create and call, as plain values.

A pickle is a program for a stack machine. Here every instruction is carried out on stand-ins: a
name stays a `Name`, a call a `Call`, an object a `New`. Nothing is imported and nothing is built,
so the result can be judged before any of it happens. Names are taken from the raw bytes, exactly
as torch's weights-only unpickler reads them, so that both speak of the same program.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any

from normsurgery.artefacts.nodes import Call, Name, New, Persistent, Program, Sequence, Table
from normsurgery.errors import CannotRead


class MalformedPickle(CannotRead):
    """The bytes are not a pickle, or one that no writer of models produces; says why."""


_LITERALS = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "FLOAT",
        "BINFLOAT",
    ]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_TUPLE": lambda: Sequence(tuple),
    "EMPTY_LIST": lambda: Sequence(list),
    "EMPTY_SET": lambda: Sequence(set),
    "EMPTY_DICT": Table,
}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FROM_MARK = {"TUPLE": tuple, "LIST": list, "FROZENSET": frozenset}
_NOTHING = frozenset({"PROTO", "FRAME", "STOP"})
# What torch's weights-only unpickler executes; a file that needs more is told to be saved again.
_WEIGHTS_ONLY = frozenset(
    [
        "APPEND",
        "APPENDS",
        "BINFLOAT",
        "BINGET",
        "BININT",
        "BININT1",
        "BININT2",
        "BINPERSID",
        "BINPUT",
        "BINUNICODE",
        "BUILD",
        "EMPTY_DICT",
        "EMPTY_LIST",
        "EMPTY_SET",
        "EMPTY_TUPLE",
        "GLOBAL",
        "LONG1",
        "LONG_BINGET",
        "LONG_BINPUT",
        "MARK",
        "NEWFALSE",
        "NEWOBJ",
        "NEWTRUE",
        "NONE",
        "PROTO",
        "REDUCE",
        "SETITEM",
        "SETITEMS",
        "SHORT_BINSTRING",
        "STOP",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
    ]
)


def interpret(data: bytes) -> Program:
    """What the pickle at the start of `data` would do. Raises MalformedPickle."""
    machine = _Machine(data)
    try:
        for opcode, argument, position in pickletools.genops(data):
            machine.step(opcode.name, argument, position or 0)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise MalformedPickle(f"its pickle is not well formed ({error})") from None
    return machine.program()


class _Machine:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.nodes: list[Any] = []
        self.builds: list[tuple[Any, Any]] = []
        self.protocol = 0
        self.newer: dict[str, None] = {}

    def program(self) -> Program:
        if not self.stack:
            raise MalformedPickle("its pickle leaves no result")
        return Program(
            self.stack[-1], tuple(self.nodes), tuple(self.builds), self.protocol, tuple(self.newer)
        )

    def step(self, opcode: str, argument: Any, position: int) -> None:
        if opcode not in _WEIGHTS_ONLY:
            self.newer[opcode] = None
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            self.stack.append(_EMPTY[opcode]())
        elif opcode in _SHORT_TUPLES:
            self._pack(tuple, self._take(_SHORT_TUPLES[opcode]))
        elif opcode in _FROM_MARK:
            self._pack(_FROM_MARK[opcode], self._take_to_mark())
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument, position)
        elif opcode not in _NOTHING:
            raise MalformedPickle(f"its pickle uses the instruction {opcode}")
        if opcode == "PROTO":
            self.protocol = int(argument)

    def _take(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise MalformedPickle("its pickle takes from an empty stack")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _take_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _pack(self, kind: type, items: list[Any]) -> None:
        self.stack.append(Sequence(kind, items))

    def _record(self, node: Any) -> None:
        self.nodes.append(node)
        self.stack.append(node)

    def mark(self, argument: Any, position: int) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def put(self, argument: Any, position: int) -> None:
        self.memo[int(argument)] = self.stack[-1]

    def memoize(self, argument: Any, position: int) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, argument: Any, position: int) -> None:
        self.stack.append(self.memo[int(argument)])

    def pop(self, argument: Any, position: int) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._take_to_mark()

    def pop_mark(self, argument: Any, position: int) -> None:
        self._take_to_mark()

    def duplicate(self, argument: Any, position: int) -> None:
        self.stack.append(self.stack[-1])

    def name(self, argument: Any, position: int) -> None:
        middle = self.data.index(b"\n", position + 1)
        end = self.data.index(b"\n", middle + 1)
        module, name = self.data[position + 1 : middle], self.data[middle + 1 : end]
        self._record(_modern(module.decode("utf-8"), name.decode("utf-8")))

    def stack_name(self, argument: Any, position: int) -> None:
        module, name = self._take(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise MalformedPickle("its pickle computes a name")
        self._record(Name(module, name))

    def call(self, argument: Any, position: int) -> None:
        function, args = self._take(2)
        self._record(Call(function, args))

    def new(self, argument: Any, position: int) -> None:
        cls, args = self._take(2)
        self._record(New(cls, args))

    def build(self, argument: Any, position: int) -> None:
        (state,) = self._take(1)
        target = self.stack[-1]
        if isinstance(target, (Call, New)):
            target.states.append(state)
        else:
            self.builds.append((target, state))

    def persistent(self, argument: Any, position: int) -> None:
        (key,) = self._take(1)
        self._record(Persistent(key))

    def append(self, argument: Any, position: int) -> None:
        self._extend(self._take(1))

    def append_all(self, argument: Any, position: int) -> None:
        self._extend(self._take_to_mark())

    def set_item(self, argument: Any, position: int) -> None:
        self._extend(self._take(2))

    def dictionary(self, argument: Any, position: int) -> None:
        self.stack.append(Table(self._take_to_mark()))

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (Call, New, Sequence, Table)):
            raise MalformedPickle("its pickle adds items to something that holds none")
        target.items.extend(items)
        if isinstance(target, Table) and len(target.items) % 2:
            raise MalformedPickle("its pickle has a dict key without a value")


_ACTIONS: dict[str, Callable[[_Machine, Any, int], None]] = {
    "MARK": _Machine.mark,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.duplicate,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.append_all,
    "ADDITEMS": _Machine.append_all,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.append_all,
    "DICT": _Machine.dictionary,
}


def _modern(module: str, name: str) -> Name:
    """The Python 3 name for one that a protocol 2 pickle writes in its Python 2 form."""
    if (module, name) in NAME_MAPPING:
        return Name(*NAME_MAPPING[module, name])
    return Name(IMPORT_MAPPING.get(module, module), name)
