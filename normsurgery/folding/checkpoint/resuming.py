"""Where an unfinished run lives, and how it is taken up again.

Beside OUT stands `OUT.partial`: a journal (what is being folded, by which Edits, and which shards
are finished) and the folder that becomes OUT by one rename at the very end. Whatever kills a run,
OUT is either complete or not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normsurgery.edits.as_json import edit_to_json
from normsurgery.edits.types import Edit
from normsurgery.errors import NormsurgeryError, UsageError
from normsurgery.folding.checkpoint.layout import CONFIG, Layout
from normsurgery.jsonfiles import write_json

_JOURNAL = "journal.json"
_LOCK = "lock"
_FILES = "files"
_REPLACED = "replaced"


@dataclass(frozen=True)
class Workplace:
    """The folder of one unfinished run. `finished`: size of each shard that is written."""

    folder: Path
    out: Path
    task: Mapping[str, Any]
    finished: dict[str, int]

    @property
    def files(self) -> Path:
        return self.folder / _FILES

    def has(self, name: str) -> bool:
        """Whether this shard was finished by an earlier run, and is still as it was."""
        path = self.files / name
        return path.is_file() and self.finished.get(name) == path.stat().st_size

    def note(self, name: str) -> None:
        """Write down that a shard is finished."""
        self.finished[name] = (self.files / name).stat().st_size
        self._write()

    def publish(self) -> None:
        """Put the files in place by one rename; what stood there is removed after it."""
        _sync(self.files)
        if self.out.exists():
            self.out.rename(self.folder / _REPLACED)
        self.files.rename(self.out)
        _sync(self.out.parent)
        shutil.rmtree(self.folder)

    def _write(self) -> None:
        write_json(self.folder / _JOURNAL, {**self.task, "finished": self.finished})


@contextmanager
def workplace(out: Path, task: Mapping[str, Any], force: bool) -> Iterator[Workplace]:
    """The place to write to, held for this process alone.

    task: what identifies the run (source, edits, options), as JSON values. A folder of the same
    task is taken up; of another, refused or with `force` begun anew. Raises UsageError.
    """
    folder = partial_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{folder}: another run is writing there. Wait for it, or give another output."
            ) from None
        yield _taken_up(folder, out, task, force)


@contextmanager
def cleared_on_refusal(place: Workplace) -> Iterator[None]:
    """What is refused would be refused again: nothing of it is kept for another run."""
    try:
        yield
    except NormsurgeryError:
        shutil.rmtree(place.folder)
        raise


def partial_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _taken_up(folder: Path, out: Path, task: Mapping[str, Any], force: bool) -> Workplace:
    known = json.loads(json.dumps(task))
    before = _journal(folder)
    finished = before.pop("finished", {})
    files = folder / _FILES
    if before != known:
        if before and not force:
            raise UsageError(
                f"{folder} was left by a run with another {_difference(before, known)}. Give the "
                "same again to take it up, or --force to begin anew."
            )
        shutil.rmtree(files, ignore_errors=True)
        finished = {}
    files.mkdir(exist_ok=True)
    place = Workplace(folder, out, known, dict(finished))
    place._write()
    return place


def _journal(folder: Path) -> dict[str, Any]:
    """What an earlier run wrote down; empty if nothing that can be used."""
    try:
        found = json.loads((folder / _JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [name for name in now if before.get(name) != now[name]]
    return " and another ".join(changed) or "version"


def task_of(layout: Layout, edits: Sequence[Edit], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is, so that only the very same is taken up."""
    return {
        "source": source_fingerprint(layout),
        "plan": _digest(json.dumps([edit_to_json(e) for e in edits], sort_keys=True).encode()),
        "options": dict(options),
    }


def source_fingerprint(layout: Layout) -> str:
    """Changes with config.json, and with the header, size or time of any shard."""
    parts = [(layout.directory / CONFIG).read_bytes()]
    for shard in layout.shards:
        status = shard.path.stat()
        with shard.path.open("rb") as file:
            header = file.read(shard.header_bytes)
        parts += [f"{shard.name} {status.st_size} {status.st_mtime_ns}".encode(), header]
    return _digest(b"\0".join(parts))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_place(source: Path, out: Path, force: bool) -> None:
    """Raises UsageError where OUT cannot become the result's directory."""
    real, target = source.resolve(), out.resolve()
    if real == target or real in target.parents or target in real.parents:
        raise UsageError(
            f"{out}: is the source, inside it or around it. The source is never written to: give "
            "another output."
        )
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: is a file, and the result is a directory. Give another output.")
    if not any(out.iterdir()):
        return
    if not force:
        raise UsageError(f"{out}: exists and is not empty. Give another output, or --force.")
    if not (out / CONFIG).is_file():
        raise UsageError(
            f"{out}: holds something that is no checkpoint, which even --force does not replace. "
            "Give another output."
        )


def require_space(out: Path, needed: int) -> None:
    """Raises UsageError where the file system has not `needed` bytes left for OUT."""
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UsageError(
            f"{out}: needs {needed / 1e9:.3g} GB, and {existing} has {free / 1e9:.3g} GB left. "
            "Free some, or give an output on another disk."
        )
