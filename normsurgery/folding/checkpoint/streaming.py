"""Writing the folded shards: the same files, keys, order and metadata; a tensor at a time.

What no Edit changes is copied byte for byte by the kernel. What one changes is read, changed and
written some rows at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from normsurgery.errors import UsageError
from normsurgery.folding.checkpoint.evaluating import Box, Evaluation
from normsurgery.folding.checkpoint.layout import Entry, Shard
from normsurgery.folding.checkpoint.losses import Losses
from normsurgery.folding.checkpoint.pieces import Piece
from normsurgery.folding.checkpoint.reading import (
    blocks,
    bytes_of,
    exact_copy,
    read_entry,
    read_rows,
    require_finite,
    rows_of_block,
)

_LENGTH_BYTES = 8
_ALIGNMENT = 8  # of the header, as the safetensors library writes it
_COPIED = 1 << 26  # bytes handed to the kernel at once
_BUFFER = 1 << 20

Progress = Callable[[int], None]  # bytes written since the last call


@dataclass(frozen=True)
class Output:
    """One tensor to be written: `source` has its dtype and shape; `parts` are the model's tensors
    in it that Edits change, with their boxes. Without parts its bytes are those of the source."""

    key: str
    source: Entry
    parts: tuple[tuple[str, Piece], ...] = ()


@dataclass(frozen=True)
class OutputShard:
    """One file to be written. `source` is the shard it replaces."""

    source: Shard
    outputs: tuple[Output, ...]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def nbytes(self) -> int:
        return sum(output.source.nbytes for output in self.outputs)


def write_shard(
    path: Path, shard: OutputShard, evaluation: Evaluation, progress: Progress = lambda n: None
) -> None:
    """Write one shard under a temporary name, then rename it. Raises CannotRead and UsageError."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb", buffering=0) as file:
        _write_all(file, memoryview(header_bytes(shard)))
        for run in _runs(shard.outputs):
            if run[0].parts:
                for _, rows in folded(run[0], evaluation):
                    _write_all(file, bytes_of(_as_bytes(rows)))
                    progress(rows.nbytes)
            else:
                first, last = run[0].source, run[-1].source
                _copy(file, first.path, first.start, last.start + last.nbytes, progress)
        os.fsync(file.fileno())
    temporary.replace(path)


def header_bytes(shard: OutputShard) -> bytes:
    """The safetensors header: that of the source where the same tensors are written."""
    kept = [output.source for output in shard.outputs]
    if kept == list(shard.source.entries) and all(o.key == o.source.key for o in shard.outputs):
        with shard.source.path.open("rb") as file:
            return file.read(shard.source.header_bytes)
    header: dict[str, object] = {}
    if shard.source.metadata is not None:
        header["__metadata__"] = dict(shard.source.metadata)
    position = 0
    for output in shard.outputs:
        end = position + output.source.nbytes
        header[output.key] = {
            "dtype": output.source.code,
            "shape": list(output.source.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def folded(output: Output, evaluation: Evaluation) -> Iterator[tuple[int, Tensor]]:
    """The tensor after all Edits, in the dtype it has in the file: (first row, so many rows).

    Raises CannotRead where it holds NaN or Inf; at its end UsageError where its dtype cannot hold
    the result.
    """
    source = output.source
    losses = Losses()
    for first, count in _row_blocks(output, evaluation):
        rows = read_rows(source, first, count) if source.shape else read_entry(source)
        for name, piece in output.parts:
            part = piece.of_rows(first, count) if source.shape else piece
            if part is not None:
                _fold_piece(output, evaluation, name, part, rows, losses)
        yield first, rows
    loss = losses.serious(math.prod(source.shape))
    if loss is not None:
        names = ", ".join(sorted({name for name, _ in output.parts}))
        raise UsageError(
            f"{output.key} ({names}): {loss}. Nothing was folded. Leave its norm out (--exclude), "
            "or save the checkpoint in a wider dtype first."
        )


def _row_blocks(output: Output, evaluation: Evaluation) -> Iterator[tuple[int, int]]:
    """Rows to fold at a time: as many as make a block, or all where an Edit needs all."""
    shape = output.source.shape
    if not shape or any(evaluation.kept_whole(name) for name, _ in output.parts):
        yield 0, shape[0] if shape else 1
        return
    count = rows_of_block(shape)
    for first in range(0, shape[0], count):
        yield first, min(count, shape[0] - first)


def _fold_piece(
    output: Output,
    evaluation: Evaluation,
    name: str,
    piece: Piece,
    stored: Tensor,
    losses: Losses,
) -> None:
    """Fold, in place, the part of the rows that belongs to one tensor of the model."""
    view = piece.view(stored)
    for axis, first, count in blocks(piece.shape, evaluation.kept_whole(name)):
        part = view.narrow(axis, first, count) if view.dim() else view
        require_finite(output.source, name, part)
        exact = evaluation.final(name, exact_copy(part), block_box(piece, axis, first, count))
        part.copy_(losses.cast(exact, stored.dtype))


def block_box(piece: Piece, axis: int, first: int, count: int) -> Box:
    """The place of a block of a piece in the model's tensor."""
    if not piece.shape:
        return Box((), ())
    starts, shape = list(piece.starts), list(piece.shape)
    starts[axis] += first
    shape[axis] = count
    return Box(tuple(starts), tuple(shape))


def _runs(outputs: tuple[Output, ...]) -> Iterator[list[Output]]:
    """Outputs one by one, and unchanged ones that follow each other in their file together."""
    run: list[Output] = []
    for output in outputs:
        if run and not output.parts and not run[-1].parts:
            last = run[-1].source
            if (last.path, last.start + last.nbytes) == (output.source.path, output.source.start):
                run.append(output)
                continue
        if run:
            yield run
        run = [output]
    if run:
        yield run


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _write_all(file: BinaryIO, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += file.write(data[done : done + _COPIED])


def _copy(file: BinaryIO, source: Path, start: int, end: int, progress: Progress) -> None:
    """Bytes start..end of `source`; where the kernel copies, they never enter this process."""
    with source.open("rb", buffering=0) as other:
        while start < end:
            done = _moved(file, other, start, end - start)
            if done == 0:
                raise UsageError(f"{source}: became shorter while it was read. Start again.")
            start += done
            progress(done)


def _moved(file: BinaryIO, other: BinaryIO, start: int, count: int) -> int:
    """Copy at most `count` bytes from `start` on; how many were."""
    try:
        return os.sendfile(file.fileno(), other.fileno(), start, min(_COPIED, count))
    except OSError:  # not every file system and not every kernel copies between files
        return file.write(os.pread(other.fileno(), min(_BUFFER, count), start))


def planned_outputs(
    shards: tuple[Shard, ...], evaluation: Evaluation, drop: bool, untied: Iterable[str] = ()
) -> tuple[OutputShard, ...]:
    """What to write. drop: neutral tensors are left out. untied: names that become tensors of
    their own; they are added to the last shard where the files have no key for them."""
    held = evaluation.held()
    dropped = frozenset(evaluation.left_out(drop))
    written = evaluation.written
    made = []
    for shard in shards:
        outputs = [
            Output(entry.key, entry, _changed(held.get(entry.key, ()), written))
            for entry in shard.entries
            if not _all_dropped(held.get(entry.key, ()), dropped)
        ]
        made.append(OutputShard(shard, tuple(outputs)))
    made[-1] = replace(made[-1], outputs=(*made[-1].outputs, *_added(evaluation, shards, untied)))
    return tuple(shard for shard in made if shard.outputs)


def _changed(
    held: Iterable[tuple[str, Piece]],
    written: frozenset[str],
) -> tuple[tuple[str, Piece], ...]:
    return tuple((name, piece) for name, piece in held if name in written)


def _all_dropped(held: Collection[tuple[str, Piece]], dropped: frozenset[str]) -> bool:
    return bool(held) and all(name in dropped for name, _ in held)


def _added(
    evaluation: Evaluation, shards: tuple[Shard, ...], untied: Iterable[str]
) -> Iterator[Output]:
    keys = {entry.key for shard in shards for entry in shard.entries}
    for name in untied:
        key = evaluation.key_of_copy(name)
        if key in keys:
            continue
        own = name if name in evaluation.copied else evaluation.names.aliases[name]
        (piece,) = evaluation.pieces(own)
        source = evaluation.entries[piece.key]
        yield Output(key, source, ((own, piece),) if own in evaluation.written else ())
