"""Gates: how open each neuron is for each sample, the derivative of the activation that follows it.

A layer whose activation follows directly computes its gate from its own output. Where a norm or a
residual sum stands between, a `GateTap` in front of the activation hands the gate back to the
layer; the two share a `GateLink`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.spec import Source

aten = torch.ops.aten


def _silu(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _sigmoid(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


def _gelu(z: Tensor, approximate: str = "none") -> Tensor:
    derivative: Tensor = aten.gelu_backward(torch.ones_like(z), z, approximate=approximate)
    return derivative


def _hardsigmoid(z: Tensor) -> Tensor:
    derivative: Tensor = aten.hardsigmoid_backward(torch.ones_like(z), z)
    return derivative


def _mish(z: Tensor) -> Tensor:
    derivative: Tensor = aten.mish_backward(torch.ones_like(z), z)
    return derivative


def _leaky_relu(z: Tensor, negative_slope: float = 0.01) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), torch.full_like(z, negative_slope))


def _elu(z: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    below = alpha * input_scale * torch.exp(input_scale * z.clamp(max=0))
    return scale * torch.where(z > 0, torch.ones_like(z), below)


def _celu(z: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), torch.exp(z.clamp(max=0) / alpha))


def _selu(z: Tensor) -> Tensor:
    return _elu(z, 1.6732632423543772, 1.0507009873554805)


def _hardtanh(z: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return (z > min_val) & (z < max_val)


def _hardswish(z: Tensor) -> Tensor:
    inner = torch.where(z > 3, torch.ones_like(z), (2 * z + 3) / 6)
    return torch.where(z < -3, torch.zeros_like(z), inner)


# phi'(z) by the name of phi in ATen, taking phi's further positional arguments; a bool where it is
# 0 or 1.
DERIVATIVES: Mapping[str, Callable[..., Tensor]] = {
    "relu": lambda z: z > 0,
    "relu6": lambda z: (z > 0) & (z < 6),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "celu": _celu,
    "selu": _selu,
    "gelu": _gelu,
    "silu": _silu,
    "mish": _mish,
    "hardswish": _hardswish,
    "hardtanh": _hardtanh,
    "hardsigmoid": _hardsigmoid,
    "tanh": lambda z: 1 - torch.tanh(z) ** 2,
    "sigmoid": _sigmoid,
    "log_sigmoid": lambda z: torch.sigmoid(-z),
    "softplus": lambda z, beta=1.0, threshold=20.0: torch.sigmoid(beta * z),
    "softsign": lambda z: 1 / (1 + z.abs()) ** 2,
}


def gate_weights(activation: str, arguments: Sequence[Any], z: Tensor) -> Tensor:
    """`|phi'(z)|`, in the shape of `z`: the weight of each sample for each neuron.

    The absolute value, because a smooth activation that dips (GELU, SiLU, Mish) has a negative
    derivative there, and a weight must not be negative.
    """
    derivative = DERIVATIVES[activation](z, *arguments)
    return derivative if derivative.dtype == torch.bool else derivative.abs()


@dataclass(frozen=True)
class FoundGate:
    """The activation after a layer: its name, its arguments, and where a tap has to go, if at all.

    `direct`: it reads the layer's own output. `module`: its path, or None if it is a plain call.
    """

    activation: str
    direct: bool
    module: str | None
    arguments: tuple[Any, ...]


def found_gate(source: Source, wanted: str | None) -> FoundGate | None:
    """The gate to use: the one in `source.settings["gate"]`, or the one that `wanted` names.

    None where nothing can be read: no activation, one without a known derivative, or one that
    stands behind a norm or a sum as a plain call, where no tap can be put.
    """
    if wanted == "none":
        return None
    data = source.settings.get("gate") or {}
    found = None
    if data.get("activation") in DERIVATIVES:
        found = FoundGate(
            data["activation"],
            data["direct"],
            data.get("module"),
            tuple(data.get("arguments", ())),
        )
    if wanted is not None and (found is None or found.activation != wanted):
        return FoundGate(wanted, True, None, ())
    if found is not None and not found.direct and found.module is None:
        return None
    return found


class GateBox:
    """The gate of one call of a layer: its shape is known at the call, its weights later."""

    __slots__ = ("shape", "weights")

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.weights: Tensor | None = None


class GateLink(nn.Module):
    """Shared by a GateTap and the layers it gates: the calls that wait for their gate.

    An activation gates every call made since the activation was last called, if the shapes agree:
    one call in a plain chain, several where a residual sum stands between. A module without
    parameters, so that it is copied, pickled and loaded with the model it belongs to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[GateBox] = []

    def open(self, shape: torch.Size) -> GateBox:
        box = GateBox(shape)
        self.waiting.append(box)
        return box

    def fill(self, weights: Tensor) -> None:
        for box in self.waiting:
            if box.shape == weights.shape:
                box.weights = weights
        self.waiting.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "waiting": []}


class GateTap(nn.Module):
    """An activation module that also tells the layers before it how open they are.

    Its output is the wrapped activation's, bit for bit. The gate is taken before the activation
    runs, so an in-place activation is safe.
    """

    def __init__(
        self, inner: nn.Module, activation: str, arguments: Sequence[Any], link: GateLink
    ) -> None:
        super().__init__()
        self.inner = inner
        self.activation = activation
        self.arguments = list(arguments)
        self.link = link

    def forward(self, z: Tensor) -> Any:
        if torch.is_grad_enabled():
            self._tell(z)
        return self.inner(z)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the box is filled in Python
    def _tell(self, z: Tensor) -> None:
        if self.link.waiting:
            self.link.fill(gate_weights(self.activation, self.arguments, z.detach()))

    def extra_repr(self) -> str:
        return self.activation
