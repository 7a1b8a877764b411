"""From events to Sites: the module that is a norm as a whole, or the expression that is one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from normsurgery.errors import NormsurgeryError
from normsurgery.finding.events import Event, parameter_name, plain
from normsurgery.finding.proof import Proof, prove
from normsurgery.flow import ModuleCall
from normsurgery.flow.calls import values_in
from normsurgery.flow.nodes import (
    arguments,
    frames,
    inputs_of,
    is_constant,
    name_of,
    operations_between,
    operator,
    outputs_of,
    position,
    shape,
    tensor,
    users_of,
)
from normsurgery.flow.operators import SAME_NUMBERS, kind_of
from normsurgery.numerics.precision import float64_copy, lifted
from normsurgery.spec import specs
from normsurgery.treecopy import tree_copy

_LARGEST_EPS = 0.1


class NotProven(NormsurgeryError):
    """A candidate that no registered norm explains, with the reason."""


@dataclass(frozen=True)
class Region:
    """The operations of a formula from the value it normalises to the value it makes."""

    input: fx.Node
    output: fx.Node
    operations: tuple[fx.Node, ...]
    proof: Proof


# --- whole modules ---------------------------------------------------------------------------


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
        eps = _small_numbers(call.operations, original)
        others = _others(call, place)
        run = _module_run(original, call, place, others)
        first = event.kind or _kind_of_class(original)
        cache[key] = _try(
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


def _small_numbers(operations: Sequence[fx.Node], module: nn.Module | None) -> tuple[float, ...]:
    """Numbers in the code or on the module that an eps could be, most likely first."""
    found: list[float] = []
    for leaf in tree_leaves([(node.args, node.kwargs) for node in operations]):
        if isinstance(leaf, float) and 0.0 < leaf <= _LARGEST_EPS:
            found.append(leaf)
    for value in vars(module).values() if module is not None else ():
        if isinstance(value, float) and 0.0 < value <= _LARGEST_EPS:
            found.append(value)
    return tuple(dict.fromkeys([*found, 0.0]))


def _try(
    run: Callable[[Tensor, Mapping[str, Tensor], bool], Tensor],
    size: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    eps: tuple[float, ...],
    modes: tuple[bool, ...] = (False, True),
    first: str | None = None,
    further: Mapping[str, Tensor] | None = None,
) -> Proof | None:
    try:
        return prove(run, size, tensors, eps, modes=modes, first=first, further=further)
    except Exception:  # the user's code, run on inputs it was not written for, may raise anything
        return None


# --- expressions in a forward -------------------------------------------------------------------


def prove_region(event: Event, module: nn.Module) -> Region:
    """The longest stretch of operations around the event that is a registered norm.

    Raises NotProven with the reason where there is none.
    """
    reason = "no registered norm has this formula"
    for start in _starts(event):
        for output in reversed(_outputs(event)):
            try:
                region = _region(start, output, module)
            except NotProven as error:
                reason = str(error)
                continue
            if region is not None:
                return region
    raise NotProven(reason)


def _starts(event: Event) -> list[fx.Node]:
    """What may be the normalised value, earliest first: each input, then its views and casts.

    x comes before x - mean(x), of which a layer norm of x is an RMS norm.
    """
    found: list[fx.Node] = []
    first = position(event.operations[0])
    for start in (event.input, *event.other_inputs):
        queue = [start]
        while queue:
            found.append(queue.pop(0))
            for node in users_of(found[-1]):
                if kind_of(node) in SAME_NUMBERS and outputs_of(node) and position(node) < first:
                    queue.append(outputs_of(node)[0])
    return found


def _region(start: fx.Node, output: fx.Node, module: nn.Module) -> Region | None:
    operations = operations_between(start, output)
    if operations is None:
        raise NotProven("its output depends on another input as well")
    if shape(output) != shape(start):
        return None
    tensors = _tensors_read(operations)
    run = _region_run(start, output, operations)
    proof = _try(run, shape(start), tensors, _small_numbers(operations, module), (False,))
    return Region(start, output, operations, proof) if proof is not None else None


def _outputs(event: Event) -> list[fx.Node]:
    """The event's output, and what scaling, shifting and casting by constants make of it."""
    chain = [event.output]
    while True:
        reading = users_of(chain[-1])
        if len(reading) != 1 or not outputs_of(reading[0]) or not _extends(reading[0]):
            return chain
        if not _same_forward(reading[0], event):
            return chain
        chain.append(outputs_of(reading[0])[0])


def _extends(node: fx.Node) -> bool:
    name = operator(node)
    if kind_of(node) in SAME_NUMBERS:
        return True
    varying = [value for value in inputs_of(node) if not is_constant(value)]
    arithmetic = name in ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::addcmul")
    return arithmetic and len(varying) == 1


def _same_forward(node: fx.Node, event: Event) -> bool:
    if not frames(node) or not event.frames:
        return not frames(node) and not event.frames
    return frames(node)[0].module is event.frames[0].module


def _tensors_read(operations: Sequence[fx.Node]) -> dict[str, Tensor]:
    """The named floating tensors that the operations read."""
    read = (value for node in operations for value in inputs_of(node) if value.op == "get_attr")
    named = {name: tensor(value) for value in read if (name := name_of(value)) is not None}
    return {name: held for name, held in named.items() if held.is_floating_point()}


def _region_run(
    start: fx.Node, output: fx.Node, operations: tuple[fx.Node, ...]
) -> Callable[[Tensor, Mapping[str, Tensor], bool], Tensor]:
    def run(x: Tensor, values: Mapping[str, Tensor], training: bool) -> Tensor:
        known: dict[fx.Node, Tensor] = {start: x.clone()}

        def back(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return torch.device("cpu") if isinstance(leaf, torch.device) else leaf
            if leaf in known:
                return known[leaf]
            name, held = name_of(leaf), tensor(leaf)
            if name is not None and name in values:
                return values[name]
            return held.double() if held.is_floating_point() else held

        with torch.no_grad(), lifted():
            for node in operations:
                target: Any = node.target
                args, kwargs = tree_map(back, (arguments(node), dict(node.kwargs)))
                result = target(*args, **kwargs)
                made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
                known.update(zip(outputs_of(node), made, strict=True))
        return known[output]

    return run


def named_tensors(event: Event) -> dict[str, str]:
    """Role -> name for a call of a known function. Raises NotProven for a computed argument."""
    found = {}
    for role, value in (event.tensors or {}).items():
        name = parameter_name(value)
        if name is None:
            raise NotProven(f"its {role} is computed in the forward, not a parameter or buffer")
        found[role] = name
    return found


def groups(events: Sequence[Event]) -> Iterator[list[Event]]:
    """Events that are the same code in the same module: one norm that ran several times."""
    found: dict[Any, list[Event]] = {}
    for event in events:
        frame = event.frames[0] if event.frames else None
        key = (id(frame.module), frame.code, frame.span, frame.node) if frame else id(event)
        found.setdefault(key, []).append(event)
    yield from found.values()
