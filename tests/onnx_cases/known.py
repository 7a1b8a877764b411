"""The pairs of the reference that exhibit today's exporter, runtime and verifiers.

`torch` is what `torch.onnx.export(verify=True)` said of each when that reference was measured
(torch 2.13, onnxruntime 1.31): 33 of its 48 right, nine false passes, six false alarms.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import onnx
import torch
from torch import Tensor, nn

from onnx_cases.case import Cases, Sides
from onnx_cases.graphs import exported, graph, node
from onnx_cases.modules import (
    BatchOnly,
    Formula,
    GemmaRMSNorm,
    HalfRMSNorm,
    HandLayerNorm,
    RankUpRMSNorm,
    StandardizedConv,
    randn,
    random_module,
)

KNOWN = Cases()
ALONE = {"hard": False}  # only the example is run: it alone must show the fault

# GroupNorm: with opset 21 onnxruntime has no kernel and runs the function body, E[x^2] - E[x]^2.


def group_norm() -> nn.Module:
    return random_module(nn.GroupNorm(4, 8))


@cache
def group_norm_file(opset: int) -> onnx.ModelProto:
    return exported(group_norm(), (offset(0),), opset=opset)


def group_norm_sides(opset: int, x: Tensor, *, hard: bool = False) -> Sides:
    return Sides(group_norm(), group_norm_file(opset), (x,), {"hard": hard})


def offset(mean: float) -> Tensor:
    """With this seed a relative difference near zero decides as it did in the reference."""
    return randn(3, 8, 24, 24, seed=9) + mean


@KNOWN.bad("output", torch="false pass")
def gn21_off10() -> Sides:
    """one-pass variance at mean/std 10: an error of 1e-4, below the usual tolerances"""
    return group_norm_sides(21, offset(10))


@KNOWN.bad("output", torch="right")
def gn21_off100() -> Sides:
    """one-pass variance at mean/std 100"""
    return group_norm_sides(21, offset(100))


@KNOWN.bad("output", torch="right")
def gn21_off1000() -> Sides:
    """one-pass variance at mean/std 1000"""
    return group_norm_sides(21, offset(1000), hard=True)


@KNOWN.bad("not finite|nan", torch="false pass")
def gn21_off10000() -> Sides:
    """one-pass variance at mean/std 1e4: negative, its root NaN"""
    return group_norm_sides(21, offset(1e4), hard=True)


@KNOWN.bad("not finite|nan", torch="false pass")
def gn21_const() -> Sides:
    """one-pass variance of a constant input: negative by rounding, all NaN"""
    return group_norm_sides(21, torch.full((3, 8, 24, 24), 3.7))


@KNOWN.bad("not finite|nan")
def gn21_const_large() -> Sides:
    """one-pass variance of a large constant input: all NaN"""
    return group_norm_sides(21, torch.full((3, 8, 24, 24), 1000.7))


@KNOWN.bad(r"mean 1e\+04|mean 1000|constant")
def gn21_random() -> Sides:
    """one-pass variance, and an example on which it is right: the hard inputs must find it"""
    return group_norm_sides(21, offset(0), hard=True)


@KNOWN.good(torch="false alarm", alarms=True)
def gn18_off100() -> Sides:
    """none: centred, but outputs near zero have large relative errors"""
    return group_norm_sides(18, offset(100))


@KNOWN.good(torch="false alarm", alarms=True)
def gn18_off1000() -> Sides:
    """none: centred; an error of 1e-4 is the conditioning of the input"""
    return group_norm_sides(18, offset(1000), hard=True)


@KNOWN.good(torch="false alarm", alarms=True)
def gn18_off10000() -> Sides:
    """none: centred; an error of 1e-3 is the conditioning of the input"""
    return group_norm_sides(18, offset(1e4), hard=True)


@KNOWN.good()
def gn18_hard() -> Sides:
    """none: centred, on every hard input"""
    return group_norm_sides(18, offset(0), hard=True)


@KNOWN.bad("batch 0|run|raises|Reshape", "fail or refused")
def gn_batch0() -> Sides:
    """an empty batch, which the Reshape of opset 18 does not take and torch does"""
    return group_norm_sides(18, torch.zeros(0, 8, 24, 24))


# LayerNorm and hand-written norms: `+ eps` with eps <= 1e-8 is deleted by the exporter's optimizer.


@cache
def layer_norm_file() -> onnx.ModelProto:
    return exported(layer_norm(), (randn(4, 6, 16),), opset=20)


def layer_norm() -> nn.Module:
    return random_module(nn.LayerNorm(16))


@KNOWN.good(torch="false alarm", alarms=True)
def ln_off10000() -> Sides:
    """none: relative errors at outputs near zero"""
    return Sides(layer_norm(), layer_norm_file(), (randn(4, 6, 16) + 1e4,))


@KNOWN.good()
def ln_hard() -> Sides:
    """none: an ordinary LayerNorm on every hard input"""
    return Sides(layer_norm(), layer_norm_file(), (randn(4, 6, 16),))


@KNOWN.good(torch="false alarm", alarms=True)
def ln_batch0() -> Sides:
    """none: an empty batch gives an empty output, and the batches 1, 2 and 7 are right"""
    return Sides(layer_norm(), layer_norm_file(), (torch.zeros(0, 6, 16),))


@KNOWN.bad("nothing was compared")
def ln_batch0_alone() -> Sides:
    """nothing was compared: the only input has no element"""
    return Sides(layer_norm(), layer_norm_file(), (torch.zeros(0, 6, 16),), ALONE)


@cache
def rms_file(eps: float) -> onnx.ModelProto:
    return exported(rms(eps), (randn(4, 6, 16),), opset=20)


def rms(eps: float) -> nn.Module:
    return random_module(nn.RMSNorm(16, eps=eps))


@KNOWN.bad("not finite|nan", torch="false pass")
def rms_eps1e_08_zeros() -> Sides:
    """eps 1e-8 deleted by the optimizer: zeros give NaN"""
    return Sides(rms(1e-8), rms_file(1e-8), (torch.zeros(4, 6, 16),), ALONE)


@KNOWN.bad("not finite|nan", torch="false pass")
def rms_eps1e_12_zeros() -> Sides:
    """eps 1e-12 deleted by the optimizer: zeros give NaN"""
    return Sides(rms(1e-12), rms_file(1e-12), (torch.zeros(4, 6, 16),), ALONE)


@KNOWN.bad("output")
def rms_eps1e_08_small() -> Sides:
    """eps 1e-8 deleted by the optimizer: inputs of 1e-5 come out 8 times too large"""
    return Sides(rms(1e-8), rms_file(1e-8), (1e-5 * randn(4, 6, 16),), ALONE)


@KNOWN.bad("zeros|constant|subnormal|tiny")
def rms_eps1e_12_random() -> Sides:
    """eps 1e-12 deleted by the optimizer, and an example on which it does not matter"""
    return Sides(rms(1e-12), rms_file(1e-12), (randn(4, 6, 16),))


@KNOWN.good()
def rms_eps2e_08() -> Sides:
    """none: eps 2e-8 is large enough to survive the optimizer"""
    return Sides(rms(2e-8), rms_file(2e-8), (randn(4, 6, 16),))


@KNOWN.good()
def rms23_eps1e_12() -> Sides:
    """none: eps 1e-12 is an attribute of RMSNormalization and survives"""
    source = rms(1e-12)
    return Sides(source, exported(source, (randn(4, 6, 16),), opset=23), (randn(4, 6, 16),))


@KNOWN.good()
def ln_eps1e_12() -> Sides:
    """none: eps 1e-12 is an attribute of LayerNormalization and survives"""
    source = random_module(nn.LayerNorm(16, eps=1e-12))
    return Sides(source, exported(source, (randn(4, 6, 16),), opset=20), (randn(4, 6, 16),))


@KNOWN.bad("not finite|nan", torch="false pass")
def ln_manual_eps1e_12() -> Sides:
    """hand-written LayerNorm whose eps 1e-12 (BERT's) was deleted: constant rows give NaN"""
    source = random_module(HandLayerNorm(16, 1e-12))
    file = exported(source, (randn(4, 6, 16),), opset=20)
    return Sides(source, file, (torch.full((4, 6, 16), 3.0),), ALONE)


@KNOWN.good()
def ln_manual_eps1e_12_kept() -> Sides:
    """none: the same norm without the exporter's optimizer, eps kept"""
    source = random_module(HandLayerNorm(16, 1e-12))
    file = exported(source, (randn(4, 6, 16),), opset=20, optimize=False)
    return Sides(source, file, (randn(4, 6, 16),))


# BatchNorm, modes, randomness.


def conv_bn() -> nn.Module:
    return random_module(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))


@KNOWN.bad("batch|random|train|output", "fail or refused", torch="right")
def bn_train() -> Sides:
    """compared in train mode, and exported with the running statistics"""
    x = randn(4, 3, 6, 6)
    file = exported(conv_bn(), (x,), train=True)
    return Sides(conv_bn(), file, (x,), {"modes": ("train",)})


def mixed() -> nn.Module:
    model = conv_bn().eval()
    model[1].train()
    return model


@KNOWN.bad("batch|random|train|output", "fail or refused")
def bn_mixed_mode() -> Sides:
    """the norm alone in train mode, compared so, and exported with the running statistics"""
    x = randn(4, 3, 6, 6)
    return Sides(mixed(), exported(mixed(), (x,), train=None), (x,), {"modes": ("train",)})


@KNOWN.good()
def bn_mixed_mode_as_eval() -> Sides:
    """none: the file has the running statistics, which is what the model is in eval mode"""
    x = randn(4, 3, 6, 6)
    return Sides(mixed(), exported(mixed(), (x,), train=None), (x,))


@KNOWN.good()
def bn_train_as_eval() -> Sides:
    """none: the file has the running statistics, which is what the model is in eval mode"""
    x = randn(4, 3, 6, 6)
    return Sides(conv_bn().train(), exported(conv_bn(), (x,), train=True), (x,))


@KNOWN.bad("output|batch", torch="right")
def bn_always_batch() -> Sides:
    """batch_norm(training=True) in the forward, exported with the running statistics"""
    x = 2 + 3 * randn(4, 8, 5, 5)
    return Sides(BatchOnly(8), exported(BatchOnly(8), (x,)), (x,))


@KNOWN.bad("output|random|two runs", torch="right")
def dropout_train() -> Sides:
    """a live Dropout in the graph: two runs of the file differ"""
    x = randn(4, 16)

    def source() -> nn.Module:
        return random_module(nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 5)))

    return Sides(source(), exported(source(), (x,), train=True), (x,))


@KNOWN.bad("batch", torch="false pass")
def bn_nostats_batchdep() -> Sides:
    """no running statistics: what a sample gives depends on the batch it is in"""
    x = randn(4, 8, 5, 5)
    source = nn.BatchNorm2d(8, affine=False, track_running_stats=False).eval()
    return Sides(source, exported(source, (x,)), (x,))


@KNOWN.bad("random|seed|differ", torch="false pass")
def random_norm() -> Sides:
    """a random draw of the forward was frozen into the file"""
    source = Formula(lambda s, x: x * (1 + 0.3 * random.random()))
    return Sides(source, exported(source, (randn(4, 16),)), (randn(4, 16),))


@KNOWN.bad("raises|nothing was compared", torch="right")
def bn_nostats_b1() -> Sides:
    """torch refuses one value per channel, onnxruntime returns 0"""
    source = nn.BatchNorm1d(8, affine=False, track_running_stats=False).train()
    file = graph(
        [
            node("ReduceMean", "x axes", "mean", keepdims=1),
            node("Sub", "x mean", "centred"),
            node("Mul", "centred centred", "square"),
            node("ReduceMean", "square axes", "variance", keepdims=1),
            node("Add", "variance eps", "shifted"),
            node("Sqrt", "shifted", "deviation"),
            node("Div", "centred deviation", "y"),
        ],
        {"x": (torch.float32, ["batch", 8])},
        {"y": (torch.float32, ["batch", 8])},
        {"axes": [0], "eps": 1e-5},
    )
    return Sides(source, file, (randn(1, 8),), ALONE)


@KNOWN.bad("raises|nothing was compared", torch="right")
def in_1x1() -> Sides:
    """torch refuses a map of one pixel, onnxruntime returns the bias"""
    source = random_module(nn.InstanceNorm2d(8, affine=True))
    file = graph(
        [node("InstanceNormalization", "x weight bias", "y", epsilon=1e-5)],
        {"x": (torch.float32, ["batch", 8, "height", "width"])},
        {"y": (torch.float32, ["batch", 8, "height", "width"])},
        {"weight": source.weight, "bias": source.bias},  # type: ignore[dict-item]
    )
    return Sides(source, file, (randn(2, 8, 1, 1),), ALONE)


# Half precision.


@KNOWN.bad("reference poor|device|overflow", "undecided", torch="right")
def rms_fp16_overflow() -> Sides:
    """squares overflow in torch's fp16 and not in onnxruntime's CPU provider, which upcasts"""
    source = random_module(HalfRMSNorm(16)).half()
    x = (300 + 30 * randn(4, 6, 16).abs()).half()
    return Sides(source, exported(source, (x,)), (x,), ALONE)


@KNOWN.bad("inf|overflow|finite|running_var|output", "fail or refused", torch="false pass")
def bn_half_var() -> Sides:
    """a running variance above 65504 is infinite in fp16: the channel collapses to its bias"""
    master = random_module(nn.BatchNorm2d(8))
    with torch.no_grad():
        master.running_var[2] = 1e5  # type: ignore[index, union-attr]
    half = random_module(nn.BatchNorm2d(8)).half()
    half.running_var[2] = float("inf")  # type: ignore[index, union-attr]
    x = 300 * randn(4, 8, 5, 5)
    return Sides(master, exported(half, (x.half(),)), (x,))


@KNOWN.good(alarms=True)
def bn_half() -> Sides:
    """none: the fp32 master against its fp16 file, statistics in range; fp16's rounding"""
    master = random_module(nn.BatchNorm2d(8))
    half = random_module(nn.BatchNorm2d(8)).half()
    x = 3 * randn(4, 8, 5, 5)
    return Sides(master, exported(half, (x.half(),)), (x,), ALONE)


@KNOWN.bad("RMSNormalization|type", "refused", torch="right")
def gemma_fp16_op23() -> Sides:
    """fused into RMSNormalization with a float32 scale: an invalid graph"""
    source = random_module(GemmaRMSNorm(16)).half()
    x = randn(4, 6, 16).half()
    return Sides(source, exported(source, (x,), opset=23), (x,))


@KNOWN.bad("RMSNormalization|type", "refused", torch="right")
def gemma_bf16_op23() -> Sides:
    """fused into RMSNormalization with a float32 scale: an invalid graph"""
    source = random_module(GemmaRMSNorm(16)).bfloat16()
    x = randn(4, 6, 16).bfloat16()
    return Sides(source, exported(source, (x,), opset=23), (x,))


@KNOWN.good()
def gemma_fp16_op18() -> Sides:
    """none: the same norm at opset 18"""
    source = random_module(GemmaRMSNorm(16)).half()
    x = (randn(4, 50, 16) + 10).half()
    return Sides(source, exported(source, (x,), opset=18), (x,))


@KNOWN.bad("RMSNormalization|scale|rank|shape|run", "fail or refused", torch="right")
def rms_scale_rank_up() -> Sides:
    """a scale with more dimensions than its input was fused: the runtime refuses it"""
    source = random_module(RankUpRMSNorm(16))
    return Sides(source, exported(source, (randn(4, 6, 16),), opset=23), (randn(4, 6, 16),))


def bf16(module: Callable[[], nn.Module], x: Tensor, opset: int = 18) -> Sides:
    source = random_module(module()).bfloat16()
    file = exported(source, (x.bfloat16(),), opset=opset)
    return Sides(source, file, (x.bfloat16(),))


@KNOWN.bad("InstanceNormalization|bfloat16", "refused", torch="right")
def gn_bf16_op18() -> Sides:
    """InstanceNormalization takes bf16 only from opset 22"""
    return bf16(lambda: nn.GroupNorm(4, 8), randn(3, 8, 5, 5))


@KNOWN.bad("InstanceNormalization|bfloat16", "refused", torch="right")
def in_bf16_op18() -> Sides:
    """InstanceNormalization takes bf16 only from opset 22"""
    return bf16(lambda: nn.InstanceNorm2d(8, affine=True), randn(3, 8, 5, 5))


@KNOWN.bad("AveragePool|bfloat16", "refused", torch="right")
def lrn_bf16_op18() -> Sides:
    """AveragePool takes bf16 only from opset 22"""
    return bf16(lambda: nn.LocalResponseNorm(3), randn(3, 8, 5, 5))


@KNOWN.bad("Conv|bfloat16", "refused", torch="right")
def conv_bf16_op18() -> Sides:
    """Conv takes bf16 only from opset 22"""
    return bf16(lambda: nn.Conv2d(8, 8, 3), randn(3, 8, 5, 5))


@KNOWN.bad("BatchNormalization|bfloat16|kernel|implement", "refused", torch="right")
def bn_bf16() -> Sides:
    """valid, and onnxruntime's CPU provider has no kernel for it"""
    return bf16(lambda: nn.BatchNorm2d(8), randn(3, 8, 5, 5))


@KNOWN.good(alarms=True)
def ln_bf16() -> Sides:
    """none: LayerNorm is the one norm that onnxruntime's CPU provider runs in bf16"""
    return bf16(lambda: nn.LayerNorm(64), randn(4, 50, 64) + 10)


# Controls.


@KNOWN.good(torch="false alarm", alarms=True)
def none_out() -> Sides:
    """none: the first of the outputs is None"""
    source = random_module(Formula(lambda s, x: (None, x * s.weight), weight=torch.ones(16)))
    return Sides(source, exported(source, (randn(4, 16),)), (randn(4, 16),))


@KNOWN.good(torch="right")
def instance_norm_unbatched() -> Sides:
    """none: an InstanceNorm of (C, L), which has no batch axis"""
    source = random_module(nn.InstanceNorm1d(8, affine=True))
    x = randn(8, 20)
    return Sides(source, exported(source, (x,), dynamic=False), (x,))


@KNOWN.good(torch="right")
def bn1d_traced_at_1() -> Sides:
    """none: traced at batch 1, which once was baked in"""
    source = random_module(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))
    return Sides(source, exported(source, (randn(1, 6),)), (randn(5, 6),))


@KNOWN.good(torch="right", alarms=True)
def conv_bn_folded() -> Sides:
    """none: the exporter folds the BatchNorm into the convolution, inputs of size 1e3"""
    x = 1e3 * randn(4, 3, 6, 6)
    return Sides(conv_bn(), exported(conv_bn(), (x,)), (x,))


@KNOWN.good(torch="right", alarms=True)
def weight_standardization() -> Sides:
    """none: the weight was standardised at export, errors of 1e-5"""
    source = StandardizedConv(16, 8, 3)
    with torch.no_grad():
        assert source.bias is not None
        source.weight.copy_(1 + 0.01 * randn(8, 16, 3, 3))
        source.bias.copy_(randn(8, seed=2))
    x = 3 * randn(2, 16, 6, 6)
    return Sides(source.eval(), exported(source, (x,)), (x,))


@KNOWN.good(torch="right")
def local_response_norm() -> Sides:
    """none: written as a chain of nine operators, never as LRN"""
    source = nn.LocalResponseNorm(3, alpha=0.3)
    x = randn(2, 8, 5, 5)
    return Sides(source, exported(source, (x,)), (x,))


@KNOWN.good(torch="right")
def weight_norm() -> Sides:
    """none: weight_norm, folded into the matrix at export; inputs of size 1e4"""
    source = nn.utils.parametrizations.weight_norm(nn.Linear(16, 5))
    x = 1e4 * randn(50, 16)
    return Sides(source.eval(), exported(source, (x,)), (x,))


@KNOWN.good(torch="right", alarms=True)
def instance_norm_fp16() -> Sides:
    """none: torch's own fp16 InstanceNorm is the worse one, by tens of ulp"""
    source = random_module(nn.InstanceNorm2d(8, affine=True)).half()
    x = (randn(2, 8, 9, 9) + 2).half()
    return Sides(source, exported(source, (x,)), (x,), ALONE)
