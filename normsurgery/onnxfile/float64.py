"""What an ONNX graph says, computed in float64 throughout: the truth its runs are held against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from normsurgery.errors import CannotRun, UsageError
from normsurgery.numerics.precision import NotFloat64
from normsurgery.onnxfile.feeding import as_array
from normsurgery.onnxfile.formulas import OPERATORS
from normsurgery.onnxfile.lifting import (
    lift_node,
    lifted_array,
    lifted_graph,
    without_functions,
)
from normsurgery.onnxfile.reading import OnnxFile, subgraphs

Array = np.ndarray[Any, Any]


class Float64Graph:
    """The graph's own float64 truth, inner values included.

    Exactly the weights of the file; every cast to, and every constant of, a lower floating type is
    lifted to float64; norms are centred. Where a weight of the file was rounded, so it stays.

    Raises CannotRun naming the operator where there is no formula for it.
    """

    def __init__(self, model: OnnxFile | onnx.ModelProto) -> None:
        proto = model.proto if isinstance(model, OnnxFile) else model
        self._outputs = [value.name for value in proto.graph.output]
        self._computed = [name for node in proto.graph.node for name in node.output if name]
        plain = without_functions(proto)
        self._nodes = plain.graph.node
        light, self._constants = lifted_graph(plain)
        try:
            self._evaluator = _Evaluator(light)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise CannotRun(f"no float64 run of the graph: {_first(error)}.") from None

    def run(
        self,
        feeds: Mapping[str, Array | Tensor],
        wanted: Literal["all"] | Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Value name -> tensor on the CPU, float64 where it is floating.

        feeds: input name -> array of the file's dtype; floating ones are widened, exactly.
        wanted: names of values (inputs and weights too), "all": every value that a node of the main
            graph computes, or None: the outputs. Values that are no tensors are left out of "all".

        Raises NotFloat64 where an operator gives a floating result of another type, CannotRun where
        one fails.
        """
        given = {name: _widened(value) for name, value in feeds.items()}
        known = {**self._constants, **given}
        names = self._wanted(wanted, known)
        found = self._evaluator.values(known, set(names))
        return {name: _as_tensor(found[name]) for name in names if _is_array(found.get(name))}

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """The initializers, float64 where they are floating."""
        return {name: _as_tensor(value) for name, value in self._constants.items()}

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The nodes of the main graph, in its order, to be run one by one on any values."""
        nodes = zip(self._nodes, self._evaluator.rt_nodes_, strict=True)
        return tuple(Step(node, self._evaluator, operator) for node, operator in nodes)

    def _wanted(self, wanted: Any, known: Mapping[str, Array]) -> list[str]:
        if wanted is None:
            return self._outputs
        if wanted == "all":
            return self._computed
        computed = set(self._computed)
        unknown = [name for name in wanted if name not in computed and name not in known]
        if unknown:
            raise UsageError(f"the graph has no value {unknown[0]!r}, which was asked for.")
        return list(wanted)


@dataclass(frozen=True)
class Step:
    """One node of a graph: `node` as the file has it, `run` in float64."""

    node: onnx.NodeProto
    _evaluator: _Evaluator
    _operator: Any

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the node makes of `values` (all that it and its subgraphs read), by name.

        Raises NotFloat64 and CannotRun as `Float64Graph.run` does.
        """
        read = {name for name in _reads(self._operator.onnx_node) if name}
        known: dict[str, Any] = {"": None}
        known |= {name: lifted_array(as_array(values[name])) for name in read if name in values}
        with np.errstate(all="ignore"), torch.no_grad():
            made = self._evaluator.outputs_of(self._operator, known, None)
        found = {}
        for name, value in zip(self.node.output, made, strict=False):
            _check(value, self._operator)
            if name and _is_array(value):
                found[name] = _as_tensor(value)
        return found


class _Evaluator(ReferenceEvaluator):
    """ONNX's reference evaluator with this package's formulas, every result checked."""

    def __init__(self, proto: Any, *args: Any, **options: Any) -> None:
        if isinstance(proto, onnx.FunctionProto):  # the body of an operator that ONNX defines so
            body = onnx.FunctionProto()
            body.CopyFrom(proto)
            for node in body.node:
                lift_node(node)
            proto = body
        options["new_ops"] = OPERATORS
        super().__init__(proto, *args, **options)
        for operator in self.rt_nodes_:
            _widen_attributes(operator)

    def run(
        self,
        output_names: Sequence[str] | None,
        feed_inputs: dict[str, Any],
        attributes: dict[str, Any] | None = None,
        intermediate: bool = False,
        check_shape_annotations: bool | None = None,
        _bindings: Any = None,
    ) -> Any:
        """As the base class has it; `feed_inputs` may hold the values of the graph around."""
        names = list(output_names or self.output_names)
        found = self.values(feed_inputs, set(names), attributes)
        return found if intermediate else [found[name] for name in names]

    def values(
        self, feeds: Mapping[str, Any], keep: set[str], attributes: Any = None
    ) -> dict[str, Any]:
        """Run all nodes; values that are neither kept nor needed any more are dropped."""
        values: dict[str, Any] = {"": None, **self.rt_inits_, **feeds}
        last = self._last_uses()
        with np.errstate(all="ignore"), torch.no_grad():
            for index, node in enumerate(self.rt_nodes_):
                for name, value in zip(
                    node.output, self.outputs_of(node, values, attributes), strict=False
                ):
                    _check(value, node)
                    values[name] = value
                for name in last.get(index, ()):
                    if name not in keep:
                        values.pop(name, None)
        return values

    def outputs_of(self, node: Any, values: dict[str, Any], attributes: Any) -> Any:
        linked = {"linked_attributes": attributes} if node.has_linked_attribute else {}
        if node.need_context():
            linked["context"] = values
        missing = [name for name in node.input if name not in values]
        if missing:
            raise CannotRun(f"{_named(node)} reads {missing[0]!r}, which nothing gives.")
        try:
            return node.run(*[values[name] for name in node.input], **linked)
        except (CannotRun, NotFloat64):
            raise
        except Exception as error:  # an operator may refuse its inputs in any way
            shapes = ", ".join(_described(values[name]) for name in node.input)
            reason = _first(error.__cause__ or error)
            raise CannotRun(f"{_named(node)} fails in float64 on {shapes}: {reason}.") from None

    def _last_uses(self) -> dict[int, list[str]]:
        """Position of a node -> the values that no later node reads."""
        if not hasattr(self, "_dropped"):
            last: dict[str, int] = {}
            for index, node in enumerate(self.rt_nodes_):
                for name in (*node.output, *_reads(node.onnx_node)):
                    last[name] = index
            self._dropped: dict[int, list[str]] = {}
            for name, index in last.items():
                if name:
                    self._dropped.setdefault(index, []).append(name)
        return self._dropped


def _reads(node: onnx.NodeProto) -> Iterable[str]:
    """What a node reads, its subgraphs included."""
    yield from node.input
    for graph in subgraphs(node):
        yield from (value.name for value in graph.output)
        for inner in graph.node:
            yield from _reads(inner)


def _widen_attributes(operator: Any) -> None:
    """Floating attributes as float64 of the same value: numpy would compute their roots in fp32."""
    for name, value in list(vars(operator).items()):
        if isinstance(value, np.float32):
            setattr(operator, name, float(value))
        elif isinstance(value, list) and value and isinstance(value[0], np.float32):
            setattr(operator, name, [float(item) for item in value])


def _check(value: Any, node: Any) -> None:
    if isinstance(value, list):
        for item in value:
            _check(item, node)
    if isinstance(value, np.ndarray) and not _is_exact(value.dtype):
        raise NotFloat64(f"{_named(node)} gave {value.dtype} in a float64 run of the graph")


def _is_exact(dtype: np.dtype[Any]) -> bool:
    if dtype.kind in "fc":
        return dtype in (np.float64, np.complex128)
    return "float" not in dtype.name


def _named(node: Any) -> str:
    name = node.onnx_node.name or node.output[0]
    return f"{node.op_type} (node {name!r})"


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__


def _widened(value: Array | Tensor) -> Array:
    return lifted_array(as_array(value) if isinstance(value, Tensor) else np.asarray(value))


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiubc"


def _as_tensor(value: Array) -> Tensor:
    writable = value.flags.writeable and value.flags.c_contiguous
    return torch.from_numpy(value if writable else np.array(value, order="C"))


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__
