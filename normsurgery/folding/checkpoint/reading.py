"""Reading tensors from shards. Nothing is memory-mapped: mapped pages would count as resident."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from normsurgery.errors import CannotRead
from normsurgery.folding.checkpoint.layout import Entry
from normsurgery.folding.checkpoint.pieces import Piece

BLOCK = 1 << 19  # elements that are float64 at once: 4 MiB
_BYTES = 1 << 20  # compared at once


def read_entry(entry: Entry) -> Tensor:
    """The whole tensor, in its own dtype, contiguous and writable."""
    flat = torch.empty(entry.nbytes, dtype=torch.uint8)
    read_into(flat, entry, 0)
    return flat.view(entry.dtype).reshape(entry.shape)


def read_rows(entry: Entry, first: int, count: int) -> Tensor:
    """`count` entries along the first axis, from `first` on."""
    row = entry.nbytes // max(entry.shape[0], 1)
    flat = torch.empty(count * row, dtype=torch.uint8)
    read_into(flat, entry, first * row)
    return flat.view(entry.dtype).reshape(count, *entry.shape[1:])


def read_into(flat: Tensor, entry: Entry, offset: int) -> None:
    """Fill a tensor of bytes from the entry's bytes at `offset`. Raises CannotRead."""
    view = bytes_of(flat)
    done = 0
    with entry.path.open("rb", buffering=0) as file:
        while done < len(view):
            got = os.preadv(file.fileno(), [view[done:]], entry.start + offset + done)
            if got == 0:
                raise CannotRead(
                    f"{entry.path}: ends within {entry.key}. Fetch the file once more."
                )
            done += got


def bytes_of(flat: Tensor) -> memoryview:
    """The memory of a tensor of bytes."""
    return flat.numpy().data


def same_bytes(a: Entry, b: Entry) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (a.code, a.shape) != (b.code, b.shape):
        return False
    for offset in range(0, a.nbytes, _BYTES):
        size = min(_BYTES, a.nbytes - offset)
        one, other = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
        read_into(one, a, offset)
        read_into(other, b, offset)
        if not torch.equal(one, other):
            return False
    return True


def blocks(shape: tuple[int, ...], kept_whole: set[int]) -> Iterator[tuple[int, int, int]]:
    """(axis, first, count) of slices of a box, none much larger than BLOCK elements where that can
    be. No slice cuts an axis of `kept_whole`."""
    if not shape:
        yield 0, 0, 1
        return
    total = 1
    for length in shape:
        total *= length
    allowed = [axis for axis in range(len(shape)) if axis not in kept_whole and shape[axis] > 1]
    if not allowed or total <= BLOCK:
        yield 0, 0, shape[0]
        return
    longest = max(allowed, key=lambda axis: shape[axis])
    axis = next((a for a in allowed if total // shape[a] <= BLOCK), longest)
    count = max(1, BLOCK // (total // shape[axis]))
    for first in range(0, shape[axis], count):
        yield axis, first, min(count, shape[axis] - first)


def rows_of_block(shape: tuple[int, ...]) -> int:
    """How many rows (entries along the first axis) make a block; at least one."""
    return max(1, BLOCK * max(shape[0], 1) // max(1, math.prod(shape)))


def narrowed(piece: Piece, axis: int, first: int, count: int) -> Piece | None:
    """The part of a piece that lies in first..first+count of `axis`, its place kept."""
    cut = piece.cut(axis, first, first + count)
    return None if cut is None else cut.moved(axis, first)


def read_piece(entry: Entry, piece: Piece) -> Tensor:
    """A box of a file tensor; only the rows that it needs are read where it is cut by rows."""
    for position, axis in enumerate(piece.axes):
        if axis.file_axis == 0 and axis.length < entry.shape[0]:
            rows = read_rows(entry, axis.file_start, axis.length)
            axes = list(piece.axes)
            axes[position] = replace(axis, file_start=0)
            return replace(piece, axes=tuple(axes)).view(rows)
    return piece.view(read_entry(entry))


def require_finite(entry: Entry, name: str, block: Tensor) -> None:
    """Raises CannotRead for a value that no Edit can use."""
    if block.is_floating_point() and not bool(block.isfinite().all()):
        raise CannotRead(
            f"{entry.path}: {entry.key} ({name}) holds values that are not finite, and a fold "
            "would spread them. Leave its norm out (--exclude), or mend the checkpoint."
        )


def exact_copy(stored: Tensor) -> Tensor:
    """The values as float64, in memory of their own."""
    return stored.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
