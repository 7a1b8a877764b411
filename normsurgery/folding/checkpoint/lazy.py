"""Tensors whose values are read where an operation needs them, a block at a time.

A model with such parameters runs forward in little memory, however large it is: a matrix product
reads the matrix block by block, an embedding its rows. Every other operation gets the whole tensor,
for as long as it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from normsurgery.folding.checkpoint.evaluating import Box
from normsurgery.folding.checkpoint.reading import blocks

aten = torch.ops.aten


@dataclass(frozen=True)
class Source:
    """Where values come from. `fetch` gives a box; it never asks for a part of a `kept` axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[Box], Tensor]
    kept: frozenset[int] = frozenset()


@dataclass(frozen=True)
class View:
    """A source with axes reordered (`axes`: which source axes it has, in order), and others held
    at one index (`fixed`)."""

    source: Source
    axes: tuple[int, ...]
    fixed: Mapping[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape[axis] for axis in self.axes)

    def read(self, axis: int = 0, first: int = 0, count: int | None = None) -> Tensor:
        """The values, of `axis` (of this view) only first..first+count."""
        rank = len(self.source.shape)
        starts = [self.fixed.get(k, 0) for k in range(rank)]
        shape = [1 if k in self.fixed else self.source.shape[k] for k in range(rank)]
        if count is not None:
            starts[self.axes[axis]], shape[self.axes[axis]] = first, count
        values = self.source.fetch(Box(tuple(starts), tuple(shape)))
        for held in sorted(self.fixed, reverse=True):
            values = values.squeeze(held)
        order = sorted(self.axes)
        return values.permute([order.index(axis) for axis in self.axes])

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """(axis of this view, first, count) of blocks of rows as they lie in the source."""
        order = sorted(self.axes)
        kept = {order.index(axis) for axis in self.source.kept if axis in order}
        for position, first, count in blocks(tuple(self.source.shape[k] for k in order), kept):
            yield self.axes.index(order[position]), first, count


class Lazy(Tensor):
    """A tensor subclass without storage; see the module."""

    view_of: View

    @staticmethod
    def __new__(cls, view: View) -> Lazy:
        made: Lazy = Tensor._make_wrapper_subclass(
            cls, view.shape, dtype=view.source.dtype, device=torch.device("cpu")
        )
        made.view_of = view
        return made

    @classmethod
    def of(cls, source: Source) -> Lazy:
        return cls(View(source, tuple(range(len(source.shape))), {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Lazy(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*tree_map(_whole, args), **tree_map(_whole, kwargs))


def _whole(value: Any) -> Any:
    return value.view_of.read() if isinstance(value, Lazy) else value


def _same(tensor: Lazy) -> Lazy:
    return Lazy(tensor.view_of)


def _transposed(tensor: Lazy, dim0: int = 0, dim1: int = 1) -> Any:
    axes = list(tensor.view_of.axes)
    if len(axes) < 2:
        return _same(tensor)
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return Lazy(replace(tensor.view_of, axes=tuple(axes)))


def _selected(tensor: Lazy, dim: int, index: int) -> Any:
    view = tensor.view_of
    axis = view.axes[dim]
    if axis in view.source.kept:
        return NotImplemented
    rest = tuple(k for k in view.axes if k != axis)
    place = index % view.source.shape[axis]
    return Lazy(replace(view, axes=rest, fixed={**view.fixed, axis: place}))


def _mm(a: Tensor, b: Tensor) -> Any:
    if isinstance(a, Lazy) or not isinstance(b, Lazy):
        return NotImplemented
    view = b.view_of
    result = a.new_zeros(a.shape[0], b.shape[1])
    for axis, first, count in view.blocks():
        block = view.read(axis, first, count)
        if axis == 1:
            result[:, first : first + count] = a @ block
        else:
            result += a[:, first : first + count] @ block
    return result


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _mm(a, b)
    if product is NotImplemented or (beta, alpha) != (1, 1):
        return NotImplemented
    return product + _whole(bias)


def _embedding(weight: Tensor, indices: Tensor, *args: Any) -> Any:
    if not isinstance(weight, Lazy) or 0 in weight.view_of.source.kept:
        return NotImplemented
    view = weight.view_of
    found, places = torch.unique(indices, return_inverse=True)
    rows = [view.read(0, int(row), 1) for row in found]
    table = torch.cat(rows) if rows else weight.new_zeros(0, *weight.shape[1:])
    return table[places]


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.t.default: _transposed,
    aten.transpose.int: _transposed,
    aten.select.int: _selected,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.embedding.default: _embedding,
}
