"""Finds the state_dict in a file of weights and loads it into a model, key for key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from normsurgery.artefacts.loaded import MARK
from normsurgery.artefacts.pickles import load_tensors
from normsurgery.errors import CannotRead

# Keys under which training scripts keep the weights, the one to prefer first.
USUAL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "model_ema",
    "state_dict_ema",
    "ema",
)
# What DataParallel, torch.compile and training frameworks put before every key.
PREFIXES = ("module.", "_orig_mod.", "model.")
_FEW = 5
_CURE = "Give the factory and the arguments the weights were trained with."


@dataclass(frozen=True)
class Found:
    """A state_dict in a file: under which key, without which prefix."""

    tensors: Mapping[str, Any]
    key: str = ""
    prefix: str = ""

    @property
    def note(self) -> str:
        under = f"the weights are under {self.key!r}" if self.key else "the file is a state_dict"
        return f"{under}, prefix {self.prefix!r} removed" if self.prefix else under

    @property
    def place(self) -> str:
        """The note in brackets, where there is something to look up."""
        return f" ({self.note})" if self.key or self.prefix else ""


def read_weights(path: Path) -> tuple[Mapping[str, Any], tuple[Any, ...]]:
    """What a file of weights holds, and the swaps whose structure they belong to (oldest first).

    Reads .safetensors and whatever torch.save wrote, a whole model included, without running code
    from it. Raises CannotRead.
    """
    if not path.is_file():
        raise CannotRead(f"{path}: there is no such file of weights.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = load_tensors(path)
    if not isinstance(content, Mapping):
        raise CannotRead(f"{path}: holds a {type(content).__name__}, not a state_dict.")
    if MARK in content and "plan" in content:
        return content["model"], tuple(content["plan"])
    return content, ()


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], tuple[Any, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CannotRead(f"{path}: not a readable safetensors file ({error}).") from None
    plans = json.loads(metadata["plan"]) if MARK in metadata and "plan" in metadata else ()
    return tensors, tuple(plans)


def load_weights(
    model: nn.Module, content: Mapping[str, Any], path: Path, *, cure: str = _CURE
) -> str:
    """Load the state_dict that fits `model` best, in place; returns the note that says which.

    cure: what to do where none fits, the end of the error's text.
    Raises CannotRead if a key is missing or extra (a tied name may be absent), or a shape differs.
    """
    wanted = set(model.state_dict())
    candidates = list(_candidates(content))
    if not candidates:
        raise CannotRead(f"{path}: holds no state_dict. Its keys: {_few(map(str, content))}.")
    best = max(candidates, key=lambda found: _fit(wanted, found))
    _refuse_other_shapes(model, best, path, cure)
    result = model.load_state_dict(dict(best.tensors), strict=False)
    missing = [key for key in result.missing_keys if key not in _tied(model, set(best.tensors))]
    if missing or result.unexpected_keys:
        raise CannotRead(
            f"{path}: the weights do not fit {type(model).__name__}{best.place}. "
            f"{_list('missing', missing)} {_list('extra', result.unexpected_keys)} {cure}"
        )
    return best.note


def _fit(wanted: set[str], found: Found) -> tuple[int, int]:
    names = set(found.tensors)
    return len(wanted & names), -len(names - wanted)


def _candidates(content: Mapping[str, Any]) -> Iterator[Found]:
    """Every state_dict in the file, the preferred first, each with and without its prefixes."""
    usual = [key for key in USUAL_KEYS if key in content]
    others = [key for key in content if key not in usual]
    if _is_state_dict(content):
        yield from _without_prefixes(content, "")
    for key in (*usual, *others):
        value = content[key]
        if not isinstance(value, Mapping):
            continue
        if _is_state_dict(value):
            yield from _without_prefixes(value, str(key))
        for inner in USUAL_KEYS:
            if inner in value and _is_state_dict(value[inner]):
                yield from _without_prefixes(value[inner], f"{key}.{inner}")


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    return any(isinstance(item, Tensor) for item in value.values())


def _without_prefixes(tensors: Mapping[str, Any], key: str) -> Iterator[Found]:
    removed = ""
    yield Found(tensors, key, removed)
    while True:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            return
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        removed += prefix
        yield Found(tensors, key, removed)


def _refuse_other_shapes(model: nn.Module, found: Found, path: Path, cure: str) -> None:
    for name, tensor in model.state_dict().items():
        given = found.tensors.get(name)
        if isinstance(given, Tensor) and isinstance(tensor, Tensor) and given.shape != tensor.shape:
            raise CannotRead(
                f"{path}: {name} has shape {tuple(given.shape)}, and the model's has "
                f"{tuple(tensor.shape)}. {cure}"
            )


def _tied(model: nn.Module, given: set[str]) -> set[str]:
    """Names whose tensor is also known under a name in `given`."""
    tensors = model.state_dict(keep_vars=True)
    known = {id(tensor) for name, tensor in tensors.items() if name in given}
    return {name for name, tensor in tensors.items() if id(tensor) in known}


def _list(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({_few(names)})." if names else f"0 {what}."


def _few(names: Any) -> str:
    names = list(names)
    shown = ", ".join(islice(names, _FEW))
    return f"{shown}, ..." if len(names) > _FEW else shown
