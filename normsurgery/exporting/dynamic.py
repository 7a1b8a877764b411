"""Dynamic axes by name: what the caller wrote, as torch.export wants it, and as ONNX names it."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_with_path

from normsurgery.errors import CannotTrace, UnknownName, UsageError
from normsurgery.inputs import Inputs

Dynamic = Mapping[int, str] | Mapping[str, Mapping[int, str]] | Mapping[int | str, Any]


@dataclass(frozen=True)
class Axis:
    """One dynamic axis: of the tensor input `input`, which is `size` long in the example."""

    input: str
    axis: int
    name: str
    size: int


@dataclass(frozen=True)
class Axes:
    """The dynamic axes of one call. `shapes` is what torch.export takes as dynamic_shapes."""

    axes: tuple[Axis, ...]
    shapes: dict[str, Any] | None
    bounds: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(axis.name for axis in self.axes))


def bound(forward: Callable[..., Any], inputs: Inputs) -> dict[str, Any]:
    """The arguments of one call by the names of the parameters that take them."""
    try:
        return dict(inspect.signature(forward).bind(*inputs.args, **inputs.kwargs).arguments)
    except TypeError as error:
        raise UsageError(
            f"the inputs do not fit the signature of forward: {error}. Give one value for each "
            "parameter that has no default."
        ) from error


def tensor_names(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Every tensor input by name: the parameter's, followed by keys and indices where it is nested
    (`x`, `input_ids`, `states_0`)."""
    arguments = bound(model.forward, inputs)
    leaves, _ = tree_flatten_with_path(arguments)
    return {_leaf_name(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def resolve(
    model: nn.Module,
    inputs: Inputs,
    dynamic: Dynamic | None,
    bounds: Mapping[str, tuple[int, int | None]] | None = None,
) -> Axes:
    """The dynamic axes that `dynamic` means for these inputs.

    Args:
        dynamic: `{0: "batch"}` for every tensor input that has such an axis, or
            `{"input_ids": {0: "batch", 1: "sequence"}}` by input; both may stand in one.
        bounds: smallest and largest size of an axis by its name, where the model has such.

    Raises UnknownName for an input that the call does not have, UsageError for a `dynamic` that is
    no such table, for an axis that no input has, for a name that is no identifier, and where axes
    of one name differ in size.
    """
    if not dynamic:
        return Axes((), None)
    tensors = tensor_names(model, inputs)
    wanted = _by_input(dynamic, tensors)
    axes = tuple(_axes(wanted, tensors))
    _check_sizes(axes)
    bounds = bounds or {}
    dims = {
        name: Dim(name, min=bounds[name][0], max=bounds[name][1]) if name in bounds else Dim(name)
        for name in dict.fromkeys(axis.name for axis in axes)
    }
    table = {(axis.input, axis.axis): dims[axis.name] for axis in axes}

    def shape(path: Any, leaf: Any) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor):
            return None
        name = _leaf_name(path)
        return {i: table[name, i] for i in range(leaf.dim()) if (name, i) in table}

    return Axes(axes, tree_map_with_path(shape, bound(model.forward, inputs)), bounds)


def enlarged(model: nn.Module, inputs: Inputs, axes: Axes) -> Inputs:
    """The same inputs with every dynamic axis of size 1 repeated once.

    A size of 1 broadcasts, and a trace would take that for a fact about the model.
    """
    small = {axis.name for axis in axes.axes if axis.size == 1}
    table = {(axis.input, axis.axis) for axis in axes.axes if axis.name in small}
    if not table:
        return inputs

    def grown(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        name = _leaf_name(path)
        for axis in range(leaf.dim()):
            if (name, axis) in table:
                leaf = torch.cat([leaf, leaf], dim=axis)
        return leaf

    arguments = tree_map_with_path(grown, bound(model.forward, inputs))
    return _as_given(model.forward, arguments, inputs)


def _as_given(forward: Callable[..., Any], arguments: Mapping[str, Any], inputs: Inputs) -> Inputs:
    """`arguments` by parameter name, positional or by keyword as `inputs` has them."""
    parameters = inspect.signature(forward).parameters.values()
    starred = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "")
    doubly = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), "")
    order = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional = [arguments[name] for name in order[: len(inputs.args)]]
    kwargs = {**arguments.get(doubly, {}), **arguments}
    return Inputs(
        (*positional, *arguments.get(starred, ())),
        {name: kwargs[name] for name in inputs.kwargs},
        inputs.spelling,
    )


def _by_input(dynamic: Dynamic, tensors: Mapping[str, Tensor]) -> dict[str, Mapping[int, str]]:
    if not isinstance(dynamic, Mapping):
        raise UsageError(_no_table(dynamic))
    every = {key: name for key, name in dynamic.items() if isinstance(key, int)}
    wanted = _for_every(every, tensors)  # type: ignore[arg-type]
    for key, axes in dynamic.items():
        if isinstance(key, int):
            continue
        if not isinstance(key, str) or not isinstance(axes, Mapping):
            raise UsageError(_no_table(dict(dynamic)))
        below = [name for name in tensors if name == key or name.startswith(f"{key}_")]
        if key in tensors:
            below = [key]
        if not below:
            raise UnknownName("input with a dynamic axis", key, tensors)
        wanted |= {name: {**wanted[name], **axes} for name in below}
    return wanted


def _no_table(dynamic: object) -> str:
    return (
        f"dynamic is {dynamic!r}. Give {{0: 'batch'}} for every tensor input, or "
        "{'input_ids': {0: 'batch', 1: 'sequence'}} by input."
    )


def _for_every(
    dynamic: Mapping[int, str], tensors: Mapping[str, Tensor]
) -> dict[str, Mapping[int, str]]:
    """One table for all inputs; an input that has fewer axes goes without."""
    for axis in dynamic:
        if not any(-tensor.dim() <= axis < tensor.dim() for tensor in tensors.values()):
            raise UsageError(_no_axis(axis, "any input", tensors))
    return {
        name: {axis: text for axis, text in dynamic.items() if -t.dim() <= axis < t.dim()}
        for name, t in tensors.items()
    }


def _axes(wanted: Mapping[str, Mapping[int, str]], tensors: Mapping[str, Tensor]) -> Iterator[Axis]:
    for name, axes in wanted.items():
        tensor = tensors[name]
        for axis, text in axes.items():
            if not isinstance(text, str) or not text.isidentifier() or keyword.iskeyword(text):
                raise UsageError(
                    f"{text!r} cannot name the dynamic axis {axis} of {name}: a name is letters, "
                    "digits and _, as in batch."
                )
            if not isinstance(axis, int) or not -tensor.dim() <= axis < tensor.dim():
                raise UsageError(_no_axis(axis, name, {name: tensor}))
            positive = axis % tensor.dim()
            yield Axis(name, positive, text, tensor.shape[positive])


def _no_axis(axis: Any, where: str, tensors: Mapping[str, Tensor]) -> str:
    shapes = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return f"there is no axis {axis} in {where} ({shapes or 'no tensor input'})."


def _check_sizes(axes: tuple[Axis, ...]) -> None:
    first: dict[str, Axis] = {}
    for axis in axes:
        other = first.setdefault(axis.name, axis)
        if other.size != axis.size:
            raise UsageError(
                f"axis {other.axis} of {other.input} and axis {axis.axis} of {axis.input} are both "
                f"named {axis.name}, and the example has {other.size} and {axis.size} there. "
                "Name them differently, or give inputs of one size."
            )


def _leaf_name(path: Any) -> str:
    """`('states'), [0]` as `states_0`, the way torch.export names placeholders."""
    head, *rest = path
    parts = [str(head.key)]
    for key in rest:
        text = keystr((key,)).strip("[].'\"")
        parts.append("".join(c if c.isalnum() else "_" for c in text))
    return "_".join(parts)


def named_axes(program: ExportedProgram, dynamic: Dynamic | None) -> dict[str, dict[int, str]]:
    """The dynamic axes of an exported program by the names of `dynamic`: input -> {axis: name}.

    Raises CannotTrace for an axis that the program has a fixed size for, and as `resolve` does.
    """
    if not dynamic:
        return {}
    wanted = set(program.graph_signature.user_inputs)
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.name in wanted}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    named: dict[str, dict[int, str]] = {}
    for name, axes in _by_input(dynamic, tensors).items():
        for axis, text in axes.items():
            if not -tensors[name].dim() <= axis < tensors[name].dim():
                raise UsageError(_no_axis(axis, name, {name: tensors[name]}))
            size: Any = tensors[name].shape[axis]  # an int, or a SymInt, which torch types as one
            if not isinstance(size, torch.SymInt):
                raise CannotTrace(
                    f"axis {axis} of {name} is fixed to {size} in the exported program. Export it "
                    f"again with that axis in dynamic_shapes, or leave {text} out of dynamic."
                )
            named.setdefault(name, {})[axis % tensors[name].dim()] = text
    return named
