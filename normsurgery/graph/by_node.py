"""Graph modules run node by node, so that every operation knows its node."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx, nn


class NodeRunner(fx.Interpreter):
    """Runs a graph module node by node, so that every operation knows its node."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.owner = graph_module
        self.current: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n.name
        return super().run_node(n)


@contextmanager
def graphs_by_node(model: nn.Module) -> Iterator[None]:
    """Inside, every graph module of the tree runs through a NodeRunner."""
    owners = [m for m in model.modules() if isinstance(m, fx.GraphModule)]
    for owner in owners:
        owner.__dict__["forward"] = _node_forward(owner)
    try:
        yield
    finally:
        for owner in owners:
            del owner.__dict__["forward"]


def _node_forward(owner: fx.GraphModule) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        runner = NodeRunner(owner)
        return runner.run(*_positional(owner, args, kwargs))

    return forward


def _positional(
    owner: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    names = [str(node.target).lstrip("*") for node in owner.graph.nodes if node.op == "placeholder"]
    codegen = owner.graph._codegen
    if not hasattr(codegen, "pytree_info"):
        return [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
    # The module of an exported program flattens what it is given, by the names it was traced with.
    names = list(codegen.pytree_info.orig_args)
    rest = (kwargs[name] for name in names[len(args) :] if name in kwargs)
    return list(codegen.process_inputs(*args, *rest))
