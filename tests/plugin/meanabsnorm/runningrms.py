"""Running root mean square: divides by a running root mean square per channel.

What it computes
    y = x / sqrt(running_square + eps) * gain + offset, per channel of (N, C, ...); in training the
    mean square of the batch takes the place of the running one, which it moves.

Use it when
    A test wants a third party's norm that is a scale and a shift in eval.

From other norms
    Weight and bias are carried; the statistic starts at 1.

Inference
    scale = gain / sqrt(running_square + eps), shift = offset.

ONNX
    Mul, Add.

Example
    >>> import torch
    >>> from meanabsnorm.runningrms import RunningRMS
    >>> RunningRMS(4)(torch.randn(2, 4)).shape
    torch.Size([2, 4])

Reference
    None: it exists to show that a third party's norm folds.
"""

from __future__ import annotations

import torch
from torch import nn

from normsurgery.norms.carry import along, refusal, require_channels
from normsurgery.norms.examples import randomised
from normsurgery.spec import Conversion, Example, Fidelity, Law, NormSpec, OnnxForm, Reading


class RunningRMS(nn.Module):
    """(N, C, ...) over a running root mean square. Raises WrongShape unless C is `features`."""

    def __init__(self, features, eps=1e-5):
        super().__init__()
        self.features, self.eps = features, eps
        self.gain = nn.Parameter(torch.ones(features))
        self.offset = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_square", torch.ones(features))

    def forward(self, x):
        require_channels("runningrms", x, 1, self.features)
        square = self.running_square
        if self.training:
            square = x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(over(x))
            self.running_square.lerp_(square.detach().to(self.running_square), 0.1)
        scale = self.gain / (square + self.eps).sqrt()
        return (x * along(scale, x, 1) + along(self.offset, x, 1)).to(x.dtype)


def over(x):
    return [d for d in range(x.dim()) if d != 1]


def formula(x, tensors, settings, training):
    square = x.square().mean(over(x)) if training else tensors["running_square"]
    scale, shift = affine({**tensors, "running_square": square}, settings)
    return x * along(scale, x, 1) + along(shift, x, 1)


def affine(tensors, settings):
    scale = tensors["gain"] / (tensors["running_square"] + settings["eps"]).sqrt()
    return scale, tensors["offset"]


def read(module):
    settings = {"eps": module.eps, "channel_axis": 1, "features": module.features}
    return Reading({r: r for r in ("gain", "offset", "running_square")}, settings)


def build(source, *, init="copy"):
    if source.settings.get("channel_axis") != 1:
        raise refusal(source, "runningrms", "its channels are not second", "Use rmsnorm.")
    new = RunningRMS(source.features, source.settings.get("eps") or 1e-5)
    new.to(dtype=source.dtype, device=source.device).train(source.training)
    roles = {} if source.kind == "runningrms" else {"gain": "weight", "offset": "bias"}
    for name, tensor in new.state_dict().items() if init == "copy" else ():
        if (old := source.tensors.get(roles.get(name, name))) is not None:
            tensor.copy_(old.detach().reshape(-1))
    return new


def examples():
    return (Example("maps", lambda: randomised(RunningRMS(4)), ((2, 4, 5, 3), (3, 4))),)


NORM = NormSpec(
    name="runningrms",
    summary="divides by a running root mean square",
    paper="",
    attach="norm",
    classes=(RunningRMS,),
    read=read,
    formula=formula,
    examples=examples,
    conversions={
        "*": Conversion(build, Fidelity.RETRAIN),
        "runningrms": Conversion(build, Fidelity.IDENTICAL),
        "powernorm": Conversion(build, Fidelity.EVAL),
    },
    laws=frozenset({Law.SCALE_INVARIANT, Law.PERMUTATION_EQUIVARIANT, Law.AFFINE_IN_EVAL}),
    onnx=OnnxForm({18: ("Mul", "Add")}),
    affine=affine,
)
