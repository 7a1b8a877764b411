"""What a pickle does, as plain values: names, calls, objects, references, and what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Name:
    """A class, a function or a value of a module, by name only."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """`function(*args)`, and what is put into the result."""

    function: Any
    args: Any
    states: list[Any] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class New:
    """An instance of `cls` created without its `__init__`, and the state it is given."""

    cls: Any
    args: Any
    states: list[Any] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Persistent:
    """A reference to something outside the pickle: in torch files, a storage."""

    key: Any


@dataclass(eq=False)
class Sequence:
    """A tuple, list, set or frozenset."""

    kind: type
    items: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Table:
    """A dict: keys and values alternate in `items`."""

    items: list[Any] = field(default_factory=list)

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        return zip(self.items[::2], self.items[1::2], strict=True)

    def get(self, key: str) -> Any:
        found = None
        for name, value in self.pairs():
            if isinstance(name, str) and name == key:
                found = value
        return found


@dataclass(frozen=True)
class Program:
    """What a pickle makes: its result, all names, calls, objects, builds and references in order.

    `builds` holds (target, state) for every state given to something that is not a Call or a New.
    """

    root: Any
    nodes: tuple[Any, ...]
    builds: tuple[tuple[Any, Any], ...]
    protocol: int
    newer_opcodes: tuple[str, ...]


def children(node: Any) -> Iterator[tuple[str, Any]]:
    """What hangs below a node, each with the step its attribute path gets ("" for none)."""
    if isinstance(node, Table):
        yield from _entries(node.items)
    elif isinstance(node, Sequence):
        yield from ((f"[{index}]", item) for index, item in enumerate(node.items))
    elif isinstance(node, (Call, New)):
        yield "", node.function if isinstance(node, Call) else node.cls
        yield "", node.args
        yield from (("", state) for state in node.states)
        if len(node.items) % 2 == 0:
            yield from _entries(node.items)
        else:
            yield from (("", item) for item in node.items)
    elif isinstance(node, Persistent):
        yield "", node.key


def _entries(items: list[Any]) -> Iterator[tuple[str, Any]]:
    for key, value in zip(items[::2], items[1::2], strict=True):
        yield "", key
        yield key if isinstance(key, str) else f"[{key}]" if isinstance(key, int) else "", value


# The three dicts of nn.Module are not part of the path by which their entries are reached.
_TRANSPARENT = frozenset({"_modules", "_parameters", "_buffers"})


def path_to(root: Any, wanted: Any) -> str:
    """The attribute path by which `wanted` hangs below the result; "" for the result itself.

    The shortest one; "" also for what nothing reaches. Ends of very long paths only are given.
    """
    parents: dict[int, tuple[int, str]] = {}
    queue = [root]
    for node in queue:
        for step, child in children(node):
            if isinstance(child, _PLAIN) or id(child) in parents or child is root:
                continue
            parents[id(child)] = (id(node), step)
            queue.append(child)
    steps: list[str] = []
    at = id(wanted)
    while at in parents:
        at, step = parents[at]
        steps.append(step)
    path = "".join(_as_suffix(step) for step in reversed(steps)).removeprefix(".")
    return path if len(path) <= _LONGEST_PATH else f"...{path[-_LONGEST_PATH:]}"


_PLAIN = (str, bytes, int, float, bool, type(None))
_LONGEST_PATH = 200


def _as_suffix(step: str) -> str:
    if not step or step in _TRANSPARENT:
        return ""
    return step if step.startswith("[") else f".{step}"
