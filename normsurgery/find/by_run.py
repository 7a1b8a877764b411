"""Third rung: calls of the norm functions and norm operators, with what their arguments say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from normsurgery.find.events import Event
from normsurgery.graph import Flow
from normsurgery.graph.nodes import (
    frames,
    function_call,
    is_constant,
    operator,
    outputs_of,
    shape,
    tensor,
)

_BATCH = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_BATCH_ATEN = (
    "input",
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "training",
    "momentum",
    "eps",
)
_LAYER = ("input", "normalized_shape", "weight", "bias", "eps")
_GROUP = ("input", "num_groups", "weight", "bias", "eps")
_RMS = ("input", "normalized_shape", "weight", "eps")
_L2 = ("input", "p", "dim", "eps")

FUNCTIONS: Mapping[Callable[..., Any], tuple[str, tuple[str, ...]]] = {
    F.batch_norm: ("batchnorm", _BATCH),
    torch.batch_norm: ("batchnorm", _BATCH_ATEN),
    torch.ops.aten.batch_norm.default: ("batchnorm", _BATCH_ATEN),
    F.layer_norm: ("layernorm", _LAYER),
    torch.layer_norm: ("layernorm", _LAYER),
    torch.ops.aten.layer_norm.default: ("layernorm", _LAYER),
    F.group_norm: ("groupnorm", _GROUP),
    torch.group_norm: ("groupnorm", _GROUP),
    torch.ops.aten.group_norm.default: ("groupnorm", _GROUP),
    F.instance_norm: ("instancenorm", _BATCH),
    torch.instance_norm: ("instancenorm", _BATCH_ATEN),
    torch.ops.aten.instance_norm.default: ("instancenorm", _BATCH_ATEN),
    F.rms_norm: ("rmsnorm", _RMS),
    torch.rms_norm: ("rmsnorm", _RMS),
    torch.ops.aten.rms_norm.default: ("rmsnorm", _RMS),
    F.normalize: ("l2norm", _L2),
}

OPERATORS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "aten::native_layer_norm": ("layernorm", _LAYER),
    "aten::native_batch_norm": ("batchnorm", _BATCH_ATEN),
    "aten::cudnn_batch_norm": ("batchnorm", _BATCH_ATEN),
    "aten::miopen_batch_norm": ("batchnorm", _BATCH_ATEN),
    "aten::_native_batch_norm_legit": ("batchnorm", _BATCH_ATEN),
    "aten::_native_batch_norm_legit_no_training": (
        "batchnorm",
        tuple(name for name in _BATCH_ATEN if name != "training"),
    ),
    "aten::native_group_norm": (
        "groupnorm",
        ("input", "weight", "bias", "", "", "", "num_groups", "eps"),
    ),
    "aten::_fused_rms_norm": ("rmsnorm", _RMS),
}

_DEFAULTS = {"eps": 1e-5, "momentum": 0.1, "training": False, "p": 2.0, "dim": 1}
_ROLES = ("weight", "bias", "running_mean", "running_var")


def events(recording: Flow) -> Iterator[Event]:
    """Every call of a norm function, then every norm operator outside such a call."""
    for call in recording.calls:
        if call.function not in FUNCTIONS:
            continue
        kind, names = FUNCTIONS[call.function]
        given = _given(names, call.args, call.kwargs)
        if isinstance(call.output, fx.Node):
            yield _event(kind, given, call.output, call.frames, call.operations)
    for op in recording.operations:
        if function_call(op) is None and operator(op) in OPERATORS and outputs_of(op):
            kind, names = OPERATORS[operator(op)]
            if str(op.target).endswith("no_stats"):
                names = tuple(name for name in names if not name.startswith("running"))
            given = _given(names, op.args, op.kwargs)
            yield _event(kind, given, outputs_of(op)[0], frames(op), (op,))


def _given(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    return {**_DEFAULTS, **dict(zip(names, args, strict=False)), **kwargs}


def _event(
    kind: str,
    given: Mapping[str, Any],
    output: fx.Node,
    frames: Any,
    operations: tuple[fx.Node, ...],
) -> Event:
    value = given["input"]
    return Event(
        input=value,
        output=output,
        operations=operations,
        frames=frames,
        constant=is_constant(value),
        kind=kind,
        settings=_settings(kind, given, shape(value), tensor(value).dtype),
        tensors=_tensors(kind, given),
        refusal=_refusal(kind, given),
    )


def _tensors(kind: str, given: Mapping[str, Any]) -> dict[str, fx.Node]:
    found = {role: given[role] for role in _ROLES if isinstance(given.get(role), fx.Node)}
    if kind == "instancenorm" and given.get("use_input_stats", given["training"]):
        return {role: value for role, value in found.items() if not role.startswith("running")}
    return found


def _refusal(kind: str, given: Mapping[str, Any]) -> str:
    if kind == "l2norm" and given["p"] != 2:
        return f"F.normalize with p={given['p']}: only the Euclidean length (p=2) is known"
    return ""


def _settings(
    kind: str, given: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Any]:
    eps = given["eps"]
    if eps is None:  # torch's rms_norm computes half types in float32 and takes its epsilon
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    if kind == "l2norm":
        dim = given["dim"]
        axis = 1 if dim in (1, 1 - len(shape)) and len(shape) != 2 else dim
        axis = -1 if axis in (-1, len(shape) - 1) else axis
        return {"eps": eps, "channel_axis": axis, "features": shape[dim], "dim": axis}
    if kind in ("layernorm", "rmsnorm"):
        normalized = [int(size) for size in given["normalized_shape"]]
        return {
            "eps": eps,
            "channel_axis": -1,
            "features": normalized[-1],
            "normalized_shape": normalized,
        }
    settings = {"eps": eps, "channel_axis": 1, "features": shape[1]}
    if kind == "groupnorm":
        return {**settings, "num_groups": int(given["num_groups"])}
    return {**settings, "momentum": given["momentum"]}
