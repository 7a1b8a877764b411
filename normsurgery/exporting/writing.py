"""An ONNX file, its external data and its report: written whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx

from normsurgery.errors import UsageError
from normsurgery.onnxfile.reading import LARGE_FILE, weight_bytes


def data_path(path: Path) -> Path:
    """Where the weights of `path` go when they do not go into it."""
    return path.with_name(f"{path.name}.data")


def report_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.report.json")


def check_target(path: Path, *, force: bool) -> None:
    """Raise UsageError where `path` and what stands beside it cannot be written."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such directory to write {path.name} into.")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder}: no permission to write {path.name} into this directory.")
    if path.is_dir():
        raise UsageError(f"{path} is a directory. Give the name of a file, such as model.onnx.")
    if path.suffix != ".onnx":
        raise UsageError(f"{path}: an ONNX file is known by its name. Let it end in .onnx.")
    for file in (path, data_path(path), report_path(path)):
        if file.exists() and not force:
            raise UsageError(f"{file} exists already. Give another name with -o, or --force.")


def wants_external_data(written: onnx.ModelProto, asked: bool | None) -> bool:
    """Whether the weights go into a file of their own: where that is asked for, or above 2 GB.

    Raises UsageError where one file is asked for and cannot hold them.
    """
    large = weight_bytes(written) >= LARGE_FILE
    if large and asked is False:
        raise UsageError(
            f"the weights take {weight_bytes(written) / 2**30:.2f} GiB, and one ONNX file holds "
            "2 GiB at most. Leave out external_data=False."
        )
    return large if asked is None else asked


class Draft:
    """A folder beside the target, of which nothing is seen until `publish`. A context manager."""

    def __init__(self, path: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.resolve().parent))
        self.file = self.folder / path.name
        self.path = path

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, written: onnx.ModelProto, *, external: bool) -> None:
        """Write the graph, with its weights in the file or in one beside it."""
        import onnx_ir

        if not external:
            onnx.save(written, self.file)
            return
        model = onnx_ir.from_proto(written)
        onnx_ir.save(model, self.file, external_data=data_path(self.file).name)

    def write_report(self, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=1) + "\n"
        report_path(self.file).write_text(text, encoding="utf-8")

    def publish(self, path: Path | None = None) -> Path:
        """Move everything to its place; on any failure everything there is as it was before."""
        path = path or self.path
        drafts = {
            data_path(self.file): data_path(path),
            report_path(self.file): report_path(path),
            self.file: path,
        }
        kept = self._set_aside(drafts.values())
        placed: list[Path] = []
        try:
            for draft, final in drafts.items():
                if draft.exists():
                    os.replace(draft, final)
                    placed.append(final)
        except BaseException:
            for final in placed:
                final.unlink(missing_ok=True)
            for aside, final in kept.items():
                os.replace(aside, final)
            raise
        return path

    def _set_aside(self, finals: Iterable[Path]) -> dict[Path, Path]:
        old = self.folder / "replaced"
        old.mkdir()
        kept: dict[Path, Path] = {}
        try:
            for final in finals:
                if final.exists():
                    os.replace(final, old / final.name)
                    kept[old / final.name] = final
        except BaseException:
            for aside, final in kept.items():
                os.replace(aside, final)
            raise
        return kept
