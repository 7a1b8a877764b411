"""The calls on which a fold is measured: the example, and what is one argument away from it.

A recorded run says what one call does. What is planned from it must hold for other calls too, so
they are made: other batch sizes, another length or image size, each boolean of the signature the
other way, each optional tensor that can be made from the example, and whatever the user adds.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normsurgery.errors import UsageError
from normsurgery.inputs import Inputs, as_inputs

BATCHES = (1, 2, 3)


@dataclass(frozen=True)
class Call:
    """One call of the model. Of alternatives to one thing, the first that runs is measured.

    name: for people, as `batch 3` or `use_cache=False`.
    binds: all of its outputs count; else only those that the example gives too.
    """

    name: str
    alternatives: tuple[Inputs, ...]
    binds: bool = False


def relatives(model: nn.Module, inputs: Inputs) -> list[Call]:
    """Other calls of the same model, in a fixed order; some of them may not run."""
    return [
        *_other_batches(inputs),
        *_other_sizes(inputs),
        *_other_arguments(model, inputs),
    ]


def added(inputs: Inputs, calls: Sequence[Any]) -> list[Call]:
    """The calls that the user adds.

    calls: each a mapping of keyword arguments that are added to the example, or whole Inputs (or a
        tuple of positional arguments). Raises UsageError for anything else.
    """
    return [_added(inputs, given) for given in calls]


def _added(inputs: Inputs, given: Any) -> Call:
    if isinstance(given, Mapping):
        name = ", ".join(f"{key}={_short(value)}" for key, value in given.items())
        return Call(name, (Inputs(inputs.args, {**inputs.kwargs, **given}),), binds=True)
    if not isinstance(given, (Inputs, tuple)):
        raise UsageError(
            "calls holds a mapping of keyword arguments, a tuple of positional ones or Inputs for "
            f"each further call, not {type(given).__name__}."
        )
    whole = as_inputs(given)
    arguments = [*map(_short, whole.args), *(f"{k}={_short(v)}" for k, v in whole.kwargs.items())]
    return Call(f"({', '.join(arguments)})", (whole,), binds=True)


def _short(value: Any) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


# --- sizes ----------------------------------------------------------------------------------------

Axes = Callable[[Tensor], Sequence[int]]


def _other_batches(inputs: Inputs) -> Iterator[Call]:
    """With batch 1, 2 and 3, where every tensor has the batch as its first dimension."""
    tensors = _tensors(inputs)
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        return
    (size,) = sizes
    for batch in BATCHES:
        if batch != size:
            yield Call(f"batch {batch}", (_resized(inputs, lambda t: (0,), batch - size),))


def _other_sizes(inputs: Inputs) -> Iterator[Call]:
    """Images of another size, or else sequences of another length."""
    tensors = _tensors(inputs)
    if any(tensor.dim() > 3 for tensor in tensors):
        side = max(tensor.shape[-1] for tensor in tensors if tensor.dim() > 3)
        yield Call("another image size", _by(inputs, _spatial, (1, 32, side)))
        return
    for axis in (1, 2):
        sizes = [tensor.shape[axis] for tensor in tensors if tensor.dim() > axis]
        if sizes:
            steps = (-1, 1) if min(sizes) > 1 else (1,)
            name = f"another size of axis {axis}"
            yield Call(name, _by(inputs, lambda t, a=axis: [a] if t.dim() > a else [], steps))  # type: ignore[misc]


def _spatial(tensor: Tensor) -> Sequence[int]:
    return range(2, tensor.dim()) if tensor.dim() > 3 else ()


def _by(inputs: Inputs, axes: Axes, steps: Sequence[int]) -> tuple[Inputs, ...]:
    return tuple(_resized(inputs, axes, step) for step in steps)


def _resized(inputs: Inputs, axes: Axes, step: int) -> Inputs:
    """The inputs with some axes longer or shorter by `step`; what is longer repeats itself."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for axis in axes(leaf):
            size = leaf.shape[axis]
            index = torch.arange(size + step, device=leaf.device) % max(size, 1)
            leaf = leaf.index_select(axis, index)
        return leaf

    return Inputs(tree_map(one, inputs.args), tree_map(one, dict(inputs.kwargs)))


def _tensors(inputs: Inputs) -> list[Tensor]:
    leaves = tree_leaves((inputs.args, dict(inputs.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


# --- arguments ------------------------------------------------------------------------------------


def _other_arguments(model: nn.Module, inputs: Inputs) -> Iterator[Call]:
    """Each boolean the other way, and each optional tensor that was not given."""
    signature = _signature(model)
    given = _given(signature, inputs)
    shape = next(iter(_tensors(inputs)), None)
    for name, annotation, default in _parameters(signature):
        value = given.get(name, default)
        if isinstance(value, bool) or (value is None and _names(annotation, bool)):
            yield Call(f"{name}={not value}", (_with(signature, inputs, name, not value),))
        elif value is None and shape is not None and _may_be_tensor(annotation):
            # Ones are a mask of nothing and a valid index nearly everywhere; zeros are one always.
            values: list[Any] = [torch.ones_like(shape)]
            values += [] if shape.is_floating_point() else [torch.zeros_like(shape)]
            values += [True] if annotation is inspect.Parameter.empty else []
            made = tuple(_with(signature, inputs, name, value) for value in values)
            yield Call(f"{name} given", made)


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward, eval_str=True)
    except (ValueError, TypeError, NameError):  # annotations that only a type checker can read
        return None


def _given(signature: inspect.Signature | None, inputs: Inputs) -> Mapping[str, Any]:
    if signature is None:
        return inputs.kwargs
    try:
        bound = signature.bind(*inputs.args, **inputs.kwargs).arguments
    except TypeError:
        return inputs.kwargs
    variable = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    return {**bound, **{k: v for name in variable for k, v in bound.get(name, {}).items()}}


def _parameters(signature: inspect.Signature | None) -> Iterator[tuple[str, Any, Any]]:
    """(name, annotation, default) of what may be given by name, `**kwargs` by its TypedDict."""
    if signature is None:
        return
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            yield parameter.name, parameter.annotation, parameter.default
        elif parameter.kind is parameter.VAR_KEYWORD:
            for unpacked in typing.get_args(parameter.annotation):
                yield from _entries(unpacked)


def _entries(typed_dict: Any) -> Iterator[tuple[str, Any, Any]]:
    """The booleans that a TypedDict of keyword arguments names."""
    try:
        # Its own module may import torch for a type checker only.
        hints = typing.get_type_hints(typed_dict, localns={"torch": torch})
    except (NameError, TypeError):
        return
    for name, annotation in hints.items():
        if _names(annotation, bool):
            yield name, annotation, None


def _may_be_tensor(annotation: Any) -> bool:
    return annotation is inspect.Parameter.empty or _names(annotation, Tensor)


def _names(annotation: Any, wanted: type) -> bool:
    """Whether an annotation is the type, or a union with it. `torch.LongTensor` is a Tensor."""
    named = (annotation, *typing.get_args(annotation))
    kinds = (wanted, type(torch.LongTensor)) if wanted is Tensor else (wanted,)
    return any(part is wanted or isinstance(part, kinds[1:]) for part in named)


def _with(signature: inspect.Signature | None, inputs: Inputs, name: str, value: Any) -> Inputs:
    """The inputs with one argument more, or another; in the place where it was given."""
    names = list(signature.parameters) if signature is not None else []
    if name in names[: len(inputs.args)]:
        place = names.index(name)
        return Inputs((*inputs.args[:place], value, *inputs.args[place + 1 :]), inputs.kwargs)
    return Inputs(inputs.args, {**inputs.kwargs, name: value})
