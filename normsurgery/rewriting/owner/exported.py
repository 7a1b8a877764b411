"""Replacing norms in an exported program."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    TensorArgument,
)
from torch.utils._pytree import tree_map

from normsurgery.errors import CannotRewrite
from normsurgery.rewriting.owner.biases import give_bias, weight_without_bias
from normsurgery.rewriting.owner.graphs import Replacement, below, erase, fresh_names, norm_nodes
from normsurgery.survey import Site
from normsurgery.treecopy import tree_copy

NO_TENSORS: Mapping[str, Tensor] = MappingProxyType({})
NO_NAMES: Mapping[str, str] = MappingProxyType({})
# The order in which a program takes the tensors of its model, before the user's inputs.
LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def rewrite_exported(
    program: ExportedProgram,
    replacements: Sequence[Replacement],
    tensors: Mapping[str, Tensor] = NO_TENSORS,
    biases: Mapping[str, str] = NO_NAMES,
) -> ExportedProgram:
    """A program with the node of each site replaced by the operations of its module, in eval mode.

    tensors: new values by name in its state_dict or constants, also of those `biases` (name -> name
    of the weight it belongs to) that calls without a bias get.

    The new parameters are in its state_dict and signature as `norm_0.weight` and so on, the old
    ones are gone where nothing reads them; symbolic sizes stay symbolic. The given program is
    unchanged, and shares its other tensors with the result.
    Raises CannotRewrite where a site's statistics are updated by the program (exported in train
    mode), or where a module cannot be exported on the site's input.
    """
    edited = _Program(program)
    edited.set_tensors({name: t for name, t in tensors.items() if name not in biases})
    for bias, weight in biases.items():
        edited.give_bias(bias, weight, tensors[bias])
    used = {name.partition(".")[0] for name in edited.tensors}
    names = fresh_names(used, len(replacements))
    for name, (site, module) in zip(names, replacements, strict=True):
        edited.replace(name, site, module)
    for site, _ in replacements:
        edited.drop(below(site))
    return edited.finished()


class _Program:
    """An exported program being edited: a copy of its graph, its signature, and its tensors."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.graph = copy.deepcopy(program.graph)
        # A copied node may get another name (a placeholder named `input` does).
        pairs = zip(program.graph.nodes, self.graph.nodes, strict=True)
        self.by_name: dict[str, fx.Node] = {old.name: new for old, new in pairs}
        self.inputs = copy.deepcopy(program.graph_signature.input_specs)
        for spec, node in zip(self.inputs, _placeholders(self.graph), strict=True):
            spec.arg.name = node.name
        self.mode = next(mode for node in self.graph.nodes if (mode := _mode_of(node)) is not None)
        self.tensors: dict[str, Tensor] = dict(program.state_dict)
        self.constants = dict(program.constants)

    def replace(self, name: str, site: Site, module: nn.Module) -> None:
        output, value = norm_nodes(self.by_name, site)
        piece = _exported_piece(module, value, site)
        copied: dict[fx.Node, Any] = {}
        for node, spec in zip(
            _placeholders(piece.graph), piece.graph_signature.input_specs, strict=True
        ):
            if spec.kind is InputKind.USER_INPUT:
                copied[node] = value
            else:
                copied[node] = self._add_tensor(name, spec, node, piece)
        result = self._inline(piece.graph, copied, output)
        if result is not value:
            result.meta = {**output.meta, "val": result.meta["val"]}
        output.replace_all_uses_with(result)
        # The next norm may normalise this one's output.
        self.by_name.update({n: result for n, node in self.by_name.items() if node is output})
        erase(output, keep=value)

    def _inline(self, graph: fx.Graph, copied: dict[fx.Node, Any], before: fx.Node) -> fx.Node:
        with self.graph.inserting_before(before):
            for node in graph.nodes:
                if node.op == "call_function":
                    copied[node] = self._copy(node, copied)
        (returned,) = next(node for node in graph.nodes if node.op == "output").args[0]
        result = copied[returned]
        assert isinstance(result, fx.Node)
        return result

    def _copy(self, node: fx.Node, copied: Mapping[fx.Node, Any]) -> fx.Node:
        """The node on this program's values: sizes are computed again, in its own symbols."""
        new: fx.Node = self.graph.node_copy(node, lambda old: copied[old])
        args, kwargs = _values((new.args, new.kwargs))
        with self.mode:
            new.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        return new

    def _add_tensor(
        self, name: str, spec: InputSpec, node: fx.Node, piece: ExportedProgram
    ) -> fx.Node:
        assert spec.target is not None
        target = f"{name}.{spec.target}"
        saved = spec.target in piece.state_dict
        tensor = (piece.state_dict if saved else piece.constants)[spec.target]
        (self.tensors if saved else self.constants)[target] = tensor
        new = self._add_placeholder(f"{node.name}_{name}", spec.kind, target, spec.persistent)
        new.meta = {**node.meta, "val": self.mode.from_tensor(tensor, static_shapes=True)}
        return new

    def _add_placeholder(
        self, name: str, kind: InputKind, target: str, persistent: bool | None
    ) -> fx.Node:
        before = LIFTED[: LIFTED.index(kind) + 1]
        place = sum(other.kind in before for other in self.inputs)
        following = list(_placeholders(self.graph))[place:]
        first = following[0] if following else next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            new: fx.Node = self.graph.placeholder(name)
        argument = TensorArgument(name=new.name)
        self.inputs.insert(place, InputSpec(kind, argument, target, persistent))
        return new

    def set_tensors(self, values: Mapping[str, Tensor]) -> None:
        """New values in place of the old, under every name of a tied tensor."""
        held = {**self.constants, **self.tensors}
        for name, value in values.items():
            old = held[name]
            new = value
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(value, requires_grad=old.requires_grad)
            for group in (self.tensors, self.constants):
                group.update({n: new for n, tensor in group.items() if tensor is old})

    def give_bias(self, name: str, weight: str, value: Tensor) -> None:
        """A new parameter for every call without a bias that reads the weight."""
        held: Tensor = self.tensors[weight]
        same = {n for n, tensor in self.tensors.items() if tensor is held}
        pairs = list(zip(_placeholders(self.graph), self.inputs, strict=True))
        reads = {node for node, spec in pairs if spec.target in same}
        new = self._add_placeholder(
            f"p_{name.replace('.', '_')}", InputKind.PARAMETER, name, persistent=None
        )
        new.meta = {"val": self.mode.from_tensor(value, static_shapes=True)}
        self.tensors[name] = nn.Parameter(value, requires_grad=held.requires_grad)
        for call in self.graph.nodes:
            if weight_without_bias(call) in reads:
                give_bias(call, new)

    def drop(self, names: frozenset[str]) -> None:
        """The old norm's tensors that no node reads any more."""
        nodes = list(_placeholders(self.graph))
        for node, spec in zip(nodes, list(self.inputs), strict=True):
            if spec.target in names and not node.users:
                self.graph.erase_node(node)
                self.inputs = [other for other in self.inputs if other is not spec]
                self.tensors.pop(spec.target, None)
                self.constants.pop(spec.target, None)

    def finished(self) -> ExportedProgram:
        old = self.program.graph_signature
        by_output = {node.name for node in self.graph.nodes}
        if any(spec.arg.name not in by_output for spec in old.output_specs if spec.target):
            raise CannotRewrite(
                "the program updates the norm's statistics: it was exported in train mode"
            )
        outputs = _renamed_outputs(self.graph, old)
        graph_module = fx.GraphModule(self.program.graph_module, self.graph)
        graph_module.meta = copy.copy(self.program.graph_module.meta)
        program = ExportedProgram(
            root=graph_module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(self.inputs, outputs),
            state_dict=self.tensors,
            range_constraints=copy.deepcopy(self.program.range_constraints),
            module_call_graph=copy.deepcopy(self.program.module_call_graph),
            example_inputs=self.program.example_inputs,
            constants=self.constants,
            verifiers=self.program.verifiers,
        )
        program.validate()  # type: ignore[no-untyped-call]
        return program


def _exported_piece(module: nn.Module, value: fx.Node, site: Site) -> ExportedProgram:
    """The new norm as a program of its own, on an input like the site's; every symbolic size is
    dynamic there too."""
    fake = value.meta.get("val")
    if not isinstance(fake, Tensor):
        raise CannotRewrite(f"{site.label}: the graph does not say what its input is")
    example = torch.zeros(
        [_example_size(size, axis) for axis, size in enumerate(fake.shape)],
        dtype=fake.dtype,
        device=fake.device,
    )
    sizes: list[Any] = list(fake.shape)
    free = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
    dynamic = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
    try:
        with torch.no_grad():
            return torch.export.export(
                tree_copy(module).eval(), (example,), dynamic_shapes=(dynamic or None,)
            )
    except Exception as error:  # whatever the norm's forward or the tracer raises
        raise CannotRewrite(f"{site.label}: the new norm cannot be exported: {error}") from error


def _example_size(size: Any, axis: int) -> int:
    """For a free size one that is neither 0 nor 1 and differs from axis to axis."""
    if isinstance(size, int):
        return size
    hint = int(size.node.hint) if size.node.has_hint() else 0
    return hint if hint > 1 else 5 + axis


def _renamed_outputs(graph: fx.Graph, old: ExportGraphSignature) -> list[Any]:
    """The output specs, with the name of a node that was replaced and is itself an output."""
    returned = next(node for node in graph.nodes if node.op == "output").args[0]
    assert isinstance(returned, (tuple, list))
    renamed = copy.deepcopy(list(old.output_specs))
    for spec, node in zip(renamed, returned, strict=True):
        if isinstance(node, fx.Node) and isinstance(spec.arg, TensorArgument):
            spec.arg = TensorArgument(name=node.name)
    return renamed


def _placeholders(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "placeholder")


def _values(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf, tree)


def _mode_of(node: fx.Node) -> FakeTensorMode | None:
    mode = getattr(node.meta.get("val"), "fake_mode", None)
    return mode if isinstance(mode, FakeTensorMode) else None
