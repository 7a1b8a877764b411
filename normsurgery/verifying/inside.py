"""What a runtime computes inside a graph, every floating value judged against its float64 truth.

An inner value carries the errors of everything before it, so it is judged by its own, local error:
against the float64 value of its node, fed with what the runtime itself fed it. A node whose result
one rounding of its inputs would move is allowed that (a centred norm of large values is), which is
what tells it from a node that computes badly (a one-pass variance is off by far more).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normsurgery.inputs import Inputs
from normsurgery.onnxfile.feeding import as_tensor, feeds
from normsurgery.onnxfile.float64 import Float64Graph
from normsurgery.onnxfile.reading import OnnxFile, Port, floating_values, origin, value_types
from normsurgery.onnxfile.sessions import Session
from normsurgery.verifying.differences import ulp
from normsurgery.verifying.judge import Verdict, judge
from normsurgery.verifying.shaking import moved, shaken_inputs
from normsurgery.verifying.stages import Coverage, InnerValue

if TYPE_CHECKING:
    from onnx import NodeProto

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Inside:
    """The inner values of a graph, judged, in graph order."""

    values: tuple[InnerValue, ...]
    coverage: Coverage | None


def look_inside(
    file: OnnxFile,
    inputs: Inputs,
    *,
    order: tuple[str, ...] = (),
    runner: str = "cpu",
    seed: int = 0,
    source: Tensors | None = None,
    graph: Float64Graph | None = None,
) -> Inside:
    """Run the graph once with all its floating values as outputs, unoptimised, and judge each.

    source: float64 values of the source model for these inputs, by name: what corresponds to one of
        them is said. Raises CannotRun where the runner cannot run the graph so.
    """
    graph = graph or Float64Graph(file.proto)
    fed = feeds(file, inputs, order)
    types = value_types(file.proto)
    names = floating_values(file.proto)
    truth = graph.run(fed, "all")
    computed = [name for name in names if name in truth and name not in _given(graph, fed)]
    found = Session(file, level="off", runner=runner, also=computed).run(fed)
    corresponding = _corresponding(truth, source, types)
    values = tuple(
        InnerValue(
            value=name,
            node=node.name,
            operator=node.op_type,
            module=origin(node).module,
            source=origin(node).source,
            against="source" if name in corresponding else "graph",
            verdict=verdict,
            total_ulps=_distance(found[name], truth[name]),
        )
        for node, name, verdict in _judged(graph, fed, found, truth, seed)
    )
    both = sum(value.against == "source" for value in values)
    return Inside(values, Coverage(len(names), len(values), both))


def moved_values(
    graph: Float64Graph,
    fed: Mapping[str, Any],
    dtype: torch.dtype,
    seed: int,
    *,
    shaking: bool = False,
) -> dict[str, Tensor]:
    """Every float64 value of the graph, its inputs and constants moved by one rounding of `dtype`:
    how well conditioned the graph is.

    shaking: move what every node gives, too.
    """
    rounding = torch.finfo(dtype).eps / 2
    generator = torch.Generator().manual_seed(seed)

    def off(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: moved(value, rounding, generator) if value.is_floating_point() else value
            for name, value in values.items()
        }

    values = off(_doubled(fed) | dict(graph.constants))
    for step in graph.steps:
        if not shaking:
            values.update(step.run(values))
            continue
        read = shaken_inputs(step.node, values, rounding, generator)
        values.update(off(step.run({**values, **read})))
    return values


def _given(graph: Float64Graph, fed: Mapping[str, Any]) -> set[str]:
    return {*graph.constants, *fed}


def _doubled(fed: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {name: as_tensor(array) for name, array in fed.items()}
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def _judged(
    graph: Float64Graph,
    fed: Mapping[str, Any],
    found: Tensors,
    truth: Tensors,
    seed: int,
) -> Iterator[tuple[NodeProto, str, Verdict]]:
    """Every floating value that a node makes, against its float64 value from the runtime's own."""
    generator = torch.Generator().manual_seed(seed)
    values = _doubled(fed) | dict(graph.constants)
    for step in graph.steps:
        local = step.run(values)
        judged = [name for name in local if name in found and found[name].is_floating_point()]
        if judged:
            shaken = shaken_inputs(step.node, values, _rounding(found, judged), generator)
            other = step.run({**values, **shaken}) if shaken else local
            for name in judged:
                if _read_overflowed(step.node, found, truth):
                    reason = "what it reads overflows in its type, where the runtime keeps it wider"
                    yield step.node, name, Verdict(None, reason, compared=found[name].numel())
                else:
                    yield step.node, name, _verdict(found[name], local[name], other[name])
        values |= local
        values |= {name: found[name].double() for name in judged}


def _read_overflowed(node: NodeProto, found: Tensors, truth: Tensors) -> bool:
    """A runtime may round a value only where it must hand it out: inside it may stay finite."""
    return any(
        bool((found[name].isinf() & truth[name].isfinite()).any())
        for name in node.input
        if name in found and found[name].shape == truth[name].shape
    )


def _rounding(found: Tensors, names: Sequence[str]) -> float:
    """One rounding of the coarsest type that a node gives."""
    return max(torch.finfo(found[name].dtype).eps for name in names) / 2


def _verdict(found: Tensor, local: Tensor, other: Tensor) -> Verdict:
    verdict = judge(found, local)
    if verdict.passed is not False:
        return verdict
    rounded = local.to(found.dtype)
    overflows = not torch.equal(rounded.isfinite(), local.isfinite())
    return judge(found, local, rounded if overflows else None, shaken=other)


def _distance(found: Tensor, truth: Tensor) -> float:
    """The largest error of the whole run up to here, in ulp of the largest value."""
    if found.shape != truth.shape or found.numel() == 0:
        return 0.0
    finite = truth.isfinite() & found.isfinite()
    error = torch.where(finite, (found.double() - truth).abs(), 0.0).max()
    scale = torch.where(truth.isfinite(), truth.abs(), 0.0).max()
    return float(error) / ulp(float(scale), found.dtype)


def _corresponding(
    truth: Tensors, source: Tensors | None, types: Mapping[str, Port]
) -> dict[str, str]:
    from normsurgery.verifying.alignment import correspond

    if not source:
        return {}
    floats = {name: value for name, value in truth.items() if value.is_floating_point()}
    dtypes = {name: port.dtype for name, port in types.items()}
    return correspond(floats, source, dtypes=dtypes)
