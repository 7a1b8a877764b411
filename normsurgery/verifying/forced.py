"""Every norm of a graph, fed with hard values inside the graph, in float64, beside its source.

An eps that is wrong by little shows where the variance is about as large as it, which deep inside a
model no input brings about. So the values that norms read are replaced, in the graph and in the
traced source alike, by rows of every size, all norms in one run; what corresponds must stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normsurgery.inputs import Inputs
from normsurgery.onnxfile.feeding import as_tensor
from normsurgery.onnxfile.float64 import Float64Graph
from normsurgery.onnxfile.reading import NORM_OPERATORS, OnnxFile, origin, value_types
from normsurgery.verifying.alignment import ValueIndex
from normsurgery.verifying.judge import Verdict, coarsest, judge
from normsurgery.verifying.shaking import moved
from normsurgery.verifying.sides import float_type
from normsurgery.verifying.sources import fed
from normsurgery.verifying.stages import InnerValue

Values = dict[str, Tensor]
# Inputs and values that take the place of others -> every value, by name.
Source = Callable[[Inputs, Mapping[str, Tensor]], Mapping[str, Tensor]]
Pairs = dict[str, list[str]]  # value of the graph -> equal values of the source, nearest first
# A norm that is written in steps begins with one of them.
_REDUCTIONS = frozenset({"ReduceMean", "ReduceL2", "ReduceSumSquare", "ReduceSum", "ReduceL1"})
LEAST, MOST = 1e-7, 1.0  # standard deviations of the rows
DEVIATION = 3e-3  # of a whole tensor: its square is about the usual eps


def forced_norms(
    file: OnnxFile,
    source: Source,
    inputs: Sequence[Inputs],
    order: tuple[str, ...],
    *,
    seed: int = 0,
) -> list[InnerValue]:
    """The first value, for each kind of rows, in which graph and source differ; else nothing.

    source: gives every float64 value of the source, others put in the place of some. inputs: two or
    more, on all of which a pair of values must agree to be taken for the same. Raises what the runs
    raise.
    """
    graph = Float64Graph(file)
    feeds = [_doubled(fed(file, given, order)) for given in inputs]
    runs = [{**values, **_run(graph, values, {})} for values in feeds]
    truths = [source(given, {}) for given in inputs]
    pairs = _pairs(file, runs, truths)
    places = list(_norm_inputs(file, graph, runs[0], pairs))
    found = []
    for kind in ("rows of every size", "small values") if places else ():
        instead = _instead(places, runs[0], kind, seed)
        ours = _run(graph, feeds[0], instead)
        theirs = source(inputs[0], {pairs[name][0]: value for name, value in instead.items()})
        compared = {name: pairs[name] for name in ours if name in pairs and name not in instead}
        found += _first_difference(file, graph, feeds[0], instead, ours, theirs, compared, kind)
    return found


def values_of_graph(file: OnnxFile, order: tuple[str, ...]) -> Source:
    """The values of an ONNX graph, where it is the source."""
    graph = Float64Graph(file)

    def run(inputs: Inputs, instead: Mapping[str, Tensor]) -> Values:
        feeds = _doubled(fed(file, inputs, order))
        return {**feeds, **_run(graph, feeds, instead)}

    return run


def _pairs(
    file: OnnxFile, runs: Sequence[Mapping[str, Tensor]], truths: Sequence[Mapping[str, Tensor]]
) -> Pairs:
    """Value of the graph -> the values of the source that equal it on all inputs. The nearest comes
    first, for a sum with a small eps equals the sum without it; of equally near ones the first."""
    index = ValueIndex(truths)
    types = value_types(file.proto)
    found: Pairs = {}
    for name in runs[0]:
        values = [run[name] for run in runs if name in run]
        if len(values) < len(runs) or not values[0].is_floating_point() or not values[0].numel():
            continue
        if values[0].dim() < 2 or not _varies(values):
            continue
        port = types.get(name)
        dtype = port.dtype if port is not None else torch.float32
        near = {
            other: _distance(values, [truth[other] for truth in truths])
            for other in index.all(values, "", dtype)
        }
        if near:
            found[name] = sorted(near, key=lambda other: near[other])
    return found


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    apart = (torch.where(a == b, 0.0, (a - b).abs()) for a, b in zip(ours, theirs, strict=True))
    return max(float(difference.nan_to_num(0.0).max()) for difference in apart)


def _varies(values: Sequence[Tensor]) -> bool:
    """A value that does not depend on the input may equal another by chance."""
    return any(v.shape != values[0].shape or not torch.equal(v, values[0]) for v in values[1:])


def _norm_inputs(
    file: OnnxFile, graph: Float64Graph, run: Mapping[str, Tensor], pairs: Pairs
) -> Iterator[str]:
    """The values that norms read, each by the first value of the graph that equals it."""
    first: dict[str, str] = {}
    for name, others in pairs.items():
        first.setdefault(others[0], name)
    seen = set()
    for node in file.proto.graph.node:
        if node.op_type not in NORM_OPERATORS and node.op_type not in _REDUCTIONS:
            continue
        name = first.get(pairs.get(node.input[0], [""])[0], "")
        if name and name not in seen and name not in graph.constants:
            seen.add(name)
            yield name


def _instead(
    places: Sequence[str],
    run: Mapping[str, Tensor],
    kind: str,
    seed: int,
) -> Values:
    generator = torch.Generator().manual_seed(seed)
    instead = {}
    for name in places:
        old = run[name]
        new = torch.randn(old.shape, generator=generator, dtype=torch.float64)
        if kind == "small values":
            new = new * DEVIATION
        else:
            share = torch.rand((*old.shape[:-1], 1), generator=generator, dtype=torch.float64)
            new = new * LEAST * torch.pow(torch.tensor(MOST / LEAST), share)
        instead[name] = new.abs() if bool((old >= 0).all()) else new
    return instead


def _run(
    graph: Float64Graph, feeds: Mapping[str, Tensor], instead: Mapping[str, Tensor], off: Any = None
) -> Values:
    """Every value of one run. off: what becomes of each constant."""
    constants = graph.constants if off is None else {n: off(v) for n, v in graph.constants.items()}
    values = {**constants, **feeds}
    values.update({name: instead[name] for name in feeds if name in instead})
    made: Values = {}
    for step in graph.steps:
        new = step.run(values)
        made.update(new)
        values.update(new)
        values.update({name: instead[name] for name in new if name in instead})
    return made


def _first_difference(
    file: OnnxFile,
    graph: Float64Graph,
    feeds: Mapping[str, Tensor],
    instead: Mapping[str, Tensor],
    ours: Values,
    theirs: Mapping[str, Tensor],
    pairs: Pairs,
    kind: str,
) -> list[InnerValue]:
    """The first value of the graph that no value of the source that equalled it equals now."""
    types, held = value_types(file.proto), float_type(file) or torch.float32
    off: Values | None = None
    for name, others in pairs.items():
        value, port = ours[name], types.get(name)
        # A constant of a half graph is rounded, also where what it makes is cast to float32.
        precision = coarsest([held, *([] if port is None else [port.dtype])])
        truths = [theirs[other] for other in others if other in theirs]
        if any(_exceeds(held_there, precision) for held_there in (value, *truths)):
            continue  # no model computes there in its type: T5 clamps to its range
        if not truths or any(
            judge(value, truth, precision=precision).passed is not False for truth in truths
        ):
            continue
        if off is None:
            off = _run(graph, feeds, instead, _off_by_rounding(precision))
        moved_by = off[name] - value
        verdicts = [judge(value, t, None, t + moved_by, precision) for t in truths]
        if all(verdict.passed is False for verdict in verdicts):
            return [_told(file, name, verdicts[0], kind)]
    return []


def _exceeds(value: Tensor, dtype: torch.dtype) -> bool:
    return bool((value.abs() > torch.finfo(dtype).max).any())


def _off_by_rounding(dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(0)
    rounding = torch.finfo(dtype).eps / 2

    def off(value: Tensor) -> Tensor:
        return moved(value, rounding, generator) if value.is_floating_point() else value

    return off


def _told(file: OnnxFile, name: str, verdict: Verdict, kind: str) -> InnerValue:
    node = next(node for node in file.proto.graph.node if name in node.output)
    reason = (
        f"where norms are fed with {kind}, the graph says something else than the source: an "
        "epsilon, a weight or the formula differs"
    )
    told = Verdict(**{**vars(verdict), "reason": reason})
    place = origin(node)
    return InnerValue(name, node.name, node.op_type, place.module, place.source, "source", told)


def _doubled(values: Mapping[str, Any]) -> Values:
    tensors = {name: as_tensor(array) for name, array in values.items()}
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
