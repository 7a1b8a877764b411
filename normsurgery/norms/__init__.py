"""The table of norms: a line per norm. Each file holds everything about its norm."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    file: str
    attach: str
    summary: str


TABLE: dict[str, Row] = {
    "batchnorm": Row(
        "batchnorm", "norm", "per channel over batch and space, running statistics in eval"
    ),
    "layernorm": Row("layernorm", "norm", "over the last dimensions of each position"),
    "layernorm2d": Row("layernorm2d", "norm", "over the channels of each pixel of (N, C, H, W)"),
    "layernorm_chw": Row(
        "layernorm_chw", "norm", "over channels and space of each sample, affine per channel"
    ),
    "groupnorm": Row("groupnorm", "norm", "over groups of channels and space of each sample"),
    "instancenorm": Row("instancenorm", "norm", "per channel over the space of each sample"),
    "rmsnorm": Row("rmsnorm", "norm", "divides by the root mean square, no centring"),
    "l2norm": Row("l2norm", "norm", "divides by the Euclidean length"),
    "affine": Row("affine", "norm", "one scale and one shift per channel, no statistics"),
    "gatedrmsnorm": Row("gatedrmsnorm", "norm", "an RMS norm over groups, gated by a second input"),
    "batchrenorm": Row(
        "batchrenorm", "norm", "batch norm whose training is tied to its running statistics"
    ),
    "powernorm": Row("powernorm", "norm", "divides by a running root mean square per channel"),
    "identity": Row("identity", "norm", "nothing"),
    "randomaggregation": Row(
        "randomaggregation", "norm", "an ensemble of norms, one drawn per layer and batch"
    ),
    "neuronwise": Row(
        "neuronwise", "layer", "gradients taken against inputs standardised per neuron"
    ),
    "weightstandardization": Row(
        "weightstandardization", "weight", "standardises a weight per output channel"
    ),
    "dyt": Row("dyt", "norm", "tanh of a learned scale, no statistics"),
    "evonorm-s0": Row("evonorm_s0", "norm", "norm and activation in one, per group of channels"),
    "localresponsenorm": Row(
        "localresponsenorm", "norm", "divides by the energy of neighbouring channels"
    ),
}

SHORT_FORMS = {
    "bn": "batchnorm",
    "ln": "layernorm",
    "ln2d": "layernorm2d",
    "gn": "groupnorm",
    "in": "instancenorm",
    "rms": "rmsnorm",
    "l2": "l2norm",
    "none": "identity",
    "rna": "randomaggregation",
    "ws": "weightstandardization",
    "dynamictanh": "dyt",
    "evonorms0": "evonorm-s0",
    "lrn": "localresponsenorm",
}
