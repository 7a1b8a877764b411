"""A module that is a norm as a whole, judged by replaying its recorded call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from normsurgery.finding.candidates import small_numbers, tried
from normsurgery.finding.events import Event, plain
from normsurgery.finding.proof import Proof
from normsurgery.flow import ModuleCall
from normsurgery.flow.calls import values_in
from normsurgery.flow.nodes import (
    shape,
    tensor,
)
from normsurgery.numerics.precision import float64_copy, lifted
from normsurgery.spec import specs
from normsurgery.treecopy import tree_copy


def prove_module(
    original: nn.Module,
    calls: Sequence[ModuleCall],
    event: Event,
    cache: dict[Any, Proof | None],
) -> Proof | None:
    """The norm that the module as a whole is, judged by replaying its recorded call.

    Every argument that the call passed must be explained: the others are drawn anew, so that a
    gate or a scale that was passed and has an effect makes the proof fail.
    """
    call = calls[0]
    place = _primary(call, event)
    if place is None or not isinstance(call.output, fx.Node):
        return None
    size = shape(place)
    if shape(call.output) != size:
        return None
    tensors = _state(original)
    key = (type(original), size, _fingerprint(original), _form(call, place))
    if key not in cache:
        eps = small_numbers(call.operations, original)
        others = _others(call, place)
        run = _module_run(original, call, place, others)
        first = event.kind or _kind_of_class(original)
        cache[key] = tried(
            run,
            _told_apart(size),
            tensors,
            eps,
            first=first,
            further=_by_argument(original, call, others),
        )
    return cache[key]


def _told_apart(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without empty axes, since a model may run a norm on no tokens at all, and with two
    samples at least: of one alone a batch norm by its own statistics is an instance norm."""
    filled = tuple(size or 3 for size in sizes)
    return (max(2, filled[0]), *filled[1:]) if len(filled) > 1 else filled


def _kind_of_class(module: nn.Module) -> str | None:
    """The kind that a subclass of a registered class most likely still is."""
    return next((found.name for found in specs() if isinstance(module, found.classes)), None)


def _form(call: ModuleCall, primary: fx.Node) -> str:
    """What the call passed, with a type and a shape in place of each tensor."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        return (leaf is primary, shape(leaf), str(tensor(leaf).dtype))

    return repr(tree_map(one, (call.args, dict(call.kwargs))))


def _primary(call: ModuleCall, event: Event) -> fx.Node | None:
    wanted = {plain(value) for value in (event.input, *event.other_inputs)}
    given = values_in((call.args, call.kwargs))
    for value in given:
        if plain(value) in wanted:
            return value
    if not isinstance(call.output, fx.Node):
        return None
    # What it normalises may be made of several inputs: x, which comes first, and its gate.
    alike = [value for value in given if shape(value) == shape(call.output)]
    return alike[0] if len(alike) > 1 else None


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: held
        for name, held in (*module.named_parameters(), *module.named_buffers())
        if held.is_floating_point()
    }


def _fingerprint(module: nn.Module) -> Any:
    """What decides the function besides the values of its tensors; equal ones are proven once."""
    attributes = tuple(
        (name, repr(value))
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str, tuple, type(None), torch.dtype))
        and name != "training"
    )
    children = tuple((n, type(m), _fingerprint(m)) for n, m in module.named_children())
    held = tuple((name, tuple(t.shape), t.dtype) for name, t in _state(module).items())
    own = vars(module).get("forward")
    return (attributes, children, held, id(own) if own is not None else None)


def _others(call: ModuleCall, primary: fx.Node) -> dict[fx.Node, Tensor]:
    """What the call was given beside the normalised value, drawn anew, by value."""
    generator = torch.Generator().manual_seed(0)
    found: dict[fx.Node, Tensor] = {}
    for value in values_in((call.args, call.kwargs)):
        if value is not primary:
            given = tensor(value)
            found[value] = (
                torch.randn(given.shape, generator=generator, dtype=torch.float64)
                if given.is_floating_point()
                else given
            )
    return found


def _by_argument(
    module: nn.Module, call: ModuleCall, others: Mapping[fx.Node, Tensor]
) -> dict[str, Tensor]:
    """The other tensors under the names of the arguments that they are."""
    names = list(inspect.signature(module.forward).parameters)
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    return {
        name: others[leaf]
        for name, leaf in given.items()
        if isinstance(leaf, fx.Node) and leaf in others
    }


def _module_run(
    original: nn.Module, call: ModuleCall, primary: fx.Node, others: Mapping[fx.Node, Tensor]
) -> Callable[[Tensor, Mapping[str, Tensor], bool], Tensor]:
    double = float64_copy(_on_cpu(original))

    def run(x: Tensor, values: Mapping[str, Tensor], training: bool) -> Tensor:
        def back(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            return x.clone() if leaf is primary else others[leaf]

        double.train(training)
        with torch.no_grad(), lifted():
            for name, held in _state(double).items():
                held.copy_(values[name])
            output: Tensor = double(*tree_map(back, call.args), **tree_map(back, call.kwargs))
        return output

    return run


def _on_cpu(module: nn.Module) -> nn.Module:
    if not any(held.is_meta for held in (*module.parameters(), *module.buffers())):
        return module
    return tree_copy(module).to_empty(device="cpu")
