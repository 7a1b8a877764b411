"""What a case is: two sides that should be equal, and what was planted between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from torch import nn

Side = nn.Module | onnx.ModelProto | Path
Torch = str  # "right", "false pass", "false alarm", or "" where the case is new


@dataclass(frozen=True)
class Sides:
    """The source, the file that is held against it (None: `ns.export` writes it), and how.

    options: of `ns.verify`. export: of `ns.export`, where file is None.
    """

    source: Side
    file: onnx.ModelProto | Path | None
    inputs: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    export: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One pair with its right verdict, which follows from what was planted and from nothing else.

    cause: what was planted; of a good pair, why a careless check would think something was.
    verdict: "pass", "fail", "undecided", "refused" (a NormsurgeryError), or several joined by
        " or " where the cause does not say which of them.
    why: a regular expression that must be found in what is said about it, so that a fault is found
        for what it is.
    alarms: some fixed tolerance in use today rejects this good pair on these inputs (measured).
    torch: what `torch.onnx.export(verify=True)` said of it when the reference was written.
    """

    label: str
    cause: str
    build: Callable[[], Sides]
    verdict: str
    why: str = ""
    alarms: bool = False
    torch: Torch = ""

    @property
    def good(self) -> bool:
        return self.verdict == "pass"

    @property
    def sides(self) -> Sides:
        return _built(self.build)


@cache
def _built(build: Callable[[], Sides]) -> Sides:
    return build()


class Cases(list[Case]):
    """Cases in the order they were written; used as a decorator of the functions that build them.

    The label is the function's name, the cause its docstring.
    """

    def good(self, **facts: Any) -> Callable[[Callable[[], Sides]], Callable[[], Sides]]:
        return self.add("pass", **facts)

    def bad(
        self, why: str, verdict: str = "fail", **facts: Any
    ) -> Callable[[Callable[[], Sides]], Callable[[], Sides]]:
        return self.add(verdict, why=why, **facts)

    def add(
        self, verdict: str, **facts: Any
    ) -> Callable[[Callable[[], Sides]], Callable[[], Sides]]:
        def note(build: Callable[[], Sides]) -> Callable[[], Sides]:
            cause = " ".join((build.__doc__ or "").split())
            if not cause:
                raise ValueError(f"{build.__name__} does not say what was planted")
            label = facts.pop("label", build.__name__)
            self.append(Case(label, cause, build, verdict, **facts))
            return build

        return note
