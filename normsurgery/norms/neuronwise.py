"""Neuron-wise input normalization: gradients as if each neuron saw standardized inputs.

What it computes
    The forward is exactly the Linear or Conv it replaces. Only the gradients of weight and bias
    are mapped. For neuron `j` with gate `w_ij = |phi'(z_ij)|` over samples (and positions) `i`:
    `S_j = sum_i w_ij`, `mu_j = sum_i w_ij x_i / S_j`, `v_j = sum_i w_ij (x_i - mu_j)^2 / S_j`: mean
    and variance of its inputs over the region where it is linear. With the ordinary `dW`, `db`:

    - `exact`: `gW_j = (dW_j - db_j mu_j) / (v_j + eps)`, `gb_j = db_j - gW_j . mu_j`: one SGD step
      in the coordinates `V = W sqrt(v + eps)`, `c = b + W . mu`, mapped back
    - `center`: the same with variance 1
    - `raw`: `gW_j = (dW_j - db_j mu_j) / sqrt(v_j + eps)`, `gb_j = db_j`; not always a descent
      direction

    Without a trainable bias there is nothing to centre with: `exact` divides `dW` by
    `E_w[x^2] + eps`, `raw` by its root, and `center` leaves it. A neuron with `S_j <= 1e-6` keeps
    its ordinary gradient. The gradient of the input is always the ordinary one.

Use it when
    SGD trains slowly because layer inputs are badly scaled or far from zero mean, and the forward
    must not change. Lower the learning rate by 3 to 10. Use it with SGD: Adam normalises each
    gradient element again, which breaks the coupling of weight and bias. Under DDP every rank maps
    its own gradients before they are averaged, which is not the same as mapping the average;
    gradient clipping sees the mapped gradients.

From other norms
    It wraps a layer, not a norm: Linear, Conv1d, Conv2d, Conv3d. Outputs and input gradients are
    the same bits (`FORWARD`). Options `mode`, `eps`, and `gate`: by default the activation that
    the model's graph shows after the layer (through norms, residual sums, dropout); "none" weighs
    all samples equally, as does a layer with no activation after it.

Inference
    `strip` gives the plain layer back, bitwise.

ONNX
    The plain layer: Gemm (or MatMul, Add) or Conv.

Example
    >>> from normsurgery.norms.neuronwise import NeuronwiseLinear
    >>> NeuronwiseLinear(784, 128, gate="relu")
    NeuronwiseLinear(in_features=784, out_features=128, bias=True, mode=exact, eps=0.001, gate=relu)

Reference
    Neuron-wise input normalization as the quasi-diagonal natural gradient: Ollivier, "Riemannian
    metrics for neural networks I", 2013, arXiv 1303.0818; Marceau-Caron and Ollivier, 2016, arXiv
    1602.08007.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd

from normsurgery.errors import UsageError
from normsurgery.norms.carry import present, refusal
from normsurgery.norms.examples import randomised
from normsurgery.norms.gates import (
    DERIVATIVES,
    GateBox,
    GateLink,
    GateTap,
    found_gate,
    gate_weights,
)
from normsurgery.norms.neuronwise_gradients import (
    DEFAULT_EPS,
    MODES,
    ConvolutionForm,
    Form,
    LinearForm,
    Mode,
    Rule,
    mapped,
)
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


class _Gated(torch.autograd.Function):
    """The layer's forward, with the gradients of weight and bias mapped in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        form: Form,
        rule: Rule,
        link: GateLink | None,
    ) -> Tensor:
        product = form.apply(x, weight, bias)
        # Of an x of three dimensions or more it is a view, and what a Function returns as a view
        # may not be written in place later.
        z: Tensor = torch.ops.aten._unsafe_view(product, product.shape)
        # Saved as weights, not as z: an in-place activation is about to overwrite z.
        direct = rule.gate is not None and link is None
        gate = gate_weights(rule.gate or "", rule.arguments, z) if direct else None
        ctx.save_for_backward(x, weight, gate)
        ctx.form, ctx.rule = form, rule
        ctx.box = link.open(z.shape) if link is not None else None
        ctx.biased = bias is not None and bias.requires_grad
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        form: Form = ctx.form
        box: GateBox | None = ctx.box
        dx = None
        if ctx.needs_input_grad[0]:
            dx = form.input_gradient(g, x.to(g.dtype), weight.to(g.dtype)).to(x.dtype)
        if gate is None and box is not None:
            gate = box.weights
        wide = torch.promote_types(weight.dtype, torch.float32)
        gate = torch.ones_like(g, dtype=wide) if gate is None else gate.to(wide)
        dw, db = mapped(form, ctx.rule, x.to(wide), g.to(wide), gate, weight, ctx.biased)
        bias_gradient = db.to(weight.dtype) if ctx.needs_input_grad[2] else None
        return dx, dw.to(weight.dtype), bias_gradient, None, None, None


class Neuronwise(nn.Module):
    """What the neuron-wise layers share: the rule, and the link to an activation further on.

    The rule is kept as plain attributes, so that a saved model holds modules and values only.
    """

    weight: Tensor
    link: GateLink | None

    def configure(self, rule: Rule, link: GateLink | None = None) -> None:
        """Set the rule; raises UsageError for an unknown mode or gate, or a negative eps."""
        if rule.mode not in MODES:
            raise UsageError(f"neuronwise has no mode {rule.mode!r}. Valid: {', '.join(MODES)}.")
        if rule.gate is not None and rule.gate not in DERIVATIVES:
            raise UsageError(
                f"neuronwise knows no gate {rule.gate!r}. Valid: none, {', '.join(DERIVATIVES)}."
            )
        if not rule.eps >= 0.0:
            raise UsageError(f"neuronwise needs eps >= 0, not {rule.eps}.")
        self.mode = rule.mode
        self.eps = rule.eps
        self.gate = rule.gate
        self.gate_arguments = list(rule.arguments)
        self.link = link

    @property
    def rule(self) -> Rule:
        return Rule(self.mode, self.eps, self.gate, tuple(self.gate_arguments))

    def maps(self) -> bool:
        return torch.is_grad_enabled() and self.weight.requires_grad

    def gated(self, x: Tensor, form: Form) -> Tensor:
        """The layer's output for `x`, its gradients mapped."""
        if self.link is not None:
            return cast(Tensor, self._linked(x, form))
        arguments = (x, self.weight, self.bias, form, self.rule, None)
        return cast(Tensor, _Gated.apply(*arguments))  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the box is opened in Python
    def _linked(self, x: Tensor, form: Form) -> Tensor:
        arguments = (x, self.weight, self.bias, form, self.rule, self.link)
        return cast(Tensor, _Gated.apply(*arguments))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        reach = " behind other layers" if self.link is not None else ""
        gate = f"{self.gate}{reach}" if self.gate else "none"
        return f"{super().extra_repr()}, mode={self.mode}, eps={self.eps}, gate={gate}"


class NeuronwiseLinear(Neuronwise, nn.Linear):
    """nn.Linear with neuron-wise gradients. x: (..., in_features)."""

    def __init__(
        self,
        *args: Any,
        mode: Mode = "exact",
        eps: float = DEFAULT_EPS,
        gate: str | None = None,
        **keywords: Any,
    ) -> None:
        nn.Linear.__init__(self, *args, **keywords)
        self.configure(Rule(mode, eps, gate))

    def forward(self, x: Tensor) -> Tensor:
        if not self.maps():
            return F.linear(x, self.weight, self.bias)
        return self.gated(x, LinearForm())


class _NeuronwiseConv(Neuronwise, _ConvNd):
    def __init__(
        self,
        *args: Any,
        mode: Mode = "exact",
        eps: float = DEFAULT_EPS,
        gate: str | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*args, **keywords)
        self.configure(Rule(mode, eps, gate))

    def forward(self, x: Tensor) -> Tensor:
        if not self.maps():
            return self._conv_forward(x, self.weight, self.bias)
        if x.dim() < self.weight.dim():
            return self.gated(*self._evenly_padded(x.unsqueeze(0))).squeeze(0)
        return self.gated(*self._evenly_padded(x))

    def _evenly_padded(self, x: Tensor) -> tuple[Tensor, ConvolutionForm]:
        """The input, padded by what a convolution cannot do itself, and the rest as its form."""
        sides = self._reversed_padding_repeated_twice
        low, high = sides[0::2], sides[1::2]
        if self.padding_mode != "zeros":
            x = F.pad(x, sides, mode=self.padding_mode)
            low = [0] * len(low)
        elif low != high:  # "same" with an even kernel: torch adds the surplus at the end
            x = F.pad(x, [size for a, b in zip(low, high, strict=True) for size in (0, b - a)])
        padding = tuple(reversed(low))
        return x, ConvolutionForm(self.stride, padding, self.dilation, self.groups)


class NeuronwiseConv1d(_NeuronwiseConv, nn.Conv1d):
    """nn.Conv1d with neuron-wise gradients. x: (N, C, L) or (C, L)."""


class NeuronwiseConv2d(_NeuronwiseConv, nn.Conv2d):
    """nn.Conv2d with neuron-wise gradients. x: (N, C, H, W) or (C, H, W)."""


class NeuronwiseConv3d(_NeuronwiseConv, nn.Conv3d):
    """nn.Conv3d with neuron-wise gradients. x: (N, C, D, H, W) or (C, D, H, W)."""


WRAPPED: Mapping[type[nn.Module], type[Neuronwise]] = {
    nn.Linear: NeuronwiseLinear,
    nn.Conv1d: NeuronwiseConv1d,
    nn.Conv2d: NeuronwiseConv2d,
    nn.Conv3d: NeuronwiseConv3d,
}


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    """Float64 truth of the forward: the plain layer's, in both modes."""
    weight, bias = tensors["weight"], tensors.get("bias")
    if "stride" not in settings:
        y = x @ weight.mT
        return y if bias is None else y + bias
    x = F.pad(x, settings["padding"], mode=settings["padding_mode"])
    still = (0,) * len(settings["stride"])
    stride, dilation, groups = settings["stride"], settings["dilation"], settings["groups"]
    return torch.convolution(x, weight, bias, stride, still, dilation, False, still, groups)


def read(module: nn.Module) -> Reading:
    assert isinstance(module, Neuronwise)
    settings: dict[str, Any] = {
        "eps": module.eps,
        "channel_axis": -1,
        "features": module.weight.shape[1],
        "mode": module.mode,
    }
    if isinstance(module, _NeuronwiseConv):
        mode = module.padding_mode
        settings |= {
            "channel_axis": 1,
            "features": module.in_channels,
            "stride": list(module.stride),
            "padding": list(module._reversed_padding_repeated_twice),
            "padding_mode": "constant" if mode == "zeros" else mode,
            "dilation": list(module.dilation),
            "groups": module.groups,
        }
    return Reading(present(module, "weight", "bias"), settings)


def plain_class(source: Source) -> type[nn.Module]:
    """The torch class of the layer; raises CannotConvert unless the layer computes just that."""
    module = source.module
    for plain in WRAPPED:
        if isinstance(module, plain) and _computes_as(module, plain):
            if module._parameters.get("weight") is not None:
                return plain
            raise refusal(
                source,
                "neuronwise",
                "its weight is computed from other parameters",
                "Remove the parametrization of its weight first.",
            )
    raise refusal(
        source,
        "neuronwise",
        "only Linear and Conv1d, 2d, 3d with torch's own forward can be wrapped",
        "Leave this layer out.",
    )


def _computes_as(module: nn.Module, plain: type[nn.Module]) -> bool:
    if "forward" in vars(module):
        return False
    names = ("forward", "_conv_forward", "__call__")
    return all(getattr(type(module), n, None) is getattr(plain, n, None) for n in names)


def build(
    source: Source,
    *,
    init: str = "copy",
    mode: Mode = "exact",
    eps: float = DEFAULT_EPS,
    gate: str | None = None,
) -> nn.Module:
    """The layer with the same tensors' values, hooks and attributes, and mapped gradients."""
    wrapped = WRAPPED[plain_class(source)]
    layer = wrapped.__new__(wrapped)
    layer.__dict__.update(vars(tree_copy(cast(nn.Module, source.module), clone=True)))
    found = found_gate(source, gate)
    if found is None:
        layer.configure(Rule(mode, float(eps)))
    else:
        rule = Rule(mode, float(eps), found.activation, found.arguments)
        layer.configure(rule, None if found.direct else GateLink())
    if init == "reset":
        layer.reset_parameters()  # type: ignore[operator]
    return layer


def resolve(source: Source, options: Mapping[str, Any]) -> Mapping[str, Any]:
    plain_class(source)
    found = found_gate(source, options.get("gate"))
    defaults = {"mode": "exact", "eps": DEFAULT_EPS}
    return {**defaults, **options, "gate": found.activation if found else "none"}


def companions(
    source: Source, built: nn.Module, options: Mapping[str, Any]
) -> Mapping[str, Callable[[nn.Module], nn.Module]]:
    """Where the gate stands behind other layers: its activation becomes a tap (or is one)."""
    gate = source.settings.get("gate") or {}
    link = built.link if isinstance(built, Neuronwise) else None
    if link is None:
        return {}

    def tapped(activation: nn.Module) -> nn.Module:
        if isinstance(activation, GateTap):
            cast(Neuronwise, built).link = activation.link
            return activation
        layer = cast(Neuronwise, built)
        return GateTap(activation, cast(str, layer.gate), layer.gate_arguments, link)

    return {gate["module"]: tapped}


def strip(module: nn.Module) -> nn.Module:
    """A copy of a neuron-wise layer as the plain torch layer it computes, bit for bit."""
    assert isinstance(module, Neuronwise)
    plain = next(plain for plain, wrapped in WRAPPED.items() if isinstance(module, wrapped))
    layer = plain.__new__(plain)
    layer.__dict__.update(vars(tree_copy(module, clone=True)))
    layer._modules.pop("link", None)
    for name in ("mode", "eps", "gate", "gate_arguments", "link"):
        layer.__dict__.pop(name, None)
    return layer


def idle_taps(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Taps that no layer waits for, and the activations in them."""
    waited_for = {id(layer.link) for layer in model.modules() if isinstance(layer, Neuronwise)}
    taps = [tap for tap in model.modules() if isinstance(tap, GateTap)]
    return [(tap, tap.inner) for tap in taps if id(tap.link) not in waited_for]


def examples() -> tuple[Example, ...]:
    return (
        Example(
            "linear",
            lambda: randomised(NeuronwiseLinear(6, 5, gate="relu")),
            ((7, 6), (3, 4, 6), (1, 6)),
        ),
        Example(
            "convolution",
            lambda: randomised(NeuronwiseConv2d(4, 6, 3, padding=1, groups=2, gate="gelu")),
            ((2, 4, 5, 5), (1, 4, 3, 3)),
        ),
    )


NORM = NormSpec(
    name="neuronwise",
    summary="gradients taken against inputs standardised per neuron",
    paper="arXiv 1303.0818",
    attach="layer",
    classes=tuple(WRAPPED.values()),
    read=read,
    formula=formula,
    examples=examples,
    conversions={"*": Conversion(build, Fidelity.FORWARD, resolve, companions)},
    laws=frozenset({Law.BATCH_INDEPENDENT, Law.PERMUTATION_EQUIVARIANT}),
    onnx=OnnxForm({18: ("Gemm",)}),
    why_not_affine="its forward is the layer's, which mixes channels",
    idle=idle_taps,
    strip=strip,
)
