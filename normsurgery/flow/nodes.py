"""What the nodes of a recorded run stand for, and what their `meta` holds.

A *value* is a node that stands for one tensor at one time: a placeholder, a get_attr, an operation
with one output, or what `operator.getitem` takes from one with several. An *operation* is a
call_function node with an ATen operator as its target (or `F.pad`, where that is many of them).
Makers and readers of a value are FX's own args and users.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from normsurgery.flow.calls import FrameRecord

# --- values -------------------------------------------------------------------------------------


def tensor(value: fx.Node) -> Tensor:
    """The tensor itself, as the run left it."""
    held: Tensor = value.meta["val"]
    return held


def shape(value: fx.Node) -> tuple[int, ...]:
    return tuple(value.meta["val"].shape)


def is_constant(value: fx.Node) -> bool:
    """Made from parameters, buffers and numbers alone."""
    constant: bool = value.meta["constant"]
    return constant


def name_of(value: fx.Node) -> str | None:
    """The parameter's, buffer's or input's name; None for anything computed."""
    return value.meta.get("name")


def maker(value: fx.Node) -> fx.Node | None:
    """The operation that made the value; None for a parameter, a buffer or an input."""
    while value.target is python_operator.getitem:
        (value, _) = value.args  # type: ignore[assignment]
    return value if value.op == "call_function" else None


def users_of(value: fx.Node) -> list[fx.Node]:
    """The operations that read the value, in the order they ran."""
    return [user for user in value.users if user.op == "call_function"]


# --- operations ---------------------------------------------------------------------------------


def operator(operation: fx.Node) -> str:
    """As `aten::mul`, without overload or in-place underscore; `pad` for a call of F.pad."""
    return _operator_of(operation.target)


@cache
def _operator_of(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return str(getattr(target, "__name__", target))
    name = str(schema.name)
    return name if name.startswith("aten::_") else name.removesuffix("_")


def writes(operation: fx.Node) -> bool:
    """Whether it writes into a tensor it was given: then something may read that later."""
    schema = getattr(operation.target, "_schema", None)
    return operation.target is not F.pad if schema is None else bool(schema.is_mutable)


def inputs_of(operation: fx.Node) -> tuple[fx.Node, ...]:
    """The values it reads, in order; one that it reads twice is there twice."""
    read: tuple[fx.Node, ...] = operation.meta["inputs"]
    return read


def outputs_of(operation: fx.Node) -> tuple[fx.Node, ...]:
    """The values it makes."""
    made: tuple[fx.Node, ...] = operation.meta["outputs"]
    return made


def frames(operation: fx.Node) -> tuple[FrameRecord, ...]:
    """What was running, from the innermost module outwards."""
    running: tuple[FrameRecord, ...] = operation.meta["frames"]
    return running


def module_of(operation: fx.Node) -> nn.Module | None:
    """The innermost module whose forward it ran in."""
    running = frames(operation)
    return running[0].module if running else None


def function_call(operation: fx.Node) -> int | None:
    """The index of the recorded function call that it ran in."""
    index: int | None = operation.meta["call"]
    return index


def position(node: fx.Node) -> int:
    """Nodes are recorded in this order."""
    place: int = node.meta["position"]
    return place


def arguments(operation: fx.Node) -> tuple[Any, ...]:
    """Those that it was given by position."""
    return operation.args


def argument(operation: fx.Node, place: int, name: str, default: Any = None) -> Any:
    if len(operation.args) > place:
        return operation.args[place]
    return operation.kwargs.get(name, default)


def operations_between(start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...] | None:
    """The operations that make `end` of `start`, those on constants too; None where it is not made
    of it, or of another input as well."""
    found: set[fx.Node] = set()
    queue, reached = [end], False
    while queue:
        value = queue.pop()
        made_by = maker(value)
        if value is start:
            reached = True
        elif made_by is not None and made_by not in found:
            found.add(made_by)
            queue.extend(inputs_of(made_by))
        elif made_by is None and not is_constant(value):
            return None
    return in_order(found) if reached else None


# --- trees of arguments -------------------------------------------------------------------------


def nodes_in(tree: Any) -> tuple[fx.Node, ...]:
    """The nodes in an operation's arguments, in order."""
    return tuple(_nodes_in(tree))


def _nodes_in(tree: Any) -> Iterator[fx.Node]:
    if isinstance(tree, fx.Node):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _nodes_in(item)
    elif isinstance(tree, dict):
        yield from _nodes_in(tuple(tree.values()))


def in_order(operations: Sequence[fx.Node] | set[fx.Node]) -> tuple[fx.Node, ...]:
    """In the order they ran."""
    return tuple(sorted(operations, key=position))
