"""Edits: tensor algebra on named tensors. What a fold does to weights, as data.

An Edit names the tensors it reads and writes by their state_dict names, so that the same list runs
on a model in memory and, group by group, on a checkpoint that is larger than memory. Edits run in
order: each sees what those before it wrote. All of them compute in float64; a tensor is cast to its
own dtype once, after its last Edit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Vector:
    """A scale or a shift per channel, computed in float64 where an Edit uses it.

    tensors: role -> name. A role that is not there is neutral.
    settings: those that the norm computes it by, and `features`, as JSON values; with `operations`
        also `channel_axis` and `shape`, that of the input they were recorded on.
    operations: instead of roles that are known, the recorded ATen operations (flow.operations)
        of a per-channel affine function, whose scale is f(1) - f(0) and whose shift is f(0).
    index: element i of the vector is the channel `index[i]`; -1 is neutral (1 or 0). None: as is.
    factor: what the shift is multiplied by.
    offset: what of the scale a shift has beside: factor * shift + offset * (scale - 1).
    kind: the norm whose spec says what it is in eval, or what comes last in it; without one it is
        `weight + weight_offset` (scale) and `bias` (shift).
    """

    part: Literal["scale", "shift"]
    tensors: Mapping[str, str]
    settings: Mapping[str, Any]
    operations: tuple[Mapping[str, Any], ...] | None = None
    index: tuple[int, ...] | None = None
    factor: float = 1.0
    offset: float = 0.0
    kind: str = ""


@dataclass(frozen=True)
class Scale:
    """target *= by, along `axis`.

    groups: the first axis of target is split into so many groups, and `axis` must be 1: the vector
        then holds, group after group, the elements for axis 1 (a grouped convolution's inputs, a
        grouped transposed convolution's outputs).
    """

    target: str
    by: Vector
    axis: int
    groups: int = 1


@dataclass(frozen=True)
class Shift:
    """target += by, along `axis`."""

    target: str
    by: Vector
    axis: int = 0


@dataclass(frozen=True)
class AddProduct:
    """target += the sum over `axis` and over all axes of `weight` that target does not have, of
    weight * by. target lies along `out_axis` of weight (axis 0 of a linear's bias, axis 1 of a
    GPT-2 Conv1D's); leading axes that both have (experts) stay.

    groups: as in Scale: inputs of a grouped convolution (`axis` 1, `out_axis` 0), or of a grouped
        transposed one (`axis` 0, `out_axis` 1); target then holds group after group.
    """

    target: str
    weight: str
    by: Vector
    axis: int
    out_axis: int = 0
    groups: int = 1


@dataclass(frozen=True)
class Create:
    """target, which did not exist: zeros of this shape, of the dtype of `like`."""

    target: str
    shape: tuple[int, ...]
    like: str


@dataclass(frozen=True)
class Copy:
    """target, which shared its values with `source` (a tie), becomes a tensor of its own."""

    target: str
    source: str


@dataclass(frozen=True)
class Centre:
    """target -= its mean over `axis`."""

    target: str
    axis: int


@dataclass(frozen=True)
class Fill:
    """target = value everywhere: a norm's tensor made neutral."""

    target: str
    value: float


@dataclass(frozen=True)
class Drop:
    """target is no longer there."""

    target: str


@dataclass(frozen=True)
class Bake:
    """target = the formula of the norm `kind` (one that acts on a weight), of `tensors` by role.

    kind: one of those in weight_formulas, with its roles and settings.
    """

    target: str
    kind: str
    tensors: Mapping[str, str]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class AddKernel:
    """target += factor * source, a smaller kernel put at offset `at` in each spatial dimension.

    Both are weights of convolutions with the same groups.
    """

    target: str
    source: str
    at: tuple[int, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class AddTensor:
    """target += factor * source, of the same shape (the biases of parallel branches)."""

    target: str
    source: str
    factor: float = 1.0


@dataclass(frozen=True)
class AddIdentity:
    """target, the weight of a convolution with `groups`, += factor times the kernel of x -> by * x,
    at `at`."""

    target: str
    by: Vector | None
    at: tuple[int, ...]
    groups: int = 1
    factor: float = 1.0


Edit = (
    Scale
    | Shift
    | AddProduct
    | Create
    | Copy
    | Centre
    | Fill
    | Drop
    | Bake
    | AddKernel
    | AddTensor
    | AddIdentity
)


def reads(edit: Edit) -> tuple[str, ...]:
    """The tensors whose values the edit needs, each once; its target's too, where it is changed.

    Create looks at the dtype of `like` alone and Fill at the shape of its target: not at values.
    """
    return tuple(dict.fromkeys(_reads(edit)))


def _reads(edit: Edit) -> tuple[str, ...]:
    match edit:
        case Create() | Fill() | Drop():
            return ()
        case Copy():
            return (edit.source,)
        case Bake():
            return tuple(edit.tensors.values())
        case Centre():
            return (edit.target,)
        case AddKernel() | AddTensor():
            return (edit.target, edit.source)
        case AddProduct():
            return (edit.target, edit.weight, *_of_vector(edit.by))
        case Scale() | Shift() | AddIdentity():
            return (edit.target, *_of_vector(edit.by))


def _of_vector(vector: Vector | None) -> tuple[str, ...]:
    return () if vector is None else tuple(vector.tensors.values())


def writes(edit: Edit) -> tuple[str, ...]:
    """The tensors that are others, or there or gone, after the edit."""
    return (edit.target,)
