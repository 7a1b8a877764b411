"""What a recorded run notes beside its operations: where each stands, and calls taken whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from normsurgery.survey import Span


@dataclass(frozen=True)
class FrameRecord:
    """One running forward (or method of a module, or node of a graph module).

    serial: one number per activation, so that two calls of one forward differ.
    span: the expression that was running, None where the compiler left no position.
    names: local names bound to a known value just then (kept for the innermost module only).
    """

    serial: int
    module: nn.Module
    code: CodeType | None
    span: Span | None
    names: Mapping[str, fx.Node]
    node: str | None = None


@dataclass(frozen=True)
class FunctionCall:
    """One call of a watched torch function, with a node in the place of each tensor."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    frames: tuple[FrameRecord, ...]
    operations: tuple[fx.Node, ...]


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module, with a node in the place of each tensor."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    operations: tuple[fx.Node, ...]

    @property
    def values(self) -> tuple[fx.Node, ...]:
        """Everything it was given and gave back."""
        return values_in((self.args, self.kwargs, self.output))


def values_in(tree: Any) -> tuple[fx.Node, ...]:
    """The nodes in what a call was given or gave back, in order."""
    return tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, fx.Node))
