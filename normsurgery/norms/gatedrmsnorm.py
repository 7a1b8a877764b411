"""Gated root mean square norm: an RMS norm over groups of channels, gated by a second input.

What it computes
    With the gate before the norm (Mamba2) y = rms(x * silu(gate)) * weight; with
    `norm_before_gate` (Qwen3-Next) y = rms(x) * weight * silu(gate). `rms(u)` is
    u / sqrt(mean(u^2) + eps) over each group of `group_size` neighbouring channels of a position.
    Without a gate it is that norm alone.

Use it when
    A state space or linear attention block hands its gate to the norm. The two orders are two
    functions: in the first the gate decides the statistics.

From other norms
    From itself alone: at other norms' places there is no gate to be given.

Inference
    It depends on the input in eval as in training, so it cannot become a scale and a shift.

ONNX
    Of a call without the gate: an RMS norm between Reshapes.

Example
    >>> import torch
    >>> from normsurgery.norms.gatedrmsnorm import GatedRMSNorm
    >>> x, gate = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    >>> GatedRMSNorm(8, group_size=4)(x, gate).shape
    torch.Size([2, 5, 8])

Reference
    Dao and Gu, 2024, "Transformers are SSMs", arXiv:2405.21060, section 7.1; the norm itself Zhang
    and Sennrich, 2019, arXiv:1910.07467, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgery.norms.carry import known, present, require_channels, scaled, settled, without
from normsurgery.norms.examples import randomised
from normsurgery.norms.groupnorm import divisors
from normsurgery.spec import Conversion, Example, Fidelity, Law, NormSpec, OnnxForm, Reading, Source

ARGUMENTS = ("features", "eps", "group_size", "norm_before_gate")


class GatedRMSNorm(nn.Module):
    """Gated RMS norm of (..., C); `gate` has the shape of x, or is left out.

    Half precision is computed in float32. Raises WrongShape unless the last size is `features`.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        features: int,
        eps: float = 1e-6,
        *,
        group_size: int | None = None,
        norm_before_gate: bool = False,
    ) -> None:
        super().__init__()
        self.features, self.eps = features, eps
        self.group_size, self.norm_before_gate = group_size or features, norm_before_gate
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        require_channels("gatedrmsnorm", x, -1, self.features)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        opening = None if gate is None else F.silu(gate.to(wide.dtype))
        if opening is not None and not self.norm_before_gate:
            wide = wide * opening
        grouped = in_groups(wide, self.group_size)
        square = grouped.square().mean(-1, keepdim=True)
        y: Tensor = (grouped * (square + self.eps).rsqrt()).flatten(-2)
        y = y if self.weight is None else y * self.weight
        if opening is not None and self.norm_before_gate:
            y = y * opening
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.features}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}"
        )


def in_groups(x: Tensor, size: int) -> Tensor:
    """(..., C) as (..., C / size, size)."""
    grouped: Tensor = x.unflatten(-1, (-1, size))  # type: ignore[no-untyped-call]
    return grouped


def formula(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    training: bool,
    gate: Tensor | None = None,
) -> Tensor:
    opening = torch.ones_like(x) if gate is None else gate / (1 + torch.exp(-gate))
    before = settings["norm_before_gate"]
    grouped = in_groups(x if before else x * opening, settings["group_size"])
    mean_square = (grouped * grouped).mean(-1, keepdim=True)
    y = (grouped / (mean_square + settings["eps"]).sqrt()).flatten(-2)
    y = scaled(y, tensors, settings)
    return y * opening if before else y


def read(module: nn.Module) -> Reading:
    assert isinstance(module, GatedRMSNorm)
    settings = {"channel_axis": -1, **known(vars(module), ARGUMENTS)}
    return Reading(present(module, "weight"), settings)


def hypotheses(shape: tuple[int, ...], tensors: Mapping[str, tuple[int, ...]]) -> Iterator[Reading]:
    """Both orders, every size of group, any vector of C elements as the weight."""
    features = shape[-1] if shape else 0
    fitting = [name for name, size in tensors.items() if size == (features,)]
    for name in fitting if features else ():
        for before in (False, True):
            for size in reversed(divisors(features)):
                settings = {"channel_axis": -1, "features": features, "group_size": size}
                yield Reading({"weight": name}, {**settings, "norm_before_gate": before})


def build(source: Source, *, init: str = "copy") -> nn.Module:
    module = GatedRMSNorm(**known(source.settings, ARGUMENTS))
    return settled(without(module, "weight" in source.tensors, True), source, init)


def _gate(x: Tensor) -> dict[str, Tensor]:
    return {"gate": torch.linspace(-3.0, 2.0, x.numel(), dtype=x.dtype).reshape(x.shape)}


def examples() -> tuple[Example, ...]:
    tokens = (2, 5, 12)

    def norm(**arguments: Any) -> nn.Module:
        return randomised(GatedRMSNorm(12, **arguments))

    return (
        Example("without the gate", lambda: norm(group_size=4), (tokens,)),
        Example("gate before", lambda: norm(group_size=4), (tokens, (3, 12)), _gate),
        Example("gate after", lambda: norm(norm_before_gate=True), (tokens,), _gate),
    )


OPERATORS = (
    *("Reshape", "Pow", "ReduceMean", "Add", "Sqrt", "Reciprocal", "Mul", "Reshape"),
    "Mul",
)

NORM = NormSpec(
    name="gatedrmsnorm",
    summary="an RMS norm over groups, gated by a second input",
    paper="Dao and Gu 2024, arXiv:2405.21060",
    classes=(GatedRMSNorm,),
    read=read,
    formula=formula,
    inputs=("gate",),
    examples=examples,
    conversions={"gatedrmsnorm": Conversion(build, Fidelity.IDENTICAL)},
    laws=frozenset({Law.SCALE_INVARIANT, Law.BATCH_INDEPENDENT, Law.PERMUTATION_EQUIVARIANT}),
    onnx=OnnxForm({18: OPERATORS}),
    hypotheses=hypotheses,
    tail=True,
    why_not_affine="its root mean square is that of each position, in eval as in training",
)
