"""ONNX graphs run by onnxruntime: on a provider, at an optimisation level, inner values too."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from normsurgery.errors import CannotRun, UnknownName, UsageError
from normsurgery.onnxfile.external import LARGE_FILE, save_large, weight_bytes
from normsurgery.onnxfile.feeding import as_array, as_tensor
from normsurgery.onnxfile.reading import TYPES, OnnxFile

_LEVELS = {
    "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
LEVELS = tuple(_LEVELS)
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_ERRORS_ONLY = 3  # onnxruntime's log severity
_NO_CONVERSION = frozenset({torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2})


def missing_provider(runner: str) -> str:
    """Why onnxruntime cannot run there on this machine, or "". Raises UnknownName."""
    if runner not in PROVIDERS:
        raise UnknownName("runner", runner, PROVIDERS)
    if PROVIDERS[runner] not in onnxruntime.get_available_providers():
        return (
            f"the installed onnxruntime has no {PROVIDERS[runner]} "
            f"(pip install onnxruntime-gpu on a machine with a GPU)"
        )
    return "" if runner == "cpu" else _unusable(runner)


class Session:
    """One onnxruntime session; deterministic, and all on `runner` (what it lacks runs on the CPU).

    On CUDA float32 means float32: TF32 is switched off.

    level: how far onnxruntime may rewrite the graph; "off" runs it as it is written.
    also: inner values to return as well. They keep onnxruntime from fusing across them, so other
        levels than "off" then run another graph than users run.
    threads: 0 leaves their number to onnxruntime.

    Raises CannotRun where the runner is missing, an operator has no kernel there or the graph is
    rejected; UsageError where `also` names no value.
    """

    def __init__(
        self,
        model: OnnxFile | onnx.ModelProto,
        *,
        level: str = "all",
        runner: str = "cpu",
        also: Sequence[str] = (),
        threads: int = 0,
    ) -> None:
        if level not in LEVELS:
            raise UnknownName("optimisation level", level, LEVELS)
        reason = missing_provider(runner)
        if reason:
            raise CannotRun(f"{runner}: {reason}.")
        proto = model.proto if isinstance(model, OnnxFile) else model
        path = model.path if isinstance(model, OnnxFile) else ""
        self.runner, self.level = runner, level
        self._proto, self._place = proto, path or "the ONNX model"
        options = _options(level, threads)
        self._session = self._started(_with_outputs(proto, also), path if not also else "", options)
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    def run(
        self, feeds: Mapping[str, np.ndarray[Any, Any] | Tensor], wanted: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """The outputs, then `also`: name -> tensor on the CPU, in the graph's dtypes.

        wanted: compute and return only these outputs. Raises CannotRun where a kernel fails.
        """
        wanted_inputs = [port.name for port in self._session.get_inputs()]
        if set(wanted_inputs) != set(feeds):
            raise UsageError(
                f"{self._place} takes the inputs {', '.join(wanted_inputs) or 'none'}, not "
                f"{', '.join(feeds) or 'none'}."
            )
        arrays = {name: _as_array(value) for name, value in feeds.items()}  # onnxruntime may borrow
        values = {name: _as_value(array) for name, array in arrays.items()}
        names = list(wanted or self.outputs)
        try:
            found = self._session.run_with_ort_values(names, values)
        except Exception as error:  # onnxruntime has a dozen classes, without a common base
            raise CannotRun(self._fault(error)) from None
        return {name: _read_out(value) for name, value in zip(names, found, strict=True)}

    def _started(
        self, proto: onnx.ModelProto, path: str, options: onnxruntime.SessionOptions
    ) -> onnxruntime.InferenceSession:
        try:
            return _start(proto, path, options, self.runner)
        except Exception as error:  # onnxruntime has a dozen classes, without a common base
            raise CannotRun(self._fault(error)) from None

    def _fault(self, error: Exception) -> str:
        return explain(error, self._proto, self.runner, self._place)


def optimised(proto: onnx.ModelProto, level: str, runner: str = "cpu") -> onnx.ModelProto:
    """The graph that onnxruntime makes of `proto` at `level` for `runner`, with its weights.

    It is made for this machine, and has lost the metadata of the nodes. Raises CannotRun.
    """
    if level not in LEVELS:
        raise UnknownName("optimisation level", level, LEVELS)
    reason = missing_provider(runner)
    if reason:
        raise CannotRun(f"{runner}: {reason}.")
    with tempfile.TemporaryDirectory() as folder:
        options = _options(level, 1)
        path = str(Path(folder) / "optimised.onnx")
        options.optimized_model_filepath = path
        if weight_bytes(proto) >= LARGE_FILE:
            key = "session.optimized_model_external_initializers_file_name"
            options.add_session_config_entry(key, "optimised.weights")
        try:
            _start(proto, "", options, runner)
        except Exception as error:  # onnxruntime has a dozen classes, without a common base
            raise CannotRun(explain(error, proto, runner, "the ONNX model")) from None
        return onnx.load(path)


def explain(error: Exception, proto: onnx.ModelProto, runner: str, place: str) -> str:
    """What onnxruntime says, as one sentence: operator, node, runner, dtype, and what to do."""
    text = " ".join(str(error).split())
    provider = PROVIDERS[runner]
    missing = re.search(
        r"Could not find an implementation for (\w+)\((\d+)\) node with name '(.*?)'", text
    )
    if missing:
        operator, version, name = missing.groups()
        return (
            f"{place}: onnxruntime's {provider} has no kernel for {operator} (version {version}) "
            f"in {_dtypes_at(proto, name)} (node {name!r}). Export in float32 or float16, with "
            f"another opset, or run it elsewhere."
        )
    failing = re.search(r"running (\w+) node\. Name:\s*'(.*?)'", text)
    if failing:
        operator, name = failing.groups()
        reason = re.sub(r"/\S+\.(h|cc):\d+ \S+", "", text.split("Status Message:")[-1]).strip()
        return (
            f"{place}: {operator} (node {name!r}) fails in onnxruntime's {provider}: "
            f"{reason[:300].rstrip('. ')}. Give inputs that the graph takes, or export it again."
        )
    reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)[:400].rstrip(". ")
    return f"{place}: onnxruntime's {provider} rejects the graph: {reason}. Export it again."


def _options(level: str, threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = _LEVELS[level]
    options.use_deterministic_compute = True
    options.log_severity_level = _ERRORS_ONLY + 1
    options.intra_op_num_threads = threads
    return options


def _start(
    proto: onnx.ModelProto, path: str, options: onnxruntime.SessionOptions, runner: str
) -> onnxruntime.InferenceSession:
    providers = _providers(runner)
    if weight_bytes(proto) < LARGE_FILE:
        return _session(proto.SerializeToString(), options, providers)
    if path and Path(path).is_file():
        return _session(path, options, providers)
    with tempfile.TemporaryDirectory() as folder:
        return _session(save_large(proto, Path(folder)), options, providers)


def _providers(runner: str) -> list[tuple[str, dict[str, str]]]:
    """The provider of the runner with its options, then those that take what it lacks."""
    names = [PROVIDERS[runner], *([PROVIDERS["cuda"]] if runner == "tensorrt" else [])]
    available = onnxruntime.get_available_providers()
    chosen = [name for name in dict.fromkeys((*names, PROVIDERS["cpu"])) if name in available]
    # By default it rounds what it multiplies to ten binary digits, which is not float32.
    return [(name, {"use_tf32": "0"} if name == PROVIDERS["cuda"] else {}) for name in chosen]


def _session(
    source: str | bytes,
    options: onnxruntime.SessionOptions,
    providers: list[tuple[str, dict[str, str]]],
) -> onnxruntime.InferenceSession:
    session = onnxruntime.InferenceSession(source, options, providers=providers)
    wanted = providers[0][0]
    if session.get_providers()[0] != wanted:  # onnxruntime falls back to the CPU with a log
        raise RuntimeError(f"{wanted} could not be started")
    session.disable_fallback()
    return session


@cache
def _unusable(runner: str) -> str:
    """Why a provider that is installed does not start: no device, or a library is missing."""
    value = onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Neg", ["x"], ["y"])],
        "probe",
        [value("x", kind, [1])],
        [value("y", kind, [1])],
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    try:
        session = _start(proto, "", _options("off", 1), runner)
        session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:  # onnxruntime has a dozen classes, without a common base
        reason = " ".join(str(error).split())[:300]
        return f"{PROVIDERS[runner]} is installed but does not start: {reason}"
    return ""


def _with_outputs(proto: onnx.ModelProto, also: Sequence[str]) -> onnx.ModelProto:
    """The model with inner values as further outputs; onnxruntime infers their types itself."""
    there = {output.name for output in proto.graph.output}
    new = [name for name in dict.fromkeys(also) if name not in there]
    if not new:
        return proto
    computed = {name for node in proto.graph.node for name in node.output if name}
    unknown = [name for name in new if name not in computed]
    if unknown:
        raise UsageError(f"the graph computes no value {unknown[0]!r}, which was asked for.")
    widened = onnx.ModelProto()
    widened.CopyFrom(proto)
    widened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in new)
    return widened


def _dtypes_at(proto: onnx.ModelProto, name: str) -> str:
    """The dtypes that the node of that name reads, as far as shape inference knows them."""
    from normsurgery.onnxfile.reading import value_types

    types = value_types(proto)
    nodes = [node for node in proto.graph.node if node.name == name]
    read = [types[value].dtype for node in nodes for value in node.input if value in types]
    spelled = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in read)
    return ", ".join(spelled) or "the dtype it has there"


def _as_array(value: np.ndarray[Any, Any] | Tensor) -> np.ndarray[Any, Any]:
    return as_array(value) if isinstance(value, Tensor) else np.asarray(value, order="C")


def _as_value(array: np.ndarray[Any, Any]) -> onnxruntime.OrtValue:
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    if kind in TYPES and TYPES[kind] in _NO_CONVERSION:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _read_out(value: Any) -> Tensor:
    if not value.is_tensor():
        raise CannotRun("onnxruntime returned a sequence or a map; only tensors can be compared.")
    dtype = TYPES[value.element_type()]
    if dtype not in _NO_CONVERSION:
        return as_tensor(value.numpy())
    if not all(value.shape()):
        return torch.empty(value.shape(), dtype=dtype)
    tensor: Tensor = torch.from_dlpack(value._ortvalue.to_dlpack())  # type: ignore[attr-defined]
    return tensor.clone().reshape(value.shape())
