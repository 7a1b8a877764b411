"""Inputs that make faults show, chosen from what the example inputs are.

A random batch hides most faults of a normalization: an eps in the wrong place shows on a tiny
variance, a one-pass variance on a large mean, a deleted eps on constant rows and on zeros, a lost
upcast on squares that overflow, and statistics over the wrong axis on another batch size. A mask
that is ignored shows where it hides something, a wrong row of a table where that row is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normsurgery.inputs import Inputs
from normsurgery.verifying.axes import BATCH_SIZES, LARGER_SIZE, Axis, resized, sizes_to_try
from normsurgery.verifying.hard_ids import (
    Integers,
    ending_in_padding,
    integers_of,
    many_ids,
    samples_for_all_ids,
    with_ids,
    with_random_masks,
)
from normsurgery.verifying.hard_tables import embedding_rows
from normsurgery.verifying.hard_values import (
    FLOATING,
    MORE_FLOATING,
    Make,
    is_as_meant,
    mapped,
    tensors_of,
    with_floats,
)

RANDOM = FLOATING[0][1]
SMALLER_SCALAR, LARGER_SCALAR = 0.5, 2.0
CHEAP = 100_000  # elements of one sample; of larger ones no more than 7 are tried
MOST_ELEMENTS = 2**20  # of all inputs together, where many samples hold many ids


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
    that is known to be valid: the rows of the table they index (read off one run of a copy of
    `model`), of which many are asked for, else the range of the example, from 0 on where that is a
    single value. Booleans and other integers that are 0 or 1 are masks: random ones, and ones that
    hide the second half. The batch size varies where all tensors agree on their first dimension,
    unless `vary_batch` forbids it.
    """
    known = integers_of(inputs, embedding_rows(model, inputs) if model is not None else {})
    batch = batch_size(inputs) if vary_batch else None
    cases = [Case("example", inputs), *_same_shape(inputs, known, seed, FLOATING)]
    cases += _masked(inputs, known, None, seed)
    asking = list(_many_ids(inputs, known, seed, batch or 0, _with_samples))
    most = max((batch_size(case.inputs) or 0 for case in asking), default=0)
    return (*cases, *asking, *_other_batches(inputs, known, seed, batch or 0, most))


def inputs_of_a_graph(
    inputs: Inputs,
    axes: Sequence[Axis],
    *,
    rows: Mapping[int, int] | None = None,
    padding: int | None = None,
    seed: int = 0,
) -> tuple[Case, ...]:
    """`hard_inputs` for a model that was exported: only its dynamic axes vary, each over 1, 2, 7
    (a batch) or 1, 2 and an odd size (another axis), 17, and the bounds it declares.

    Adds values and squares that overflow a type below the one at hand, 1e-20, a single NaN and a
    single Inf, and token ids that end in padding.

    Args:
        rows: position of an integer input among the leaves -> rows of the embedding it indexes.
        padding: the id that pads, where the model has one.
    """
    known = integers_of(inputs, rows or {})
    floating = (*FLOATING, *MORE_FLOATING)
    cases = [Case("example", inputs), *_same_shape(inputs, known, seed, floating)]
    cases += _masked(inputs, known, padding, seed)
    size, resize = _batch_of(axes, known)
    cases += _many_ids(inputs, known, seed, size, resize)
    for index, axis in enumerate(axes):
        for size in sizes_to_try(axis):
            other = resized(inputs, axis, size)
            if other is not None and (size != LARGER_SIZE or _is_cheap(other, axis)):
                new = with_floats(other, RANDOM, seed + index, LARGER_SCALAR)
                label = f"{'batch' if axis.is_batch else axis.name} {size}"
                cases.append(Case(label, with_ids(new, known, "random", seed)))
    return tuple(cases)


def batch_size(inputs: Inputs) -> int | None:
    """The first dimension, if all tensors (0-dim ones aside) have the same one."""
    sizes = {t.shape[0] for t in tensors_of(inputs) if t.dim() > 0}
    return sizes.pop() if len(sizes) == 1 else None


def _same_shape(
    inputs: Inputs, known: Integers, seed: int, floating: Sequence[tuple[str, Make]]
) -> Iterator[Case]:
    if any(t.is_floating_point() for t in tensors_of(inputs)):
        for index, (label, make) in enumerate(floating):
            scalars = SMALLER_SCALAR if label == "random" else 1.0
            new = with_floats(inputs, make, seed + index, scalars)
            if floating is FLOATING or is_as_meant(label, new):
                yield Case(label, new)
    if known.ranges:
        yield Case("random ids", with_ids(inputs, known, "random", seed))
        yield Case("first ids", with_ids(inputs, known, "first", seed))
        yield Case("last ids", with_ids(inputs, known, "last", seed))


def _masked(inputs: Inputs, known: Integers, padding: int | None, seed: int) -> Iterator[Case]:
    """Sequences whose second half is padding, and other masks; what differs from the example."""
    padded = ending_in_padding(inputs, known, padding, seed)
    masked = with_random_masks(inputs, known, seed)
    for label, new in (("padding", padded), ("random mask", masked)):
        pairs = zip(_leaves(new), _leaves(inputs), strict=True)
        if any(one is not other for one, other in pairs):
            yield Case(label, new)


Resize = Callable[[Inputs, int], Inputs | None]


def _many_ids(
    inputs: Inputs, known: Integers, seed: int, size: int, resize: Resize
) -> Iterator[Case]:
    """Every row of the tables: in more samples where `size`, the batch, may vary, else in a few
    inputs of the same shape."""
    if not known.rows:
        return
    cases: list[Inputs] = []
    wanted = samples_for_all_ids(inputs, known, size) if size else 0
    if wanted > size:
        per_sample = sum(t.numel() for t in tensors_of(inputs)) // size
        larger = resize(inputs, max(size, min(wanted, MOST_ELEMENTS // max(per_sample, 1))))
        cases = many_ids(larger, known, seed, most=1) if larger is not None else []
    for index, new in enumerate(cases or many_ids(inputs, known, seed)):
        yield Case(f"many ids {index + 1}" if index else "many ids", new)


def _batch_of(axes: Sequence[Axis], known: Integers) -> tuple[int, Resize]:
    """Size of the batch that all ids have, and what changes it; 0 where there is none."""
    for axis in axes:
        if axis.is_batch and {(position, 0) for position in known.rows} <= set(axis.places):
            return axis.size, partial(_resized_at_most, axis)
    return 0, lambda inputs, size: None


def _resized_at_most(axis: Axis, inputs: Inputs, size: int) -> Inputs | None:
    return resized(inputs, axis, size if axis.high is None else min(size, axis.high))


def _other_batches(
    inputs: Inputs, known: Integers, seed: int, batch: int, tried: int
) -> Iterator[Case]:
    """tried: a size that another case has; 17 is not tried where that is as large."""
    if not batch:
        return
    cheap = sum(t.numel() for t in tensors_of(inputs)) < CHEAP * batch
    for size in (*BATCH_SIZES, *((LARGER_SIZE,) if cheap and tried < LARGER_SIZE else ())):
        if size != batch:
            new = with_floats(_with_samples(inputs, size), RANDOM, seed, LARGER_SCALAR)
            yield Case(f"batch {size}", with_ids(new, known, "random", seed))


def _is_cheap(inputs: Inputs, axis: Axis) -> bool:
    elements = sum(t.numel() for t in tensors_of(inputs))
    return elements < CHEAP * LARGER_SIZE or LARGER_SIZE in (axis.low, axis.high)


def _with_samples(inputs: Inputs, size: int) -> Inputs:
    """The samples repeated or cut to `size`."""

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] == 0:
            return value
        return value[torch.arange(size, device=value.device) % value.shape[0]]

    return mapped(inputs, resize)


def _leaves(inputs: Inputs) -> list[Any]:
    leaves: list[Any] = tree_leaves((inputs.args, dict(inputs.kwargs)))
    return leaves
