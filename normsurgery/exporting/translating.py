"""From an exported program to ONNX: raw as torch writes it, and optimised by our own rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_unflatten

from normsurgery.errors import CannotTrace
from normsurgery.exporting.quiet import quiet
from normsurgery.exporting.tracing import AXES
from normsurgery.inputs.outputs import flatten_outputs

if TYPE_CHECKING:
    import onnx

OPSETS = range(18, 25)
DEFAULT_OPSET = 20


@dataclass(frozen=True)
class Translation:
    """One program as ONNX.

    program: the decomposed program; its node names are the names of the ONNX values.
    raw: as torch translates it. optimised: after `optimising.optimise`.
    """

    program: ExportedProgram
    raw: onnx.ModelProto
    optimised: onnx.ModelProto


def translate(program: ExportedProgram, opset: int = DEFAULT_OPSET) -> Translation:
    """Write a traced program as ONNX.

    Outputs get the names of `flatten_outputs`, dynamic axes those they were traced with. Raises
    CannotTrace naming the operator that has no ONNX form, with its module.
    """
    from onnx_ir import to_proto

    from normsurgery.exporting.annotating import annotate_nodes
    from normsurgery.exporting.optimising import optimise

    written, decomposed = _translated(program, opset)
    _name_outputs(written, output_names(program))
    _name_axes(written, axis_names(program))
    raw = to_proto(written)
    optimise(written)
    optimised = to_proto(written)
    annotate_nodes(raw)
    annotate_nodes(optimised)
    return Translation(decomposed, raw, optimised)


def _translated(program: ExportedProgram, opset: int) -> tuple[Any, ExportedProgram]:
    """torch's own translation, unoptimised, as onnx_ir."""
    from normsurgery.exporting import decompositions
    from normsurgery.exporting.bounds import one_sided_bounds

    table = {**one_sided_bounds(opset), **decompositions.translations(opset)}
    with quiet(), torch.no_grad():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                opset_version=opset,
                custom_translation_table=table,
                verbose=False,
            )
        except Exception as error:  # torch.onnx raises its own and any other kind
            raise CannotTrace(_untranslatable(error)) from error
    assert made is not None and made.exported_program is not None
    return made.model, made.exported_program


def _untranslatable(error: Exception) -> str:
    text = str(error)
    missing = re.search(r"No ONNX function found for (\S+?)\.? ", text)
    place = re.findall(r'File "([^"]+)", line (\d+), in (\w+)\n\s+(.+)', text)
    at = f" (at {place[-1][0]}:{place[-1][1]} in {place[-1][2]})" if place else ""
    if missing:
        what = re.sub(r"<OpOverload\(op='([^']+)', overload='([^']+)'\)>", r"\1.\2", missing[1])
        return (
            f"{what} has no ONNX form{at}. Write it with other operations, or leave it out of the "
            "model that is exported."
        )
    cause = error.__cause__ or error
    first = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    return (
        f"torch cannot translate the traced program to ONNX{at}: {type(cause).__name__}: "
        f"{first[:300]}. Try another opset."
    )


def axis_names(program: ExportedProgram) -> dict[str, str]:
    """The symbols of a traced program, such as s77, by the names its axes were given: batch.

    An axis that was made dynamic without a name keeps its symbol.
    """
    named = program.graph_module.meta.get(AXES, {})
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        for axis, name in named.get(node.name, {}).items():
            size = value.shape[axis] if isinstance(value, Tensor) else None
            if isinstance(size, torch.SymInt):
                found[str(size.node.expr)] = name
    return found


def output_names(program: ExportedProgram) -> tuple[str, ...]:
    """A name for each tensor that the program returns, in order, as `flatten_outputs` names them;
    two that the same tensor stands behind keep two names."""
    spec = program.call_spec.out_spec
    if spec is None:
        return ()
    marks = [torch.empty(0) for _ in range(spec.num_leaves)]
    names = {id(t): name for name, t in flatten_outputs(tree_unflatten(marks, spec)).items()}
    outputs = (s for s in program.graph_signature.output_specs if s.kind.name == "USER_OUTPUT")
    tensors = [isinstance(s.arg, torch.export.graph_signature.TensorArgument) for s in outputs]
    taken = {node.name for node in program.graph.nodes if node.op == "placeholder"}
    return tuple(
        _free(names.get(id(mark), f"output_{index}"), taken)
        for index, (mark, tensor) in enumerate(zip(marks, tensors, strict=True))
        if tensor
    )


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name = f"{name}_output"
    return name


def _name_outputs(model: Any, names: tuple[str, ...]) -> None:
    """Give the outputs of an onnx_ir model their names; one that is an input, a constant, or an
    output already, goes through an Identity of its own."""
    import onnx_ir as ir

    graph = model.graph
    if len(graph.outputs) != len(names):
        return  # numbers among the outputs of a program that was given: they keep torch's names
    taken = {value.name for value in _values(graph)}
    seen: set[int] = set()
    for index, name in enumerate(names):
        value = graph.outputs[index]
        if value.producer() is None or id(value) in seen:
            node = ir.node("Identity", [value], name=f"node_{name}_output")
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            value = graph.outputs[index] = node.outputs[0]
        seen.add(id(value))
        if name in taken and value.name != name:
            _rename_others(graph, name, value)
        if value.name and value.name != name:
            value.metadata_props["pkg.torch.onnx.original_node_name"] = value.name
        value.name = name


def _rename_others(graph: Any, name: str, kept: Any) -> None:
    for value in _values(graph):
        if value.name == name and value is not kept:
            value.name = f"{name}_inner"


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _name_axes(model: Any, names: dict[str, str]) -> None:
    """Replace symbols by names in every shape, also inside expressions: 2*s77 becomes 2*batch."""
    import onnx_ir as ir

    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in _values(model.graph):
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            [
                pattern.sub(lambda m: names[m[1]], dim.value)
                if isinstance(dim, ir.SymbolicDim) and dim.value
                else dim
                for dim in value.shape
            ]
        )
