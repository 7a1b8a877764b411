"""Motifs of several branches, and hazards."""

from __future__ import annotations

from dataclasses import replace

from . import parts
from .steps import (
    Grower,
    Value,
    activation,
    call,
    dropout,
    linear,
    norm,
    pool,
    select,
    shuffle,
    to_vector,
    upsample,
    weigh,
)

# --- motifs of several branches -------------------------------------------------------------------


def merge(g: Grower, a: Value, b: Value) -> Value:
    channels = a.channels + b.channels
    code = f"torch.cat([{{0}}, {{1}}], {a.axis})"
    name = g.node("cat", (a.name, b.name), code, axis=a.axis)
    return replace(a, name=name, channels=channels)


def add(g: Grower, a: Value, b: Value, *, when: str = "") -> Value:
    return replace(a, name=g.node("add", (a.name, b.name), "{0} + {1}", when=when))


def keep(g: Grower, *values: Value) -> None:
    g.needed.update(v.name for v in values)


def concatenation(g: Grower, v: Value) -> Value:
    keep(g, v)
    branches = []
    for _ in range(2):
        made = weigh(g, v, same_shape=True) if g.chance(0.75) else v
        made = activation(g, made) if g.chance(0.2) else made
        keep(g, made)
        branches.append(made)
    return norm(g, merge(g, *branches)) if g.chance(0.8) else merge(g, *branches)


def residual(g: Grower, v: Value) -> Value:
    keep(g, v)
    made = norm(g, v) if g.chance(0.5) else v
    made = weigh(g, made, same_shape=True)
    made = norm(g, made) if g.chance(0.5) else made
    made = activation(g, made) if g.chance(0.5) else made
    if made.channels != v.channels or made.spatial != v.spatial:
        return made
    total = add(g, made, v)
    return activation(g, total) if g.chance(0.7) else total


def parallel(g: Grower, v: Value) -> Value:
    """A sum of convolutions with batch norms, and perhaps a batch norm alone."""
    keep(g, v)
    if v.domain == "map" and min(v.spatial) >= 4 and g.chance(0.7):
        return _parallel_plain(g, v)
    total = norm(g, v) if g.chance(0.5) else norm(g, weigh(g, v, same_shape=True))
    keep(g, total)
    for _ in range(g.rng.choice([1, 2])):
        total = add(g, total, norm(g, weigh(g, v, same_shape=True)))
    return activation(g, total)


def _parallel_plain(g: Grower, v: Value) -> Value:
    """The branches that can become one convolution."""
    branches = []
    for kernel in (3, 1):
        layer, code = parts.branch(g.fresh("conv"), v.channels, len(v.spatial), kernel)
        branches.append(_batch_normed(g, call(g, v, layer, code)))
    if g.chance(0.6):
        branches.append(_batch_normed(g, v))
    total = branches[0]
    for made in branches[1:]:
        total = add(g, total, made)
    return activation(g, total)


def _batch_normed(g: Grower, v: Value) -> Value:
    layer = parts.batch_norm(g.fresh("norm"), v.channels, v.spatial)
    normed = call(g, v, layer, f"self.{layer.name}({{0}})")
    keep(g, normed)
    return normed


def attention(g: Grower, v: Value) -> Value:
    if v.domain != "tokens":
        return residual(g, v)
    normed = norm(g, v)
    keep(g, normed, v)
    q, k, value = (linear(g, normed, v.channels) for _ in range(3))
    code = "torch.softmax({0} @ {1}.transpose(-1, -2) * 0.01, -1) @ {2}"
    mixed = g.node("attention", (q.name, k.name, value.name), code, scale=0.01)
    made = linear(g, replace(v, name=mixed), v.channels)
    return add(g, v, made) if g.chance(0.6) else made


def gated(g: Grower, v: Value) -> Value:
    if v.domain == "map":
        return concatenation(g, v)
    normed = norm(g, v)
    keep(g, normed)
    a, b = linear(g, normed, 4), linear(g, normed, 4)
    product = g.node("multiply", (smooth(g, a).name, b.name), "{0} * {1}")
    return linear(g, replace(a, name=product))


def smooth(g: Grower, v: Value) -> Value:
    return g.then(v, "gelu", "F.gelu({0})")


# --- hazards --------------------------------------------------------------------------------------


def second_consumer(g: Grower, v: Value) -> Value:
    """Something before a norm is read, or returned, elsewhere too."""
    g.hazards.add("second consumer")
    made = weigh(g, v, same_shape=True)
    keep(g, made)
    normed = norm(g, made)
    way = g.rng.choice(["returned", "added", "weighed"])
    if way == "returned" or normed.spatial != made.spatial:
        g.extra.append(made.name)
        return normed
    other = weigh(g, made, same_shape=True) if way == "weighed" else made
    return activation(g, add(g, activation(g, normed), other))


def called_twice(g: Grower, v: Value) -> Value:
    """One layer, two calls: with one norm, with two, or one call without."""
    g.hazards.add("called twice")
    first = weigh(g, v, same_shape=True)
    layer = g.nodes[-1].layer
    code = g.nodes[-1].code
    normed = norm(g, first)
    way = g.rng.choice(["same norm", "other norm", "no norm"])
    last = g.nodes[-1]
    active = activation(g, normed)
    if active.channels != v.channels or active.spatial != v.spatial:
        return active
    again = replace(active, name=g.node("layer", (active.name,), code, layer=layer))
    if way == "other norm":
        return norm(g, again)
    if way == "same norm" and last.layer and last.op == "layer":
        return replace(again, name=g.node("layer", (again.name,), last.code, layer=last.layer))
    return again


def tied(g: Grower, v: Value) -> Value:
    """Two layers, one weight."""
    first = weigh(g, v, same_shape=True)
    layer = g.layers[g.nodes[-1].layer]
    if layer.functional:
        return norm(g, first)
    g.hazards.add("tied")
    middle = norm(g, first) if g.chance(0.5) else first
    middle = activation(g, middle)
    if middle.channels != v.channels or middle.spatial != v.spatial:
        return middle
    name = g.fresh("tied")
    made = layer.lines[0].replace(f"self.{layer.name} =", f"self.{name} =")
    twin = replace(layer, name=name, lines=(made,))
    g.ties[twin.tensor("weight")] = layer.tensor("weight")
    second = call(g, middle, twin, f"self.{name}({{0}})")
    return norm(g, second) if g.chance(0.7) else second


def hidden_branch(g: Grower, v: Value) -> Value:
    """A condition on the batch or on a flag, around a norm, between, or around a second reading."""
    when = g.rng.choice(["batch", "flag", "flag"])
    g.hazards.add("hidden branch")
    made = weigh(g, v, same_shape=True)
    way = g.rng.choice(["norm", "reading", "between", "elsewhere"])
    if way == "norm":
        return norm(g, made, when=when)
    if way == "between":
        return norm(g, g.then(made, "flag", "{0} * flag", when="flag"))
    keep(g, made)
    normed = norm(g, made)
    if way == "elsewhere":
        return g.then(activation(g, normed), "flag", "{0} * flag", when="flag")
    return add(g, normed, made, when=when) if normed.spatial == made.spatial else normed


def hooked(g: Grower, v: Value) -> Value:
    made = weigh(g, v, same_shape=True)
    before = len(g.nodes)
    normed = norm(g, made)
    last = [node for node in g.nodes[before - 1 :] if node.layer]
    layer = g.layers[g.rng.choice(last).layer]
    if not layer.functional:
        g.hazards.add("hook")
        g.hooks[layer.name] = g.rng.choice(["double", "look"])
    return normed


def weight_read(g: Grower, v: Value) -> Value:
    """A weight that the forward reads a second time."""
    made = weigh(g, v, same_shape=True)
    layer = g.layers[g.nodes[-1].layer]
    normed = activation(g, norm(g, made))
    if layer.functional:
        return normed
    g.hazards.add("weight read elsewhere")
    return g.then(normed, "weight_mean", f"{{0}} + self.{layer.name}.weight.mean()", of=layer.name)


def weigh_and_norm(g: Grower, v: Value) -> Value:
    return norm(g, weigh(g, v))


def norm_and_weigh(g: Grower, v: Value) -> Value:
    return weigh(g, norm(g, v))


def norm_and_norm(g: Grower, v: Value) -> Value:
    g.hazards.add("norm after norm")
    return norm(g, norm(g, weigh(g, v)))


def through(g: Grower, v: Value) -> Value:
    """A layer and a norm with something in between."""
    moves = [activation, *[dropout] * 3, *[shuffle] * 2, select]
    moves += [*[pool] * 12, *[upsample] * 12, shuffle] if v.domain == "map" else []
    between = g.rng.choice(moves)
    if g.chance(0.5):
        return norm(g, between(g, weigh(g, v)))
    return weigh(g, between(g, norm(g, v)))


def ending(g: Grower, v: Value) -> Value:
    """A norm before or after what makes a vector, with weights on both sides."""
    if v.domain == "vector":
        return norm_and_weigh(g, v)
    if g.chance(0.5):
        return norm(g, to_vector(g, weigh(g, v)))
    return linear(g, to_vector(g, norm(g, v)))
