"""Record one run of a model as a `torch.fx.Graph` of ATen operations.

A recorded run sees what any tracer sees and works where tracers do not: control flow on data,
`**kwargs`, dataclass outputs, item assignment. Every operation knows the modules whose forwards
were running, the expression in each that it belongs to, and its tensors by identity.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from normsurgery.collector import uncollected
from normsurgery.errors import CannotTrace
from normsurgery.flow.by_node import graphs_by_node
from normsurgery.flow.calls import FunctionCall, ModuleCall
from normsurgery.flow.flow import Flow
from normsurgery.flow.frames import Frames
from normsurgery.flow.lines import Lines, Unwatched
from normsurgery.flow.nodes import is_constant, nodes_in
from normsurgery.inputs import Inputs
from normsurgery.randomstate import random_state_kept
from normsurgery.treecopy import tensors_of, tree_copy

_ASSERTS = torch.ops.aten._assert_tensor_metadata.default


def record(
    model: nn.Module,
    inputs: Inputs,
    *,
    training: bool = False,
    watched: frozenset[Callable[..., Any]] = frozenset(),
    meta: bool = False,
) -> Flow:
    """Run a tree copy of `model` once under no_grad and record it.

    The user's model, its buffers and the global random state are as before. `watched` are torch
    functions whose calls are recorded whole. `meta`: without values, in no time; a model that reads
    a value does not run so. Raises CannotTrace if the model does not run.
    """
    # A forward may write buffers, in eval too.
    copied = tree_copy(model, meta=True) if meta else tree_copy(model, clone_buffers=True)
    inputs = inputs.to(device="meta") if meta else inputs
    copied.train(training) if training else _eval_in_place(copied)
    lines = Lines.of(copied)
    flow = Flow(copied, _paths(copied), training, lines=lines.ran)
    recorder = _Recorder(flow, watched)
    recorder.name_tensors(copied, inputs)
    try:
        with ExitStack() as stack:
            stack.enter_context(uncollected())
            stack.enter_context(random_state_kept(model))
            stack.enter_context(graphs_by_node(copied))
            stack.enter_context(recorder.hooks(copied))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_Functions(recorder))
            stack.enter_context(_Operations(recorder))
            stack.enter_context(lines.watched())
            inputs.call(copied)
    except Exception as error:  # the user's forward may raise anything
        raise CannotTrace(
            f"{type(model).__name__} does not run in {'train' if training else 'eval'} mode on "
            f"these inputs ({type(error).__name__}: {error}). Give inputs it takes (--input)."
        ) from error
    finally:
        recorder.close()
    return flow


def _eval_in_place(model: nn.Module) -> None:
    for module in model.modules():
        module.training = False


def _paths(model: nn.Module) -> dict[int, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[id(module)] = (*found.get(id(module), ()), name)
    return found


class _Recorder:
    """The state of one recording; the two modes and the module hooks report to it."""

    def __init__(self, flow: Flow, watched: frozenset[Callable[..., Any]]) -> None:
        self.flow = flow
        self.watched = watched
        # id(tensor) -> its value; each is held by its node, so that an id stays its own.
        self._known: dict[int, fx.Node] = {}
        self._frames = Frames(flow.paths, self._known, outermost=sys._getframe(1))
        self._open_modules: list[tuple[nn.Module, tuple[Any, ...], Mapping[str, Any], int]] = []
        self._positions = count()
        self._call: int | None = None
        self._inside_one = False

    def close(self) -> None:
        """The graph ends with what the model gave back; nothing of the run is held any more."""
        self.flow.graph.output(tuple(self.flow.outputs.values()))
        self._frames.close()
        self._known.clear()

    def name_tensors(self, model: nn.Module, inputs: Inputs) -> None:
        for name, held in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            if id(held) not in self._known:
                self._attribute(held, name)
        for held in tensors_of(model):
            if id(held) not in self._known:
                self._attribute(held, None)
        for number, held in enumerate(tree_leaves((inputs.args, dict(inputs.kwargs)))):
            if isinstance(held, Tensor):
                node = self._node("placeholder", f"input_{number}", (), {})
                self._stands_for(node, held, constant=False)
                node.meta["name"] = f"input {number}"

    def _node(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.flow.graph.create_node(op, target, args, kwargs)
        node.meta["position"] = next(self._positions)
        return node

    def _attribute(self, held: Tensor, name: str | None) -> fx.Node:
        target = name if name is not None else f"constant {len(self._known)}"
        node = self._node("get_attr", target, (), {})
        if name is not None:
            node.meta["name"] = name
        return self._stands_for(node, held, constant=True)

    def _stands_for(self, node: fx.Node, held: Tensor, *, constant: bool) -> fx.Node:
        """From here on the node is what the tensor is: one that is written into is a new value."""
        node.meta["val"], node.meta["constant"] = held, constant
        self._known[id(held)] = node
        return node

    def refer(self, tree: Any) -> Any:
        """The tree with a node in place of every tensor."""
        kind = type(tree)
        if kind in _PLAIN:
            return tree
        if isinstance(tree, Tensor):
            return self._known.get(id(tree)) or self._attribute(tree, None)
        if kind is tuple or kind is list:
            return kind([self.refer(item) for item in tree])
        if kind is dict:
            return {name: self.refer(item) for name, item in tree.items()}
        return tree_map(lambda leaf: self.refer(leaf) if isinstance(leaf, Tensor) else leaf, tree)

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._inside_one or func is _ASSERTS:  # an assert reads no element of its tensor
            return func(*args, **kwargs)
        if not isinstance(func, OpOverload):  # it may run the model's own code
            return self._as_one(func, args, kwargs)
        with Unwatched():
            return self._as_one(func, args, kwargs)

    def _as_one(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        running = self._frames.outwards_from(sys._getframe(1))
        node_args, node_kwargs = self.refer(args), self.refer(dict(kwargs))
        result = func(*args, **kwargs)
        node = self._node("call_function", func, node_args, node_kwargs)
        read = nodes_in((node_args, node_kwargs))
        constant = all(map(is_constant, read))
        made = tuple(self._made(node, result, constant))
        node.meta.update(inputs=read, outputs=made, frames=running, call=self._call)
        self.flow.operations.append(node)
        return result

    def _made(self, node: fx.Node, result: Any, constant: bool) -> Iterator[fx.Node]:
        """The values that an operation, or a part of what it gave, stands for or holds."""
        if isinstance(result, Tensor):
            yield self._stands_for(node, result, constant=constant)
        elif isinstance(result, (list, tuple)):
            for place, part in enumerate(result):
                if isinstance(part, (Tensor, list, tuple)):
                    inner = self._node("call_function", operator.getitem, (node, place), {})
                    yield from self._made(inner, part, constant)

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func in _SIZES and id(args[0]) in self._known:
            self.flow.measured.add(self._known[id(args[0])])
        if func is F.pad and (args[2] if len(args) > 2 else kwargs.get("mode")) == "circular":
            return self._padding(args, kwargs)
        if func not in self.watched:
            return func(*args, **kwargs)
        running = self._frames.outwards_from(sys._getframe(1))
        referred, keywords = self.refer(args), self.refer(dict(kwargs))
        start = len(self.flow.operations)
        self._call = len(self.flow.calls)
        try:
            result = func(*args, **kwargs)
        finally:
            self._call = None
        inner = tuple(self.flow.operations[start:])
        call = FunctionCall(func, referred, keywords, self.refer(result), running, inner)
        self.flow.calls.append(call)
        return result

    def _padding(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A circular padding is a dozen copies into slices; it is recorded as the one call."""
        self._inside_one = True
        try:
            return self._as_one(F.pad, args, kwargs)
        finally:
            self._inside_one = False

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            referred = (self.refer(args), self.refer(kwargs))
            self._open_modules.append((module, *referred, len(self.flow.operations)))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            while self._open_modules:
                opened, given, keywords, start = self._open_modules.pop()
                if opened is module:
                    inner = tuple(self.flow.operations[start:])
                    call = ModuleCall(module, given, keywords, self.refer(output), inner)
                    self.flow.module_calls.append(call)
                    return

        handles = []
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks; its operations are seen as its caller's
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


# What holds no tensor.
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size})
# Functions and properties by which a forward asks for a tensor's size.
_SIZES = frozenset(
    {
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.size,
        Tensor.numel,
        Tensor.nelement,
        Tensor.__len__,
        Tensor.stride,
    }
)


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.recorder.function(func, args, kwargs or {})


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.recorder.operation(func, args, kwargs or {})
