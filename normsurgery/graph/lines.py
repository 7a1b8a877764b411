"""Which lines of a model's own methods a run went through."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from torch import nn

from normsurgery.graph.positions import functions_of


@dataclass
class Lines:
    """The lines that ran, by code; `codes` are the methods that are watched, by `id`."""

    codes: Mapping[int, CodeType]  # a code's own hash is that of all it holds
    ran: dict[CodeType, set[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Lines:
        """For all methods of the model's classes, and what their decorators wrap; torch's aside."""
        classes = {base for kind in {type(m) for m in model.modules()} for base in kind.__mro__}
        own = [c for c in classes if not c.__module__.startswith(("torch.", "builtins"))]
        values = (value for cls_ in own for value in vars(cls_).values())
        codes = (f.__code__ for value in values for f in functions_of(value))
        return cls({id(code): code for code in codes})

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, lines are noted; a debugger's trace function is put back afterwards."""
        before = sys.gettrace()
        sys.settrace(self._entered)
        try:
            yield
        finally:
            sys.settrace(before)

    def _entered(self, frame: FrameType, event: str, argument: Any) -> Any:
        if id(frame.f_code) not in self.codes:
            return None
        lines = self.ran.setdefault(frame.f_code, set())

        def ran(frame: FrameType, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return ran

        return ran


class Unwatched:
    """Inside, no line is noted: what runs is none of the model's code."""

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(None)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)
