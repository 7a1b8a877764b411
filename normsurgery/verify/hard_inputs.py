"""Inputs that make faults show, chosen from what the example inputs are.

A random batch hides most faults of a normalization: an eps in the wrong place shows on a tiny
variance, a one-pass variance on a large mean, a deleted eps on constant rows and on zeros, a lost
upcast on squares that overflow, and statistics over the wrong axis on another batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from normsurgery.inputs import Inputs
from normsurgery.treecopy import tree_copy
from normsurgery.verify.axes import BATCH_SIZES, Axis, resized, sizes_to_try
from normsurgery.verify.runners import fresh, same_randomness, set_mode

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
    cases = [Case("example", inputs), *_same_shape(inputs, rows, seed, _FLOATING)]
    return (*cases, *(_other_batches(inputs, rows, seed) if vary_batch else ()))


def inputs_of_a_graph(
    inputs: Inputs,
    axes: Sequence[Axis],
    *,
    rows: Mapping[int, int] | None = None,
    padding: int | None = None,
    seed: int = 0,
) -> tuple[Case, ...]:
    """`hard_inputs` for a model that was exported: only its dynamic axes vary, each over 1, 2, 7
    (a batch) or 1, 2 and an odd size (another axis) and the bounds it declares.

    Adds values and squares that overflow a type below the one at hand, 1e-20, a single NaN and a
    single Inf, token ids that end in padding, and masks that hide the second half.

    Args:
        rows: position of an integer input among the leaves -> rows of the embedding it indexes.
        padding: the id that pads, where the model has one.
    """
    rows = dict(rows or {})
    floating = (*_FLOATING, *_MORE_FLOATING)
    cases = [Case("example", inputs), *_same_shape(inputs, rows, seed, floating)]
    cases += _padded(inputs, rows, padding, seed)
    for index, axis in enumerate(axes):
        for size in sizes_to_try(axis):
            other = resized(inputs, axis, size)
            if other is not None:
                new = _with_ids(_with_floats(other, _random, seed + index), rows, "random", seed)
                cases.append(Case(f"{'batch' if axis.is_batch else axis.name} {size}", new))
    return tuple(cases)


def _same_shape(
    inputs: Inputs, rows: dict[int, int], seed: int, floating: Sequence[tuple[str, Make]]
) -> Iterator[Case]:
    tensors = _tensors(inputs)
    if any(t.is_floating_point() for t in tensors):
        for index, (label, make) in enumerate(floating):
            new = _with_floats(inputs, make, seed + index)
            if floating is _FLOATING or _is_as_meant(label, new):
                yield Case(label, new)
    if any(_is_index(t) for t in tensors):
        yield Case("random ids", _with_ids(inputs, rows, "random", seed))
        yield Case("first ids", _with_ids(inputs, rows, "first", seed))
        yield Case("last ids", _with_ids(inputs, rows, "last", seed))


def _is_as_meant(label: str, inputs: Inputs) -> bool:
    """False where the type cannot hold such values: 1e19 in fp16 is infinite, 1e-20 is zero. And
    nothing that overflows in float64, which has no wider truth."""
    floats = [t for t in _tensors(inputs) if t.is_floating_point() and t.dim() and t.numel()]
    if label == "squares overflow" and any(t.dtype is torch.float64 for t in floats):
        return False
    if label in ("one NaN", "one Inf", "zeros"):
        return bool(floats)
    return all(bool(t.isfinite().all() & t.any()) for t in floats)


def _padded(inputs: Inputs, rows: dict[int, int], padding: int | None, seed: int) -> Iterator[Case]:
    """Sequences whose second half is padding, and masks that hide it."""
    leaves, structure = tree_flatten((inputs.args, dict(inputs.kwargs)))
    hidden = list(leaves)
    random_ids = tree_flatten(_arguments(_with_ids(inputs, rows, "random", seed)))[0]
    for position, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or leaf.dim() < 2 or leaf.shape[-1] < 2:
            continue
        if _is_index(leaf) and padding is not None:
            hidden[position] = _ending_in(random_ids[position], padding)
        elif _is_full_mask(leaf):
            hidden[position] = _ending_in(leaf, 0)
    if any(new is not old for new, old in zip(hidden, leaves, strict=True)):
        yield Case("padding", Inputs(*tree_unflatten(hidden, structure)))


def _ending_in(tensor: Tensor, value: int) -> Tensor:
    new = tensor.clone()
    new[..., (tensor.shape[-1] + 1) // 2 :] = value
    return new


def _is_full_mask(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and bool((tensor == 1).all())


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
    return _with_outlier(shape, generator, 1e3)


def _far_outlier(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return _with_outlier(shape, generator, 1e4)


def _with_outlier(shape: tuple[int, ...], generator: torch.Generator, factor: float) -> Tensor:
    values = _normal(shape, generator)
    if values.dim() > 1:
        values.select(1 if values.dim() > 3 else -1, 0).mul_(factor)
    return values


def _overflowing(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Finite values whose squares are not: around 500 in fp16, around 4e19 in fp32 and bf16."""
    return _normal(shape, generator) * (2 * math.sqrt(torch.finfo(dtype).max))


def _subnormal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return _normal(shape, generator) * (torch.finfo(dtype).smallest_normal / 16)


def _sized(least: float, most: float) -> Make:
    """Both signs, magnitudes spread evenly in their logarithm."""

    def make(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        signs = _normal(shape, generator).sign()
        share = torch.rand(shape, generator=generator, dtype=torch.float64)
        return signs * least * torch.pow(most / least, share)

    return make


def _one(value: float) -> Make:
    """Normal values, and one that is `value` (in the first sample)."""

    def make(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        values = _normal(shape, generator)
        if values.numel():
            sample = values[0] if values.dim() else values
            sample.flatten()[sample.numel() // 2] = value
        return values

    return make


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
# On a graph also. What overflows or vanishes in a lower type shows a cast that should not be there.
_MORE_FLOATING: tuple[tuple[str, Make], ...] = (
    ("outlier channel 10000", _far_outlier),
    ("300 to 60000", _sized(300.0, 6e4)),
    ("1e19", _sized(1e19, 1e19)),
    ("1e-20", _sized(1e-20, 1e-20)),
    ("one NaN", _one(math.nan)),
    ("one Inf", _one(math.inf)),
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


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    return inputs.args, dict(inputs.kwargs)


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
