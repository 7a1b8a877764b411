"""From events to Sites: the module that is a norm as a whole, or the expression that is one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normsurgery.errors import NormsurgeryError
from normsurgery.find.events import SAME_NUMBERS, Event, parameter_name, plain, schema_name
from normsurgery.find.proof import Proof, prove
from normsurgery.graph import ModuleCall, Op, Recording, Ref
from normsurgery.precision import float64_copy, lifted
from normsurgery.spec import specs
from normsurgery.treecopy import tree_copy

_LARGEST_EPS = 0.1


class NotProven(NormsurgeryError):
    """A candidate that no registered norm explains, with the reason."""


@dataclass(frozen=True)
class Region:
    """The operations of a formula from the value it normalises to the value it makes."""

    input: int
    output: int
    ops: tuple[Op, ...]
    proof: Proof


# --- whole modules ---------------------------------------------------------------------------


def prove_module(
    recording: Recording,
    module: nn.Module,
    original: nn.Module,
    calls: Sequence[ModuleCall],
    event: Event,
    cache: dict[Any, Proof | None],
) -> Proof | None:
    """The norm that `module` as a whole is, judged by replaying its recorded call.

    Every argument that the call passed must be explained: the others are drawn anew, so that a
    gate or a scale that was passed and has an effect makes the proof fail.
    """
    call = calls[0]
    place = _primary(recording, call, event)
    if place is None or not isinstance(call.output, Ref):
        return None
    shape = recording.values[place].shape
    if recording.values[call.output.value].shape != shape:
        return None
    tensors = _state(original)
    key = (type(original), shape, _fingerprint(original), _form(recording, call, place))
    if key not in cache:
        eps = _small_numbers(recording.ops[call.start : call.end], original)
        others = _others(recording, call, place)
        run = _module_run(original, call, place, others)
        first = event.kind or _kind_of_class(original)
        cache[key] = _try(
            run,
            _told_apart(shape),
            tensors,
            eps,
            first=first,
            further=_by_argument(original, call, others),
        )
    return cache[key]


def _told_apart(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without empty axes, since a model may run a norm on no tokens at all, and with two
    samples at least: of one alone a batch norm by its own statistics is an instance norm."""
    filled = tuple(size or 3 for size in shape)
    return (max(2, filled[0]), *filled[1:]) if len(filled) > 1 else filled


def _kind_of_class(module: nn.Module) -> str | None:
    """The kind that a subclass of a registered class most likely still is."""
    return next((found.name for found in specs() if isinstance(module, found.classes)), None)


def _form(recording: Recording, call: ModuleCall, primary: int) -> str:
    """What the call passed, with a type and a shape in place of each tensor."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        value = recording.values[leaf.value]
        return (leaf.value == primary, value.shape, str(value.tensor.dtype))

    return repr(tree_map(one, (call.args, dict(call.kwargs))))


def _primary(recording: Recording, call: ModuleCall, event: Event) -> int | None:
    wanted = {plain(recording, value) for value in (event.input, *event.other_inputs)}
    given = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Ref)]
    for leaf in given:
        if plain(recording, leaf.value) in wanted:
            return leaf.value
    if not isinstance(call.output, Ref):
        return None
    # What it normalises may be made of several inputs: x, which comes first, and its gate.
    shape = recording.values[call.output.value].shape
    alike = [leaf.value for leaf in given if recording.values[leaf.value].shape == shape]
    return alike[0] if len(alike) > 1 else None


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.is_floating_point()
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


def _others(recording: Recording, call: ModuleCall, primary: int) -> dict[int, Tensor]:
    """What the call was given beside the normalised value, drawn anew, by value."""
    generator = torch.Generator().manual_seed(0)
    found: dict[int, Tensor] = {}
    for leaf in tree_leaves((call.args, call.kwargs)):
        if isinstance(leaf, Ref) and leaf.value != primary:
            tensor = recording.values[leaf.value].tensor
            found[leaf.value] = (
                torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                if tensor.is_floating_point()
                else tensor
            )
    return found


def _by_argument(
    module: nn.Module, call: ModuleCall, others: Mapping[int, Tensor]
) -> dict[str, Tensor]:
    """The other tensors under the names of the arguments that they are."""
    names = list(inspect.signature(module.forward).parameters)
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    return {
        name: others[leaf.value]
        for name, leaf in given.items()
        if isinstance(leaf, Ref) and leaf.value in others
    }


def _module_run(
    original: nn.Module, call: ModuleCall, primary: int, others: Mapping[int, Tensor]
) -> Callable[[Tensor, Mapping[str, Tensor], bool], Tensor]:
    double = float64_copy(_on_cpu(original))

    def run(x: Tensor, values: Mapping[str, Tensor], training: bool) -> Tensor:
        def back(leaf: Any) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            return x.clone() if leaf.value == primary else others[leaf.value]

        double.train(training)
        with torch.no_grad(), lifted():
            for name, tensor in _state(double).items():
                tensor.copy_(values[name])
            output: Tensor = double(*tree_map(back, call.args), **tree_map(back, call.kwargs))
        return output

    return run


def _on_cpu(module: nn.Module) -> nn.Module:
    if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return module
    return tree_copy(module).to_empty(device="cpu")


def _small_numbers(ops: Sequence[Op], module: nn.Module | None) -> tuple[float, ...]:
    """Numbers in the code or on the module that an eps could be, most likely first."""
    found: list[float] = []
    for leaf in tree_leaves([(op.args, dict(op.kwargs)) for op in ops]):
        if isinstance(leaf, float) and 0.0 < leaf <= _LARGEST_EPS:
            found.append(leaf)
    for value in vars(module).values() if module is not None else ():
        if isinstance(value, float) and 0.0 < value <= _LARGEST_EPS:
            found.append(value)
    return tuple(dict.fromkeys([*found, 0.0]))


def _try(
    run: Callable[[Tensor, Mapping[str, Tensor], bool], Tensor],
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    eps: tuple[float, ...],
    modes: tuple[bool, ...] = (False, True),
    first: str | None = None,
    further: Mapping[str, Tensor] | None = None,
) -> Proof | None:
    try:
        return prove(run, shape, tensors, eps, modes=modes, first=first, further=further)
    except Exception:  # the user's code, run on inputs it was not written for, may raise anything
        return None


# --- expressions in a forward -------------------------------------------------------------------


def prove_region(
    recording: Recording, event: Event, readers: Mapping[int, list[Op]], module: nn.Module
) -> Region:
    """The longest stretch of operations around the event that is a registered norm.

    Raises NotProven with the reason where there is none.
    """
    reason = "no registered norm has this formula"
    for start in _starts(recording, event, readers):
        for output in reversed(_outputs(recording, event, readers)):
            try:
                region = _region(recording, start, output, module)
            except NotProven as error:
                reason = str(error)
                continue
            if region is not None:
                return region
    raise NotProven(reason)


def _starts(recording: Recording, event: Event, readers: Mapping[int, list[Op]]) -> list[int]:
    """What may be the normalised value, earliest first: each input, then its views and casts.

    x comes before x - mean(x), of which a layer norm of x is an RMS norm.
    """
    found: list[int] = []
    for start in (event.input, *event.other_inputs):
        queue = [start]
        while queue:
            found.append(queue.pop(0))
            for op in readers.get(found[-1], []):
                if schema_name(op) in SAME_NUMBERS and op.outputs and op.index < event.ops[0]:
                    queue.append(op.outputs[0])
    return found


def _region(recording: Recording, start: int, output: int, module: nn.Module) -> Region | None:
    ops, tensors = _slice(recording, start, output)
    shape = recording.values[start].shape
    if recording.values[output].shape != shape:
        return None
    run = _region_run(recording, start, output, ops)
    proof = _try(run, shape, tensors, _small_numbers(ops, module), (False,))
    return Region(start, output, ops, proof) if proof is not None else None


def _outputs(recording: Recording, event: Event, readers: Mapping[int, list[Op]]) -> list[int]:
    """The event's output, and what scaling, shifting and casting by constants make of it."""
    chain = [event.output]
    while True:
        reading = readers.get(chain[-1], [])
        if len(reading) != 1 or not reading[0].outputs or not _extends(recording, reading[0]):
            return chain
        if not _same_forward(reading[0], event):
            return chain
        chain.append(reading[0].outputs[0])


def _extends(recording: Recording, op: Op) -> bool:
    name = schema_name(op).removesuffix("_")
    if schema_name(op) in SAME_NUMBERS:
        return True
    varying = [value for value in op.inputs if not recording.values[value].constant]
    arithmetic = name in ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::addcmul")
    return arithmetic and len(varying) == 1


def _same_forward(op: Op, event: Event) -> bool:
    if not op.frames or not event.frames:
        return not op.frames and not event.frames
    return op.frames[0].module is event.frames[0].module


def _slice(
    recording: Recording, start: int, output: int
) -> tuple[tuple[Op, ...], dict[str, Tensor]]:
    """The operations between two values, and the named tensors they read."""
    needed: dict[int, Op] = {}
    tensors: dict[str, Tensor] = {}
    queue = [output]
    while queue:
        value = queue.pop()
        if value == start:
            continue
        found = recording.values[value]
        if found.op is not None:
            if found.op not in needed:
                needed[found.op] = recording.ops[found.op]
                queue.extend(recording.ops[found.op].inputs)
        elif found.constant:
            if found.name is not None and found.tensor.is_floating_point():
                tensors[found.name] = found.tensor
        else:
            raise NotProven("its output depends on another input as well")
    return tuple(needed[index] for index in sorted(needed)), tensors


def _region_run(
    recording: Recording, start: int, output: int, ops: tuple[Op, ...]
) -> Callable[[Tensor, Mapping[str, Tensor], bool], Tensor]:
    def run(x: Tensor, values: Mapping[str, Tensor], training: bool) -> Tensor:
        known: dict[int, Tensor] = {start: x.clone()}

        def back(leaf: Any) -> Any:
            if not isinstance(leaf, Ref):
                return leaf.cpu() if isinstance(leaf, Tensor) else _on_this_device(leaf)
            if leaf.value in known:
                return known[leaf.value]
            value = recording.values[leaf.value]
            if value.name is not None and value.name in values:
                return values[value.name]
            return value.tensor.double() if value.tensor.is_floating_point() else value.tensor

        with torch.no_grad(), lifted():
            for op in ops:
                result = op.target(*tree_map(back, op.args), **tree_map(back, dict(op.kwargs)))
                made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
                known.update(zip(op.outputs, made, strict=True))
        return known[output]

    return run


def _on_this_device(leaf: Any) -> Any:
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def named_tensors(recording: Recording, event: Event) -> dict[str, str]:
    """Role -> name for a call of a known function. Raises NotProven for a computed argument."""
    found = {}
    for role, value in (event.tensors or {}).items():
        name = parameter_name(recording, value)
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
