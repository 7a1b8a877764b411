"""Write down every ATen operator of one forward: operands, module, and place in its code."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(eq=False)
class Value:
    """One tensor as an operator left it: which operator, on what, in which module and where."""

    operator: str
    operands: tuple[Any, ...]
    options: Mapping[str, Any]
    shape: tuple[int, ...]
    depends: frozenset[str]  # of "input" and "parameter"
    owner: nn.Module | None = None
    place: tuple[tuple[int, int], ...] = ()
    result: int = 0  # which of the operator's results


@dataclass
class Frame:
    """One running call of a module, with the values it was given and what it gave back."""

    module: nn.Module | None
    given: list[Value] = field(default_factory=list)
    returned: list[Value] = field(default_factory=list)


class Writer(TorchDispatchMode):
    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.frames = [Frame(None)]
        self.frame_of: dict[int, Frame] = {}
        self._known: dict[int, Value] = {}
        self._alive: list[Tensor] = []
        tensors = [*model.parameters(), *model.buffers()]
        self._parameters = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        self._inputs = {id(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}

    def value(self, tensor: Tensor) -> Value:
        if id(tensor) not in self._known:
            self._remember(tensor, Value("", (), {}, tuple(tensor.shape), self._kind(tensor)))
        return self._known[id(tensor)]

    def _kind(self, tensor: Tensor) -> frozenset[str]:
        if id(tensor) in self._inputs:
            return frozenset({"input"})
        if tensor.numel() and tensor.untyped_storage().data_ptr() in self._parameters:
            return frozenset({"parameter"})
        return frozenset()

    def _remember(self, tensor: Tensor, value: Value) -> None:
        self._known[id(tensor)] = value
        self._alive.append(tensor)  # an identity may not be used again while we read by it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands, options = tree_map(self._seen, args), tree_map(self._seen, kwargs)
        result = func(*args, **kwargs)
        read = [leaf for leaf in tree_leaves((operands, options)) if isinstance(leaf, Value)]
        depends = frozenset[str]().union(*(value.depends for value in read))
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        place = _place()
        for index, tensor in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            if not isinstance(tensor, Tensor):
                continue
            value = Value(name, operands, options, tuple(tensor.shape), depends)
            value.owner, value.place, value.result = self.frames[-1].module, place, index
            self.frame_of[id(value)] = self.frames[-1]
            self._remember(tensor, value)
            self.values.append(value)
        return result

    def _seen(self, leaf: Any) -> Any:
        return self.value(leaf) if isinstance(leaf, Tensor) else leaf


def _place() -> tuple[tuple[int, int], ...]:
    """The instructions being run between the innermost module's call and the operator."""
    steps = []
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        steps.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return tuple(steps)


@contextmanager
def watched(model: nn.Module, writer: Writer) -> Iterator[None]:
    """Keep the writer's stack of running modules while inside."""

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        writer.frames.append(Frame(module, [writer.value(tensor) for tensor in given]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        given = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        writer.frames.pop().returned.extend(writer.value(tensor) for tensor in given)

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
