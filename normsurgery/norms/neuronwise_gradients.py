"""The gradients of neuron-wise layers: mapped from the ordinary ones, for a Linear and a Conv.

The formulas and their source stand in `normsurgery.norms.neuronwise`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["exact", "center", "raw"]
MODES = ("exact", "center", "raw")
DEFAULT_EPS = 1e-3
DEAD = 1e-6


@dataclass(frozen=True)
class LinearForm:
    """`x @ W.T + b` for x (..., in), and what its gradients are made of."""

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return g.matmul(weight)

    def correlate(self, x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        """`sum_i g_ij x_i`: (out, in)."""
        return g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1])

    def total(self, g: Tensor) -> Tensor:
        """Sum over samples, shaped to broadcast against the weight."""
        return g.reshape(-1, g.shape[-1]).sum(0).unsqueeze(1)

    def shifted(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`x - mean(x)`, and the mean shaped to broadcast against the weight."""
        flat = x.reshape(-1, x.shape[-1])
        mean = flat.sum(0, keepdim=True) / max(flat.shape[0], 1)
        return flat - mean, mean


@dataclass(frozen=True)
class ConvolutionForm:
    """A convolution of x (N, C, *space) with equal padding on both sides."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        still = (0,) * len(self.stride)
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, False, still, self.groups
        )

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(g, x, weight, self.padding, [True, False, False])[0]

    def correlate(self, x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        """`sum_i g_ij x_i` over all patches of x, which is padded already: the weight's shape."""
        still = (0,) * len(self.padding)
        return self._backward(g, x, weight, still, [False, True, False])[1]

    def total(self, g: Tensor) -> Tensor:
        """Sum over samples and positions, shaped to broadcast against the weight."""
        return g.transpose(0, 1).flatten(1).sum(1).reshape(-1, *[1] * (g.dim() - 1))

    def shifted(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`x - mean(x)` padded, and the mean shaped to broadcast against the weight.

        A padded zero is an input like any other: it is there before the mean is taken.
        """
        sides = [side for size in reversed(self.padding) for side in (size, size)]
        padded = F.pad(x, sides)
        over = (0, *range(2, x.dim()))
        count = max(padded.numel() // max(padded.shape[1], 1), 1)
        mean = padded.sum(over) / count
        space = [1] * (x.dim() - 2)
        grouped = mean.reshape(self.groups, 1, -1).expand(-1, weight.shape[0] // self.groups, -1)
        return (
            padded - mean.reshape(1, -1, *space),
            grouped.reshape(weight.shape[0], weight.shape[1], *space),
        )

    def _backward(
        self, g: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, ...], wanted: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        still = (0,) * len(self.stride)
        stride, dilation, groups = self.stride, self.dilation, self.groups
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            g, x, weight, None, stride, padding, dilation, False, still, groups, wanted
        )
        return gradients


Form = LinearForm | ConvolutionForm


@dataclass(frozen=True)
class Rule:
    """How a layer's gradients are mapped. `gate` names an activation; None weighs all equally."""

    mode: Mode = "exact"
    eps: float = DEFAULT_EPS
    gate: str | None = None
    arguments: tuple[Any, ...] = ()


def mapped(
    form: Form, rule: Rule, x: Tensor, g: Tensor, gate: Tensor, weight: Tensor, biased: bool
) -> tuple[Tensor, Tensor]:
    """The mapped gradients of weight and bias.

    x: the layer's input; g: the gradient of its output; gate: the weights, in the shape of g; all
    in the dtype to compute in. Everything is taken about the mean of x: with a mean of 300
    standard deviations the plain difference of moments loses half of float32's digits.
    """
    x, shift = form.shifted(x, weight)
    db = form.total(g)
    about_shift = form.correlate(x, g, weight)
    ordinary = about_shift + db * shift
    mass = form.total(gate)
    alive = mass > DEAD
    safe = torch.where(alive, mass, torch.ones_like(mass))
    from_shift = form.correlate(x, gate, weight) / safe
    mean = from_shift + shift
    direction = about_shift - db * from_shift if biased else ordinary
    if rule.mode != "center":
        square = form.correlate(x * x, gate, weight) / safe - from_shift * from_shift
        moment = square.clamp(min=0) + rule.eps
        if not biased:
            moment = moment + mean * mean
        direction = direction / (moment if rule.mode == "exact" else moment.sqrt())
    bias_direction = db
    if biased and rule.mode != "raw":
        inputs = tuple(range(1, weight.dim()))
        bias_direction = db - (direction * mean).sum(inputs, keepdim=True)
    return (
        torch.where(alive, direction, ordinary),
        torch.where(alive, bias_direction, db).flatten(),
    )
