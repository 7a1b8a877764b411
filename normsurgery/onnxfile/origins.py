"""Where a node of an ONNX graph comes from: the traced node, the module, the source line."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n?\s*([^\n]*)')
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Origin:
    """fx_node: name in the traced program. module: path in the source model; "" is the model itself
    or unknown. source: "file.py:123 in forward: code"; "" unknown.
    """

    fx_node: str = ""
    module: str = ""
    source: str = ""


def origin(node: onnx.NodeProto) -> Origin:
    """What a node's metadata tells: normsurgery's own keys first, then those of torch's exporter.

    Nothing is known of a node that onnxruntime made: it drops metadata.
    """
    told = {entry.key: entry.value for entry in node.metadata_props}
    scopes = _scopes(told.get("pkg.torch.onnx.name_scopes", ""))
    fx_node = scopes[-1] if scopes else _fx_name(told.get("pkg.torch.onnx.fx_node", ""))
    module = told.get("normsurgery.module", scopes[-2] if len(scopes) > 1 else "")
    source = told.get("normsurgery.source", "")
    return Origin(fx_node, module, source or source_line(told.get("pkg.torch.onnx.stack_trace")))


def source_line(stack_trace: str | None) -> str:
    """The innermost line of a stack trace that is the user's, not torch's: "a.py:3 in forward: x".

    A file of an installed package is told from the package on, any other relative to the working
    directory where it is below it.
    """
    frames = _FRAME.findall(stack_trace or "")
    users = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    if not users:
        return ""
    file, line, function, code = users[-1]
    return f"{_short(file)}:{line} in {function}: {code.strip()}".removesuffix(": ")


def _short(file: str) -> str:
    if "site-packages/" in file:
        return file.rsplit("site-packages/", 1)[1]
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file


def _scopes(text: str) -> list[str]:
    try:
        scopes = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError):
        return []
    return [str(scope) for scope in scopes] if isinstance(scopes, list) else []


def _fx_name(text: str) -> str:
    found = re.match(r"%(\w+)", text)
    return found.group(1) if found else ""
