"""Where the values of a model's tensor lie in the files: boxes of file tensors, moved and joined.

transformers converts checkpoints while it loads them: experts are stacked, projections joined or
split. Its own conversion operations are run here on `Composite`s, which have shapes and no values
and understand stack, cat, chunk, split, transpose and squeeze. What else an operation does to a
tensor raises NotPlacement: it is then not known where the values lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


class NotPlacement(Exception):
    """An operation that does more than move whole boxes of values."""


@dataclass(frozen=True)
class Axis:
    """One axis of a box: where it starts in the model's tensor, how long it is, and which axis of
    the file's tensor it is (None: one that stacking made), from where on."""

    start: int
    length: int
    file_axis: int | None
    file_start: int = 0


@dataclass(frozen=True)
class Piece:
    """A box of the file tensor `key`. `fixed`: file axes of which it holds one index."""

    key: str
    axes: tuple[Axis, ...]
    fixed: tuple[tuple[int, int], ...] = ()

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(axis.start for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.length for axis in self.axes)

    def view(self, stored: torch.Tensor) -> torch.Tensor:
        """The box as a view of the file's tensor, its axes in the model's order."""
        for axis in self.axes:
            if axis.file_axis is not None:
                stored = stored.narrow(axis.file_axis, axis.file_start, axis.length)
        for file_axis, index in sorted(self.fixed, reverse=True):
            stored = stored.select(file_axis, index)
        dropped = [file_axis for file_axis, _ in self.fixed]
        kept = [axis.file_axis for axis in self.axes if axis.file_axis is not None]
        stored = stored.permute([k - sum(d < k for d in dropped) for k in kept])
        for position, axis in enumerate(self.axes):
            if axis.file_axis is None:
                stored = stored.unsqueeze(position)
        return stored

    def of_rows(self, first: int, count: int) -> Piece | None:
        """What of the box lies in first..first+count of the file tensor's first axis, its place
        in the model kept, as a box of these rows alone; None if nothing does."""
        held = dict(self.fixed)
        if 0 in held:
            inside = first <= held[0] < first + count
            fixed = tuple((k, i - first if k == 0 else i) for k, i in self.fixed)
            return replace(self, fixed=fixed) if inside else None
        position = next(k for k, axis in enumerate(self.axes) if axis.file_axis == 0)
        axis = self.axes[position]
        low = max(axis.file_start, first)
        high = min(axis.file_start + axis.length, first + count)
        if low >= high:
            return None
        start = axis.start + low - axis.file_start
        return self._with(position, Axis(start, high - low, 0, low - first))

    def moved(self, axis: int, by: int) -> Piece:
        return self._with(axis, replace(self.axes[axis], start=self.axes[axis].start + by))

    def cut(self, axis: int, start: int, end: int) -> Piece | None:
        """What lies in start..end of `axis`, which then begins at 0; None if nothing does."""
        old = self.axes[axis]
        first, last = max(old.start, start), min(old.start + old.length, end)
        if first >= last:
            return None
        inside = old.file_start + (first - old.start if old.file_axis is not None else 0)
        return self._with(axis, Axis(first - start, last - first, old.file_axis, inside))

    def without(self, axis: int) -> Piece:
        """An axis of length 1 left out."""
        old = self.axes[axis]
        rest = (*self.axes[:axis], *self.axes[axis + 1 :])
        held = () if old.file_axis is None else ((old.file_axis, old.file_start),)
        return replace(self, axes=rest, fixed=(*self.fixed, *held))

    def _with(self, axis: int, new: Axis) -> Piece:
        return replace(self, axes=(*self.axes[:axis], new, *self.axes[axis + 1 :]))


class Composite:
    """A tensor without values: its shape, and the pieces that it consists of."""

    def __init__(self, shape: Sequence[int], pieces: Sequence[Piece]) -> None:
        self.shape = torch.Size(shape)
        self.pieces = tuple(pieces)

    @classmethod
    def of_file(cls, key: str, shape: Sequence[int]) -> Composite:
        axes = tuple(Axis(0, length, axis) for axis, length in enumerate(shape))
        return cls(shape, (Piece(key, axes),))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = _FUNCTIONS.get(func)
        if made is None:
            raise NotPlacement(getattr(func, "__name__", str(func)))
        return made(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        raise NotPlacement(name)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def contiguous(self) -> Composite:
        return self

    def squeeze(self, dim: int) -> Composite:
        axis = dim % self.ndim
        if self.shape[axis] != 1:
            return self
        shape = [size for k, size in enumerate(self.shape) if k != axis]
        return Composite(shape, [piece.without(axis) for piece in self.pieces])


def _stack(tensors: Sequence[Composite], dim: int = 0) -> Composite:
    first = tensors[0]
    axis = dim % (first.ndim + 1)
    pieces = [
        replace(piece, axes=(*piece.axes[:axis], Axis(k, 1, None), *piece.axes[axis:]))
        for k, tensor in enumerate(tensors)
        for piece in tensor.pieces
    ]
    return Composite((*first.shape[:axis], len(tensors), *first.shape[axis:]), pieces)


def _cat(tensors: Sequence[Composite], dim: int = 0) -> Composite:
    axis = dim % tensors[0].ndim
    pieces: list[Piece] = []
    offset = 0
    for tensor in tensors:
        pieces += [piece.moved(axis, offset) for piece in tensor.pieces]
        offset += tensor.shape[axis]
    shape = list(tensors[0].shape)
    shape[axis] = offset
    return Composite(shape, pieces)


def _transpose(tensor: Composite, dim0: int, dim1: int) -> Composite:
    order = list(range(tensor.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    pieces = [replace(p, axes=tuple(p.axes[k] for k in order)) for p in tensor.pieces]
    return Composite([tensor.shape[k] for k in order], pieces)


def _split(tensor: Composite, sizes: int | Sequence[int], dim: int = 0) -> tuple[Composite, ...]:
    axis = dim % tensor.ndim
    total = tensor.shape[axis]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    return tuple(_cuts(tensor, sizes, axis))


def _chunk(tensor: Composite, chunks: int, dim: int = 0) -> tuple[Composite, ...]:
    return _split(tensor, max(1, -(-tensor.shape[dim] // chunks)), dim)


def _cuts(tensor: Composite, sizes: Sequence[int], axis: int) -> Iterator[Composite]:
    start = 0
    for size in sizes:
        cut = [piece.cut(axis, start, start + size) for piece in tensor.pieces]
        shape = list(tensor.shape)
        shape[axis] = size
        yield Composite(shape, [piece for piece in cut if piece is not None])
        start += size


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.transpose: _transpose,
    torch.split: _split,
    torch.chunk: _chunk,
}
