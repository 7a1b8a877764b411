"""Loads what `torch.save` wrote, without running code from the file.

The pickle is judged first (vetting), then read by `torch.load(weights_only=True)` with exactly the
names it was allowed. Both read the same open file through the same reader, so that no second pickle
in the archive can stand in for the one that was judged.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch
from torch import Tensor

from normsurgery.artefacts.classes import resolve
from normsurgery.artefacts.nodes import Name, Program
from normsurgery.artefacts.opcodes import MalformedPickle, interpret
from normsurgery.artefacts.vetting import Refused, is_tensor_part, vet
from normsurgery.errors import CannotRead

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number torch wrote before 1.6
CONFIGURED = ("transformers", "diffusers")  # their classes are made from a config object
_NOT_TORCH = (
    "{}: a zip archive, but not one that torch.save wrote. "
    "Give a model file, or package.module:factory with --weights."
)
_TOO_DEEP = "its objects are nested in each other too deeply"
_GIT_LFS = b"version https://git-lfs"


def load_pickled(path: Path, trust: Iterable[str] = ()) -> Any:
    """The object in a file written by `torch.save`, on the CPU.

    `trust` names further packages whose layer and configuration classes are allowed; they may lie
    in the working directory. Raises CannotRead for a foreign or damaged file, and for one that
    would have to run code to load.
    """
    trusted = frozenset(trust)
    with path.open("rb") as file:
        data = read_program(path, file)
        try:
            names = resolve(vet(data, trusted), trusted)
        except MalformedPickle as error:
            raise CannotRead(f"{path}: {error}, so it was not loaded.") from None
        except Refused as refused:
            raise CannotRead(_refusal(path, refused)) from None
        except RecursionError:
            raise CannotRead(f"{path}: {_TOO_DEEP}, so it was not loaded.") from None
        return _load(path, file, names)


def read_program(path: Path, file: IO[bytes]) -> bytes:
    """The bytes of the pickle in an open torch file. Raises CannotRead where there is none."""
    start = file.read(len(LEGACY))
    file.seek(0)
    if start.startswith(LEGACY):
        raise CannotRead(
            f"{path}: written in the format torch used before version 1.6, which keeps source code "
            "beside a model and cannot be loaded safely. Save it again with a newer torch, or give "
            "package.module:factory with --weights and a state_dict file."
        )
    if not start.startswith(ZIP):
        raise CannotRead(f"{path}: {_foreign(start)}")
    try:
        reader = torch._C.PyTorchFileReader(file)
        records = set(reader.get_all_records())
        if "constants.pkl" in records:
            raise CannotRead(
                f"{path}: a TorchScript archive, whose forward is compiled code that cannot be "
                "changed. Give the Python model it was made from: a file saved with torch.save, or "
                "package.module:factory with --weights."
            )
        if "data.pkl" not in records:
            raise CannotRead(_NOT_TORCH.format(path))
        data: bytes = reader.get_record("data.pkl")
        return data
    except (RuntimeError, OSError) as error:  # which of them depends on where it is cut
        if zipfile.is_zipfile(file):
            raise CannotRead(_NOT_TORCH.format(path)) from None
        raise CannotRead(
            f"{path}: damaged or cut off ({first_line(error)}). Copy or download it again."
        ) from None
    finally:
        file.seek(0)


def _foreign(start: bytes) -> str:
    if not start:
        return "the file is empty."
    if start.startswith(_GIT_LFS[: len(start)]):
        return "a git-lfs pointer, not the file itself. Fetch it with `git lfs pull`."
    if start[:1] == b"\x80":
        return (
            "a pickle that torch.save did not write, and it is not run. Save the model with "
            "torch.save, or give package.module:factory with --weights."
        )
    return (
        "not a model file that is known here. Known are .pt, .pth and .ckpt as torch.save writes "
        "them, .pt2, a transformers checkpoint directory, and package.module:factory."
    )


def _refusal(path: Path, refused: Refused) -> str:
    cure = f"Give the code that builds the model instead: {_factory(refused.root)} --weights {path}"
    if "outside the packages" in refused.why:
        package = refused.what.partition(".")[0]
        if package in sys.stdlib_module_names:  # no package to trust: what it offers is Python
            return f"{path}: {refused}, so nothing was loaded. {cure}."
        return (
            f"{path}: {refused}, so nothing was loaded. If you trust that package, add "
            f"--trust {package}. Or: {cure[0].lower()}{cure[1:]}."
        )
    return f"{path}: {refused}, so nothing was loaded. {cure}."


def _factory(root: str) -> str:
    """The factory to name for a class: its own name, or where that takes a config, a script's."""
    module, _, name = root.partition(":")
    if module == "__main__":
        return f"my_script:{name}"
    if not root or module.partition(".")[0] in CONFIGURED:
        return "my_script:make_model, a function without arguments that returns the model, with"
    return root


def _load(path: Path, file: IO[bytes], names: Mapping[str, Any]) -> Any:
    try:
        with _allowed(names):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, TypeError) as error:
        raise CannotRead(f"{path}: cannot be loaded ({first_line(error)}).") from None
    except (AttributeError, LookupError, OSError, MemoryError) as error:
        raise CannotRead(f"{path}: damaged ({first_line(error)}).") from None


@contextmanager
def _allowed(names: Mapping[str, Any]) -> Iterator[None]:
    """torch's list of safe names extended for a while; what the caller had put there stays."""
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([(value, name) for name, value in names.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop, else its class."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


class _StandIn:
    """Stands for every class while only the tensors of a file are read; has no behaviour."""

    state: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *args: Any) -> None:
        """Takes whatever the file would call the class with."""

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, Mapping) else {}

    def entries(self, table: str) -> Iterable[tuple[Any, Any]]:
        found = self.state.get(table)
        return found.items() if isinstance(found, Mapping) else ()


def load_tensors(path: Path) -> Any:
    """What a torch file holds with every object that is no tensor emptied of its class.

    For files that are read for their weights only: no name in the file is imported, so this reads
    a whole pickled model whose class is not known here. A pickled module becomes its state_dict.
    Raises CannotRead.
    """
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
        file.seek(0)
        if start.startswith(LEGACY):
            return _load(path, file, {})
        try:
            program = interpret(read_program(path, file))
            return _as_tensors(_load(path, file, _stand_ins(program)))
        except MalformedPickle as error:
            raise CannotRead(f"{path}: {error}, so it was not loaded.") from None
        except RecursionError:
            raise CannotRead(f"{path}: {_TOO_DEEP}, so it was not loaded.") from None


def _stand_ins(program: Program) -> dict[str, Any]:
    """A class without behaviour for every name but those a tensor is made of."""
    names = {str(node) for node in program.nodes if isinstance(node, Name)}
    return {name: _StandIn for name in names if not is_tensor_part(name)}


def _as_tensors(value: Any) -> Any:
    if isinstance(value, _StandIn):
        return dict(_state_dict(value, ""))
    if isinstance(value, Mapping):
        return {key: _as_tensors(item) for key, item in value.items()}
    return value


def _state_dict(module: _StandIn, prefix: str) -> Iterator[tuple[str, Tensor]]:
    hidden = module.state.get("_non_persistent_buffers_set", ())
    for table in ("_parameters", "_buffers"):
        for name, tensor in module.entries(table):
            if isinstance(tensor, Tensor) and not (table == "_buffers" and name in hidden):
                yield f"{prefix}{name}", tensor
    for name, child in module.entries("_modules"):
        if isinstance(child, _StandIn):
            yield from _state_dict(child, f"{prefix}{name}.")
