"""The float64 run of whole exports against the module's own, at every level of rewriting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_onnx_float64 import against_torch, exported
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetModel,
)

from normsurgery.inputs import Inputs
from normsurgery.onnxfile.feeding import feeds
from normsurgery.onnxfile.float64 import Float64Graph
from normsurgery.onnxfile.reading import floating_values, of_proto
from normsurgery.onnxfile.sessions import Session, optimised
from normsurgery.verifying.judge import judge

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False))


def bert() -> nn.Module:
    return BertModel(BertConfig(**SIZES))


def gpt2() -> nn.Module:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, use_cache=False)
    return GPT2LMHeadModel(config)


def resnet() -> nn.Module:
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2]))


def example(make: Callable[[], nn.Module]) -> Inputs:
    if make is resnet:
        return Inputs((), {"pixel_values": torch.randn(2, 3, 32, 32)})
    return Inputs((), {"input_ids": torch.randint(0, 50, (2, 8))})


@pytest.mark.parametrize(
    ("make", "opset", "optimize"),
    [(llama, 23, True), (bert, 20, True), (gpt2, 24, True), (resnet, 18, False)],
)
def test_an_export_in_float64_is_the_module_in_float64(
    make: Callable[[], nn.Module], opset: int, optimize: bool
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data.copy_(torch.rand_like(parameter) + 0.5)
    inputs = example(make)
    proto = exported(model, inputs, opset, optimize=optimize)
    verdicts = against_torch(proto, model, inputs, torch.float32)
    assert verdicts and all(verdict.passed for verdict in verdicts.values())

    file = of_proto(proto)
    fed = feeds(file, inputs)
    graph = Float64Graph(file)
    truth = graph.run(fed, "all")
    names = floating_values(proto)
    assert set(names) <= set(truth)
    found = Session(file, level="off", also=names).run(fed)
    assert all(found[name].shape == truth[name].shape for name in names)

    rewritten = Float64Graph(optimised(proto, "extended")).run(fed)
    for name, value in graph.run(fed).items():
        assert judge(rewritten[name], value, precision=torch.float32).passed
