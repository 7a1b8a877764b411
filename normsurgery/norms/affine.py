"""One scale and one shift per channel: what is left of a norm without its statistics.

What it computes
    y = x * weight + bias, per channel, for (N, C, ...) or, with `channel_axis=-1`, (..., C).

Use it when
    A norm is to be removed but its learned scale and shift kept, or as what a batch norm is in
    eval.

From other norms
    A batch norm (or an instance norm with running statistics) becomes its inference form, so eval
    outputs stay; a frozen one, and identity, are the same function in both modes. From all others
    weight and bias are carried and the statistics are lost.

Inference
    It is its own inference form.

ONNX
    Mul, Add.

Example
    >>> import torch
    >>> from normsurgery.norms.affine import Affine
    >>> x = torch.randn(2, 8, 5, 5)
    >>> torch.equal(Affine(8)(x), x)
    True

Reference
    Touvron et al., 2021, "ResMLP: Feedforward networks for image classification with
    data-efficient training", arXiv:2105.03404, equation 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from normsurgery.norms.carry import (
    AFFINE_ROLES,
    PerChannel,
    channels,
    present,
    scaled,
    settled,
    wanted_affine,
    without,
)
from normsurgery.norms.examples import randomised
from normsurgery.spec import (
    Conversion,
    Example,
    Fidelity,
    Law,
    NormSpec,
    OnnxForm,
    Reading,
    Source,
    get,
    weight_and_bias,
)


class Affine(PerChannel):
    """Scale and shift per channel of (N, C, ...), or along any `channel_axis`, as -1 of (..., C).

    Output keeps the input's dtype and memory format. Raises WrongShape unless the size of the
    channel axis is `features`.
    """

    def __init__(self, features: int, *, channel_axis: int = 1) -> None:
        super().__init__(features, channel_axis)

    def forward(self, x: Tensor) -> Tensor:
        self.require_channels(x)
        return self.affined(x).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.features}, channel_axis={self.channel_axis}"


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    return scaled(x, tensors, settings)


def read(module: nn.Module) -> Reading:
    assert isinstance(module, Affine)
    settings = {"eps": 0.0, "channel_axis": module.channel_axis, "features": module.features}
    return Reading(present(module, "weight", "bias"), settings)


def from_any(source: Source, *, init: str = "copy", affine: bool | None = None) -> nn.Module:
    """Weight and bias as the source has them; both, fresh, where it has none."""
    axis, features = channels(source, "affine", any_axis=True)
    weight, bias = wanted_affine(source, affine)
    module = Affine(features, channel_axis=axis)
    if weight or bias:
        module = without(module, weight, bias)
    return settled(module, source, init)


def from_statistics(source: Source, *, init: str = "copy") -> nn.Module:
    """The inference form where there are running statistics, else weight and bias alone."""
    axis, features = channels(source, "affine", any_axis=True)
    if "running_mean" not in source.tensors:
        return from_any(source, init=init)
    tensors = {role: tensor.detach().double() for role, tensor in source.tensors.items()}
    parts = get(source.kind).scale_and_shift(tensors, source.settings)
    assert parts is not None
    scale, shift = parts
    module = settled(
        Affine(features, channel_axis=axis), source, init, {"weight": scale, "bias": shift}
    )
    old = [source.tensors[role] for role in AFFINE_ROLES if role in source.tensors]
    # The shift holds the old weight too, so it is trained where either of them was.
    if old and module.bias is not None:
        module.bias.requires_grad_(any(parameter.requires_grad for parameter in old))
    return module


def _inference_form(source: Source, options: Mapping[str, Any]) -> Fidelity:
    if "running_mean" not in source.tensors:
        return Fidelity.RETRAIN
    return Fidelity.IDENTICAL if source.settings.get("frozen", False) else Fidelity.EVAL


def examples() -> tuple[Example, ...]:
    return (
        Example("channels second", lambda: randomised(Affine(6)), ((2, 6, 5, 3), (3, 6))),
        Example("tokens", lambda: randomised(Affine(12, channel_axis=-1)), ((2, 5, 12),)),
        Example(
            "without bias", lambda: without(randomised(Affine(6)), True, False), ((2, 6, 5, 3),)
        ),
    )


NORM = NormSpec(
    name="affine",
    summary="one scale and one shift per channel, no statistics",
    paper="Touvron et al. 2021, arXiv:2105.03404",
    classes=(Affine,),
    read=read,
    formula=formula,
    examples=examples,
    conversions={
        "*": Conversion(from_any, Fidelity.RETRAIN),
        "affine": Conversion(from_any, Fidelity.IDENTICAL),
        "identity": Conversion(from_any, Fidelity.IDENTICAL),
        "batchnorm": Conversion(from_statistics, _inference_form),
        "instancenorm": Conversion(from_statistics, _inference_form),
    },
    laws=frozenset(
        {
            Law.BATCH_INDEPENDENT,
            Law.PERMUTATION_EQUIVARIANT,
            Law.ROTATION_EQUIVARIANT,
            Law.AFFINE_IN_EVAL,
        }
    ),
    onnx=OnnxForm({18: ("Mul", "Add")}),
    affine=weight_and_bias,
    tail=True,
)
