"""Load models in every form people keep them in, and save a changed one in the same form.

`load` takes a `.pt`, `.pth` or `.ckpt` file (a whole pickled model, or a dict around one), a `.pt2`
exported program, a transformers checkpoint directory, or `package.module:factory`. No code from a
file is run. `save` writes what comes out in the kind that went in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.artefacts import factory
from normsurgery.artefacts.checkpoints import load_checkpoint, load_directory, rebuilt
from normsurgery.artefacts.exported import is_exported, load_exported
from normsurgery.artefacts.loaded import MARK, Loaded
from normsurgery.artefacts.pickles import load_pickled
from normsurgery.artefacts.saving import save
from normsurgery.artefacts.weights import load_weights, read_weights
from normsurgery.errors import CannotRead, UsageError

__all__ = ["Loaded", "load", "load_directory", "save"]

# Keys under which training scripts keep a whole model, the one to prefer first.
MODEL_KEYS = ("model", "net", "network", "module", "ema", "model_ema", "ema_model")


def load(
    path: str | Path,
    *,
    arguments: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    trust: Iterable[str] = (),
    meta: bool = False,
) -> Loaded:
    """Load a model: a file, a checkpoint directory, or `package.module:factory`.

    arguments: keyword arguments of a factory. weights: the file of weights to load into what the
    factory makes. trust: further packages whose classes a pickle may name. meta: build a checkpoint
    directory without its weights, on the meta device. Raises CannotRead, UsageError.
    """
    text = str(path)
    if factory.is_factory(text) and not Path(text).exists():
        return _with_notes(_load_factory(text, arguments or {}, weights))
    if arguments or weights is not None:
        raise UsageError(
            f"--arg and --weights belong to a factory, and {text} is not one. "
            "A factory is written package.module:factory."
        )
    path = Path(text)
    if path.is_dir():
        return _with_notes(load_checkpoint(path, meta=meta))
    if not path.is_file():
        raise CannotRead(f"{text}: there is no such file, directory or package.module:factory.")
    _refuse_by_kind(path)
    if is_exported(path):
        return _with_notes(Loaded(load_exported(path), "exported", text))
    return _with_notes(_unwrap(load_pickled(path, trust), path))


def _load_factory(text: str, arguments: Mapping[str, Any], weights: str | Path | None) -> Loaded:
    model = factory.build(text, arguments)
    if weights is None:
        return Loaded(
            model, "factory", text, ("no --weights: the model is as its factory makes it",)
        )
    content, plans = read_weights(Path(weights))
    model = rebuilt(model, plans)
    note = load_weights(model, content, Path(weights))
    return Loaded(model, "factory", text, (f"{weights}: {note}",), plans=plans)


def _refuse_by_kind(path: Path) -> None:
    if path.suffix == ".onnx":
        raise CannotRead(
            f"{path}: an ONNX file holds no torch model to change. "
            "Give the model it was exported from: model.pt or package.module:factory."
        )
    if path.suffix == ".safetensors":
        raise CannotRead(
            f"{path}: holds weights but no code. "
            f"Give the code that builds the model: package.module:factory --weights {path}."
        )


def _unwrap(content: Any, path: Path) -> Loaded:
    """The model in what a file holds: the object itself, or a value of the dict around it."""
    if isinstance(content, nn.Module):
        return Loaded(content, "pickle", str(path))
    if not isinstance(content, Mapping):
        raise CannotRead(f"{path}: holds a {type(content).__name__}, not a model. {_ASK_FACTORY}")
    if MARK in content:
        return _remade(content, path)
    marked = [key for key, value in content.items() if isinstance(value, Mapping) and MARK in value]
    if marked:
        inner = _remade(content[marked[0]], path)
        return replace(inner, container=content, key=marked[0])
    return _from_dict(content, path)


_ASK_FACTORY = "Give the code that builds the model: package.module:factory --weights FILE."


def _from_dict(content: Mapping[Any, Any], path: Path) -> Loaded:
    models = [key for key, value in content.items() if isinstance(value, nn.Module)]
    if not models:
        what = "a state_dict" if _has_tensors(content) else "a dict without a model"
        raise CannotRead(
            f"{path}: holds {what}, weights but no code. {_ASK_FACTORY.replace('FILE', str(path))}"
        )
    preferred = [key for key in MODEL_KEYS if key in models]
    if not preferred and len(models) > 1:
        raise CannotRead(
            f"{path}: a dict with several models ({', '.join(map(str, models))}), and which one is "
            "meant is not said. Save the one you want by itself."
        )
    key = (preferred or models)[0]
    notes = [f"the model is under {key!r} in the file's dict"]
    others = [str(name) for name in models if name != key]
    if others:
        notes.append(f"the dict also holds models that are left as they are: {', '.join(others)}")
    return Loaded(content[key], "pickle", str(path), tuple(notes), content, key)


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    inner = [
        item for value in content.values() if isinstance(value, Mapping) for item in value.values()
    ]
    return any(isinstance(value, Tensor) for value in (*content.values(), *inner))


def _remade(content: Mapping[Any, Any], path: Path) -> Loaded:
    """A file written for a model with rewritten owners: their forwards are rewritten again."""
    if not isinstance(content.get("model"), nn.Module) or "plan" not in content:
        raise CannotRead(f"{path}: marked as written by normsurgery, but holds no model and plan.")
    from normsurgery.plans import Plan
    from normsurgery.rewriting.rebuilding import restore_rewrites

    plans = tuple(content["plan"])
    model = content["model"]
    for plan in plans:
        model = restore_rewrites(model, Plan.from_json(plan))
    note = f"rewritten forwards made again from its plan (written by normsurgery {content[MARK]})"
    return Loaded(model, "pickle", str(path), (note,), plans=plans)


def _with_notes(loaded: Loaded) -> Loaded:
    """With a note for weights that are not finite: the model loads, but nothing can be proven."""
    model = loaded.model
    state = model.state_dict() if isinstance(model, nn.Module) else model.state_dict
    bad = [
        name
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and not tensor.is_meta
        and not bool(torch.isfinite(tensor).all())
    ]
    if not bad:
        return loaded
    shown = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
    note = f"{len(bad)} weights or statistics hold NaN or infinity: {shown}"
    return replace(loaded, notes=(*loaded.notes, note))
