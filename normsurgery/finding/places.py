"""Places for norms that attach to a layer or to its weight: every linear and convolution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from normsurgery.finding.by_type import all_paths
from normsurgery.flow import Flow
from normsurgery.flow.nodes import (
    arguments,
    module_of,
    outputs_of,
    shape,
    users_of,
)
from normsurgery.flow.operators import SAME_NUMBERS, Kind, activation_of, kind_of
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

# What the gate of a neuron may lie behind: it changes no sign pattern of its own.
_BETWEEN = SAME_NUMBERS | {Kind.ADD, Kind.NORM, Kind.DROPOUT, Kind.SCALE}


def layer_sites(model: nn.Module, recording: Flow | None, attach: Any) -> Iterator[Site]:
    """A Site for every linear and convolution; `settings["gate"]` says which activation follows."""
    paths = all_paths(model)
    first_paths = {paths[id(module)][0]: module for module in model.modules()}
    gates = _gates(recording) if recording is not None else {}
    for path, module in first_paths.items():
        kind = next((name for cls, name in LAYERS.items() if type(module) is cls), None)
        if kind is None:
            continue
        calls, size, gate = gates.get(path, (0, None, None))
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
            shape=size,
            dtype=str(weight.dtype).removeprefix("torch."),
            calls=calls if recording is not None else None,
            attach=attach,
        )


def _gates(
    recording: Flow,
) -> dict[str, tuple[int, tuple[int, ...] | None, dict[str, Any] | None]]:
    found: dict[str, tuple[int, tuple[int, ...] | None, dict[str, Any] | None]] = {}
    for call in recording.module_calls:
        if type(call.module) not in LAYERS or not isinstance(call.output, fx.Node):
            continue
        path = recording.path(call.module)
        calls, size, _ = found.get(path, (0, None, None))
        found[path] = (calls + 1, size or shape(call.output), _gate(recording, call.output))
    return found


def _gate(recording: Flow, value: fx.Node) -> dict[str, Any] | None:
    """The first activation that the value reaches through what keeps its neurons apart."""
    size, direct, steps = shape(value), True, 0
    while steps < 32:
        steps += 1
        following = [node for node in users_of(value) if outputs_of(node)]
        active = next((node for node in following if activation_of(node)), None)
        if active is not None:
            leaf = module_of(active)
            is_leaf = leaf is not None and not any(True for _ in leaf.parameters())
            return {
                "activation": activation_of(active),
                "arguments": [
                    a
                    for a in (*arguments(active)[1:], *active.kwargs.values())
                    if isinstance(a, (int, float, str))
                ],
                "direct": direct,
                "module": recording.path(leaf) if leaf is not None and is_leaf else None,
            }
        onward = next((node for node in following if _passes(node, size)), None)
        if onward is None:
            return None
        direct = direct and kind_of(onward) in SAME_NUMBERS
        value = outputs_of(onward)[0]
    return None


def absorbable(recording: Flow, values: Sequence[fx.Node]) -> str | None:
    """The activation module that alone reads these values and that reads nothing else, by path."""
    following = [node for value in values for node in users_of(value)]
    around = [module for node in following if (module := module_of(node)) is not None]
    if len(around) < len(following) or not all(map(activation_of, following)):
        return None
    modules = {id(module): module for module in around}
    calls = [call for call in recording.module_calls if id(call.module) in modules]
    alone = len(modules) == 1 and len(calls) == len(following) == len(values)
    if not alone or any(len(call.operations) != 1 for call in calls):
        return None
    (module,) = modules.values()
    plain = not any(True for _ in module.parameters()) and module is not recording.model
    return recording.path(module) if plain and recording.returned.isdisjoint(values) else None


def _passes(node: fx.Node, size: tuple[int, ...]) -> bool:
    return kind_of(node) in _BETWEEN and shape(outputs_of(node)[0]) == size
