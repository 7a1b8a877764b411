"""Which forwards run at an operation, and where in them."""

from __future__ import annotations

from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn

from normsurgery.flow.by_node import NodeRunner
from normsurgery.flow.calls import FrameRecord
from normsurgery.flow.positions import span_of
from normsurgery.survey import Span

# Files whose frames stand between a user's expression and the operation it runs.
_MACHINERY = frozenset(
    {
        torch.nn.functional.__file__,
        torch.nn.modules.module.__file__,
        torch.overrides.__file__,
        torch._ops.__file__,
        fx.interpreter.__file__,
        torch.utils._python_dispatch.__file__,
    }
)


class Frames:
    """Which forwards run, and where in them. Frames are kept, so that an id stays theirs."""

    def __init__(
        self,
        paths: Mapping[int, tuple[str, ...]],
        known: Mapping[int, fx.Node],
        outermost: FrameType,
    ) -> None:
        """known: id of a tensor -> its value. outermost: nothing of the model runs outside it."""
        self.paths = paths
        self.known = known
        self.outermost: FrameType | None = outermost
        self._modules: dict[int, tuple[FrameType, nn.Module | None, int]] = {}
        self._spans: dict[tuple[int, int], Span | None] = {}
        self._last: dict[int, tuple[int, FrameRecord]] = {}

    def close(self) -> None:
        self.outermost = None
        self._modules.clear()
        self._last.clear()

    def outwards_from(self, innermost: FrameType) -> tuple[FrameRecord, ...]:
        """From the innermost module outwards."""
        found: list[FrameRecord] = []
        frame: FrameType | None = innermost
        while frame is not None and frame is not self.outermost:
            module = self._module_of(frame)
            if module is not None:
                inner = not found or found[0].module is module
                found.append(self._record(frame, module, inner))
            frame = frame.f_back
        return tuple(found)

    def _module_of(self, frame: FrameType) -> nn.Module | None:
        """The module whose method runs in the frame. Asked once per frame."""
        known = self._modules.get(id(frame))
        if known is None:
            serial = len(self._modules)
            known = self._modules[id(frame)] = (frame, self._first_argument(frame), serial)
        return known[1]

    def _first_argument(self, frame: FrameType) -> nn.Module | None:
        code = frame.f_code
        if not code.co_varnames or _is_machinery(code):
            return None
        first = frame.f_locals.get(code.co_varnames[0])
        if isinstance(first, NodeRunner):
            return first.owner if code is NodeRunner.run_node.__code__ else None
        known = isinstance(first, nn.Module) and id(first) in self.paths
        return first if known else None

    def _record(self, frame: FrameType, module: nn.Module, inner: bool) -> FrameRecord:
        """inner: no other module runs inside, so that its local names are kept."""
        if frame.f_code is NodeRunner.run_node.__code__:
            node = frame.f_locals["self"].current
            return FrameRecord(self._serial(frame.f_back), module, None, None, {}, node)
        instruction, record = self._last.get(id(frame), (-1, None))
        if inner or record is None or instruction != frame.f_lasti:
            names = self._names(frame.f_locals) if inner else {}
            span = self._span(frame)
            record = FrameRecord(self._serial(frame), module, frame.f_code, span, names)
            if not inner:
                self._last[id(frame)] = (frame.f_lasti, record)
        return record

    def _serial(self, frame: FrameType | None) -> int:
        if frame is None:
            return -1
        self._module_of(frame)
        return self._modules[id(frame)][2]

    def _span(self, frame: FrameType) -> Span | None:
        key = (id(frame.f_code), frame.f_lasti)
        if key not in self._spans:
            self._spans[key] = span_of(frame)
        return self._spans[key]

    def _names(self, local: Mapping[str, Any]) -> dict[str, fx.Node]:
        known = self.known
        return {name: known[id(value)] for name, value in local.items() if id(value) in known}


def _is_machinery(code: CodeType) -> bool:
    return code.co_filename in _MACHINERY and code is not NodeRunner.run_node.__code__
