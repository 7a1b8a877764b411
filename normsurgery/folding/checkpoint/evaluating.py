"""The value of one tensor after all Edits, box by box, from a checkpoint that is never loaded.

Each output is a function of the source's tensors alone: the Edits that write it, in order, and the
values that the tensors they read have at that point. So outputs can be made in any order, a block
of rows at a time, and again after a kill.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from normsurgery.edits.running import run
from normsurgery.edits.types import (
    AddProduct,
    Centre,
    Copy,
    Create,
    Drop,
    Edit,
    Fill,
    Scale,
    Shift,
    Vector,
    reads,
)
from normsurgery.errors import UsageError
from normsurgery.folding.checkpoint.keys import Names
from normsurgery.folding.checkpoint.layout import Entry
from normsurgery.folding.checkpoint.pieces import Piece
from normsurgery.folding.checkpoint.reading import (
    blocks,
    exact_copy,
    narrowed,
    read_piece,
    require_finite,
)

_KEPT = 1 << 20  # elements of a computed value that are kept for the next Edit that reads it


@dataclass(frozen=True)
class Box:
    """A part of a tensor of the model."""

    starts: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class Evaluation:
    """Edits over a checkpoint. `known` holds small values: (name, Edits of it that had run)."""

    edits: tuple[Edit, ...]
    names: Names
    entries: Mapping[str, Entry]
    known: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._means: dict[int, Tensor] = {}  # by the number of the Centre
        self._written: dict[str, list[int]] = {}
        self._sources = {e.target: e.source for e in self.edits if isinstance(e, Copy)}
        for index, edit in enumerate(self.edits):
            self._written.setdefault(edit.target, []).append(index)

    @property
    def written(self) -> frozenset[str]:
        """Names that some Edit changes."""
        return frozenset(self._written)

    @property
    def touched(self) -> frozenset[str]:
        """Names that some Edit changes or reads."""
        return self.written | {name for edit in self.edits for name in reads(edit)}

    @property
    def copied(self) -> Mapping[str, str]:
        """Tied names that become tensors of their own, and what they were tied to."""
        return self._sources

    def left_out(self, neutral: bool) -> tuple[str, ...]:
        """Names that the result does not hold: dropped ones, with `neutral` also filled ones."""
        filled = (
            name for name, of in self._written.items() if isinstance(self.edits[of[-1]], Fill)
        )
        dropped = {edit.target for edit in self.edits if isinstance(edit, Drop)}
        return tuple(sorted(dropped | set(filled if neutral else ())))

    def held(self) -> dict[str, list[tuple[str, Piece]]]:
        """file key -> the names whose values it is to hold, and their boxes in it."""
        found: dict[str, list[tuple[str, Piece]]] = {}
        for name, pieces in self.names.pieces.items():
            for piece in pieces:
                found.setdefault(piece.key, []).append((name, piece))
                for alias, key in self.names.copies.get(name, ()):
                    own = alias if alias in self._sources else name
                    found.setdefault(key, []).append((own, replace(piece, key=key)))
        return found

    def key_of_copy(self, name: str) -> str:
        """The file key of a tied name that becomes a tensor of its own."""
        copies = dict(self.names.copies.get(self.names.aliases[name], ()))
        return copies.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.names.shapes[self.names.aliases[name]]

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Where the values that `name` starts from lie."""
        return self.names.pieces[self.names.aliases[name]]

    def final(self, name: str, block: Tensor, box: Box) -> Tensor:
        """All Edits of `name` on a float64 block of its source values, which is used up."""
        return self._after(name, len(self.edits), block, box)

    def kept_whole(self, name: str) -> set[int]:
        """Axes that a block of `name` must not cut: all or none."""
        whole = (
            not isinstance(edit, Copy | Drop | AddProduct | Centre) and not self._is_local(edit)
            for edit in self._of(name, len(self.edits))
        )
        return set(range(len(self.shape(name)))) if any(whole) else set()

    def _of(self, name: str, before: int) -> Iterator[Edit]:
        if name in self._sources:
            first = self._written[name][0]
            yield from self._of(self._sources[name], min(before, first))
        yield from (self.edits[i] for i in self._written.get(name, ()) if i < before)

    def _after(self, name: str, before: int, block: Tensor, box: Box) -> Tensor:
        own = [i for i in self._written.get(name, ()) if i < before]
        if own and isinstance(self.edits[own[0]], Copy):
            block = self._after(self._sources[name], own[0], block, box)
            own = own[1:]
        for index in own:
            block = self._edited(index, block, box)
        return block

    def _edited(self, index: int, block: Tensor, box: Box) -> Tensor:
        edit = self.edits[index]
        if isinstance(edit, Drop):
            return block
        if isinstance(edit, AddProduct):
            return self._with_product(index, edit, block, box)
        whole = self.shape(edit.target)
        if isinstance(edit, Centre) and box.shape[edit.axis] < whole[edit.axis]:
            return block.sub_(self._mean(index, edit)[_along(box, edit.axis % len(whole))])
        if not (isinstance(edit, Centre) or self._is_local(edit)):
            self._require_whole(edit, box)
        tensors = {name: self.value(name, index) for name in reads(edit) if name != edit.target}
        tensors[edit.target] = block
        run((_restricted(edit, box, whole),), tensors, inplace=True)
        return tensors[edit.target]

    def _is_local(self, edit: Edit) -> bool:
        """Each value depends on itself and on vectors alone."""
        return isinstance(edit, Fill | Shift) or (isinstance(edit, Scale) and edit.groups == 1)

    def _mean(self, index: int, edit: Centre) -> Tensor:
        """The mean that a Centre subtracts, summed block by block; its axis has length 1."""
        if index in self._means:
            return self._means[index]
        name, shape = edit.target, self.shape(edit.target)
        axis = edit.axis % len(shape)
        total = torch.zeros([*shape[:axis], 1, *shape[axis + 1 :]], dtype=torch.float64)
        for piece in self.pieces(name):
            for cut, first, count in blocks(piece.shape, self.kept_whole(name)):
                part = narrowed(piece, cut, piece.starts[cut] + first, count)
                assert part is not None
                box = Box(part.starts, part.shape)
                values = self._after(name, index, exact_copy(self.read(name, part)), box)
                total[_along(box, axis)] += values.sum(axis, keepdim=True)
        self._means[index] = total / shape[axis]
        return self._means[index]

    def value(self, name: str, before: int) -> Tensor:
        """The whole of `name` as float64, after its Edits that come before number `before`."""
        count = sum(i < before for i in self._written.get(name, ()))
        if (name, count) in self.known:
            return self.known[name, count].clone()
        shape = self.shape(name)
        box = Box((0,) * len(shape), shape)
        whole = self._after(name, before, self.source(name, finite=True), box)
        if whole.numel() <= _KEPT:
            self.known[name, count] = whole.clone()
        return whole

    def source(self, name: str, *, finite: bool = False) -> Tensor:
        """The whole of `name` before all Edits, float64. finite: CannotRead for NaN or Inf."""
        whole = torch.empty(self.shape(name), dtype=torch.float64)
        for piece in self.pieces(name):
            place = tuple(slice(s, s + n) for s, n in zip(piece.starts, piece.shape, strict=True))
            entry = self.entries[piece.key]
            whole[place] = self.read(name, piece) if finite else read_piece(entry, piece)
        return whole

    def read(self, name: str, piece: Piece) -> Tensor:
        """The source's values of a box, in their own dtype. Raises CannotRead for NaN or Inf."""
        block = read_piece(self.entries[piece.key], piece)
        require_finite(self.entries[piece.key], name, block)
        return block

    def _with_product(self, index: int, edit: AddProduct, block: Tensor, box: Box) -> Tensor:
        """The weight's blocks one after the other: each adds its part of the sum."""
        others = [name for name in reads(edit) if name not in (edit.target, edit.weight)]
        vectors = {name: self.value(name, index) for name in others}
        if edit.groups > 1:
            self._require_whole(edit, box)
            tensors = {**vectors, edit.weight: self.value(edit.weight, index), edit.target: block}
            run((edit,), tensors)
            return tensors[edit.target]
        result = block.clone()
        for part, inside in self._parts(edit, box):
            of_part = Box(part.starts, part.shape)
            stored = self.read(edit.weight, part)
            weight = self._after(edit.weight, index, exact_copy(stored), of_part)
            tensors = {**vectors, edit.weight: weight, edit.target: result[inside]}
            shape = self.shape(edit.weight)
            by = _limited(edit.by, edit.axis % len(shape), of_part, shape)
            run((replace(edit, by=by),), tensors)
            result[inside] = tensors[edit.target]
        return result

    def _parts(self, edit: AddProduct, box: Box) -> Iterator[tuple[Piece, tuple[slice, ...]]]:
        """Blocks of the weight, and the part of the target's box that each adds to."""
        rank = len(self.shape(edit.weight))
        axes = [*range(len(box.shape) - 1), edit.out_axis % rank]
        for piece in self.pieces(edit.weight):
            within: Piece | None = piece
            for axis, low, size in zip(axes, box.starts, box.shape, strict=True):
                within = within and narrowed(within, axis, low, size)
            if within is None:
                continue
            for axis, first, count in blocks(within.shape, self.kept_whole(edit.weight)):
                part = narrowed(within, axis, within.starts[axis] + first, count)
                assert part is not None
                lows = zip(axes, box.starts, strict=True)
                yield (
                    part,
                    tuple(
                        slice(part.starts[a] - b, part.starts[a] - b + part.shape[a])
                        for a, b in lows
                    ),
                )

    def _require_whole(self, edit: Edit, box: Box) -> None:
        if box.shape != self.shape(edit.target):
            raise UsageError(
                f"{edit.target}: {type(edit).__name__} needs the whole tensor, which this "
                "checkpoint holds in parts. Leave this site out, or fold the loaded model."
            )


def _along(box: Box, axis: int) -> tuple[slice, ...]:
    """Where a box lies in a tensor that has length 1 along `axis`."""
    spans = list(zip(box.starts, box.shape, strict=True))
    spans[axis] = (0, 1)
    return tuple(slice(start, start + length) for start, length in spans)


def _restricted(edit: Edit, box: Box, whole: tuple[int, ...]) -> Edit:
    """The Edit as it acts on a box of its target."""
    if isinstance(edit, Scale | Shift):
        return replace(edit, by=_limited(edit.by, edit.axis % len(whole), box, whole))
    return edit


def _limited(by: Vector, axis: int, box: Box, whole: tuple[int, ...]) -> Vector:
    """The vector's elements for the box's part of `axis`."""
    start, length = box.starts[axis], box.shape[axis]
    if length == whole[axis]:
        return by
    index: Sequence[int] = range(whole[axis]) if by.index is None else by.index
    return replace(by, index=tuple(index[start : start + length]))


def refuse_created(edits: Sequence[Edit]) -> None:
    """The stock class has no place for a tensor that the checkpoint does not have."""
    for edit in edits:
        if isinstance(edit, Create):
            raise UsageError(
                f"{edit.target} would be a new tensor, and the class that config.json names has "
                "none there. Leave that norm out (--exclude), or fold the loaded model."
            )
