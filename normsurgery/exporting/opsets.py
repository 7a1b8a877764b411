"""Which opset a model is written in, and what an opset does not allow."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import torch
from torch import fx
from torch.export import ExportedProgram

from normsurgery.errors import UsageError
from normsurgery.onnxfile.origins import origin
from normsurgery.onnxfile.reading import all_nodes, value_types

FIRST, LAST = 18, 24
DEFAULT = 20
BFLOAT16 = 22  # the first whose convolutions, pools and instance norms take bfloat16
RMS = 23  # the first that has RMSNormalization

_FROM_22 = ("conv", "pool", "instance_norm", "group_norm", "grid_sampler")
_RMS = ("aten.rms_norm", "aten._fused_rms_norm", "normsurgery.rms_norm_cast_first")


def check_opset(opset: int | None) -> None:
    """Raise UsageError for an opset that cannot be written."""
    if opset is not None and (isinstance(opset, bool) or opset not in range(FIRST, LAST + 1)):
        raise UsageError(f"opset {opset} cannot be written; it must be from {FIRST} to {LAST}.")


def choose_opset(program: ExportedProgram, asked: int | None) -> tuple[int, str]:
    """The opset for a traced program, and the sentence that says why.

    Default 20: what every runtime of the last years reads. 22 where something of bfloat16 needs
    it. 23 for an RMS norm in float32 that is then one operator; not in half precision, where
    onnxruntime's CPU provider has no bfloat16 kernel for it, and 20 keeps the casts in sight.
    """
    if asked is not None:
        return asked, "asked for"
    newer = _named(program, _FROM_22, torch.bfloat16)
    if newer:
        return BFLOAT16, f"the first in which {newer} takes bfloat16"
    rms = _named(program, _RMS, torch.float32)
    half = _named(program, _RMS, torch.float16) or _named(program, _RMS, torch.bfloat16)
    if rms and not half:
        return RMS, "the first with RMSNormalization, which the model's RMS norms become"
    if half:
        return DEFAULT, (
            f"the default; RMSNormalization ({RMS}) is kept for float32: not every runtime has a "
            "kernel for it in half precision"
        )
    return DEFAULT, "the default: nothing in the model needs a newer one"


def _named(program: ExportedProgram, words: tuple[str, ...], dtype: torch.dtype) -> str:
    """The first operator of one of these names that gives `dtype`; "" where there is none."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            name = str(node.target)
            value = node.meta.get("val")
            value = value[0] if isinstance(value, (tuple, list)) and value else value
            if node.op != "call_function" or getattr(value, "dtype", None) != dtype:
                continue
            if any(name.startswith((w, f"aten.{w}")) or f"_{w}" in name for w in words):
                return name.split(".")[1]
    return ""


def require_allowed(written: onnx.ModelProto, opset: int) -> None:
    """Raise UsageError where an operator is given a type that its opset does not allow.

    Neither torch's exporter nor onnx.checker looks at that; a runtime does, when it loads.
    """
    refused = list(dict.fromkeys(_not_allowed(written, opset)))
    if not refused:
        return
    name, dtype, first, _ = refused[0]
    cure = f"It does from opset {first}: pass opset={first}" if first else "No opset does"
    places = ", ".join(dict.fromkeys(place or "the model itself" for *_, place in refused[:4]))
    raise UsageError(
        f"{name} of {places} does not take {dtype} in opset {opset}. {cure}, or export in fp32."
    )


def _not_allowed(written: onnx.ModelProto, opset: int) -> Iterator[tuple[str, str, int, str]]:
    types = value_types(written)
    for node in all_nodes(written):
        if node.domain not in ("", "ai.onnx"):
            continue
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        for name, formal in _arguments(node, schema):
            port = types.get(name)
            if port is None or not port.dtype.is_floating_point:
                continue
            spelled = f"tensor({_SPELLED[port.dtype]})" if port.dtype in _SPELLED else ""
            if spelled and spelled not in formal.types:
                dtype = str(port.dtype).removeprefix("torch.")
                first = _first_that_takes(node.op_type, formal.name, spelled)
                yield node.op_type, dtype, first, origin(node).module


_SPELLED = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def _arguments(
    node: onnx.NodeProto, schema: onnx.defs.OpSchema
) -> Iterator[tuple[str, onnx.defs.OpSchema.FormalParameter]]:
    """Names of the inputs of a node, each with what the schema says of it."""
    for index, name in enumerate(node.input):
        if name and schema.inputs:
            yield name, schema.inputs[min(index, len(schema.inputs) - 1)]


def _first_that_takes(operator: str, parameter: str, dtype: str) -> int:
    for opset in range(FIRST, LAST + 1):
        for formal in onnx.defs.get_schema(operator, opset, "").inputs:
            if formal.name == parameter and dtype in formal.types:
                return opset
    return 0
