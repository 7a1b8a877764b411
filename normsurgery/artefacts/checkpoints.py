"""Transformers checkpoint directories, built by transformers; code in a checkpoint is not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normsurgery.artefacts.loaded import MARK, Loaded
from normsurgery.artefacts.pickles import first_line
from normsurgery.artefacts.weights import load_weights
from normsurgery.errors import CannotRead

RECORD = "normsurgery.json"  # beside config.json: the swaps to make again on load
CONFIG_KEY = "normsurgery"  # in config.json: the same, written by the model's own save_pretrained
# Before the architecture, and before the names of the new norms' tensors, of a swapped directory.
SWAPPED, RENAMED = "Normsurgery", "normsurgery."
_CURE = "The swaps recorded beside the weights are not those they were saved with: swap again."


def load_directory(path: str | Path, *, meta: bool = False) -> nn.Module:
    """The model of a checkpoint directory in eval mode, with the swaps recorded in it made again.

    `from_pretrained` alone would bring the old norms back. With `meta` the model is built on the
    meta device and no weights are read. Raises CannotRead.
    """
    model = load_checkpoint(Path(path), meta=meta).model
    assert isinstance(model, nn.Module)
    return model


def load_checkpoint(path: Path, *, meta: bool = False) -> Loaded:
    """As `load_directory`, with what was noticed on the way."""
    config = _read_json(path / "config.json", path)
    plans = _plans(path)
    cls, settings = _class_of(path, config)
    if meta or plans:
        with torch.device("meta" if meta else "cpu"):
            model = _build(path, cls, settings)
        notes: tuple[str, ...] = ()
    else:
        model, notes = _from_pretrained(path, cls)
    if plans:
        model = rebuilt(model, plans)
        if not meta:
            load_weights(model, _read_shards(path), path, cure=_CURE)
    return Loaded(model.eval(), "directory", str(path), notes, plans=plans)


def _read_json(file: Path, directory: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CannotRead(
            f"{directory}: a directory without {file.name}, so not a transformers checkpoint. "
            "Give a directory written by save_pretrained, a model file, or package.module:factory."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CannotRead(f"{file}: not readable as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise CannotRead(f"{file}: holds a {type(content).__name__}, wanted an object.")
    return content


def _plans(path: Path) -> tuple[Any, ...]:
    """The swaps to make again, oldest first: of the record, else of what the config remembers."""
    file = path / RECORD
    if not file.is_file():
        return tuple(_read_json(path / "config.json", path).get(CONFIG_KEY, ()))
    record = _read_json(file, path)
    if MARK not in record or "plan" not in record:
        raise CannotRead(f"{file}: is not a record of swaps; remove it or swap again.")
    return tuple(record["plan"])


def _class_of(path: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """The transformers class that config.json names, and its configuration object."""
    try:
        import transformers
    except ImportError:
        raise CannotRead(
            f"{path}: a transformers checkpoint, and transformers is not installed. "
            "Install it with `pip install transformers`."
        ) from None
    if (path / "adapter_config.json").is_file():
        raise CannotRead(
            f"{path}: holds an adapter. Merge it into its model first, then save that."
        )
    names = [name.removeprefix(SWAPPED) for name in config.get("architectures") or []]
    cls = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if cls is None or ("auto_map" in config and config.get("model_type") not in _model_types()):
        raise CannotRead(
            f"{path}: {names[0] if names else 'its model'} is not part of transformers "
            f"{transformers.__version__}, and code from a checkpoint is never run. Give "
            "package.module:factory with --weights instead."
        )
    try:
        settings = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds for a config it cannot use
        raise CannotRead(
            f"{path}: its config.json cannot be used ({first_line(error)})."
        ) from error
    return cls, settings


def _model_types() -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return set(CONFIG_MAPPING.keys())


def _build(path: Path, cls: Any, settings: Any) -> nn.Module:
    make = cls.from_config if hasattr(cls, "from_config") else cls._from_config
    try:
        model: nn.Module = make(settings)
    except Exception as error:  # the model's own code
        raise CannotRead(f"{path}: the model cannot be built ({first_line(error)}).") from error
    return model


def _from_pretrained(path: Path, cls: Any) -> tuple[nn.Module, tuple[str, ...]]:
    try:
        model, info = cls.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            dtype="auto",
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds for weights it cannot use
        raise CannotRead(f"{path}: its weights cannot be loaded ({first_line(error)}).") from error
    missing = sorted(set(info["missing_keys"]) - _left_out(path))
    if missing:
        raise CannotRead(
            f"{path}: {len(missing)} weights of {type(model).__name__} are not in the checkpoint "
            f"({', '.join(missing[:5])}); they would be random."
        )
    extra = sorted(info["unexpected_keys"])
    note = f"{len(extra)} weights of the checkpoint are not in the model ({', '.join(extra[:5])})"
    return model, (note,) if extra else ()


def _left_out(path: Path) -> set[str]:
    """Neutral tensors that `fold --drop` left out: the model starts with them."""
    file = path / RECORD
    folds = _read_json(file, path).get("folds", []) if file.is_file() else []
    return {name for fold in folds for name in fold["keymap"]["dropped"]}


def rebuilt(model: nn.Module, plans: tuple[Any, ...]) -> nn.Module:
    """A fresh model with the swaps of earlier plans (as JSON, oldest first) made again."""
    if not plans:
        return model
    from normsurgery.plan import Plan
    from normsurgery.surgery import rebuild

    for plan in plans:
        model = rebuild(model, Plan.from_json(plan))
    return model


def _read_shards(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update((n.removeprefix(RENAMED), t) for n, t in load_file(file).items())
    if not tensors:
        raise CannotRead(f"{path}: holds no .safetensors file.")
    return tensors
