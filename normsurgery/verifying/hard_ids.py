"""What the integers among the inputs are (ids, numbers, masks), and other values for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from normsurgery.inputs import Inputs

# Not the quantized and the packed ones, which numpy does not have.
INTEGERS = frozenset(
    {torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)
MOST_IDS = 4096  # rows of a table that one case asks for
FEWEST_IDS = 256
MOST_PRODUCTS = 2**24  # a language model gives as many logits for every id as the table has rows
MOST_CASES = 4  # that ask for rows, where the shape is fixed
LARGEST = 2**63 - 1

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Integers:
    """The integers among the leaves of the inputs, by position; read off the example.

    rows: of the tables that ids index. ranges: first and last value of ids and of other numbers.
    masks: booleans, and integers that are 0 or 1 and not known to index anything.
    """

    rows: Mapping[int, int]
    ranges: Mapping[int, tuple[int, int]]
    masks: frozenset[int]


def integers_of(inputs: Inputs, rows: Mapping[int, int]) -> Integers:
    """An id ranges over the rows of its table; any other number over the values of the example, or
    from 0 on where those are all the same (lengths, timesteps)."""
    ranges: dict[int, tuple[int, int]] = {}
    masks: set[int] = set()
    for position, leaf in enumerate(_flat(inputs)[0]):
        if not is_integer(leaf, or_bool=True):
            continue
        values = leaf.detach().cpu().numpy()
        first, last = int(values.min()), int(values.max())
        if position in rows and is_integer(leaf):
            ranges[position] = (0, rows[position] - 1)
        elif first < 0 or last > 1:
            ranges[position] = (min(first, 0) if first == last > 0 else first, last)
        else:
            masks.add(position)
    known = {position: count for position, count in rows.items() if position in ranges}
    return Integers(known, ranges, frozenset(masks))


def is_integer(value: Any, *, or_bool: bool = False) -> bool:
    """A dense tensor of integers that has elements."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or not value.numel():
        return False
    return value.dtype in INTEGERS or (or_bool and value.dtype is torch.bool)


def with_ids(inputs: Inputs, known: Integers, which: str, seed: int) -> Inputs:
    """Ids and numbers "random" in their range, or all at its "first" or "last" value."""
    generator = torch.Generator().manual_seed(seed)

    def change(position: int, leaf: Tensor) -> Tensor | None:
        if position not in known.ranges:
            return None
        first, last = known.ranges[position]
        if which == "random":
            # The end of a range is excluded, and has to be an int64.
            low, end = min(first, LARGEST - 1), min(last + 1, LARGEST)
            return _like(torch.randint(low, end, leaf.shape, generator=generator).numpy(), leaf)
        return _like(np.array(first if which == "first" else last), leaf)

    return _changed(inputs, change)


def with_random_masks(inputs: Inputs, known: Integers, seed: int) -> Inputs:
    """Masks of random zeros and ones; the first element of a row stays, so that none is hidden
    altogether. A row is the last axis that has more than one element."""
    generator = torch.Generator().manual_seed(seed)

    def change(position: int, leaf: Tensor) -> Tensor | None:
        axis = _axis_of_rows(leaf)
        if position not in known.masks or axis is None:
            return None
        old = np.moveaxis(leaf.detach().cpu().numpy(), axis, -1)
        new = (torch.rand(old.shape, generator=generator) < 0.5).numpy().astype(old.dtype)
        new[..., 0] = old[..., 0]
        if np.array_equal(new, old):
            new[..., -1] = 1 - old[..., -1].astype(np.uint8)
        return _like(np.moveaxis(new, -1, axis), leaf)

    return _changed(inputs, change)


def ending_in_padding(inputs: Inputs, known: Integers, padding: int | None, seed: int) -> Inputs:
    """Sequences whose second half is padding, and the other value in the second half of masks that
    are all the same."""
    random_ids = _flat(with_ids(inputs, known, "random", seed))[0]

    def change(position: int, leaf: Tensor) -> Tensor | None:
        if position in known.masks:
            return _with_other_half(leaf)
        if position not in known.ranges or padding is None or leaf.dim() < 2 or leaf.shape[-1] < 2:
            return None
        if padding >= known.rows.get(position, padding + 1):
            return None  # ids of another kind, as token types
        return _ending_in(random_ids[position], -1, padding)

    return _changed(inputs, change)


def many_ids(inputs: Inputs, known: Integers, seed: int, most: int = MOST_CASES) -> list[Inputs]:
    """All rows of the tables in turn, in the shape at hand: in one case if they fit, else in up to
    `most`, shuffled, and if that is not enough rows spread evenly over the table."""
    sizes = {position: _flat(inputs)[0][position].numel() for position in known.rows}
    needed = (math.ceil(min(known.rows[p], ids_wanted(known.rows[p])) / sizes[p]) for p in sizes)
    count = min(max(needed, default=0), most)
    ids = {p: _spread(known.rows[p], count * sizes[p]) for p in sizes}
    if count > 1:
        generator = torch.Generator().manual_seed(seed)
        ids = {p: v[torch.randperm(len(v), generator=generator)] for p, v in ids.items()}

    def part(index: int) -> Callable[[int, Tensor], Tensor | None]:
        def change(position: int, leaf: Tensor) -> Tensor | None:
            if position not in ids:
                return None
            chosen = ids[position][index * leaf.numel() : (index + 1) * leaf.numel()]
            return _like(chosen.reshape(leaf.shape).numpy(), leaf)

        return change

    return [_changed(inputs, part(index)) for index in range(count)]


def samples_for_all_ids(inputs: Inputs, known: Integers, size: int) -> int:
    """How many samples, of which there are `size`, take all the rows that are wanted."""
    leaves = _flat(inputs)[0]
    wanted: int = max(
        math.ceil(ids_wanted(rows) * size / leaves[position].numel())
        for position, rows in known.rows.items()
    )
    return wanted


def ids_wanted(rows: int) -> int:
    """All rows of a small table, fewer of a large one: what is computed from one id grows too."""
    affordable = max(MOST_PRODUCTS // max(rows, 1), FEWEST_IDS)
    return min(rows, MOST_IDS, affordable)


def _spread(rows: int, count: int) -> Tensor:
    """All rows over and over, or as many of them as there are places, first and last among them."""
    if count >= rows:
        return torch.arange(count) % max(rows, 1)
    return torch.linspace(0, rows - 1, count, dtype=torch.float64).round().long()


def _axis_of_rows(tensor: Tensor) -> int | None:
    axes = [axis for axis, size in enumerate(tensor.shape) if size > 1]
    return axes[-1] if axes else None


def _with_other_half(mask: Tensor) -> Tensor | None:
    axis = _axis_of_rows(mask)
    values = mask.detach().cpu().numpy()
    if axis is None or values.min() != values.max():
        return None
    return _ending_in(mask, axis, 1 - int(values.flat[0]))


def _ending_in(tensor: Tensor, axis: int, value: int) -> Tensor:
    new = tensor.clone().movedim(axis, -1)
    new[..., (tensor.shape[axis] + 1) // 2 :] = value
    return new.movedim(-1, axis).contiguous()


def _like(values: Array, tensor: Tensor) -> Tensor:
    """The values, in the shape and type of the tensor, where it is."""
    array = np.broadcast_to(values, tuple(tensor.shape)).astype(tensor.cpu().numpy().dtype)
    return torch.from_numpy(np.array(array, order="C")).to(tensor.device)


def _changed(inputs: Inputs, change: Callable[[int, Tensor], Tensor | None]) -> Inputs:
    leaves, structure = _flat(inputs)
    for position, leaf in _tensors(leaves):
        new = change(position, leaf)
        leaves[position] = leaf if new is None else new
    return Inputs(*tree_unflatten(leaves, structure))


def _tensors(leaves: list[Any]) -> Iterator[tuple[int, Tensor]]:
    yield from ((p, leaf) for p, leaf in enumerate(leaves) if isinstance(leaf, Tensor))


def _flat(inputs: Inputs) -> tuple[list[Any], Any]:
    return tree_flatten((inputs.args, dict(inputs.kwargs)))
