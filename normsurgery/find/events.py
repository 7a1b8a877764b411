"""A normalization seen in a recorded run, before it is known what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from normsurgery.graph import FrameRecord, Op, Recording

# Operations that hand on the same numbers: another type, layout or shape.
SAME_NUMBERS = frozenset(
    f"aten::{name}"
    for name in (
        "_reshape_copy",
        "_to_copy",
        "_unsafe_view",
        "alias",
        "clone",
        "contiguous",
        "detach",
        "expand",
        "expand_as",
        "flatten",
        "lift",
        "lift_fresh",
        "movedim",
        "permute",
        "positive",
        "reshape",
        "squeeze",
        "swapaxes",
        "t",
        "to",
        "transpose",
        "unflatten",
        "unsqueeze",
        "view",
        "view_as",
    )
)


@dataclass(frozen=True)
class Event:
    """One execution of one normalization.

    input, output: the value it normalises and the value it makes (indices into the recording).
    ops: its operations; frames: those of the operation that makes the output.
    kind, settings, tensors: what a call of a known function says; `tensors` maps roles to values.
    constant: its input comes from parameters alone, so it acts on a weight.
    frozen: statistics come from constants (a batch norm written by hand), so it may be no norm.
    other_inputs: later values that it may be said to normalise instead (x - mean, for an RMS norm).
    """

    input: int
    output: int
    ops: tuple[int, ...]
    frames: tuple[FrameRecord, ...]
    constant: bool
    kind: str | None = None
    settings: Mapping[str, Any] | None = None
    tensors: Mapping[str, int] | None = None
    refusal: str = ""
    frozen: bool = False
    other_inputs: tuple[int, ...] = ()


def schema_name(op: Op) -> str:
    """As `aten::mul`, for every overload."""
    schema = getattr(op.target, "_schema", None)
    return str(schema.name) if schema is not None else str(op.target)


def plain(recording: Recording, value: int) -> int:
    """The value before casts and changes of layout or shape."""
    while True:
        made_by = recording.values[value].op
        if made_by is None:
            return value
        op = recording.ops[made_by]
        if schema_name(op) not in SAME_NUMBERS or not op.inputs:
            return value
        value = op.inputs[0]


def parameter_name(recording: Recording, value: int) -> str | None:
    """The name of the parameter or buffer that the value is, seen through casts and views."""
    found = recording.values[plain(recording, value)]
    return found.name if found.constant and found.op is None else None
