"""Inputs that make faults show, chosen from what the example inputs are.

A random batch hides most faults of a normalization: an eps in the wrong place shows on a tiny
variance, a one-pass variance on a large mean, a deleted eps on constant rows and on zeros, a lost
upcast on squares that overflow, and statistics over the wrong axis on another batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from normsurgery.inputs import Inputs
from normsurgery.treecopy import tree_copy
from normsurgery.verify.runners import fresh, same_randomness, set_mode

BATCH_SIZES = (1, 2, 7)
LARGE_MEANS = (30.0, 1e3, 1e4)
TINY_DEVIATION = 3e-3


@dataclass(frozen=True)
class Case:
    """One input and the label it goes by in the Evidence."""

    label: str
    inputs: Inputs


def hard_inputs(
    inputs: Inputs, *, model: nn.Module | None = None, vary_batch: bool = True, seed: int = 0
) -> tuple[Case, ...]:
    """The example itself, then what is hard for inputs of its kind; the same for the same seed.

    Floating tensors keep shape and dtype and get new values. Integer tensors stay within the range
    that is known to be valid: the rows of the embedding they index (read off one run of a copy of
    `model`), else the range of the example; booleans and 0/1 masks are left alone. The batch size
    varies where all tensors agree on their first dimension, unless `vary_batch` forbids it.
    """
    rows = embedding_rows(model, inputs) if model is not None else {}
    cases = [Case("example", inputs), *_same_shape(inputs, rows, seed)]
    return (*cases, *(_other_batches(inputs, rows, seed) if vary_batch else ()))


def _same_shape(inputs: Inputs, rows: dict[int, int], seed: int) -> Iterator[Case]:
    tensors = _tensors(inputs)
    if any(t.is_floating_point() for t in tensors):
        for index, (label, make) in enumerate(_FLOATING):
            yield Case(label, _with_floats(inputs, make, seed + index))
    if any(_is_index(t) for t in tensors):
        yield Case("random ids", _with_ids(inputs, rows, "random", seed))
        yield Case("first ids", _with_ids(inputs, rows, "first", seed))
        yield Case("last ids", _with_ids(inputs, rows, "last", seed))


def _other_batches(inputs: Inputs, rows: dict[int, int], seed: int) -> Iterator[Case]:
    batch = batch_size(inputs)
    for size in BATCH_SIZES if batch else ():
        if size != batch:
            yield Case(f"batch {size}", _with_batch(inputs, rows, size, seed))


def batch_size(inputs: Inputs) -> int | None:
    """The first dimension, if all tensors (0-dim ones aside) have the same one."""
    sizes = {t.shape[0] for t in _tensors(inputs) if t.dim() > 0}
    return sizes.pop() if len(sizes) == 1 else None


def embedding_rows(model: nn.Module, inputs: Inputs) -> dict[int, int]:
    """Position of each integer input (in flattening order) -> rows of the embedding it indexes.

    A model that does not run gives nothing.
    """
    given = fresh(inputs)
    ids = {
        t.data_ptr(): position
        for position, t in enumerate(tree_flatten((given.args, given.kwargs))[0])
        if isinstance(t, Tensor) and _is_index(t)
    }
    copied = tree_copy(model, clone=True)
    rows: dict[int, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        position = ids.get(args[0].data_ptr()) if args and isinstance(args[0], Tensor) else None
        if position is not None and isinstance(module, nn.Embedding):
            rows[position] = min(module.num_embeddings, rows.get(position, module.num_embeddings))

    embeddings = [m for m in copied.modules() if isinstance(m, nn.Embedding)]
    if not ids or not embeddings:
        return {}
    for module in embeddings:
        module.register_forward_pre_hook(note)
    try:
        set_mode(copied, "eval")
        with torch.no_grad(), same_randomness(0):
            given.call(copied)
    except Exception:  # whether the model runs at all is for the runners to say
        return {}
    return rows


Make = Callable[[tuple[int, ...], torch.dtype, torch.Generator], Tensor]


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return _normal(shape, generator)


def _mean(mean: float) -> Make:
    def make(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return _normal(shape, generator) + mean

    return make


def _tiny(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return _normal(shape, generator) * TINY_DEVIATION


def _constant_rows(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Constant along the last dimension; many different constants, so that a mean which one of them
    happens to round to exactly does not stand for all."""
    return _constants((*shape[:-1], 1), generator).expand(shape)


def _constant_samples(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    return _constants((*shape[:1], *[1] * (len(shape) - 1)), generator).expand(shape)


def _constants(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of sizes 0.1 to 1000, both signs."""
    signs = _normal(shape, generator).sign()
    exponents = 4 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    return signs * torch.pow(10.0, exponents)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _outlier(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One channel (axis 1 of a map, the last axis of tokens) a thousand times the others."""
    values = _normal(shape, generator)
    if values.dim() < 2:
        return values
    values.select(1 if values.dim() > 3 else -1, 0).mul_(1e3)
    return values


def _overflowing(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Finite values whose squares are not: around 500 in fp16, around 4e19 in fp32 and bf16."""
    return _normal(shape, generator) * (2 * math.sqrt(torch.finfo(dtype).max))


def _subnormal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return _normal(shape, generator) * (torch.finfo(dtype).smallest_normal / 16)


_FLOATING: tuple[tuple[str, Make], ...] = (
    ("random", _random),
    *((f"mean {mean:g}", _mean(mean)) for mean in LARGE_MEANS),
    ("tiny variance", _tiny),
    ("constant rows", _constant_rows),
    ("constant samples", _constant_samples),
    ("zeros", _zeros),
    ("outlier channel", _outlier),
    ("squares overflow", _overflowing),
    ("subnormal", _subnormal),
)


def _with_floats(inputs: Inputs, make: Make, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
            return value
        new = make(tuple(value.shape), value.dtype, generator)
        return new.to(value.dtype).to(value.device)

    return _mapped(inputs, change)


def _with_ids(inputs: Inputs, rows: dict[int, int], which: str, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    leaves, structure = tree_flatten((inputs.args, inputs.kwargs))
    for position, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not _is_index(leaf) or leaf.numel() == 0:
            continue
        first, last = int(leaf.min()), int(leaf.max())
        if position in rows:
            first, last = 0, rows[position] - 1
        if which == "random":
            new = torch.randint(first, last + 1, leaf.shape, generator=generator)
        else:
            new = torch.full(leaf.shape, first if which == "first" else last)
        leaves[position] = new.to(leaf.dtype).to(leaf.device)
    return Inputs(*tree_unflatten(leaves, structure))


def _with_batch(inputs: Inputs, rows: dict[int, int], size: int, seed: int) -> Inputs:
    """The samples repeated or cut to `size`, then given random values."""

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] == 0:
            return value
        return value[torch.arange(size, device=value.device) % value.shape[0]]

    resized = _with_floats(_mapped(inputs, resize), _random, seed)
    return _with_ids(resized, rows, "random", seed)


def _mapped(inputs: Inputs, change: Callable[[Any], Any]) -> Inputs:
    return Inputs(*tree_map(change, (inputs.args, dict(inputs.kwargs))))


def _tensors(inputs: Inputs) -> list[Tensor]:
    leaves = tree_flatten((inputs.args, inputs.kwargs))[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _is_index(tensor: Tensor) -> bool:
    """Integers that are no 0/1 mask."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        return False
    return tensor.numel() > 0 and bool((tensor < 0).any() | (tensor > 1).any())
