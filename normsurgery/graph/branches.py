"""What one recorded run did not show: code that other inputs would run, and conditions of what ran.

A recorded run goes one way through a model. Whatever is planned from it holds for other inputs only
if no code that did not run touches what is planned with, and if what ran together always runs
together. Only tests that read the inputs count (`graph.fixed`); code that ends in an exception does
not, for it gives no output. The recording must have been made with `lines=True`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from torch import nn

from normsurgery.graph.recording import Op, Recording
from normsurgery.graph.untaken import Condition, Untaken

_HARMLESS = {"scale": ("picks", "multiplies"), "affine": ("picks",)}
_READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.item")


def hidden_uses(
    recording: Recording,
    modules: Collection[nn.Module] = (),
    values: Collection[int] = (),
    parameters: Collection[int] = (),
    last_axis: Literal["scale", "affine"] | None = None,
) -> tuple[str, ...]:
    """What code that did not run, and that other inputs may run, would do with any of these.

    `modules` are modules of `recording.model`, `values` and `parameters` numbers in
    `recording.values`. A module is used where it, or a module around it, or one of its methods is.
    `last_axis` says that all that will be moved past the values is a scale, or a scale and a shift,
    along their last axis: then code that only picks tokens of them (or, for a scale, multiplies
    whole tokens by a factor) and hands them on in their place does no harm and is left out.
    """
    found = _untaken(recording).found(modules, frozenset((*values, *parameters)))
    harmless: tuple[str | None, ...] = _HARMLESS[last_axis] if last_axis else ()
    return tuple(dict.fromkeys(text for text, effect in found if effect not in harmless))


def conditions(recording: Recording, op: Op) -> frozenset[Condition]:
    """Everything that depends on the inputs and that had to go as it went for `op` to run."""
    return _untaken(recording).conditions(op)


def same_conditions(recording: Recording, ops: Sequence[Op]) -> str | None:
    """None where the operations run together or not at all; else a sentence that names a condition.

    Two rounds of a loop that inputs end are two conditions, as are two calls of one function.
    """
    found = [conditions(recording, op) for op in ops]
    shared = frozenset.intersection(*found) if found else frozenset()
    for op, own in zip(ops, found, strict=True):
        for condition in sorted(own - shared, key=lambda item: (item.activation, item.control)):
            return f"{op.name} runs only under a condition that others do not: {condition.text}"
    return None


def reads_data(recording: Recording) -> tuple[Op, ...]:
    """Operations that make a Python number of a tensor that depends on the inputs."""
    constant = {number for number, value in enumerate(recording.values) if value.constant}
    return tuple(
        op
        for op in recording.ops
        if op.name.startswith(_READS) and not constant.issuperset(op.inputs)
    )


def _untaken(recording: Recording) -> Untaken:
    if recording.executed is None:
        raise ValueError("the recording was made without lines=True")
    if not isinstance(recording.executed.untaken, Untaken):
        recording.executed.untaken = Untaken(recording, recording.executed)
    return recording.executed.untaken
