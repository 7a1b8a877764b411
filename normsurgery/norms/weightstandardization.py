"""Weight standardization: every output channel's weight with mean 0 and variance 1.

What it computes
    For each output channel, over its `n` weights `v`: `w = (v - mean(v)) / sqrt(var(v) + eps)` with
    the biased variance, eps 1e-6. The layer then uses `w`; `v` is what is trained. Statistics are
    of the weight alone, so nothing depends on the batch.

Use it when
    A group norm (or another batch-free norm) follows the layer and training should be as smooth
    as with batch norm: small batches, detection, BiT-style transfer. Without a norm after it the
    outputs grow by about `sqrt(n)`.

From other norms
    It attaches to a weight, not to a norm's place: from a Linear, Conv1d-3d or ConvTranspose1d-3d.
    The weights are kept as `v`; the function changes (`RETRAIN`). It is a torch parametrization,
    so the parameter is `parametrizations.weight.original`; torch refuses to pickle such a module
    whole: save its state_dict and rebuild, or strip it first. Option `eps`.

Inference
    `strip` bakes the standardized weight into the plain layer, with the same outputs.

ONNX
    Of a stripped layer, the plain layer. The weight's own graph is one LayerNormalization over the
    flattened weight.

Example
    >>> import torch
    >>> from torch.nn.utils import parametrize
    >>> from normsurgery.norms.weightstandardization import WeightStandardization
    >>> layer = torch.nn.Conv2d(3, 8, 3)
    >>> _ = parametrize.register_parametrization(layer, "weight", WeightStandardization())
    >>> bool(layer.weight.mean((1, 2, 3)).abs().max() < 1e-6)
    True

Reference
    Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization and
    Weight Standardization", 2019, arXiv 1903.10520, equation 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from normsurgery.errors import WrongShape
from normsurgery.norms.carry import SMALLEST_GROUP, refusal
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
from normsurgery.treecopy import tree_copy

DEFAULT_EPS = 1e-6


class WeightStandardization(nn.Module):
    """A parametrization of a weight: mean 0 and biased variance 1 for each output channel.

    weight: (out, in, *kernel) with `output_axis` 0; (in, out) with 1; the transposed convolution's
    (in, out / groups, *kernel) with 1 and its `groups`. Gives the same shape and dtype.
    Raises WrongShape for a weight of fewer than two dimensions.
    """

    def __init__(self, *, output_axis: int = 0, groups: int = 1, eps: float = DEFAULT_EPS) -> None:
        super().__init__()
        self.output_axis = output_axis
        self.groups = groups
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() < 2:
            raise WrongShape(
                "weightstandardization",
                weight.shape,
                "two or more dimensions",
                "Give it the weight of a linear layer or a convolution.",
            )
        rows = per_output(weight, self.output_axis, self.groups)
        flat = rows.reshape(*rows.shape[:2], -1)
        standard = F.layer_norm(flat, flat.shape[2:], eps=self.eps)
        return as_weight(standard.reshape(rows.shape), self.output_axis).reshape(weight.shape)

    def extra_repr(self) -> str:
        return f"output_axis={self.output_axis}, groups={self.groups}, eps={self.eps}"


def per_output(weight: Tensor, output_axis: int, groups: int) -> Tensor:
    """The weight as (groups, out / groups, in / groups, *kernel)."""
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2) if output_axis == 1 else grouped


def as_weight(rows: Tensor, output_axis: int) -> Tensor:
    """`per_output` undone, up to the merge of the first two axes."""
    return rows.transpose(1, 2) if output_axis == 1 else rows


def standardization(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """(W - mean) / deviation per output channel, times `scale`, times `gain` if there is one.

    correction: 1 where the variance is the unbiased one. eps_in_root: False where eps is added to
    the standard deviation.
    """
    weight, eps = tensors["weight"], settings["eps"]
    axis = settings["output_axis"]
    rows = per_output(weight, axis, settings["groups"])
    inputs = tuple(range(2, rows.dim()))
    count = rows[0, 0].numel() - settings["correction"]
    centred = rows - rows.mean(inputs, keepdim=True)
    variance = centred.square().sum(inputs, keepdim=True) / count
    deviation = (variance + eps).sqrt() if settings["eps_in_root"] else variance.sqrt() + eps
    standard = centred / deviation * settings["scale"]
    if "gain" in tensors:
        standard = standard * tensors["gain"].reshape(*rows.shape[:2], *[1] * len(inputs))
    return as_weight(standard, axis).reshape(weight.shape)


def standardization_settings(
    eps: float,
    *,
    output_axis: int = 0,
    groups: int = 1,
    correction: int = 0,
    eps_in_root: bool = True,
    scale: float = 1.0,
) -> dict[str, Any]:
    """The settings of a weight standardization, complete."""
    return {
        "eps": eps,
        "output_axis": output_axis,
        "groups": groups,
        "correction": correction,
        "eps_in_root": eps_in_root,
        "scale": scale,
    }


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    """Float64 truth for a weight `x`; the same in both modes."""
    axis, groups, eps = settings["output_axis"], settings["groups"], settings["eps"]
    rows = per_output(x, axis, groups)
    inputs = tuple(range(2, rows.dim()))
    centred = rows - rows.mean(inputs, keepdim=True)
    variance = (centred * centred).mean(inputs, keepdim=True)
    return as_weight(centred / (variance + eps).sqrt(), axis).reshape(x.shape)


def read(module: nn.Module) -> Reading:
    assert isinstance(module, WeightStandardization)
    settings = {
        "output_axis": module.output_axis,
        "channel_axis": module.output_axis,
        "groups": module.groups,
        "eps": module.eps,
    }
    return Reading({}, settings)


def layout(source: Source) -> tuple[int, int]:
    """The axis of the output channels in the source's weight, and its groups."""
    module = source.module
    if isinstance(module, _ConvTransposeNd):
        return 1, module.groups
    if isinstance(module, (nn.Linear, _ConvNd)):
        return 0, 1
    if "output_axis" in source.settings:
        return int(source.settings["output_axis"]), 1
    raise refusal(
        source,
        "weightstandardization",
        "which axis of its weight is the output is not known",
        "Only linear layers and convolutions have such a weight; leave this one out.",
    )


def standardizable(source: Source) -> tuple[nn.Module, int, int]:
    """The layer, the axis of its output channels and its groups; refused where it has no such."""
    to = "weightstandardization"
    module = source.module
    if module is None:
        raise refusal(
            source, to, "the layer is a call, not a module", "Make it an nn.Linear or a Conv."
        )
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() < 2:
        raise refusal(
            source,
            to,
            "it has no weight of its own to standardize (computed, quantized or missing)",
            "Remove the other parametrization first.",
        )
    axis, groups = layout(source)
    elements = weight.numel() // max(weight.shape[axis] * groups, 1)
    if elements < SMALLEST_GROUP:
        raise refusal(
            source,
            to,
            f"each output channel has only {elements} weight(s), so the standardized weight would "
            "be constant or have no useful gradient",
            "Leave this layer out.",
        )
    return module, axis, groups


def build(source: Source, *, init: str = "copy", eps: float = DEFAULT_EPS) -> nn.Module:
    """A deep copy of the source's layer whose `weight` is standardized from now on."""
    module, axis, groups = standardizable(source)
    standardized = tree_copy(module, clone=True)
    if init == "reset":
        standardized.reset_parameters()  # type: ignore[operator]
    parametrization = WeightStandardization(output_axis=axis, groups=groups, eps=float(eps))
    parametrize.register_parametrization(standardized, "weight", parametrization)
    return standardized


def resolve(source: Source, options: Mapping[str, Any]) -> Mapping[str, Any]:
    standardizable(source)
    return {"eps": DEFAULT_EPS, **options}


def is_standardized(module: nn.Module) -> bool:
    """Whether the module's weight is parametrized by WeightStandardization and nothing else."""
    if not parametrize.is_parametrized(module, "weight"):
        return False
    held = list(module.parametrizations["weight"])  # type: ignore[index]
    return len(held) == 1 and isinstance(held[0], WeightStandardization)


def strip(module: nn.Module) -> nn.Module:
    """A copy of a standardized layer as a plain layer holding the standardized weight."""
    plain = tree_copy(module, clone=True)
    take_off(plain, baked=True)
    return plain


def take_off(module: nn.Module, *, baked: bool) -> None:
    """Make a standardized layer plain, in place; its weight is the standardized one or the raw."""
    # torch edits the class when it removes a parametrization, and a copy shares that class.
    shared = type(module)
    own = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=baked)


def examples() -> tuple[Example, ...]:
    return (
        Example("convolution", WeightStandardization, ((8, 4, 3, 3),)),
        Example("linear", WeightStandardization, ((5, 16),)),
    )


NORM = NormSpec(
    name="weightstandardization",
    also=("ws",),
    summary="standardises a weight per output channel",
    paper="arXiv 1903.10520",
    attach="weight",
    classes=(WeightStandardization,),
    read=read,
    formula=formula,
    examples=examples,
    conversions={"*": Conversion(build, Fidelity.RETRAIN, resolve)},
    laws=frozenset(
        {
            Law.SHIFT_INVARIANT,
            Law.SCALE_INVARIANT,
            Law.BATCH_INDEPENDENT,
            Law.PERMUTATION_EQUIVARIANT,
        }
    ),
    onnx=OnnxForm({18: ("Reshape", "LayerNormalization", "Reshape")}),
    why_not_affine="it standardizes a weight, not an activation",
    bake=standardization,
    strip=strip,
)
