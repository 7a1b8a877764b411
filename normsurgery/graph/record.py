"""Record one run of a model as a graph of ATen operations.

A recorded run sees what any tracer sees and works where tracers do not: control flow on data,
`**kwargs`, dataclass outputs, item assignment. Every operation knows the modules whose forwards
were running, the expression in each that it belongs to, and its tensors by identity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from normsurgery.errors import CannotTrace
from normsurgery.graph.lines import Lines
from normsurgery.graph.nodes import NodeRunner, graphs_by_node
from normsurgery.graph.positions import span_of
from normsurgery.graph.recording import (
    FrameRecord,
    FunctionCall,
    ModuleCall,
    Op,
    Recording,
    Ref,
    Value,
    refs_in,
)
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
) -> Recording:
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
    recording = Recording(copied, _paths(copied), training, lines=lines.ran)
    recorder = _Recorder(recording, watched)
    recorder.name_tensors(copied, inputs)
    try:
        with ExitStack() as stack:
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
    return recording


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

    def __init__(self, recording: Recording, watched: frozenset[Callable[..., Any]]) -> None:
        self.recording = recording
        self.watched = watched
        self._known: dict[int, int] = {}  # id(tensor) -> value
        # Frames by id; they are kept, so that an id stays theirs.
        self._frames: dict[int, tuple[FrameType, int]] = {}
        self._modules_by_frame: dict[int, tuple[FrameType, nn.Module | None]] = {}
        self._open_modules: list[tuple[nn.Module, tuple[Any, ...], Mapping[str, Any], int]] = []
        self._call: int | None = None

    def close(self) -> None:
        self._frames.clear()
        self._modules_by_frame.clear()
        self._known.clear()

    def name_tensors(self, model: nn.Module, inputs: Inputs) -> None:
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            if id(tensor) not in self._known:
                self._add(tensor, constant=True, name=name)
        for tensor in tensors_of(model):
            if id(tensor) not in self._known:
                self._add(tensor, constant=True)
        for position, tensor in enumerate(tree_leaves((inputs.args, dict(inputs.kwargs)))):
            if isinstance(tensor, Tensor):
                self._add(tensor, constant=False, name=f"input {position}")

    def _add(
        self, tensor: Tensor, *, constant: bool, name: str | None = None, op: int | None = None
    ) -> int:
        index = len(self.recording.values)
        self.recording.values.append(Value(tensor, constant, name, op))
        self._known[id(tensor)] = index
        return index

    def refer(self, tree: Any) -> Any:
        """The tree with a Ref in place of every tensor."""

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            known = self._known.get(id(leaf))
            return Ref(self._add(leaf, constant=True) if known is None else known)

        return tree_map(one, tree)

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if func is _ASSERTS:  # reads no element of its tensor
            return func(*args, **kwargs)
        frames = self._where()
        referred, keywords = self.refer(args), self.refer(dict(kwargs))
        result = func(*args, **kwargs)
        values = self.recording.values
        read = refs_in((referred, keywords))
        constant = all(values[value].constant for value in read)
        index = len(self.recording.ops)
        # An in-place operation gives its tensor back: the same object is a new value from here on.
        outputs = tuple(
            self._add(leaf, constant=constant, op=index)
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor)
        )
        self.recording.ops.append(Op(index, func, referred, keywords, outputs, frames, self._call))
        return result

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func in _SIZES and id(args[0]) in self._known:
            self.recording.measured.add(self._known[id(args[0])])
        if func not in self.watched:
            return func(*args, **kwargs)
        frames = self._where()
        referred, keywords = self.refer(args), self.refer(dict(kwargs))
        start, index = len(self.recording.ops), len(self.recording.calls)
        self.recording.calls.append(
            FunctionCall(index, func, referred, keywords, None, frames, start, start)
        )
        self._call = index
        try:
            result = func(*args, **kwargs)
        finally:
            self._call = None
        output, end = self.refer(result), len(self.recording.ops)
        self.recording.calls[index] = FunctionCall(
            index, func, referred, keywords, output, frames, start, end
        )
        return result

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            referred = (self.refer(args), self.refer(kwargs))
            self._open_modules.append((module, *referred, len(self.recording.ops)))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            while self._open_modules:
                opened, given, keywords, start = self._open_modules.pop()
                if opened is module:
                    call = ModuleCall(
                        module, given, keywords, self.refer(output), start, len(self.recording.ops)
                    )
                    self.recording.module_calls.append(call)
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

    def _where(self) -> tuple[FrameRecord, ...]:
        frames: list[FrameRecord] = []
        frame: FrameType | None = sys._getframe(3)
        while frame is not None:
            module = self._module_of(frame)
            if module is not None:
                frames.append(self._frame_record(frame, module, frames))
            frame = frame.f_back
        return tuple(frames)

    def _module_of(self, frame: FrameType) -> nn.Module | None:
        """The module whose method runs in the frame. Asked once per frame: it is kept alive."""
        known = self._modules_by_frame.get(id(frame))
        if known is None:
            known = self._modules_by_frame[id(frame)] = (frame, self._first_argument(frame))
        return known[1]

    def _first_argument(self, frame: FrameType) -> nn.Module | None:
        code = frame.f_code
        if not code.co_varnames or _is_machinery(code):
            return None
        first = frame.f_locals.get(code.co_varnames[0])
        if isinstance(first, NodeRunner):
            return first.owner if code is NodeRunner.run_node.__code__ else None
        known = isinstance(first, nn.Module) and id(first) in self.recording.paths
        return first if known else None

    def _frame_record(
        self, frame: FrameType, module: nn.Module, inner: list[FrameRecord]
    ) -> FrameRecord:
        if frame.f_code is NodeRunner.run_node.__code__:
            node = frame.f_locals["self"].current
            return FrameRecord(self._serial(frame.f_back), module, None, None, {}, node)
        names = self._names(frame.f_locals) if not inner or inner[0].module is module else {}
        return FrameRecord(self._serial(frame), module, frame.f_code, span_of(frame), names)

    def _serial(self, frame: FrameType | None) -> int:
        if frame is None:
            return -1
        if id(frame) not in self._frames:
            self._frames[id(frame)] = (frame, len(self._frames))
        return self._frames[id(frame)][1]

    def _names(self, local: Mapping[str, Any]) -> dict[str, int]:
        return {
            name: self._known[id(value)]
            for name, value in local.items()
            if isinstance(value, Tensor) and id(value) in self._known
        }


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
# Files whose frames stand between a user's expression and the operation it runs.
_MACHINERY = frozenset(
    {
        __file__,
        torch.nn.functional.__file__,
        torch.nn.modules.module.__file__,
        torch.overrides.__file__,
        torch._ops.__file__,
        fx.interpreter.__file__,
        torch.utils._python_dispatch.__file__,
    }
)


def _is_machinery(code: CodeType) -> bool:
    return code.co_filename in _MACHINERY and code is not NodeRunner.run_node.__code__


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
