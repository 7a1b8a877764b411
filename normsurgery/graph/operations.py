"""A stretch of recorded ATen operations as plain data, and how it is run again.

Data, not code: names of ATen operators and their arguments as JSON values, so that it can stand in
a plan, and a model that holds it can be saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from normsurgery.graph.recording import Op, Recording, Ref

Operation = Mapping[str, Any]
Tree = Any  # of JSON values

_LAYOUTS = {"strided": torch.strided}


class _NotPlainError(Exception):
    """Something in the operations cannot be written as data, or holds for one shape only."""


def as_data(
    recording: Recording, ops: Sequence[Op], start: int, roles: Mapping[str, str]
) -> tuple[Operation, ...] | None:
    """The operations that lead from the value `start` to the last one's output.

    roles: name of a parameter or buffer -> its role. None where an operation is not ATen's, writes
    in place, reads anything else, or has the recorded sizes written into it.
    """
    made: dict[int, Tree] = {start: {"x": True}}
    found: list[Operation] = []
    try:
        for number, op in enumerate(ops):
            found.append(_operation(recording, op, start, roles, made))
            for place, output in enumerate(op.outputs):
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
    recording: Recording, op: Op, start: int, roles: Mapping[str, str], made: Mapping[int, Tree]
) -> Operation:
    if not op.name.startswith("aten.") or op.target._schema.is_mutable:
        raise _NotPlainError(op.name)
    x = recording.values[start].tensor

    def encoded(value: Any) -> Tree:
        if isinstance(value, Ref):
            return made[value.value] if value.value in made else _role(recording, value, roles)
        if isinstance(value, (list, tuple)):
            if list(value) == list(x.shape) and len(value) > 1:
                return {"shape of": "x"}
            return [encoded(item) for item in value]
        return _plain(value, x)

    args = [encoded(value) for value in op.args]
    kwargs = {name: encoded(value) for name, value in op.kwargs.items()}
    if _has_sizes(op) and not _is_free(recording, op, args):
        raise _NotPlainError(f"{op.name} to one shape")
    return {"name": op.name, "args": args, "kwargs": kwargs}


def _role(recording: Recording, value: Ref, roles: Mapping[str, str]) -> Tree:
    name = recording.values[value.value].name
    if name is None or name not in roles:
        raise _NotPlainError(f"value {value.value}")
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


def _has_sizes(op: Op) -> bool:
    names = {argument.name for argument in op.target._schema.arguments}
    return bool(names & {"size", "shape", "sizes", "repeats"})


def _is_free(recording: Recording, op: Op, args: Sequence[Tree]) -> bool:
    """Its sizes are those of the input, or it only reshapes a parameter."""
    constant = all(recording.values[value].constant for value in op.inputs)
    return constant or args[1] == {"shape of": "x"}


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
