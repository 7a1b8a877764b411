"""Reads ONNX files: what they take and give, which norms they have, where their nodes come from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from normsurgery.errors import CannotRead
from normsurgery.onnxfile.external import LARGE_FILE as LARGE_FILE
from normsurgery.onnxfile.external import first_line, load_external_data
from normsurgery.onnxfile.external import save_large as save_large
from normsurgery.onnxfile.external import weight_bytes as weight_bytes
from normsurgery.onnxfile.origins import Origin as Origin
from normsurgery.onnxfile.origins import origin as origin

TYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.UINT64: torch.uint64,
    onnx.TensorProto.COMPLEX64: torch.complex64,
    onnx.TensorProto.COMPLEX128: torch.complex128,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    onnx.TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    onnx.TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    onnx.TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}
# The operators that normalise, in ONNX and in onnxruntime, which writes fused ones of its own.
NORM_OPERATORS = frozenset(
    {
        "BatchNormalization",
        "BranchwiseRMSNorm",
        "EmbedLayerNormalization",
        "GatedRMSNorm",
        "GroupNorm",
        "GroupNormalization",
        "InstanceNormalization",
        "LRN",
        "LayerNormalization",
        "LpNormalization",
        "MeanVarianceNormalization",
        "Normalizer",
        "QEmbedLayerNormalization",
        "QOrderedLayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipGroupNorm",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
_KNOWN_DOMAINS = frozenset(
    {
        "",
        "ai.onnx",
        "ai.onnx.ml",
        "ai.onnx.preview",
        "ai.onnx.preview.training",
        "ai.onnx.training",
        "com.microsoft",
        "com.microsoft.nchwc",
        "com.microsoft.experimental",
        "com.ms.internal.nhwc",
        "org.pytorch.aten",
    }
)
# onnxruntime writes these into its optimised graphs as if they were ONNX's own.
RUNTIME_OPERATORS = frozenset({"SimplifiedLayerNormalization"})
_LARGE_TENSOR = 4096  # bytes: no shape is computed from a tensor this large


@dataclass(frozen=True)
class Port:
    """An input or an output, or any value. shape: sizes, names of dynamic axes, None unknown."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        sizes = "..." if self.shape is None else ", ".join(str(s or "?") for s in self.shape)
        return f"{str(self.dtype).removeprefix('torch.')}[{sizes}]"


@dataclass(frozen=True)
class OnnxFile:
    """A checked ONNX model with all its weights; `path` is "" for one that is in memory only."""

    proto: onnx.ModelProto
    path: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opset: int

    @property
    def place(self) -> str:
        """What to call it in a sentence."""
        return self.path or "the ONNX model"


def read(path: str | Path) -> OnnxFile:
    """Read and check an ONNX file, external data included.

    Raises CannotRead, in a sentence: no such file, truncated, no ONNX, external data missing or
    too short, not valid ONNX, an operator of a domain nobody here knows, inputs that are no tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise CannotRead(f"{path}: there is no such ONNX file.")
    if path.stat().st_size == 0:
        raise CannotRead(f"{path}: the file is empty (0 bytes). Export it again.")
    try:
        proto = onnx.load(path, load_external_data=False, format="protobuf")
    except (DecodeError, ValueError) as error:
        raise CannotRead(
            f"{path}: not an ONNX file, or a truncated one ({first_line(error)}). Export it again."
        ) from None
    _refuse_empty(proto, str(path))
    load_external_data(proto, path)
    return of_proto(proto, str(path))


def of_proto(proto: onnx.ModelProto, path: str = "") -> OnnxFile:
    """Check a model that is in memory, with its weights. Raises CannotRead as `read` does."""
    _refuse_empty(proto, path)
    check(proto, path)
    constants = {tensor.name for tensor in proto.graph.initializer}
    given = [value for value in proto.graph.input if value.name not in constants]
    return OnnxFile(
        proto,
        path,
        tuple(_port(value, "input", path) for value in given),
        tuple(_port(value, "output", path) for value in proto.graph.output),
        _opset(proto),
    )


def check(proto: onnx.ModelProto, path: str = "") -> None:
    """Hold a model against the ONNX standard, shapes and types included (`full_check`).

    path: what to call it in the error; where the model has more than 2 GB and the file exists, the
    file is checked. Raises CannotRead with the checker's reason.
    """
    place = path or "the ONNX model"
    _refuse_unknown_domains(proto, place)
    newest = onnx.defs.onnx_opset_version()
    if _opset(proto) > newest:
        raise CannotRead(
            f"{place}: opset {_opset(proto)}, the installed onnx {onnx.__version__} knows opsets "
            f"up to {newest}. Install a newer onnx, or export with a lower opset."
        )
    try:
        _run_checker(_in_known_domains(proto), path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CannotRead(f"{place}: not valid ONNX: {_reason(error)}.") from None
    except (DecodeError, EncodeError, ValueError, RuntimeError) as error:
        raise CannotRead(f"{place}: cannot be checked: {first_line(error)}.") from None


def norm_operators(proto: onnx.ModelProto) -> dict[str, int]:
    """How often each norm operator runs: operator -> count, by name.

    Fused operators of onnxruntime count; the body of a subgraph counts once, that of a function as
    often as it is called.
    """
    functions = {(f.domain, f.name): f for f in proto.functions}
    counts: dict[str, int] = {}

    def count(nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            called = functions.get((node.domain, node.op_type))
            if called is not None:
                count(called.node)
            elif node.op_type in NORM_OPERATORS:
                counts[node.op_type] = counts.get(node.op_type, 0) + 1
            for graph in subgraphs(node):
                count(graph.node)

    count(proto.graph.node)
    return dict(sorted(counts.items()))


def all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of the graph, of its subgraphs and of the functions of the model."""
    yield from _nodes(proto.graph.node)
    for function in proto.functions:
        yield from _nodes(function.node)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies that an If, Loop or Scan holds."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def value_types(proto: onnx.ModelProto) -> dict[str, Port]:
    """dtype and shape of the values of the main graph, as far as ONNX's shape inference knows.

    Values that are no tensors, or of a type torch lacks, are left out. Initializers are included.
    """
    inferred = onnx.shape_inference.infer_shapes(_without_weights(proto), data_prop=True).graph
    found = {
        tensor.name: Port(tensor.name, TYPES[tensor.data_type], tuple(tensor.dims))
        for tensor in proto.graph.initializer
        if tensor.data_type in TYPES
    }
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type") and kind.elem_type in TYPES:
            found[value.name] = Port(value.name, TYPES[kind.elem_type], _shape(kind))
    return found


def is_floating(value: Port | None) -> bool:
    """Whether a value is known to hold real numbers; False for None."""
    return value is not None and value.dtype.is_floating_point


def floating_values(proto: onnx.ModelProto) -> tuple[str, ...]:
    """The floating values that nodes of the main graph compute, in graph order."""
    types = value_types(proto)
    names = (name for node in proto.graph.node for name in node.output)
    return tuple(name for name in names if name and is_floating(types.get(name)))


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from _nodes(graph.node)


def _refuse_empty(proto: onnx.ModelProto, path: str) -> None:
    place = path or "the ONNX model"
    if not proto.HasField("graph") or not proto.opset_import:
        raise CannotRead(f"{place}: not an ONNX model: it has no graph or names no opset.")
    if not proto.graph.output:
        raise CannotRead(f"{place}: the graph has no outputs, so there is nothing to run.")


def _refuse_unknown_domains(proto: onnx.ModelProto, place: str) -> None:
    functions = {(f.domain, f.name) for f in proto.functions}
    for node in all_nodes(proto):
        known = node.domain in _KNOWN_DOMAINS or (node.domain, node.op_type) in functions
        if not known:
            raise CannotRead(
                f"{place}: node {node.name or node.output[0]!r} is a {node.op_type} of the domain "
                f"{node.domain!r}, which is neither ONNX's nor onnxruntime's, and the file brings "
                f"no function of that name. Export without custom operators."
            )


def _in_known_domains(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with onnxruntime's own operators in onnxruntime's own domain."""
    if not any(n.op_type in RUNTIME_OPERATORS and not n.domain for n in all_nodes(proto)):
        return proto
    moved = onnx.ModelProto()
    moved.CopyFrom(proto)
    for node in all_nodes(moved):
        if node.op_type in RUNTIME_OPERATORS and not node.domain:
            node.domain = "com.microsoft"
    if all(entry.domain != "com.microsoft" for entry in moved.opset_import):
        moved.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return moved


def _run_checker(proto: onnx.ModelProto, path: str) -> None:
    if weight_bytes(proto) < LARGE_FILE:
        onnx.checker.check_model(proto, full_check=True)
    elif path and Path(path).is_file():
        onnx.checker.check_model(path, full_check=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            onnx.checker.check_model(save_large(proto, Path(folder)), full_check=True)


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large initializers as inputs: what shape inference needs."""
    graph = proto.graph
    light = onnx.ModelProto(ir_version=proto.ir_version)
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    light.graph.name = graph.name
    light.graph.node.extend(graph.node)
    light.graph.input.extend(graph.input)
    light.graph.output.extend(graph.output)
    light.graph.value_info.extend(graph.value_info)
    given = {value.name for value in graph.input}
    for tensor in graph.initializer:
        if len(tensor.raw_data) <= _LARGE_TENSOR and tensor.ByteSize() <= 2 * _LARGE_TENSOR:
            light.graph.initializer.append(tensor)
        elif tensor.name not in given:
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return light


def _port(value: onnx.ValueInfoProto, what: str, path: str) -> Port:
    place = path or "the ONNX model"
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        name = (kind or "value of no type").removesuffix("_type").replace("_", " ")
        raise CannotRead(
            f"{place}: {what} {value.name!r} is a {name}; only tensors can be fed and compared. "
            f"Export a wrapper whose inputs and outputs are tensors."
        )
    tensor = value.type.tensor_type
    if tensor.elem_type not in TYPES:
        name = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise CannotRead(f"{place}: {what} {value.name!r} holds {name}, which torch has not.")
    return Port(value.name, TYPES[tensor.elem_type], _shape(tensor))


def _shape(tensor: onnx.TypeProto.Tensor) -> tuple[int | str | None, ...] | None:
    if not tensor.HasField("shape"):
        return None
    return tuple(_dimension(size) for size in tensor.shape.dim)


def _dimension(size: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if size.HasField("dim_value"):
        return int(size.dim_value)
    return size.dim_param or None


def _opset(proto: onnx.ModelProto) -> int:
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    return int(versions.get("", versions.get("ai.onnx", 0)))


def _reason(error: Exception) -> str:
    """The checker's reason on one line, without its context of nested calls."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("==>", "[ShapeInferenceError] Infer"))]
    text = "; ".join(kept or lines[:1]).replace("[ShapeInferenceError] Inference error(s): ", "")
    return text.rstrip(".")[:500] or type(error).__name__
