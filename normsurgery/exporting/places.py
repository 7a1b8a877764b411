"""Where a traced operation stands: the module and the source line, for a sentence to name it."""

from __future__ import annotations

from torch import fx

from normsurgery.onnxfile.origins import source_line


def module_of(node: fx.Node) -> str:
    """The path of the innermost module whose forward made a node; "" is the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if isinstance(entry, tuple)]
    return str(paths[-1]).partition("@")[0] if paths else ""


def place_of(node: fx.Node) -> str:
    """The source line of a node, else its name in the traced graph."""
    return source_line(node.meta.get("stack_trace")) or node.name


def where(node: fx.Node) -> str:
    """`layer1.drop (model.py:12 in forward: ...)`, for an error."""
    module, place = module_of(node), place_of(node)
    return f"{module or 'the model itself'} ({place})"
