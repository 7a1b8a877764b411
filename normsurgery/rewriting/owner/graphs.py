"""Replacing norms in a graph the user holds, a `fx.GraphModule`, and the nodes of norms in any."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx, nn

from normsurgery.errors import CannotRewrite
from normsurgery.rewriting.names import fresh_name
from normsurgery.rewriting.owner.biases import editable
from normsurgery.survey import Site

Replacement = tuple[Site, nn.Module]
ASSERTS = torch.ops.aten._assert_tensor_metadata.default


def rewrite_graph_module(
    graph_module: fx.GraphModule,
    replacements: Sequence[Replacement],
    *,
    kept: Collection[str] = (),
) -> tuple[str, ...]:
    """Replace the node of each site by a call of its module, in place; the modules' new names.

    What only fed the old norm goes, with its tensors where no node reads them any more, other than
    those `kept` (names in the module). Metadata of the replaced node is kept. The module gets a
    graph of its own: the one it had stays as it is, for an undo to put back.
    Raises CannotRewrite before anything is changed.
    """
    graph, by_name = editable(graph_module)
    found = [(*norm_nodes(by_name, site), site, module) for site, module in replacements]
    names = fresh_names(set(dir(graph_module)), len(found))
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
        _drop_tensors(graph_module, graph, below(site).difference(kept))
    graph.lint()
    graph_module.graph = graph
    return names


def norm_nodes(by_name: Mapping[str, fx.Node], site: Site) -> tuple[fx.Node, fx.Node]:
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


def _drop_updates(graph: fx.Graph, names: Collection[str]) -> None:
    """Erase every node that does nothing but update one of these tensors of the graph's module."""
    for read in [n for n in graph.nodes if n.op == "get_attr" and n.target in names]:
        for user in [user for user in read.users if _only_updates(user, read)]:
            graph.erase_node(user)
        if not read.users:
            graph.erase_node(read)


def _drop_tensors(graph_module: fx.GraphModule, graph: fx.Graph, names: Collection[str]) -> None:
    """Erase the old norm's tensors and their updates, where no node reads them."""
    _drop_updates(graph, names)
    for name in names:
        if any(_reads(node, name) for node in graph.nodes):
            continue
        path, _, attribute = name.rpartition(".")
        holder = graph_module.get_submodule(path)
        holder._parameters.pop(attribute, None)
        holder._buffers.pop(attribute, None)
        holder._non_persistent_buffers_set.discard(attribute)


def _mutates(node: fx.Node) -> bool:
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
    return node.op != "call_module" and _mutates(node)


def _reads(node: fx.Node, name: str) -> bool:
    if node.op == "call_module":
        return name.startswith(f"{node.target}.")
    return node.op == "get_attr" and (f"{name}.".startswith(f"{node.target}."))


def below(site: Site) -> frozenset[str]:
    """The norm's tensors by their names in the graph's own module, for each path of it."""
    prefixes = [f"{path}." if path else "" for path in site.paths]
    return frozenset(
        name.removeprefix(prefix)
        for name in site.parameters.values()
        for prefix in prefixes
        if name.startswith(prefix)
    )


def fresh_names(used: set[str], count: int) -> tuple[str, ...]:
    """Names for that many norms, none of them used."""
    names: list[str] = []
    for _ in range(count):
        names.append(fresh_name("norm", used.union(names)))
    return tuple(names)
