"""Replacing norms in a graph the user holds: a `fx.GraphModule`, or an exported program."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from normsurgery.surgery.owner.biases import give_bias, weight_without_bias
from normsurgery.survey import Site
from normsurgery.treecopy import tree_copy

Replacement = tuple[Site, nn.Module]
NO_TENSORS: Mapping[str, Tensor] = MappingProxyType({})
NO_NAMES: Mapping[str, str] = MappingProxyType({})
ASSERTS = torch.ops.aten._assert_tensor_metadata.default
# The order in which a program takes the tensors of its model, before the user's inputs.
LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def rewrite_graph_module(
    graph_module: fx.GraphModule, replacements: Sequence[Replacement]
) -> tuple[str, ...]:
    """Replace the node of each site by a call of its module, in place; the modules' new names.

    What only fed the old norm goes, with its tensors where no node reads them any more. Metadata of
    the replaced node is kept. Raises CannotRewrite before anything is changed.
    """
    graph = graph_module.graph
    by_name = {node.name: node for node in graph.nodes}
    found = [(*_norm_nodes(by_name, site), site, module) for site, module in replacements]
    names = _fresh_names(graph_module, len(found))
    replaced: dict[fx.Node, fx.Node] = {}  # a norm may normalise another norm's output
    for name, (output, given, _, module) in zip(names, found, strict=True):
        value = replaced.get(given, given)
        graph_module.add_submodule(name, module)
        with graph.inserting_before(output):
            new = graph.call_module(name, (value,))
        new.meta = copy.copy(output.meta)
        output.replace_all_uses_with(new)
        replaced[output] = new
        erase(output, keep=value)
    for _, _, site, _ in found:
        _drop_tensors(graph_module, _below(site))
    graph.lint()
    graph_module.recompile()
    return names


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
    names = edited.fresh_names(len(replacements))
    for name, (site, module) in zip(names, replacements, strict=True):
        edited.replace(name, site, module)
    for site, _ in replacements:
        edited.drop(_below(site))
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

    def fresh_names(self, count: int) -> tuple[str, ...]:
        used = {name.partition(".")[0] for name in self.tensors}
        return tuple(_unused("norm", used, count))

    def replace(self, name: str, site: Site, module: nn.Module) -> None:
        output, value = _norm_nodes(self.by_name, site)
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


def _norm_nodes(by_name: Mapping[str, fx.Node], site: Site) -> tuple[fx.Node, fx.Node]:
    """The node whose value is the norm's output, and the one that it normalises."""
    node = by_name.get(site.call.node or "") if site.call else None
    if node is None or site.call is None:
        raise CannotRewrite(f"{site.label}: the graph has no such node")
    given = by_name.get(site.call.input.name or "") or _first_input(node)
    if given is None:
        raise CannotRewrite(f"{site.label}: it is not known which value it normalises")
    readers = list(node.users)
    picks = [user for user in readers if user.target is operator.getitem]
    if not picks:
        return node, given
    if len(readers) > 1 or picks[0].args[1] != 0:
        raise CannotRewrite(f"{site.label}: the graph also reads the norm's statistics")
    return picks[0], given


def _first_input(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


def erase(output: fx.Node, keep: fx.Node) -> None:
    """Erase a node without users, and then everything above it that only it needed."""
    graph = output.graph
    waiting, gone = [output], set()
    while waiting:
        node = waiting.pop()
        if node is keep or node in gone or node.op in ("placeholder", "output"):
            continue
        if not all(user.target is ASSERTS for user in node.users):
            continue
        for user in list(node.users):
            graph.erase_node(user)
        above = node.all_input_nodes
        gone.add(node)
        graph.erase_node(node)
        waiting.extend(above)


def drop_updates(graph: fx.Graph, names: Collection[str]) -> None:
    """Erase every node that does nothing but update one of these tensors of the graph's module."""
    for read in [n for n in graph.nodes if n.op == "get_attr" and n.target in names]:
        for user in [user for user in read.users if _only_updates(user, read)]:
            graph.erase_node(user)
        if not read.users:
            graph.erase_node(read)


def _drop_tensors(graph_module: fx.GraphModule, names: frozenset[str]) -> None:
    """Erase the old norm's tensors and their updates, where no node reads them."""
    drop_updates(graph_module.graph, names)
    for name in names:
        if any(_reads(node, name) for node in graph_module.graph.nodes):
            continue
        path, _, attribute = name.rpartition(".")
        holder = graph_module.get_submodule(path)
        holder._parameters.pop(attribute, None)
        holder._buffers.pop(attribute, None)
        holder._non_persistent_buffers_set.discard(attribute)


def mutates(node: fx.Node) -> bool:
    """Whether a node may change a tensor in place; a call of a module may."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    schema = getattr(node.target, "_schema", None)
    in_place = node.target is operator.iadd or bool(node.kwargs.get("inplace"))
    return node.op == "call_module" or in_place or (schema is not None and schema.is_mutable)


def _only_updates(node: fx.Node, read: fx.Node) -> bool:
    """Whether a node nobody reads changes `read` in place (`self.n.add_(1)`)."""
    if node.users or not node.args or node.args[0] is not read:
        return False
    return node.op != "call_module" and mutates(node)


def _reads(node: fx.Node, name: str) -> bool:
    if node.op == "call_module":
        return name.startswith(f"{node.target}.")
    return node.op == "get_attr" and (f"{name}.".startswith(f"{node.target}."))


def _below(site: Site) -> frozenset[str]:
    """The norm's tensors by their names in the graph's own module, for each path of it."""
    prefixes = [f"{path}." if path else "" for path in site.paths]
    return frozenset(
        name.removeprefix(prefix)
        for name in site.parameters.values()
        for prefix in prefixes
        if name.startswith(prefix)
    )


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


def _fresh_names(graph_module: fx.GraphModule, count: int) -> tuple[str, ...]:
    used = {*vars(graph_module), *graph_module._modules, *graph_module._parameters}
    return tuple(_unused("norm", used | set(graph_module._buffers), count))


def _unused(stem: str, used: set[str], count: int) -> Iterator[str]:
    number = 0
    while count:
        if f"{stem}_{number}" not in used:
            yield f"{stem}_{number}"
            count -= 1
        number += 1
