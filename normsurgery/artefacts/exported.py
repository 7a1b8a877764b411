"""Loads `.pt2` exported programs after a look at everything in them that could run code.

`torch.export.load` unpickles some tensors without restriction, evaluates shape expressions, imports
what enums and default factories name, resolves operators by attribute look-up, and writes node
names into generated Python. Each of these is judged first.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from normsurgery.artefacts.opcodes import MalformedPickle
from normsurgery.artefacts.pickles import ZIP, first_line
from normsurgery.artefacts.vetting import Refused, vet
from normsurgery.errors import CannotRead

_KNOWN_RECORDS = (
    "models/",
    "data/weights/",
    "data/constants/",
    "data/sample_inputs/",
    "extra/",
    "archive_",
    "byteorder",
    "version",
    ".data/",
)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SYMBOL = re.compile(r"(s|u|z|zf|zuf|b)\d+", re.ASCII)
_SPELLED_SYMBOL = re.compile(r"Symbol\('\w+'(, \w+=(True|False))*\)", re.ASCII)
_EXPRESSION = re.compile(r"[\w\s()*+\-/,<>=&|~%.]*", re.ASCII)
_TARGET = re.compile(
    r"(torch\.ops\.\w+\.\w+(\.\w+)?|_operator\.\w+|torch\.sym_\w+|math\.\w+)", re.ASCII
)
# Other callables that torch.export itself writes as a node's target.
_PLAIN_TARGETS = frozenset(
    f"torch.{name}" for name in ["_check", "_constrain_as_size", "unbind", "sym_max", "sym_min"]
) | {"torch._higher_order_ops.wrap.wrap_with_set_grad_enabled"}
_FORBIDDEN_OPERATORS = ("torch.ops.aten.from_file", "torch.ops.prims.device_put_file")
_FUNCTIONS = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "BitwiseFn_bitwise_and",
        "BitwiseFn_bitwise_or",
        "CeilDiv",
        "CeilToInt",
        "CleanDiv",
        "Eq",
        "Float",
        "FloatPow",
        "FloatTrueDiv",
        "FloorDiv",
        "FloorToInt",
        "Ge",
        "Gt",
        "Identity",
        "Integer",
        "IntTrueDiv",
        "LShift",
        "Le",
        "Lt",
        "Max",
        "Min",
        "Mod",
        "ModularIndexing",
        "Mul",
        "Ne",
        "Not",
        "Or",
        "Piecewise",
        "Pow",
        "PowByNatural",
        "PythonMod",
        "RShift",
        "Rational",
        "RoundDecimal",
        "RoundToInt",
        "ToFloat",
        "TruncToFloat",
        "TruncToInt",
        "True",
        "False",
        "Where",
        "ceiling",
        "floor",
        "int_oo",
        "oo",
        "zoo",
    ]
)
_IMPORTING_KEYS = ("__enum__", "default_factory_module")


def is_exported(path: Path) -> bool:
    """Whether a file is an archive written by `torch.export.save`."""
    try:
        with path.open("rb") as file:
            if file.read(4) != ZIP:
                return False
            file.seek(0)
            return "archive_format" in torch._C.PyTorchFileReader(file).get_all_records()
    except (RuntimeError, OSError):  # which of them a cut-off archive raises depends on the cut
        return False


def load_exported(path: Path) -> torch.export.ExportedProgram:
    """The exported program in a file. Raises CannotRead for what is damaged or would run code."""
    content = path.read_bytes()
    try:
        _vet_archive(torch._C.PyTorchFileReader(io.BytesIO(content)))
    except (Refused, MalformedPickle) as refused:
        raise CannotRead(
            f"{path}: {refused}, so nothing was loaded. Export the model again with "
            "torch.export.export and torch.export.save, without custom objects."
        ) from None
    except (RuntimeError, ValueError, OSError) as error:
        raise CannotRead(f"{path}: damaged or cut off ({first_line(error)}).") from None
    try:
        return torch.export.load(io.BytesIO(content))
    except Exception as error:  # torch raises many kinds for a program it cannot read
        raise CannotRead(
            f"{path}: this version of torch ({torch.__version__}) cannot load it "
            f"({first_line(error)}). Export it again with this version."
        ) from error


def _vet_archive(reader: Any) -> None:
    for record in reader.get_all_records():
        if not record.startswith(_KNOWN_RECORDS):
            raise Refused(record, "a part that is no graph and no tensor", "is in the archive")
        if record.startswith("models/") or record.endswith(".json"):
            content = json.loads(reader.get_record(record))
            _vet_json(record, content)
            for name in _pickled(content):
                _vet_pickle(reader, f"{record.rpartition('/')[0]}/{name}")
        elif record.endswith(".pt"):
            _vet_pickle(reader, record)


def _pickled(content: Any) -> Iterator[str]:
    """Names of the records that a table of weights or constants says are pickles."""
    table = content.get("config") if isinstance(content, dict) else None
    for entry in table.values() if isinstance(table, dict) else ():
        if isinstance(entry, dict) and (entry.get("use_pickle") or not _is_raw(entry)):
            yield str(entry.get("path_name"))


def _is_raw(entry: dict[str, Any]) -> bool:
    return str(entry.get("path_name")).startswith(("weight_", "tensor_"))


def _vet_pickle(reader: Any, record: str) -> None:
    data = reader.get_record(record)
    if not data.startswith(ZIP):
        raise Refused(record, "an object that is no tensor", "would be unpickled")
    vet(torch._C.PyTorchFileReader(io.BytesIO(data)).get_record("data.pkl"))


def _vet_json(record: str, content: Any) -> None:
    for key, value in _strings(content):
        why = _refuse_string(key, value)
        if why:
            raise Refused(record, repr(value), why)


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield "", name
            yield from _strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, str):
        yield key, value


def _refuse_string(key: str, value: str) -> str | None:
    if any(name in value for name in _IMPORTING_KEYS):
        return "would import a module that the file names"
    if key in ("target", "as_operator") and not _is_operator(value):
        return "is not an operator of torch"
    if key == "name" and value and not _IDENTIFIER.fullmatch(value):
        return "is not a name, and would become code"
    if key == "expr_str" and not _is_expression(value):
        return "is not an expression over sizes, and would be evaluated"
    return None


def _is_operator(target: str) -> bool:
    if target.startswith(_FORBIDDEN_OPERATORS):
        return False
    return bool(_TARGET.fullmatch(target)) or target in _PLAIN_TARGETS


def _is_expression(text: str) -> bool:
    """Whether a text is arithmetic over sizes, as sympy prints it or as it spells it out."""
    text = _SPELLED_SYMBOL.sub("s0", text)
    if not _EXPRESSION.fullmatch(text) or re.search(r"\.\s*[A-Za-z_]", text):
        return False
    words = _IDENTIFIER.findall(text)
    return all(word in _FUNCTIONS or _SYMBOL.fullmatch(word) for word in words)
