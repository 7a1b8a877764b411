"""No normalization at all.

What it computes
    y = x.

Use it when
    A norm is to be taken out and nothing put in its place: to study what it did, or where
    normalization was made unnecessary by other means.

From other norms
    Nothing is carried.

Inference
    It is nothing in eval as well: a scale of 1 and a shift of 0.

ONNX
    Identity.

Example
    >>> import torch
    >>> from normsurgery.norms.identity import formula
    >>> x = torch.randn(2, 8)
    >>> formula(x, {}, {}, True) is x
    True

Reference
    None; for networks trained without normalization see Zhang, Dauphin and Ma, 2019, "Fixup
    Initialization", arXiv:1901.09321.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from normsurgery.norms.carry import settled
from normsurgery.spec import (
    Conversion,
    Example,
    Fidelity,
    Law,
    NormSpec,
    OnnxForm,
    Reading,
    Source,
)


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    return x


def read(module: nn.Module) -> Reading:
    """No tensors; it does not know its channels, which stand in the Source where it is used."""
    return Reading({}, {"eps": 0.0})


def from_any(source: Source, *, init: str = "copy") -> nn.Module:
    return settled(nn.Identity(), source, init)


def examples() -> tuple[Example, ...]:
    return (Example("any shape", nn.Identity, ((2, 6, 5, 3), (2, 5, 12))),)


NORM = NormSpec(
    name="identity",
    also=("none",),
    found_by_class=False,
    summary="nothing",
    paper="",
    classes=(nn.Identity,),
    read=read,
    formula=formula,
    examples=examples,
    conversions={
        "*": Conversion(from_any, Fidelity.RETRAIN),
        "identity": Conversion(from_any, Fidelity.IDENTICAL),
    },
    laws=frozenset(
        {
            Law.BATCH_INDEPENDENT,
            Law.PERMUTATION_EQUIVARIANT,
            Law.ROTATION_EQUIVARIANT,
            Law.AFFINE_IN_EVAL,
        }
    ),
    onnx=OnnxForm({18: ("Identity",)}),
    why_not_affine="it does not know how many channels it has; its scale is 1 and its shift 0",
)
