"""What a checkpoint directory holds: its configuration, its shards' headers, and every other file.

Only headers are read. What cannot be folded (quantized weights, adapters, pickles, broken files) is
refused here, by the tensor's or the file's name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from normsurgery.errors import CannotRead
from normsurgery.folding.checkpoint.foreign import refuse_foreign_files, refuse_foreign_tensors

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_LENGTH_BYTES = 8

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard: where its bytes lie, from the start of the file."""

    key: str
    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    path: Path

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.code]


@dataclass(frozen=True)
class Shard:
    """One safetensors file: entries in the order of their bytes."""

    name: str
    path: Path
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str] | None
    header_bytes: int
    size: int


@dataclass(frozen=True)
class Layout:
    """A checkpoint directory. `others` are all files that are no shard, relative to it."""

    directory: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    index: Mapping[str, Any] | None
    others: tuple[Path, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def entries(self) -> dict[str, Entry]:
        return {entry.key: entry for shard in self.shards for entry in shard.entries}


def read_layout(directory: Path) -> Layout:
    """Read the headers of a checkpoint. Raises CannotRead where it cannot be folded as it is."""
    if not directory.is_dir():
        raise CannotRead(f"{directory}: is no directory. Give the directory of a checkpoint.")
    refuse_foreign_files(directory)
    config = read_object(directory / CONFIG)
    index = read_object(directory / INDEX) if (directory / INDEX).is_file() else None
    names = _shard_names(directory, index)
    shards = tuple(read_shard(directory / name, name) for name in names)
    _check_keys(directory, shards, index)
    for shard in shards:
        refuse_foreign_tensors(shard.path, {e.key: e.code for e in shard.entries}, DTYPES)
    others = tuple(sorted(_other_files(directory, {*names})))
    return Layout(directory, config, shards, index, others, tuple(_notes(others)))


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CannotRead."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CannotRead(
            f"{file.parent}: has no {file.name}, so it is no transformers checkpoint. Give a "
            "directory written by save_pretrained."
        ) from None
    except (ValueError, OSError) as error:
        raise CannotRead(
            f"{file}: not readable as JSON ({error}). Fetch the file once more."
        ) from None
    if not isinstance(content, dict):
        raise CannotRead(f"{file}: holds a {type(content).__name__}, wanted an object.")
    return content


def read_shard(path: Path, name: str) -> Shard:
    """The header of one safetensors file. Raises CannotRead where the file is not whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 0 < length <= min(size - _LENGTH_BYTES, _MOST_HEADER_BYTES):
                raise _broken(path, f"its header would take {length} of its {size} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CannotRead(f"{path}: cannot be read ({error}).") from None
    except ValueError as error:
        raise _broken(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    first = _LENGTH_BYTES + length
    try:
        entries = [_entry(path, key, value, first) for key, value in header.items()]
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"an entry of its header cannot be used ({error!r})") from None
    entries.sort(key=lambda entry: entry.start)
    _check_bytes(path, entries, first, size)
    return Shard(name, path, tuple(entries), metadata, first, size)


def _entry(path: Path, key: str, value: Mapping[str, Any], first: int) -> Entry:
    start, end = value["data_offsets"]
    shape = tuple(int(size) for size in value["shape"])
    return Entry(key, str(value["dtype"]), shape, first + start, end - start, path)


def _check_bytes(path: Path, entries: list[Entry], first: int, size: int) -> None:
    """Entries follow each other without a gap, each as long as its shape says, up to the end."""
    position = first
    for entry in entries:
        if entry.start != position:
            raise _broken(path, f"the bytes of {entry.key} do not follow those before them")
        if entry.code in DTYPES:
            count = 1
            for length in entry.shape:
                count *= length
            if count * entry.dtype.itemsize != entry.nbytes:
                raise _broken(path, f"{entry.key} has not as many bytes as its shape asks for")
        position += entry.nbytes
    if position != size:
        state = "truncated" if position > size else "too long"
        raise _broken(path, f"it is {state}: {size} bytes, and its header tells of {position}")


def _broken(path: Path, why: str) -> CannotRead:
    return CannotRead(f"{path}: not a whole safetensors file: {why}. Fetch the file once more.")


def _shard_names(directory: Path, index: Mapping[str, Any] | None) -> list[str]:
    if index is None:
        if (directory / SINGLE).is_file():
            return [SINGLE]
        raise CannotRead(
            f"{directory}: has neither {SINGLE} nor {INDEX}. Load the model and write it with "
            "save_pretrained."
        )
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CannotRead(f"{directory / INDEX}: has no weight_map. Fetch the file once more.")
    names = sorted(set(weights.values()))
    for name in names:
        if Path(name).name != name:
            raise CannotRead(f"{directory / INDEX}: names a shard outside the directory: {name}.")
        if not (directory / name).is_file():
            raise CannotRead(f"{directory}: {name} is missing, which {INDEX} names. Fetch it.")
    return names


def _check_keys(
    directory: Path, shards: tuple[Shard, ...], index: Mapping[str, Any] | None
) -> None:
    """Each key is in one shard, and the index knows where."""
    homes: dict[str, str] = {}
    for shard in shards:
        for entry in shard.entries:
            if entry.key in homes:
                raise CannotRead(
                    f"{directory}: {entry.key} is in {homes[entry.key]} and in {shard.name}. "
                    "Write the checkpoint again with save_pretrained."
                )
            homes[entry.key] = shard.name
    for key, name in ({} if index is None else index["weight_map"]).items():
        if homes.get(key) != name:
            raise CannotRead(
                f"{directory / INDEX}: says that {key} is in {name}, which does not hold it. "
                "Fetch the checkpoint once more."
            )


def _other_files(directory: Path, shards: set[str]) -> Iterator[Path]:
    seen: set[str] = set()
    for folder, inner, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above it
            inner.clear()
            continue
        seen.add(real)
        for name in names:
            relative = (Path(folder) / name).relative_to(directory)
            if str(relative) not in shards:
                yield relative


def _notes(others: tuple[Path, ...]) -> Iterator[str]:
    for path in others:
        if path.suffix in (".safetensors", ".bin", ".gguf", ".pth", ".pt", ".onnx", ".h5"):
            yield (
                f"{path} was copied as it is; if it holds weights of this model, they are those "
                "before the fold"
            )
