"""Saves a changed model in the form the original came in, with its report beside it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from normsurgery import __version__
from normsurgery.artefacts.checkpoints import RECORD, RENAMED, SWAPPED
from normsurgery.artefacts.loaded import MARK, SUFFIX, Kind, Loaded
from normsurgery.artefacts.pickles import first_line
from normsurgery.errors import UsageError


def save(
    loaded: Loaded | nn.Module | ExportedProgram,
    model: Any,
    report: Any,
    out: str | Path,
    *,
    force: bool = False,
) -> tuple[Path, ...]:
    """Write `model`, made from `loaded`, to `out`, and the report to `<out>.report.json`.

    The file is of the kind that was loaded: a pickled model, with the same dict around it; an
    exported program; a directory; a factory's weights as safetensors. A model that was not loaded
    but built may stand in the place of `loaded`: it is pickled. `report` is a Report, or its
    JSON. Returns the paths written. Raises UsageError if one exists and `force` is not given, or
    if the model cannot be written in that form; what was there before is then untouched.
    """
    out = Path(out)
    if not isinstance(loaded, Loaded):
        kind: Kind = "exported" if isinstance(loaded, ExportedProgram) else "pickle"
        loaded = Loaded(loaded, kind, str(out))
    beside = check_target(out, force=force)
    content = report if isinstance(report, Mapping) else report.to_json()
    plans = (*loaded.plans, content.get("plan"))
    write = _WRITERS[loaded.kind]
    with _replacing(out) as temporary, _replacing(beside) as temporary_report:
        temporary_report.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write(loaded, model, plans, temporary)
    return out, beside


_NAMES: Mapping[Kind, tuple[str, frozenset[str]]] = {
    "pickle": ("a pickled model", frozenset({".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"})),
    "exported": ("an exported program", frozenset({".pt2"})),
    "factory": ("weights as safetensors", frozenset({".safetensors"})),
}
_OTHERS = frozenset({".onnx", ".json", ".html", ".md"})
_TAKEN = _OTHERS.union(*(names for _, names in _NAMES.values()))


def check_name(out: Path, kind: Kind) -> None:
    """Raise UsageError for a name that says that another kind of file is there, or a directory."""
    if kind not in _NAMES:
        return
    what, own = _NAMES[kind]
    example = f"Give the name of a file, such as model{SUFFIX[kind]}."
    if not out.name or out.is_dir():
        raise UsageError(f"{out} is a directory. {example}")
    if not out.suffix:
        raise UsageError(f"{out}: a file without a suffix is not recognised again. {example}")
    if out.suffix.lower() in _TAKEN - own:
        raise UsageError(f"{out}: what is written is {what}, no {out.suffix} file. {example}")


def check_target(out: Path, *, force: bool) -> Path:
    """The path of the report beside `out`; raises UsageError where the two cannot be written."""
    beside = out.with_name(f"{out.name}.report.json")
    check_folder(out)
    for path in (out, beside):
        if path.exists() and not force:
            raise UsageError(f"{path} exists already. Give another name with -o, or --force.")
    return beside


def check_folder(file: Path) -> None:
    """Raise UsageError where there is no directory to write `file` into."""
    if not file.resolve().parent.is_dir():
        raise UsageError(f"{file.parent}: there is no such directory to write {file.name} into.")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place once everything has been written."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.resolve().parent))
    temporary = folder / path.name
    try:
        yield temporary
        if path.is_dir() and not path.is_symlink():
            os.replace(path, folder / "replaced")
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_pickle(loaded: Loaded, model: nn.Module, plans: tuple[Any, ...], path: Path) -> None:
    from normsurgery.surgery.rebuilding import holds_rewrites, restore_originals

    content: Any = model
    if holds_rewrites(model):
        content = {MARK: __version__, "model": restore_originals(model), "plan": list(plans)}
    if loaded.container is not None:
        content = {**loaded.container, loaded.key: content}
    try:
        torch.save(content, path)
    except Exception as error:  # an attribute of any class may refuse, with any exception
        raise UsageError(
            f"{type(model).__name__} cannot be pickled ({first_line(error)}). "
            "Load it as package.module:factory with --weights; then its weights are saved."
        ) from error


def _write_exported(loaded: Loaded, model: Any, plans: tuple[Any, ...], path: Path) -> None:
    named = path.with_suffix(".pt2")  # torch.export.save takes no other suffix
    torch.export.save(model, named)
    os.replace(named, path)


def _write_directory(loaded: Loaded, model: Any, plans: tuple[Any, ...], path: Path) -> None:
    path.mkdir()
    source = Path(loaded.path)
    for file in source.iterdir():  # tokenizer, processor, licence: all but weights and config
        if file.is_file() and not _is_rewritten_file(file.name):
            shutil.copy2(file, path / file.name)
    # The file's keys are then the model's own, which the rebuilt model loads without any mapping.
    model.save_pretrained(path, save_original_format=False)
    _hide_from_others(path, plans)
    record = {MARK: __version__, "plan": list(plans)}
    (path / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _hide_from_others(path: Path, plans: tuple[Any, ...]) -> None:
    """Give the new norms' tensors, and the architecture, names that no other reader knows.

    It would load them into the old norms, which often have the same names and shapes, without a
    word. What a fold made stands in the old norms.
    """
    steps = [step for plan in plans for step in (plan or {}).get("steps", ())]
    sites = [(s["site"]["paths"], s["child"]) for s in steps if s["action"] != "fold"]
    new = tuple(
        "".join(f"{part}." for part in (path, child) if part)
        for paths, child in sites
        for path in paths
    )
    if not new:
        return
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = {_renamed(name, new): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata=metadata)
    for file in path.glob("*.safetensors.index.json"):
        index = json.loads(file.read_text(encoding="utf-8"))
        index["weight_map"] = {_renamed(n, new): part for n, part in index["weight_map"].items()}
        file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = path / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["architectures"] = [SWAPPED + name for name in content.get("architectures") or ()]
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _renamed(name: str, new: tuple[str, ...]) -> str:
    return f"{RENAMED}{name}" if name.startswith(new) else name


def _is_rewritten_file(name: str) -> bool:
    weights = (
        ".safetensors",
        ".safetensors.index.json",
        ".bin",
        ".bin.index.json",
        ".h5",
        ".msgpack",
    )
    return name.endswith(weights) or name in ("config.json", "generation_config.json", RECORD)


def _write_weights(loaded: Loaded, model: nn.Module, plans: tuple[Any, ...], path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{name} is a {type(value).__name__}, which safetensors cannot hold.")
        if id(value) not in seen:  # a tied tensor is written once, under its first name
            seen.add(id(value))
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
    save_file(tensors, path, metadata={MARK: __version__, "plan": json.dumps(list(plans))})


_WRITERS: dict[str, Callable[[Loaded, Any, tuple[Any, ...], Path], None]] = {
    "pickle": _write_pickle,
    "exported": _write_exported,
    "directory": _write_directory,
    "factory": _write_weights,
}
