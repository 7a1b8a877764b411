"""The values of a model's tensors, box by box: the original's, and the folded ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from normsurgery.edits.casting import cast
from normsurgery.folding.checkpoint.evaluating import Box, Evaluation
from normsurgery.folding.checkpoint.layout import Entry
from normsurgery.folding.checkpoint.pieces import Piece
from normsurgery.folding.checkpoint.reading import (
    exact_copy,
    narrowed,
    read_entry,
    read_piece,
    read_rows,
    same_bytes,
)
from normsurgery.folding.checkpoint.streaming import Output, folded
from normsurgery.verifying.judge import Verdict, judge


@dataclass
class Original:
    """Reads the source's values."""

    evaluation: Evaluation

    def kept(self, name: str) -> frozenset[int]:
        return frozenset()

    def __call__(self, name: str, box: Box) -> Tensor:
        pieces, entries = self.evaluation.pieces(name), self.evaluation.entries
        values = _assembled(pieces, entries, box)
        return values.double() if values.is_floating_point() else values


@dataclass
class Stored:
    """Computes the folded values, and holds what was written against them.

    wrong: name or key -> what is wrong. seen: key -> the boxes of it that were compared.
    """

    evaluation: Evaluation
    written: Mapping[str, Entry]
    wrong: dict[str, Verdict] = field(default_factory=dict)
    seen: dict[str, set[Box]] = field(default_factory=dict)

    def kept(self, name: str) -> frozenset[int]:
        return frozenset(self.evaluation.kept_whole(name))

    def __call__(self, name: str, box: Box) -> Tensor:
        evaluation = self.evaluation
        source = _assembled(evaluation.pieces(name), evaluation.entries, box)
        if not source.is_floating_point():
            return source
        exact = evaluation.final(name, exact_copy(source), box)
        pieces = self._pieces(name)
        if all(piece.key in self.written for piece in pieces):  # else it was dropped
            self._compare(name, exact, _assembled(pieces, self.written, box))
            for part in _parts(pieces, box):
                self.seen.setdefault(part.key, set()).add(Box(part.starts, part.shape))
        return exact

    def compare_rest(self, outputs: Iterable[Output]) -> None:
        """Everything that was written and that no layer has read."""
        for output in outputs:
            entry = self.written[output.key]
            if sum(math.prod(box.shape) for box in self.seen.get(output.key, ())) >= math.prod(
                entry.shape
            ):
                continue
            compare = self._is_folded if output.parts else _is_copied
            if not compare(output, entry):
                self.wrong[output.key] = Verdict(False, "what was written is not what was computed")

    def _is_folded(self, output: Output, entry: Entry) -> bool:
        return all(
            torch.equal(
                rows, read_rows(entry, first, len(rows)) if entry.shape else read_entry(entry)
            )
            for first, rows in folded(output, self.evaluation)
        )

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        pieces = self.evaluation.pieces(name)
        if name not in self.evaluation.copied:
            return pieces
        key = self.evaluation.key_of_copy(name)
        return tuple(replace(piece, key=key) for piece in pieces)

    def _compare(self, name: str, exact: Tensor, found: Tensor) -> None:
        wanted = cast(exact, found.dtype)[0]
        if torch.equal(found, wanted):
            return
        verdict = judge(found.contiguous(), exact, wanted)
        if verdict.passed is not True:
            self.wrong.setdefault(name, verdict)


def _is_copied(output: Output, entry: Entry) -> bool:
    return same_bytes(output.source, entry)


def _parts(pieces: Sequence[Piece], box: Box) -> Iterator[Piece]:
    """What of each piece lies in the box."""
    for piece in pieces:
        part: Piece | None = piece
        for axis, (start, length) in enumerate(zip(box.starts, box.shape, strict=True)):
            part = part and narrowed(part, axis, start, length)
        if part is not None:
            yield part


def _assembled(pieces: Sequence[Piece], entries: Mapping[str, Entry], box: Box) -> Tensor:
    """A box of a tensor, from all the files' tensors that hold a part of it."""
    parts = list(_parts(pieces, box))
    if len(parts) == 1:
        return read_piece(entries[parts[0].key], parts[0])
    whole = torch.empty(box.shape, dtype=entries[parts[0].key].dtype)
    for part in parts:
        spans = zip(part.starts, part.shape, box.starts, strict=True)
        place = tuple(slice(start - low, start - low + size) for start, size, low in spans)
        whole[place] = read_piece(entries[part.key], part)
    return whole
