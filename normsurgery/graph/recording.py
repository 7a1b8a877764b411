"""What one recorded run of a model did: values, operations, calls, and where they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normsurgery.survey import Span


@dataclass(frozen=True)
class Ref:
    """Stands for the tensor of `Recording.values[value]` in recorded arguments and results."""

    value: int


@dataclass(frozen=True)
class Value:
    """One tensor at one time. `constant`: made from parameters, buffers and numbers alone.

    name: the parameter's, buffer's or input's name; None for anything computed.
    op: index of the operation that made it, None for what was there before.
    """

    tensor: Tensor
    constant: bool
    name: str | None
    op: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


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
    names: Mapping[str, int]
    node: str | None = None


@dataclass(frozen=True)
class Op:
    """One ATen operation; `frames` from the innermost module outwards.

    call: index of the recorded function call it happened in.
    """

    index: int
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int, ...]
    frames: tuple[FrameRecord, ...]
    call: int | None

    @property
    def name(self) -> str:
        """As `aten.mul.Tensor`."""
        return str(self.target)

    @property
    def inputs(self) -> tuple[int, ...]:
        return refs_in((self.args, self.kwargs))


@dataclass(frozen=True)
class FunctionCall:
    """One call of a watched torch function; its operations are `ops[start:end]`."""

    index: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    frames: tuple[FrameRecord, ...]
    start: int
    end: int


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module; its operations are `ops[start:end]`."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    start: int
    end: int

    @property
    def values(self) -> tuple[int, ...]:
        """Everything it was given and gave back."""
        return refs_in((self.args, self.kwargs, self.output))


@dataclass
class Recording:
    """Everything one run did. `paths` holds every path that binds a module, by `id(module)`.

    `measured` are the values whose size some code asked for.
    `lines` are those of its methods that ran. `model` is the tree copy that ran.
    """

    model: nn.Module
    paths: Mapping[int, tuple[str, ...]]
    training: bool
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    calls: list[FunctionCall] = field(default_factory=list)
    module_calls: list[ModuleCall] = field(default_factory=list)
    measured: set[int] = field(default_factory=set)
    lines: Mapping[CodeType, set[int]] = field(default_factory=dict)

    def readers(self) -> dict[int, list[Op]]:
        """The operations that read each value."""
        found: dict[int, list[Op]] = {}
        for op in self.ops:
            for value in op.inputs:
                found.setdefault(value, []).append(op)
        return found

    def path(self, module: nn.Module) -> str:
        return self.paths[id(module)][0]


def refs_in(tree: Any) -> tuple[int, ...]:
    """The values that recorded arguments read, in order."""
    return tuple(leaf.value for leaf in tree_leaves(tree) if isinstance(leaf, Ref))
