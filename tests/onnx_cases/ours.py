"""What `ns.export` writes where torch's exporter writes something wrong, and what it refuses."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from onnx_cases.case import Cases, Sides
from onnx_cases.good import conv_net
from onnx_cases.known import conv_bn, group_norm, mixed, offset, rms
from onnx_cases.modules import (
    BatchOnly,
    ConvNet,
    Formula,
    GemmaRMSNorm,
    HandLayerNorm,
    LanguageModel,
    LlamaRMSNorm,
    RankUpRMSNorm,
    randn,
    random_module,
)

OURS = Cases()
BATCH = {"dynamic": {0: "batch"}}


def ours(source: nn.Module, *inputs: Tensor, **export: object) -> Sides:
    return Sides(source, None, inputs, export={**BATCH, **export})


@OURS.good()
def ours_rms_eps1e_08() -> Sides:
    """none: eps 1e-8, which torch's exporter deletes at its default opset"""
    return ours(rms(1e-8), torch.zeros(4, 6, 16))


@OURS.good()
def ours_rms_eps1e_12_op18() -> Sides:
    """none: eps 1e-12 at an opset that has no RMSNormalization"""
    return ours(rms(1e-12), randn(4, 6, 16), opset=18)


@OURS.good()
def ours_ln_manual_eps1e_12() -> Sides:
    """none: hand-written LayerNorm with BERT's eps"""
    return ours(random_module(HandLayerNorm(16, 1e-12)), torch.full((4, 6, 16), 3.0))


@OURS.good(alarms=False)
def ours_gn_off10000() -> Sides:
    """none: GroupNorm on a mean of 1e4, at the opset that is chosen"""
    return ours(group_norm(), offset(1e4))


@OURS.good()
def ours_gn_op21() -> Sides:
    """none: GroupNorm at opset 21, where the runtime's own form is one-pass"""
    return ours(group_norm(), offset(1000), opset=21)


@OURS.good()
def ours_gn_const_op23() -> Sides:
    """none: GroupNorm of a constant at opset 23"""
    return ours(group_norm(), torch.full((3, 8, 24, 24), 3.7), opset=23)


@OURS.good()
def ours_gemma_fp16_op23() -> Sides:
    """none: Gemma's RMSNorm in fp16 at opset 23, where torch's exporter writes an invalid graph"""
    return ours(random_module(GemmaRMSNorm(16)).half(), randn(4, 6, 16).half(), opset=23)


@OURS.good()
def ours_rms_scale_rank_up() -> Sides:
    """none: a scale with a dimension more than the input, at opset 23"""
    return ours(random_module(RankUpRMSNorm(16)), randn(4, 6, 16), opset=23)


@OURS.good()
def ours_one_kept() -> Sides:
    """none: a multiplication by 1.000009 is not one by 1"""
    return ours(Formula(lambda s, x: x * 1.000009), randn(4, 16))


@OURS.good()
def ours_bn_train() -> Sides:
    """none: a forgotten .eval() is made up for, and said"""
    source = conv_bn()
    source.train()
    return ours(source, randn(4, 3, 6, 6))


@OURS.good()
def ours_bn_mixed_mode() -> Sides:
    """none: the one norm that was left in train mode is switched, and said"""
    return ours(mixed(), randn(4, 3, 6, 6))


@OURS.good()
def ours_dropout_train() -> Sides:
    """none: a forgotten .eval() leaves no live Dropout"""
    source = random_module(nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 5)))
    source.train()
    return ours(source, randn(4, 16))


@OURS.good()
def ours_conv_net() -> Sides:
    """none: convolutions, BatchNorm, GroupNorm, dynamic batch, folded first"""
    return ours(random_module(ConvNet()), randn(3, 3, 8, 8))


@OURS.good()
def ours_llama_fp16() -> Sides:
    """none: an fp32 language model written in fp16"""
    ids = torch.arange(24).view(4, 6) % 11
    return ours(random_module(LanguageModel(LlamaRMSNorm)), ids, dtype=torch.float16)


@OURS.good()
def ours_dynamic_sequence() -> Sides:
    """none: batch and sequence are dynamic"""
    ids = torch.arange(24).view(4, 6) % 11
    axes = {"ids": {0: "batch", 1: "sequence"}}
    return ours(random_module(LanguageModel()), ids, dynamic=axes)


@OURS.bad("batch|train|statistics", "refused")
def ours_bn_always_batch() -> Sides:
    """batch statistics hard-coded in the forward: refused unless asked for"""
    return ours(BatchOnly(8), randn(4, 8, 5, 5))


@OURS.bad("statistics|batch", "refused")
def ours_bn_nostats() -> Sides:
    """BatchNorm without running statistics: refused unless asked for"""
    return ours(nn.BatchNorm2d(8, track_running_stats=False).eval(), randn(4, 8, 5, 5))


@OURS.bad("random", "refused")
def ours_live_noise() -> Sides:
    """a random draw in the graph: refused"""
    return ours(Formula(lambda s, x: x + torch.randn_like(x)), randn(4, 16))


@OURS.bad("random|seed|differ|output", "fail or refused")
def ours_frozen_noise() -> Sides:
    """a random draw of Python's, frozen by the tracer"""
    return ours(Formula(lambda s, x: x * (1 + 0.3 * random.random())), randn(4, 16))


@OURS.bad("bf16|bfloat16", "refused")
def ours_conv_bf16_op18() -> Sides:
    """Conv takes bf16 only from opset 22"""
    source = random_module(nn.Conv2d(8, 8, 3)).bfloat16()
    return ours(source, randn(3, 8, 5, 5).bfloat16(), opset=18)


@OURS.bad("inf|overflow|65504|finite|output", "fail or refused")
def ours_bn_half_var() -> Sides:
    """a running variance above 65504, written in fp16"""
    master = random_module(nn.BatchNorm2d(8))
    master.get_buffer("running_var")[2] = 1e5
    return ours(master, 300 * randn(4, 8, 5, 5), dtype=torch.float16)


@OURS.good()
def ours_optimised_file() -> Sides:
    """none: torch's own file of the same model, held against it through the same door"""
    source, file = conv_net()
    return Sides(source, file, (randn(3, 3, 8, 8),))
