"""Runs as a file: what one machine computed, to be judged on another that lacks its devices.

The file is a .safetensors: every tensor in the type it was computed in, and one JSON text in its
metadata that says what the tensors are. Nothing in it is code.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from normsurgery.errors import CannotRead, UsageError
from normsurgery.inputs import Inputs

KEY = "normsurgery.run"
FORMAT = 1
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class SavedCase:
    """One input and what was computed from it.

    outputs: runner -> output name -> tensor, of the candidate. native: the same of the original in
    its own type, on that runner's device; a runner on which it cannot run is missing.
    failed: runner -> why the candidate gave nothing there.
    """

    label: str
    inputs: Inputs
    outputs: Mapping[str, Tensors] = field(default_factory=dict)
    native: Mapping[str, Tensors] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedRun:
    """The runs of one candidate, and of its original in its own type beside it.

    runners: those that ran, in order. precision: the coarsest type the candidate computes in.
    rounded_to: the type the original's weights were rounded to first. everything: caches are
    outputs too. candidate, original: name and SHA-256 of the weights. devices: runner -> name.
    """

    cases: tuple[SavedCase, ...]
    seed: int
    runners: tuple[str, ...]
    precision: torch.dtype | None = None
    rounded_to: torch.dtype | None = None
    everything: bool = False
    candidate: Mapping[str, str] = field(default_factory=dict)
    original: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all, replacing what was there.

        Raises UsageError where the inputs hold what is neither a tensor nor plain data, or where
        the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        content = {
            "format": FORMAT,
            "seed": self.seed,
            "runners": list(self.runners),
            "precision": _name(self.precision),
            "rounded_to": _name(self.rounded_to),
            "everything": self.everything,
            "candidate": dict(self.candidate),
            "original": dict(self.original),
            "devices": dict(self.devices),
            "versions": dict(self.versions),
            "cases": [_packed(case, f"case{i}", tensors) for i, case in enumerate(self.cases)],
        }
        _write(Path(path), tensors, {KEY: json.dumps(content)})

    @classmethod
    def load(cls, path: str | Path) -> SavedRun:
        """Read a file that `save` wrote. Raises CannotRead, in a sentence, for anything else."""
        content, tensors = _contents(Path(path))
        try:
            return cls(
                cases=tuple(_unpacked(case, tensors) for case in content["cases"]),
                seed=int(content["seed"]),
                runners=tuple(content["runners"]),
                precision=_dtype(content["precision"]),
                rounded_to=_dtype(content["rounded_to"]),
                everything=bool(content["everything"]),
                candidate=dict(content["candidate"]),
                original=dict(content["original"]),
                devices=dict(content["devices"]),
                versions=dict(content["versions"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CannotRead(
                f"{path}: the saved run is damaged ({type(error).__name__}: {error}). "
                "Record it again with --save."
            ) from None


def is_run(path: Path) -> bool:
    """Whether a file is a saved run; False where it is anything else or not there."""
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CannotRead(f"{path}: there is no such saved run.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise CannotRead(
                    f"{path}: holds tensors but no run. Record one with verify --save."
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CannotRead(
            f"{path}: not a saved run, or a truncated one ({error}). Record it again with --save."
        ) from None
    return _checked(path, metadata[KEY]), tensors


def _checked(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
        version = content["format"]
    except (ValueError, KeyError, TypeError):
        raise CannotRead(
            f"{path}: the saved run is damaged. Record it again with --save."
        ) from None
    if version != FORMAT:
        raise CannotRead(
            f"{path}: a saved run of format {version}, this normsurgery reads {FORMAT}. Record it "
            "again with the same version on both machines."
        )
    found: dict[str, Any] = content
    return found


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"{path.parent}: there is no such directory to write {path.name} into.")
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: the run cannot be written ({error}).") from None


def _packed(case: SavedCase, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    def kept(values: Mapping[str, Tensors], what: str) -> dict[str, Any]:
        return {
            runner: {
                name: _kept(value, f"{key}.{what}.{runner}.{index}", tensors)
                for index, (name, value) in enumerate(found.items())
            }
            for runner, found in values.items()
        }

    return {
        "label": case.label,
        "spelling": list(case.inputs.spelling),
        "args": _structure(tuple(case.inputs.args), f"{key}.input", tensors),
        "kwargs": _structure(dict(case.inputs.kwargs), f"{key}.input", tensors),
        "outputs": kept(case.outputs, "output"),
        "native": kept(case.native, "native"),
        "failed": dict(case.failed),
    }


def _unpacked(case: Mapping[str, Any], tensors: Tensors) -> SavedCase:
    def found(values: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Tensor]]:
        return {
            runner: {name: tensors[key] for name, key in keys.items()}
            for runner, keys in values.items()
        }

    args, kwargs = _value(case["args"], tensors), _value(case["kwargs"], tensors)
    return SavedCase(
        label=str(case["label"]),
        inputs=Inputs(args, kwargs, tuple(case["spelling"])),
        outputs=found(case["outputs"]),
        native=found(case["native"]),
        failed={str(runner): str(reason) for runner, reason in case["failed"].items()},
    )


def _kept(tensor: Tensor, key: str, tensors: dict[str, Tensor]) -> str:
    """Puts a copy of its own under `key`: safetensors takes no tensors that share memory."""
    tensors[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return key


def _structure(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Plain containers, tensors and plain values as JSON, the tensors put aside."""
    if isinstance(value, Tensor):
        return {"tensor": _kept(value, f"{key}.{len(tensors)}", tensors)}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {"dict": {name: _structure(item, key, tensors) for name, item in value.items()}}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_structure(item, key, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, torch.dtype):
        return {"dtype": _name(value)}
    raise UsageError(
        f"an input is a {type(value).__name__}, which a saved run cannot hold. Give tensors, "
        "numbers, and tuples, lists or dicts of them."
    )


def _value(data: Mapping[str, Any], tensors: Tensors) -> Any:
    ((kind, content),) = data.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {name: _value(item, tensors) for name, item in content.items()}
    if kind in ("tuple", "list"):
        items = [_value(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dtype":
        return _dtype(content)
    if kind != "value":
        raise ValueError(f"an input of the unknown kind {kind!r}")
    return content


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return found
