"""A random structure, grown one motif at a time from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from . import parts
from .motifs import (
    attention,
    called_twice,
    concatenation,
    ending,
    gated,
    hidden_branch,
    hooked,
    norm_and_norm,
    norm_and_weigh,
    parallel,
    residual,
    second_consumer,
    through,
    tied,
    weigh_and_norm,
    weight_read,
)
from .program import NORMS, Program
from .steps import (
    VOCABULARY,
    Grower,
    Value,
    _between_transposes,
    activation,
    call,
    channels_last_norm,
    dropout,
    flat_norm,
    norm,
    pool,
    select,
    shuffle,
    to_tokens,
    to_vector,
    upsample,
    weigh,
)

Motif = Callable[[Grower, Value], Value]
EVERYWHERE: dict[Motif, int] = {
    weigh: 12,
    norm: 8,
    weigh_and_norm: 14,
    norm_and_weigh: 12,
    through: 30,
    activation: 10,
    dropout: 5,
    shuffle: 4,
    select: 4,
    concatenation: 10,
    residual: 6,
    parallel: 10,
    norm_and_norm: 2,
    second_consumer: 4,
    called_twice: 4,
    tied: 3,
    hidden_branch: 4,
    hooked: 3,
    weight_read: 3,
}
OF_MAPS: dict[Motif, int] = {pool: 14, upsample: 4, flat_norm: 4, channels_last_norm: 20}
OF_TOKENS: dict[Motif, int] = {attention: 10, gated: 8}
ENDS: dict[Motif, int] = {to_vector: 6, ending: 10, to_tokens: 4}


def motif(g: Grower, v: Value) -> Value:
    """One more step, whatever fits."""
    table = dict(EVERYWHERE) | ENDS
    table |= OF_MAPS if v.domain == "map" else OF_TOKENS if v.domain == "tokens" else {}
    if v.domain == "vector":
        table = {k: n for k, n in table.items() if k is not to_tokens}
    return g.rng.choices(list(table), list(table.values()))[0](g, v)


def start(g: Grower) -> tuple[Value, tuple[int, ...], bool]:
    """The input: its value, its shape without the batch, and whether it holds ids."""
    channels = g.rng.choice([2, 3, 4])
    domain = g.rng.choice(["map"] * 16 + ["tokens"] * 4 + ["vector", "ids", "ids"])
    if domain == "map":
        spatial = g.rng.choice([(8,), (7,), (6, 6), (5, 6), (7, 5), (4, 4, 4), (5, 4, 4)])
        return Value("x", "map", channels, spatial), (channels, *spatial), False
    if domain == "vector":
        return Value("x", "vector", channels + 1), (channels + 1,), False
    if domain == "tokens":
        return Value("x", "tokens", channels + 2, (5,)), (5, channels + 2), False
    layer, code = parts.embedding(g.fresh("embedding"), VOCABULARY, channels + 2)
    made = call(g, Value("x", "tokens", channels + 2, (5,)), layer, code)
    return (_between_transposes(g, made) if g.chance(0.4) else made), (5,), True


def grow(seed: int) -> Program:
    """The structure of this seed: at least one norm, at most some twenty layers."""
    for attempt in range(100):
        g = Grower(seed + (attempt << 40))
        value, shape, ids = start(g)
        for _ in range(g.rng.randint(1, 4)):
            value = motif(g, value)
        if not any(layer.kind in NORMS for layer in g.layers.values()) or len(g.nodes) > 30:
            continue
        return _finished(g, seed, value, shape, ids)
    raise AssertionError(f"seed {seed} grows no norm")


def _finished(g: Grower, seed: int, v: Value, shape: tuple[int, ...], ids: bool) -> Program:
    outputs = (v.name, *(name for name in g.extra if name != v.name))
    program = Program(
        seed=seed,
        shape=shape,
        ids=ids,
        layers=g.layers,
        nodes=tuple(g.nodes),
        outputs=outputs,
        ties=g.ties,
        hooks=g.hooks,
        hazards=frozenset(g.hazards),
        dtype=g.rng.choice(["float64"] * 22 + ["bfloat16", "float16"]),
    )
    if _is_chain(program) and g.chance(0.7):
        return replace(program, form="sequential")
    return _with_block(g.rng, program) if g.chance(0.3) else program


def _is_chain(program: Program) -> bool:
    before = ["x", *(node.name for node in program.nodes)]
    chained = all(
        node.inputs == (name,)
        and not node.when
        and node.code.startswith("self.")
        and node.code.endswith("({0})")
        and node.code.count("self.") == 1
        for node, name in zip(program.nodes, before, strict=False)
    )
    names = [name for node in program.nodes for name in program.layers_of(node)]
    return chained and len(program.outputs) == 1 and len(names) == len(set(names))


def _with_block(rng: Random, program: Program) -> Program:
    """The same with a range of its nodes in a module of its own, where the layers allow it."""
    first = rng.randrange(len(program.nodes))
    last = rng.randint(first + 1, len(program.nodes))
    inside = set().union(*(program.layers_of(node) for node in program.nodes[first:last]))
    outside = [*program.nodes[:first], *program.nodes[last:]]
    if any(inside & program.layers_of(node) for node in outside) or program.ties:
        return program
    moved = {
        name: replace(layer, home="block") if name in inside else layer
        for name, layer in program.layers.items()
    }
    return replace(program, layers=moved, block=(first, last))
