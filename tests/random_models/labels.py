"""Which rules and which hazards a structure exercises, read off the structure."""

from __future__ import annotations

from .interpret import margins
from .neighbours import after, before
from .program import CONVOLUTIONS, Layer, Program

NON_LINEAR = ("relu", "gelu", "half_relu", "attention", "multiply")


def rule_labels(program: Program, norm: str, into_consumers: bool) -> set[str]:
    """What a fold of this norm into one side of it goes through and ends in."""
    found = (after if into_consumers else before)(program, norm)
    side = "into a consumer" if into_consumers else "into a producer"
    ends = {f"{side}: {label}" for name in found.layers for label in _kinds(program.layers[name])}
    between = [n for n in program.nodes if n.name in found.between and not n.layer]
    passed = {f"through {_operation(node.op, node.settings)}" for node in between}
    spelled = " (call)" if program.layers[norm].functional else ""
    return ends | passed | {f"norm: {program.layers[norm].kind}{spelled}"}


def _operation(op: str, settings: dict[str, object]) -> str:
    if op == "pool":
        return f"{settings['kind']} pooling"
    if op == "upsample":
        return f"upsampling ({'nearest' if settings['mode'] == 'nearest' else 'linear'})"
    return op


def _kinds(layer: Layer) -> set[str]:
    kinds = {layer.kind}
    if layer.functional:
        kinds.add("a functional call")
    if layer.kind not in CONVOLUTIONS:
        return kinds
    settings = layer.settings
    if settings["groups"] > 1:
        depthwise = settings["groups"] == settings["channels"]
        kinds.add("depthwise" if depthwise else "grouped")
    if settings["mode"] != "zeros" and settings["padding"] not in (0, "valid"):
        kinds.add(f"padding {settings['mode']}")
    if "bias" not in layer.roles:
        kinds.add("no bias")
    return kinds


def hazard_labels(program: Program) -> set[str]:
    """What in this structure is in the way of some fold."""
    labels = set(program.hazards)
    nodes = {node.name: node for node in program.nodes}
    for norm in program.norms:
        behind, ahead = before(program, norm), after(program, norm)
        if any(_pads_with_zeros(program.layers[name]) for name in ahead.layers):
            labels.add("zero padding")
        between = behind.between | ahead.between
        if any(nodes[name].op in NON_LINEAR for name in between):
            labels.add("non-linear")
        if set(program.outputs) & ahead.between:
            labels.add("output of the model")
        if any(nodes[name].op == "cat" for name in behind.between):
            labels.add("concatenation")
        if any(nodes[name].op == "add" for name in behind.between):
            labels.add("sum")
    if program.dtype != "float64":
        labels.add("half precision")
    if any(layer.functional for layer in program.layers.values()):
        labels.add("functional call")
    if program.block:
        labels.add("nested block")
    return labels


def _pads_with_zeros(layer: Layer) -> bool:
    if layer.kind not in CONVOLUTIONS or layer.settings["mode"] != "zeros":
        return False
    return layer.settings["transposed"] or any(low or high for low, high in margins(layer.settings))
