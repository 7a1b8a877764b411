"""Metadata: every node says its module and source line, the file says what it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import onnx

from normsurgery.onnxfile.origins import Origin, origin
from normsurgery.onnxfile.reading import subgraphs
from normsurgery.plans import Plan

SHARED = "normsurgery.shared"  # JSON: the modules of all nodes that were merged into this one
_OF_TORCH = "_empty_nn_module_stack"  # a node that torch put in, for the size of an input
MODULE, SOURCE = "normsurgery.module", "normsurgery.source"


def annotate_nodes(written: onnx.ModelProto) -> None:
    """Write module path and source line of every node, subgraphs included, into its metadata.

    A node that the optimiser made has those of the node whose value it reads; else of the first
    that reads its value.
    """
    _annotate(written.graph.node, Origin())
    for function in written.functions:
        _annotate(function.node, Origin())


def _annotate(nodes: Iterable[onnx.NodeProto], around: Origin) -> None:
    nodes = list(nodes)
    known: dict[int, Origin] = {}
    makers: dict[str, Origin] = {}
    for index, node in enumerate(nodes):
        told = origin(node)
        if not _is_told(node):
            told = next((makers[name] for name in node.input if name in makers), Origin())
        if _is_told(node) or told != Origin():
            known[index] = told
            makers |= dict.fromkeys(node.output, told)
    readers: dict[str, Origin] = {}
    for index in reversed(range(len(nodes))):
        node = nodes[index]
        told = known.get(index) or next(
            (readers[name] for name in node.output if name in readers), around
        )
        readers |= dict.fromkeys(node.input, told)
        _write(node, told)
        for graph in subgraphs(node):
            _annotate(graph.node, told)


def _is_told(node: onnx.NodeProto) -> bool:
    told = {entry.key: entry.value for entry in node.metadata_props}
    if _OF_TORCH in told.get("pkg.torch.onnx.name_scopes", ""):
        return False
    return bool(told.keys() & {"pkg.torch.onnx.name_scopes", "pkg.torch.onnx.fx_node", MODULE})


def _write(node: onnx.NodeProto, told: Origin) -> None:
    present = {entry.key for entry in node.metadata_props}
    for key, value in ((MODULE, told.module), (SOURCE, told.source)):
        if key not in present:
            node.metadata_props.add(key=key, value=value)


def annotate_model(written: onnx.ModelProto, facts: Mapping[str, object]) -> None:
    """Write facts about the file, each under `normsurgery.<name>`; what is no text as JSON."""
    present = {entry.key: entry for entry in written.metadata_props}
    for name, value in facts.items():
        key = f"normsurgery.{name}"
        entry = present.get(key) or written.metadata_props.add(key=key)
        entry.value = value if isinstance(value, str) else json.dumps(value)


def told_module(props: Mapping[str, str]) -> str:
    """The path of the module that torch's metadata of a node names; "" is the model or unknown."""
    node = onnx.NodeProto()
    for key, value in props.items():
        node.metadata_props.add(key=key, value=value)
    return origin(node).module


def shared_by(node: onnx.NodeProto) -> tuple[str, ...]:
    """The modules whose computation a node is: its own, or those of all that it stands for."""
    told = next((entry.value for entry in node.metadata_props if entry.key == SHARED), None)
    return (origin(node).module,) if told is None else tuple(json.loads(told))


def plan_hash(plan: Plan) -> str:
    """SHA-256 of a plan's JSON; "" for a plan without steps."""
    if not plan.steps:
        return ""
    return hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest()
