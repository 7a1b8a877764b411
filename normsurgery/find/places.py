"""Places for norms that attach to a layer or to its weight: every linear and convolution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from normsurgery.find.by_type import all_paths
from normsurgery.find.events import SAME_NUMBERS, schema_name
from normsurgery.graph import Op, Recording
from normsurgery.graph.recording import refs_in
from normsurgery.survey import Site

LAYERS: Mapping[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "convtranspose1d",
    nn.ConvTranspose2d: "convtranspose2d",
    nn.ConvTranspose3d: "convtranspose3d",
}

ACTIVATIONS: Mapping[str, str] = {
    f"aten::{name}": name
    for name in (
        "celu",
        "elu",
        "gelu",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "log_sigmoid",
        "mish",
        "relu",
        "selu",
        "sigmoid",
        "silu",
        "softplus",
        "softsign",
        "tanh",
    )
}

# What the gate of a neuron may lie behind: it changes no sign pattern of its own.
_BETWEEN = frozenset(
    {
        "aten::add",
        "aten::native_batch_norm",
        "aten::_native_batch_norm_legit",
        "aten::_native_batch_norm_legit_no_training",
        "aten::native_group_norm",
        "aten::native_layer_norm",
        "aten::native_dropout",
        "aten::mul",
    }
)


def layer_sites(model: nn.Module, recording: Recording | None, attach: Any) -> Iterator[Site]:
    """A Site for every linear and convolution; `settings["gate"]` says which activation follows."""
    paths = all_paths(model)
    first_paths = {paths[id(module)][0]: module for module in model.modules()}
    gates = _gates(recording) if recording is not None else {}
    for path, module in first_paths.items():
        kind = next((name for cls, name in LAYERS.items() if type(module) is cls), None)
        if kind is None:
            continue
        calls, shape, gate = gates.get(path, (0, None, None))
        prefix = f"{path}." if path else ""
        weight: Any = module.weight
        axis = -1 if kind == "linear" else 1
        yield Site(
            index=0,
            kind=kind,
            paths=paths[id(module)],
            form="module",
            class_name=type(module).__name__,
            parameters={
                r: prefix + r for r in ("weight", "bias") if getattr(module, r) is not None
            },
            settings={
                "channel_axis": axis,
                "features": getattr(module, "out_features", None)
                or getattr(module, "out_channels", None),
                "gate": gate,
            },
            shape=shape,
            dtype=str(weight.dtype).removeprefix("torch."),
            calls=calls if recording is not None else None,
            attach=attach,
        )


def _gates(
    recording: Recording,
) -> dict[str, tuple[int, tuple[int, ...] | None, dict[str, Any] | None]]:
    readers = recording.readers()
    found: dict[str, tuple[int, tuple[int, ...] | None, dict[str, Any] | None]] = {}
    for call in recording.module_calls:
        if type(call.module) not in LAYERS or not hasattr(call.output, "value"):
            continue
        path = recording.path(call.module)
        calls, shape, _ = found.get(path, (0, None, None))
        shape = shape or recording.values[call.output.value].shape
        found[path] = (calls + 1, shape, _gate(recording, readers, call.output.value))
    return found


def _gate(
    recording: Recording, readers: Mapping[int, list[Op]], value: int
) -> dict[str, Any] | None:
    """The first activation that the value reaches through what keeps its neurons apart."""
    shape, direct, steps = recording.values[value].shape, True, 0
    while steps < 32:
        steps += 1
        following = [op for op in readers.get(value, []) if op.outputs]
        active = next((op for op in following if _activation(op)), None)
        if active is not None:
            leaf = active.frames[0].module if active.frames else None
            is_leaf = leaf is not None and not any(True for _ in leaf.parameters())
            return {
                "activation": _activation(active),
                "arguments": [
                    a
                    for a in (*active.args[1:], *active.kwargs.values())
                    if isinstance(a, (int, float, str))
                ],
                "direct": direct,
                "module": recording.path(leaf) if leaf is not None and is_leaf else None,
            }
        onward = next((op for op in following if _passes(recording, op, shape)), None)
        if onward is None:
            return None
        direct = direct and schema_name(onward) in SAME_NUMBERS
        value = onward.outputs[0]
    return None


def absorbable(
    recording: Recording, readers: Mapping[int, list[Op]], values: Sequence[int]
) -> str | None:
    """The activation module that alone reads these values and that reads nothing else, by path."""
    following = [op for value in values for op in readers.get(value, [])]
    if not all(_activation(op) and op.frames for op in following):
        return None
    modules = {id(op.frames[0].module): op.frames[0].module for op in following}
    calls = [call for call in recording.module_calls if id(call.module) in modules]
    alone = len(modules) == 1 and len(calls) == len(following) == len(values)
    if not alone or any(call.end - call.start != 1 for call in calls):
        return None
    returned = {
        value
        for call in recording.module_calls
        if call.module is recording.model
        for value in refs_in(call.output)
    }
    (module,) = modules.values()
    plain = not any(True for _ in module.parameters()) and module is not recording.model
    return recording.path(module) if plain and returned.isdisjoint(values) else None


def _activation(op: Op) -> str | None:
    name = schema_name(op)
    return ACTIVATIONS.get(name) or ACTIVATIONS.get(name.removesuffix("_"))


def _passes(recording: Recording, op: Op, shape: tuple[int, ...]) -> bool:
    name = schema_name(op)
    known = name in SAME_NUMBERS or name.removesuffix("_") in _BETWEEN
    return known and recording.values[op.outputs[0]].shape == shape
