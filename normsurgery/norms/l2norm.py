"""L2 normalization: divides by the Euclidean length along one dimension.

What it computes
    y = x / max(|x|, eps), as `torch.nn.functional.normalize` does, with |x| along one dimension.
    Written by hand eps may also be added to the length (`eps_outside`) or to the sum of squares;
    without eps these are one function. With `p` the length is another one: sum(|x|^p)^(1/p).

Use it when
    Directions are compared (contrastive embeddings, cosine attention). It has nothing to train.

From other norms
    Weight and bias are dropped, eps is its own. An RMS norm is this times sqrt(C), but for eps.

Inference
    It depends on the input in eval as in training, so it cannot become a scale and a shift.

ONNX
    ReduceL2, Max, Expand, Div; Shape and Concat make the size to expand to where the batch is
    dynamic. Not LpNormalization, which has no eps.

Example
    >>> import torch
    >>> from normsurgery.norms.l2norm import L2Norm
    >>> y = L2Norm()(torch.randn(4, 8))
    >>> bool((y.norm(dim=-1) - 1).abs().max() < 1e-5)
    True

Reference
    Liu, Rabinovich and Berg, 2015, "ParseNet: Looking Wider to See Better", arXiv:1506.04579,
    equation 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgery.errors import WrongShape
from normsurgery.norms.carry import channels, known, refusal, settled
from normsurgery.spec import (
    Conversion,
    Example,
    Fidelity,
    Law,
    NormSpec,
    OnnxForm,
    Reading,
    Source,
    Spelling,
)

PLACES = (
    {"eps_clamp": True, "eps_outside": False},
    {"eps_clamp": False, "eps_outside": True},
    {"eps_clamp": False, "eps_outside": False},
)
ARGUMENTS = ("dim", "eps", "features", "eps_clamp", "eps_outside", "p")


class L2Norm(nn.Module):
    """Divides by the Euclidean length along `dim`; any shape with that dimension, any real dtype.

    p: of the length, sum(|x|^p)^(1/p); the sum of the absolute values for 1.

    eps_clamp: the length is at least eps. Otherwise eps_outside adds eps to the length, and with
    neither it is added to the sum of squares. `features` is the size along `dim` if it is known;
    then another size raises WrongShape.
    """

    def __init__(
        self,
        dim: int = -1,
        eps: float = 1e-12,
        *,
        features: int | None = None,
        eps_clamp: bool = True,
        eps_outside: bool = False,
        p: float = 2.0,
    ) -> None:
        super().__init__()
        self.dim, self.eps, self.features, self.p = dim, eps, features, p
        self.eps_clamp, self.eps_outside = eps_clamp, eps_outside

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or (self.features is not None and x.shape[self.dim] != self.features):
            raise WrongShape(
                "L2Norm",
                x.shape,
                f"two or more dimensions, {self.features or 'any size'} along dimension {self.dim}",
                "Permute the input, or set dim.",
            )
        if self.eps_clamp:
            return F.normalize(x, p=self.p, dim=self.dim, eps=self.eps)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if self.eps_outside:  # torch's own norm has a gradient at zero
            length: Tensor = torch.linalg.vector_norm(wide, self.p, self.dim, True) + self.eps
        else:
            length = _root(_powers(wide, self.p).sum(self.dim, keepdim=True) + self.eps, self.p)
        return torch.div(wide, length).to(x.dtype)

    def extra_repr(self) -> str:
        other = "" if self.p == 2 else f", p={self.p:g}"
        return f"dim={self.dim}, eps={self.eps}{other}"


def _powers(x: Tensor, p: float) -> Tensor:
    return x.square() if p == 2 else x.abs().pow(p)


def _root(total: Tensor, p: float) -> Tensor:
    return total.sqrt() if p == 2 else total.pow(1.0 / p)


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    p: float = settings.get("p", 2.0)
    total = _powers(x, p).sum(settings["dim"], keepdim=True)
    eps: float = settings["eps"]
    if settings.get("eps_clamp", True):
        return x / _root(total, p).clamp_min(eps)
    if settings.get("eps_outside", False):
        return x / (_root(total, p) + eps)
    return x / _root(total + eps, p)


def read(module: nn.Module) -> Reading:
    assert isinstance(module, L2Norm)
    settings = known(vars(module), ARGUMENTS if module.p != 2 else ARGUMENTS[:-1])
    return Reading({}, {"channel_axis": module.dim, **settings})


def read_call(
    given: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> Reading | str:
    if not shape:
        return "a single number has no dimension to be normalised along"
    if given["p"] != 2:
        return f"F.normalize with p={given['p']}: only the Euclidean length (p=2) is known"
    dim = given["dim"] % len(shape)
    axis = -1 if dim == len(shape) - 1 else dim
    return Reading(
        {}, {"eps": given["eps"], "channel_axis": axis, "features": shape[dim], "dim": axis}
    )


def hypotheses(shape: tuple[int, ...], tensors: Mapping[str, tuple[int, ...]]) -> Iterator[Reading]:
    """Along the last or any other dimension but the first, eps in each of its places."""
    for dim in (-1, *range(1, len(shape) - 1)):
        for place in PLACES:
            features = shape[dim] if shape else 1
            yield Reading({}, {"dim": dim, "channel_axis": dim, "features": features, **place})


def from_any(source: Source, *, init: str = "copy", eps: float = 1e-12) -> nn.Module:
    axis, features = channels(source, "l2norm")
    if features == 1:
        raise refusal(
            source,
            "l2norm",
            "only one element would be normalised, so the output would be its sign",
            "Use affine at this site.",
        )
    return settled(L2Norm(axis, eps, features=features), source, init)


def from_l2norm(source: Source, *, init: str = "copy") -> nn.Module:
    """The same function as a module: for a call or a formula in a forward."""
    return settled(L2Norm(**known(source.settings, ARGUMENTS)), source, init)


def examples() -> tuple[Example, ...]:
    tokens = (2, 5, 12)
    return (
        Example("last dimension", lambda: L2Norm(features=12), (tokens, (3, 12))),
        Example("channels second", lambda: L2Norm(1, features=6), ((2, 6, 5, 3),)),
        Example(
            "eps in the sum",
            lambda: L2Norm(eps=1e-6, features=12, eps_clamp=False),
            (tokens,),
        ),
        Example(
            "eps outside",
            lambda: L2Norm(eps=1e-6, features=12, eps_clamp=False, eps_outside=True),
            (tokens,),
        ),
    )


NORM = NormSpec(
    name="l2norm",
    also=("l2",),
    summary="divides by the Euclidean length",
    paper="Liu, Rabinovich and Berg 2015, arXiv:1506.04579",
    classes=(L2Norm,),
    read=read,
    formula=formula,
    examples=examples,
    conversions={
        "*": Conversion(from_any, Fidelity.RETRAIN),
        "l2norm": Conversion(from_l2norm, Fidelity.IDENTICAL),
    },
    laws=frozenset(
        {
            Law.SCALE_INVARIANT,
            Law.BATCH_INDEPENDENT,
            Law.PERMUTATION_EQUIVARIANT,
            Law.ROTATION_EQUIVARIANT,
        }
    ),
    spellings=(Spelling((F.normalize,), read_call),),
    onnx=OnnxForm({18: ("Shape", "ReduceL2", "Max", "Concat", "Expand", "Div")}),
    hypotheses=hypotheses,
    why_not_affine="its length is that of each position, in eval as in training",
)
