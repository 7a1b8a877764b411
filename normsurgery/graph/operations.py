"""A stretch of recorded ATen operations as plain data, and how it is run again.

Data, not code: names of ATen operators and their arguments as JSON values, so that it can stand in
a plan, and a model that holds it can be saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from normsurgery.graph.nodes import inputs_of, is_constant, name_of, outputs_of, tensor

Operation = Mapping[str, Any]
Tree = Any  # of JSON values

_LAYOUTS = {"strided": torch.strided}


class _NotPlainError(Exception):
    """Something in the operations cannot be written as data, or holds for one shape only."""


def as_data(
    operations: Sequence[fx.Node], start: fx.Node, roles: Mapping[str, str]
) -> tuple[Operation, ...] | None:
    """The operations that lead from the value `start` to the last one's output.

    roles: name of a parameter or buffer -> its role. None where an operation is not ATen's, writes
    in place, reads anything else, or has the recorded sizes written into it.
    """
    made: dict[fx.Node, Tree] = {start: {"x": True}}
    found: list[Operation] = []
    try:
        for number, operation in enumerate(operations):
            found.append(_operation(operation, start, roles, made))
            for place, output in enumerate(outputs_of(operation)):
                made[output] = {"of": number, "output": place}
    except _NotPlainError:
        return None
    return tuple(found)


def run(operations: Sequence[Operation], x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The output of the last operation, for `x` and the tensors by role; differentiable."""
    results: list[list[Tensor]] = []
    for operation in operations:
        function = _function(operation["name"])
        args = [_decoded(value, x, tensors, results) for value in operation["args"]]
        kwargs = {k: _decoded(v, x, tensors, results) for k, v in operation["kwargs"].items()}
        result = function(*args, **kwargs)
        results.append([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
    return results[-1][0]


def _function(name: str) -> Any:
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _operation(
    operation: fx.Node, start: fx.Node, roles: Mapping[str, str], made: Mapping[fx.Node, Tree]
) -> Operation:
    name, schema = str(operation.target), getattr(operation.target, "_schema", None)
    if not name.startswith("aten.") or schema is None or schema.is_mutable:
        raise _NotPlainError(name)
    x = tensor(start)

    def encoded(value: Any) -> Tree:
        if isinstance(value, fx.Node):
            return made[value] if value in made else _role(value, roles)
        if isinstance(value, (list, tuple)):
            if list(value) == list(x.shape) and len(value) > 1:
                return {"shape of": "x"}
            return [encoded(item) for item in value]
        return _plain(value, x)

    args = [encoded(value) for value in operation.args]
    kwargs = {name: encoded(value) for name, value in operation.kwargs.items()}
    if _has_sizes(schema) and not _is_free(operation, args):
        raise _NotPlainError(f"{name} to one shape")
    return {"name": name, "args": args, "kwargs": kwargs}


def _role(value: fx.Node, roles: Mapping[str, str]) -> Tree:
    name = name_of(value)
    if name is None or name not in roles:
        raise _NotPlainError(f"value {value}")
    return {"role": roles[name]}


def _plain(value: Any, x: Tensor) -> Tree:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.layout) and value is torch.strided:
        return {"layout": "strided"}
    if isinstance(value, torch.device) and value == x.device:
        return None
    raise _NotPlainError(repr(value))


def _has_sizes(schema: Any) -> bool:
    names = {argument.name for argument in schema.arguments}
    return bool(names & {"size", "shape", "sizes", "repeats"})


def _is_free(operation: fx.Node, args: Sequence[Tree]) -> bool:
    """Its sizes are those of the input, or it only reshapes a parameter."""
    return all(map(is_constant, inputs_of(operation))) or args[1] == {"shape of": "x"}


def _decoded(
    value: Tree, x: Tensor, tensors: Mapping[str, Tensor], results: Sequence[Sequence[Tensor]]
) -> Any:
    if isinstance(value, list):
        return [_decoded(item, x, tensors, results) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "x" in value:
        return x
    if "of" in value:
        return results[value["of"]][value["output"]]
    if "role" in value:
        return tensors[value["role"]]
    if "shape of" in value:
        return list(x.shape)
    if "layout" in value:
        return _LAYOUTS[value["layout"]]
    (name,) = value.values()
    return getattr(torch, name)
