"""What a random structure grows by: values, and single operations on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from random import Random
from typing import Any

from . import parts
from .program import Layer, Node

VOCABULARY = 11
FRESH = ("relu", "gelu", "add", "cat", "pool", "layer")


@dataclass(frozen=True)
class Value:
    """A value: a map (N, C, *spatial), tokens (N, L, C) or a vector (N, C)."""

    name: str
    domain: str
    channels: int
    spatial: tuple[int, ...] = ()

    @property
    def axis(self) -> int:
        return 2 if self.domain == "tokens" else 1


class Grower:
    """What has grown so far."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.layers: dict[str, Layer] = {}
        self.nodes: list[Node] = []
        self.extra: list[str] = []
        self.ties: dict[str, str] = {}
        self.hooks: dict[str, str] = {}
        self.hazards: set[str] = set()
        self.needed: set[str] = {"x"}  # values that are read later, so never written in place

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def fresh(self, stem: str) -> str:
        return f"{stem}{len(self.layers)}"

    def node(
        self,
        op: str,
        inputs: tuple[str, ...],
        code: str,
        *,
        layer: str = "",
        when: str = "",
        **settings: Any,
    ) -> str:
        name = f"h{len(self.nodes)}"
        self.nodes.append(Node(name, op, inputs, code, layer, settings, when))
        return name

    def then(self, v: Value, op: str, code: str, **settings: Any) -> Value:
        return replace(v, name=self.node(op, (v.name,), code, **settings))

    def module(self, make: str) -> str:
        """A module without tensors; the code that calls it."""
        name = self.fresh("part")
        self.layers[name] = Layer(name, "plain", (f"self.{name} = {make}",), ())
        return f"self.{name}({{0}})"

    def owned(self, v: Value) -> bool:
        """Whether nothing but what comes next reads the value."""
        made = next((n for n in self.nodes if n.name == v.name), None)
        if made is None or made.op not in FRESH or v.name in self.needed | set(self.extra):
            return False
        return not any(v.name in node.inputs for node in self.nodes)


# --- single operations ----------------------------------------------------------------------------


def call(g: Grower, v: Value, layer: Layer, code: str, *, when: str = "") -> Value:
    g.layers[layer.name] = layer
    return replace(v, name=g.node("layer", (v.name,), code, layer=layer.name, when=when))


def conv(g: Grower, v: Value, *, same_shape: bool = False) -> Value:
    layer, code, channels, spatial = parts.convolution(
        g.rng, g.fresh("conv"), v.channels, v.spatial, same_shape=same_shape
    )
    return replace(call(g, v, layer, code), channels=channels, spatial=spatial)


def linear(g: Grower, v: Value, out: int | None = None) -> Value:
    out = out or g.rng.randint(2, 5)
    layer, code = parts.linear(g.rng, g.fresh("linear"), v.channels, out)
    return replace(call(g, v, layer, code), channels=out)


def weigh(g: Grower, v: Value, *, same_shape: bool = False) -> Value:
    """A convolution of a map, a linear layer of anything else."""
    if v.domain == "map":
        return conv(g, v, same_shape=same_shape)
    return linear(g, v, v.channels if same_shape else None)


def norm(g: Grower, v: Value, *, when: str = "") -> Value:
    if v.domain == "tokens" and v.channels > 2 and g.chance(0.75):
        layer = parts.last_axis_norm(g.rng, g.fresh("norm"), v.channels)
        return call(g, v, layer, f"self.{layer.name}({{0}})", when=when)
    if v.domain == "tokens":
        return _between_transposes(g, v, when=when)
    if v.domain == "vector" and v.channels > 2 and g.chance(0.35):
        layer = parts.last_axis_norm(g.rng, g.fresh("norm"), v.channels)
        return call(g, v, layer, f"self.{layer.name}({{0}})", when=when)
    if g.chance(0.1):
        layer, code = parts.functional_batch_norm(g.rng, g.fresh("norm"), v.channels, v.spatial)
        return call(g, v, layer, code, when=when)
    layer = parts.channel_norm(g.rng, g.fresh("norm"), v.channels, v.spatial)
    if layer.kind == "batchnorm_train":
        g.hazards.add("train mode")
    if layer.kind == "batchnorm_no_statistics":
        g.hazards.add("no statistics")
    return call(g, v, layer, f"self.{layer.name}({{0}})", when=when)


def _between_transposes(g: Grower, v: Value, *, when: str = "") -> Value:
    """A norm of the channels of tokens."""
    turned = g.then(v, "transpose", "{0}.transpose(1, 2)")
    normed = norm(g, replace(turned, domain="map"), when=when)
    back = g.then(normed, "transpose", "{0}.transpose(1, 2)")
    return replace(back, domain="tokens")


def activation(g: Grower, v: Value) -> Value:
    if g.chance(0.3) and g.owned(v):
        g.hazards.add("in place")
        if v.channels > 1 and v.axis == 1 and g.chance(0.3):
            half = v.channels // 2
            code = f"part = {{0}}[:, :{half}]\npart.relu_()\n{{name}} = {{0}}"
            return g.then(v, "half_relu", code, channels=half)
        code = g.rng.choice(["F.relu_({0})", "F.relu({0}, inplace=True)", "module"])
        return g.then(v, "relu", g.module("nn.ReLU(inplace=True)") if code == "module" else code)
    op, code, make = g.rng.choice(
        [("relu", "F.relu({0})", "nn.ReLU()"), ("gelu", "F.gelu({0})", "nn.GELU()")]
    )
    return g.then(v, op, code if g.chance(0.5) else g.module(make))


def dropout(g: Grower, v: Value) -> Value:
    if g.chance(0.4):
        return g.then(v, "identity", g.module("nn.Identity()"))
    code = "F.dropout({0}, 0.5, self.training)" if g.chance(0.3) else g.module("nn.Dropout(0.5)")
    return g.then(v, "dropout", code)


def pool(g: Grower, v: Value) -> Value:
    if min(v.spatial) < 4:
        return activation(g, v)
    dims = len(v.spatial)
    kind = g.rng.choice(["avg"] * 3 + ["adaptive"] * 4 + ["max"])
    settings: dict[str, Any] = {"dims": dims, "kind": kind}
    if kind == "adaptive":
        code = g.module(f"nn.AdaptiveAvgPool{dims}d(2)")
        return replace(g.then(v, "pool", code, **settings, size=2), spatial=(2,) * dims)
    if kind == "max":
        settings |= {"kernel": 2, "stride": 2}
        code = g.module(f"nn.MaxPool{dims}d(2, 2)")
        return _smaller(g.then(v, "pool", code, **settings), 2, 0)
    padding = g.rng.choice([0, 0, 1])
    included = g.chance(0.5)
    kernel = 3 if padding else 2
    settings |= {"kernel": kernel, "stride": 2, "padding": padding, "count_include_pad": included}
    arguments = f"{kernel}, 2, {padding}, count_include_pad={included}"
    code = f"F.avg_pool{dims}d({{0}}, {arguments})"
    if g.chance(0.5):
        code = g.module(f"nn.AvgPool{dims}d({arguments})")
    return _smaller(g.then(v, "pool", code, **settings), kernel, padding)


def _smaller(v: Value, kernel: int, padding: int) -> Value:
    return replace(v, spatial=tuple((s + 2 * padding - kernel) // 2 + 1 for s in v.spatial))


def upsample(g: Grower, v: Value) -> Value:
    if prod(v.spatial) > 64:
        return activation(g, v)
    smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(v.spatial)]
    mode = g.rng.choice(["nearest", smooth])
    code = f"F.interpolate({{0}}, scale_factor=2.0, mode={mode!r})"
    if g.chance(0.5):
        code = g.module(f"nn.Upsample(scale_factor=2.0, mode={mode!r})")
    grown = g.then(v, "upsample", code, mode=mode)
    return replace(grown, spatial=tuple(2 * s for s in v.spatial))


def shuffle(g: Grower, v: Value) -> Value:
    groups = next((n for n in (2, 3) if v.channels % n == 0), 0)
    if v.axis != 1 or not groups:
        return select(g, v)
    spellings = [f"{{0}}.unflatten(1, ({groups}, -1)).transpose(1, 2).flatten(1, 2)"]
    if v.domain == "map":
        spellings.append(g.module(f"nn.ChannelShuffle({groups})"))
    half = v.channels // groups
    sizes = "".join(f", {s}" for s in v.spatial)
    shape = f"{{0}}.shape[0], {groups}, {half}{sizes}"
    joined = f"{{0}}.shape[0], {v.channels}{sizes}"
    spellings.append(f"{{0}}.reshape({shape}).transpose(1, 2).reshape({joined})")
    return g.then(v, "shuffle", g.rng.choice(spellings), groups=groups)


def select(g: Grower, v: Value) -> Value:
    if v.channels < 3:
        return activation(g, v)
    start = g.rng.choice([0, 1])
    length = g.rng.randint(2, v.channels - start)
    axis = "..., " if v.domain == "tokens" else ":, "
    code = f"{{0}}[{axis}{start}:{start + length}]"
    if v.channels % 2 == 0 and v.channels > 3 and g.chance(0.4):
        start, length = g.rng.choice([0, 1]), v.channels // 2
        code = f"{{0}}.chunk(2, {v.axis})[{start}]"
        start *= length
    made = g.then(v, "slice", code, axis=v.axis, start=start, length=length)
    return replace(made, channels=length)


# --- changes of domain ----------------------------------------------------------------------------


def to_vector(g: Grower, v: Value) -> Value:
    if v.domain == "vector":
        return linear(g, v)
    axes = tuple(range(2, 2 + len(v.spatial))) if v.domain == "map" else (1,)
    size = prod(v.spatial)
    if v.domain == "map" and size * v.channels <= 40 and g.chance(0.95):
        code = g.rng.choice(["torch.flatten({0}, 1)", "{0}.flatten(1)"])
        code = g.module("nn.Flatten()") if g.chance(0.4) else code
        made = g.then(v, "flatten", code, start=1)
        return Value(made.name, "vector", v.channels * size)
    made = g.then(v, "mean", f"{{0}}.mean({axes})", axes=axes)
    return Value(made.name, "vector", v.channels)


def to_tokens(g: Grower, v: Value) -> Value:
    if v.domain != "map":
        return activation(g, v)
    flat = v if len(v.spatial) == 1 else g.then(v, "flatten", "{0}.flatten(2)", start=2)
    size = prod(v.spatial)
    turned = g.then(flat, "transpose", "{0}.transpose(1, 2)")
    return Value(turned.name, "tokens", v.channels, (size,))


def flat_norm(g: Grower, v: Value) -> Value:
    """A 1d norm of a map whose positions are made one axis."""
    if v.domain != "map" or len(v.spatial) == 1:
        return norm(g, v)
    size = prod(v.spatial)
    flat = Value(g.then(v, "flatten", "{0}.flatten(2)", start=2).name, "map", v.channels, (size,))
    return norm(g, flat)


def channels_last_norm(g: Grower, v: Value) -> Value:
    """A norm of a map beside a permutation that puts the channels last."""
    if v.domain != "map" or v.channels < 3:
        return norm(g, v)
    way = g.rng.choice(["norm first", "norm last", "norm between", "norm between"])
    before = norm(g, v) if way == "norm first" else v
    dims = len(v.spatial)
    axes = (0, *range(2, 2 + dims), 1)
    made = g.then(before, "channels_last", f"{{0}}.permute{axes}")
    if way == "norm between":
        layer = parts.last_axis_norm(g.rng, g.fresh("norm"), v.channels)
        made = call(g, made, layer, f"self.{layer.name}({{0}})")
    made = linear(g, made, v.channels) if way != "norm between" or g.chance(0.5) else made
    back = (0, dims + 1, *range(1, dims + 1))
    made = g.then(made, "channels_first", f"{{0}}.permute{back}")
    return norm(g, made) if way == "norm last" else made
