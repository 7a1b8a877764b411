"""A normalization seen in a recorded run, before it is known what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from normsurgery.flow import FrameRecord
from normsurgery.flow.nodes import inputs_of, maker, name_of
from normsurgery.flow.operators import SAME_NUMBERS, kind_of


@dataclass(frozen=True)
class Event:
    """One execution of one normalization.

    input, output: the value it normalises and the value it makes.
    operations: what it runs; frames: those of the operation that makes the output.
    kind, settings, tensors: what a call of a known function says; `tensors` maps roles to values.
    constant: its input comes from parameters alone, so it acts on a weight.
    frozen: statistics come from constants (a batch norm written by hand), so it may be no norm.
    other_inputs: later values that it may be said to normalise instead (x - mean, for an RMS norm).
    """

    input: fx.Node
    output: fx.Node
    operations: tuple[fx.Node, ...]
    frames: tuple[FrameRecord, ...]
    constant: bool
    kind: str | None = None
    settings: Mapping[str, Any] | None = None
    tensors: Mapping[str, fx.Node] | None = None
    refusal: str = ""
    frozen: bool = False
    other_inputs: tuple[fx.Node, ...] = ()


def plain(value: fx.Node) -> fx.Node:
    """The value before casts and changes of layout or shape."""
    while (made_by := maker(value)) is not None:
        if kind_of(made_by) not in SAME_NUMBERS or not inputs_of(made_by):
            return value
        value = inputs_of(made_by)[0]
    return value


def parameter_name(value: fx.Node) -> str | None:
    """The name of the parameter or buffer that the value is, seen through casts and views."""
    found = plain(value)
    return name_of(found) if found.op == "get_attr" else None
