"""What a structure computes, from its tensors alone: no module of the model is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .program import BATCH, CONVOLUTIONS, PER_SAMPLE, STATISTICS, Layer, Node, Program

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """How a model is called: the input, and a flag or none."""

    x: Tensor
    flag: Tensor | None = None

    def holds(self, when: str) -> bool:
        if when == "batch":
            return self.x.shape[0] > 1
        return when == "" or self.flag is not None


def run(program: Program, tensors: Tensors, call: Call) -> dict[str, Tensor]:
    """Every value of the structure, by name."""
    values = {"x": call.x}
    for node in program.nodes:
        values[node.name] = evaluate(program, node, [values[i] for i in node.inputs], tensors, call)
    return values


def evaluate(
    program: Program, node: Node, inputs: list[Tensor], tensors: Tensors, call: Call
) -> Tensor:
    """The value of one node."""
    if not call.holds(node.when):
        return inputs[0]
    if node.op == "flag":
        return inputs[0] * call.flag
    if node.op == "weight_mean":
        layer = node.settings["of"]
        return inputs[0] + tensors[program.tensor(layer, "weight")].mean()
    if not node.layer:
        return FUNCTIONS[node.op](node.settings, *inputs)
    value = apply_layer(program, program.layers[node.layer], inputs[0], tensors)
    return value * 2 if program.hooks.get(node.layer) == "double" else value


def apply_layer(
    program: Program, layer: Layer, x: Tensor, tensors: Tensors, neutral: bool = False
) -> Tensor:
    """What a layer does; `neutral`: a norm that computes, without its weight and bias."""
    got = {r: tensors.get(program.tensor(layer.name, r)) for r in ALL_ROLES}
    if layer.kind in CONVOLUTIONS:
        return convolution(layer, x, got["weight"], got["bias"])
    if layer.kind == "linear":
        return F.linear(x, got["weight"], got["bias"])
    if layer.kind == "embedding":
        return F.embedding(x, got["weight"])
    shape = (-1,) + (1,) * layer.settings["after"]
    weight = 1.0 if neutral or got["weight"] is None else got["weight"].reshape(shape)
    bias = 0.0 if neutral or got["bias"] is None else got["bias"].reshape(shape)
    if layer.kind == "rmsnorm_one" and not neutral:
        weight = weight + 1.0
    return normalised(layer, x, got, shape) * weight + bias


ALL_ROLES = ("weight", "bias", "running_mean", "running_var")


def normalised(
    layer: Layer, x: Tensor, got: Mapping[str, Tensor | None], shape: tuple[int, ...]
) -> Tensor:
    settings = layer.settings
    if layer.kind == "affine":
        return x
    if layer.kind in STATISTICS:
        mean, variance = got["running_mean"], got["running_var"]
        return (x - mean.reshape(shape)) / (variance + settings["eps"]).sqrt().reshape(shape)
    assert layer.kind in PER_SAMPLE + BATCH
    return MOMENTS[layer.kind](x, settings)


def over(x: Tensor, axes: tuple[int, ...], eps: float, centred: bool = True) -> Tensor:
    if centred:
        x = x - x.mean(axes, keepdim=True)
    return x / (x.square().mean(axes, keepdim=True) + eps).sqrt()


def grouped(x: Tensor, groups: int, eps: float) -> Tensor:
    split = x.unflatten(1, (groups, x.shape[1] // groups))
    return over(split, tuple(range(2, split.dim())), eps).flatten(1, 2)


def over_batch(x: Tensor, eps: float) -> Tensor:
    return over(x, (0, *range(2, x.dim())), eps)


MOMENTS: Mapping[str, Callable[..., Tensor]] = {
    "groupnorm": lambda x, s: grouped(x, s["groups"], s["eps"]),
    "instancenorm": lambda x, s: over(x, tuple(range(2, x.dim())), s["eps"]),
    "layernorm": lambda x, s: over(x, (-1,), s["eps"]),
    "rmsnorm": lambda x, s: over(x, (-1,), s["eps"], centred=False),
    "rmsnorm_hand": lambda x, s: over(x, (-1,), s["eps"], centred=False),
    "rmsnorm_one": lambda x, s: over(x, (-1,), s["eps"], centred=False),
    "batchnorm_no_statistics": lambda x, s: over_batch(x, s["eps"]),
    "batchnorm_train": lambda x, s: over_batch(x, s["eps"]),
}


def convolution(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    s = layer.settings
    d = s["dims"]
    if s["transposed"]:
        apply = getattr(F, f"conv_transpose{d}d")
        return apply(x, weight, bias, s["stride"], s["padding"], 0, s["groups"], s["dilation"])
    pads = [side for low, high in reversed(margins(s)) for side in (low, high)]
    mode = "constant" if s["mode"] == "zeros" else s["mode"]
    if any(pads):
        x = F.pad(x, pads, mode=mode)
    return getattr(F, f"conv{d}d")(x, weight, bias, s["stride"], 0, s["dilation"], s["groups"])


def margins(settings: Mapping[str, object]) -> list[tuple[int, int]]:
    """Padding before and after, per spatial dimension."""
    if settings["padding"] == "valid":
        return [(0, 0)] * settings["dims"]
    if settings["padding"] != "same":
        return [(settings["padding"],) * 2] * settings["dims"]
    total = settings["dilation"] * (settings["kernel"] - 1)
    return [(total // 2, total - total // 2)] * settings["dims"]


def shuffled(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, x.shape[1] // groups)).transpose(1, 2).flatten(1, 2)


def half_rectified(x: Tensor, channels: int) -> Tensor:
    return torch.cat([x[:, :channels].relu(), x[:, channels:]], 1)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v


def pool(s: Mapping[str, object], x: Tensor) -> Tensor:
    d = s["dims"]
    if s["kind"] == "max":
        return getattr(F, f"max_pool{d}d")(x, s["kernel"], s["stride"])
    if s["kind"] == "adaptive":
        return getattr(F, f"adaptive_avg_pool{d}d")(x, s["size"])
    apply = getattr(F, f"avg_pool{d}d")
    return apply(x, s["kernel"], s["stride"], s["padding"], False, s["count_include_pad"])


FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "relu": lambda s, x: x.relu(),
    "gelu": lambda s, x: F.gelu(x),
    "half_relu": lambda s, x: half_rectified(x, s["channels"]),
    "identity": lambda s, x: x,
    "dropout": lambda s, x: x,
    "add": lambda s, x, y: x + y,
    "multiply": lambda s, x, y: x * y,
    "cat": lambda s, *x: torch.cat(x, s["axis"]),
    "slice": lambda s, x: x.narrow(s["axis"], s["start"], s["length"]),
    "flatten": lambda s, x: x.flatten(s["start"]),
    "transpose": lambda s, x: x.transpose(1, 2),
    "channels_last": lambda s, x: x.movedim(1, -1),
    "channels_first": lambda s, x: x.movedim(-1, 1),
    "shuffle": lambda s, x: shuffled(x, s["groups"]),
    "mean": lambda s, x: x.mean(s["axes"]),
    "pool": pool,
    "upsample": lambda s, x: F.interpolate(x, scale_factor=2.0, mode=s["mode"]),
    "attention": lambda s, q, k, v: attention(q, k, v, s["scale"]),
}
# What only moves values about: part of its output is part of its input.
STRUCTURAL = (
    "identity",
    "dropout",
    "cat",
    "slice",
    "flatten",
    "transpose",
    "channels_last",
    "channels_first",
    "shuffle",
)
