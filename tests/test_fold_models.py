"""Fold on small transformers models: what becomes of every norm, by hand, and that it is exact.

Two accounts of each model: `found` by default, and `untied` with `untie=True`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers_zoo import models
from transformers_zoo.row import DECODER, built, image, text_input

import normsurgery as ns
from normsurgery.fold.checks import Check
from normsurgery.fold.edits import Scale
from normsurgery.fold.ground import Choices
from normsurgery.fold.planning import plan_fold
from normsurgery.inputs import as_inputs
from normsurgery.plan import Plan
from normsurgery.precision import float64_copy
from normsurgery.steps import Step
from normsurgery.verify.runners import run_float64, run_native, use_plain_experts

UNTIE = {"untie": True}


@dataclass(frozen=True)
class Account:
    """What becomes of the norms of one model, counted.

    A norm of kind `kind` is, by name: "kind: gone" (nothing is left), "kind: no affine" (weight and
    bias are), "kind: neutral" (a weight of one stays, because other code asks for its dtype),
    "kind: affine" (one multiplication and addition), "kind: baked" (a norm of a weight), or stays,
    under the name of the Check that it fails. untied: with a copy of what is tied, if that differs.
    """

    found: Mapping[str, int]
    untied: Mapping[str, int] | None = None


ACCOUNTS: dict[str, Account] = {
    # --- convolutional networks: every batch norm goes into the convolution or linear before it ---
    "resnet": Account({"batchnorm: gone": 11}),
    "regnet": Account({"batchnorm: gone": 12}),
    "efficientnet": Account({"batchnorm: gone": 10}),
    # 3 of the stem, 3 in each of 16 blocks, 1 on top.
    "mobilenet_v2": Account({"batchnorm: gone": 52}),
    # Two stand in front of a linear with nothing before them that could take them up; in the tokens
    # of the others a flatten and a transpose are in between.
    "levit": Account({"batchnorm: gone": 28}),
    # Every group norm is followed by a ReLU. What the convolutions' weights are standardised by
    # depends on the weights alone.
    "bit": Account({"weightstandardization: baked": 9, "NON_LINEAR": 7}),
    # Of the stem's norm a convolution that pads with zeros is the first reader (the residual is the
    # second). The others stand in front of a linear, an unpadded convolution, or the head.
    "convnext": Account(
        {"layernorm: no affine": 4, "layernorm2d: no affine": 1, "ZERO_PADDING": 1}
    ),
    # --- vision transformers ---
    # The embeddings' norm is followed by the norm of the first block. What is padded up to whole
    # windows is nothing for this image size, and zeros for others.
    "swin": Account({"layernorm: no affine": 5, "NON_LINEAR": 1, "ZERO_PADDING": 3}),
    "vit": Account({"layernorm: no affine": 5}),
    # Dinov2's last norm is read twice by one linear: the first token, and the mean of the others.
    # Each of its two layers scales what attention and MLP give: into the linear before.
    "dinov2": Account({"affine: gone": 4, "layernorm: no affine": 5}),
    # Post-norm: of six layer norms two are added on, two come last and are returned, one is
    # followed by another; the first of the decoder sees learned queries and zeros alone.
    "detr": Account(
        {"batchnorm: gone": 7, "ADDED": 2, "RETURNED": 2, "NON_LINEAR": 1, "ON_WEIGHT": 1}
    ),
    # --- encoders: post-norm, so all but the last and the head's are added on ---
    "bert": Account(
        {"layernorm: no affine": 1, "ADDED": 4, "TIED": 1}, {"layernorm: no affine": 2, "ADDED": 4}
    ),
    "wav2vec2": Account(
        {"weightnorm: baked": 1, "layernorm: no affine": 2, "NON_LINEAR": 1, "ADDED": 4}
    ),
    # The encoder's last is returned; the decoder's last stands before a tied head.
    "t5": Account(
        {"rmsnorm: no affine": 10, "RETURNED": 1, "TIED": 1},
        {"rmsnorm: no affine": 11, "RETURNED": 1},
    ),
    "whisper": Account(
        {"layernorm: no affine": 10, "RETURNED": 1, "TIED": 1},
        {"layernorm: no affine": 11, "RETURNED": 1},
    ),
    # --- decoders: the norms before attention and MLP go into what reads them ---
    "gpt2": Account({"layernorm: no affine": 4, "TIED": 1}, {"layernorm: no affine": 5}),
    "opt": Account({"layernorm: no affine": 4, "TIED": 1}, {"layernorm: no affine": 5}),
    "llama": Account({"rmsnorm: no affine": 5}),
    # Rotary positions mix the channels of normalised queries and keys.
    "qwen3": Account({"rmsnorm: no affine": 5, "ADDED": 4}),
    # The same; and the norms after attention and MLP are added to the stream.
    "gemma3": Account(
        {"rmsnorm: no affine": 4, "ADDED": 8, "TIED": 1}, {"rmsnorm: no affine": 5, "ADDED": 8}
    ),
    # Into the router and all experts.
    "mixtral": Account({"rmsnorm: no affine": 5}),
    "qwen3_moe": Account({"rmsnorm: no affine": 5, "ADDED": 4}),
    # Each block asks its norm's weight for its dtype.
    "mamba": Account(
        {"rmsnorm: neutral": 2, "TIED": 1}, {"rmsnorm: neutral": 2, "rmsnorm: no affine": 1}
    ),
}


@dataclass(frozen=True)
class Folded:
    model: nn.Module
    inputs: dict[str, Tensor]
    folded: nn.Module
    report: Any
    state: dict[str, Tensor]


def own_models() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]]:
    """Models that the table of `find` does not have."""
    backbone = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[12, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    return {
        "regnet": (
            built(
                hf.RegNetForImageClassification,
                hf.RegNetConfig(
                    embedding_size=8, hidden_sizes=[12, 16], depths=[1, 2], groups_width=4
                ),
            ),
            image(),
        ),
        "mobilenet_v2": (
            built(
                hf.MobileNetV2ForImageClassification,
                hf.MobileNetV2Config(depth_multiplier=0.25, min_depth=8, image_size=32),
            ),
            image(),
        ),
        "detr": (
            built(
                hf.DetrForObjectDetection,
                hf.DetrConfig(
                    use_timm_backbone=False,
                    use_pretrained_backbone=False,
                    backbone=None,
                    backbone_config=backbone,
                    d_model=16,
                    encoder_layers=1,
                    decoder_layers=1,
                    encoder_attention_heads=2,
                    decoder_attention_heads=2,
                    encoder_ffn_dim=24,
                    decoder_ffn_dim=24,
                    num_queries=5,
                ),
            ),
            image(64),
        ),
    }


def lively(model: nn.Module) -> nn.Module:
    """Weights of such sizes that what is computed neither dies nor saturates on the way, in place.

    A folded norm in front of a signal that has died could be wrong and nobody would see it.
    """
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            drawn = torch.randn(shape, generator=generator)
            if parameter.dim() > 1:
                fan_in = shape[-1] if "experts" in name else parameter[0].numel()
                gain = 2 if parameter.dim() == 4 else 1  # of a convolution, before a ReLU
                parameter.copy_(drawn * math.sqrt(gain / fan_in))
            elif name.endswith("weight"):
                sizes = 0.7 + 0.6 * torch.rand(shape, generator=generator)
                parameter.copy_(drawn.sign() * sizes)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * drawn)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.mul_(0.3)
    return model


@cache
def builders() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]]:
    zoo = {name: (row.build, row.inputs) for name, row in models().items()}
    every = {**zoo, **own_models()}
    return {
        name: (lambda build=build: lively(build()), inputs)
        for name, (build, inputs) in every.items()
    }


@cache
def folded(name: str) -> Folded:
    build, inputs = builders()[name]
    model, given = build(), inputs()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    made, report = ns.fold(model, inputs=given, **UNTIE)
    return Folded(model, given, made, report, state)


@cache
def planned(name: str) -> Plan:
    """What fold does with the model when nothing is allowed."""
    build, inputs = builders()[name]
    return plan_fold(build(), as_inputs(inputs()))


def account(plan: Plan) -> dict[str, int]:
    return dict(Counter([*map(left, plan.steps), *(check(skip.reason) for skip in plan.skips)]))


def left(step: Step) -> str:
    kind = step.site.kind
    if step.rule == "baked weight":
        return f"{kind}: baked"
    if step.to in ("identity", "affine"):
        return f"{kind}: {'gone' if step.to == 'identity' else 'affine'}"
    assert step.to == kind
    return f"{kind}: {'no affine' if step.options == {'affine': False} else 'neutral'}"


def check(reason: str) -> str:
    """The name of the check that a reason begins with, or the reason."""
    names = [item.name for item in Check if reason.split(": ")[0] == item.value]
    return names[0] if names else reason


def variations(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The inputs, with batches of one and of three, and where there are tokens, with fewer."""
    one = {key: value[:1] for key, value in inputs.items()}
    three = {key: torch.cat([value, value.flip(0)[:1]]) for key, value in inputs.items()}
    shorter = {
        key: value if value.is_floating_point() else value[:, :-2] for key, value in inputs.items()
    }
    return [dict(inputs), one, three, *([shorter] if "input_ids" in inputs else [])]


def relative_error(changed: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    assert changed.keys() == truth.keys()
    errors = [0.0]
    for name, right in truth.items():
        if right.is_floating_point() and right.numel():
            assert torch.equal(changed[name].isfinite(), right.isfinite())
            finite = right.isfinite()
            apart = (changed[name] - right)[finite].abs().max()
            errors.append(float(apart / right[finite].abs().max()))
    return max(errors)


def in_float64(model: nn.Module, plan: Plan, inputs: Any) -> tuple[nn.Module, nn.Module]:
    """The model in float64, and the same with the plan carried out."""
    double = float64_copy(model)
    use_plain_experts(double)
    made, _ = ns.fold(double, plan=plan, inputs=inputs, verify=False)
    return double, made


def run(model: nn.Module, inputs: Any) -> Mapping[str, Tensor]:
    return run_float64(model, as_inputs(inputs), "eval", seed=0).outputs


def some_weight(model: nn.Module, plan: Plan) -> Tensor:
    """The first that is edited, or that is baked."""
    step = plan.steps[0]
    if step.rule == "baked weight":
        return model.get_submodule(step.site.path).weight
    return model.get_parameter(step.edits[0].target)


each_model = pytest.mark.parametrize("name", list(ACCOUNTS))


@each_model
def test_every_norm_is_accounted_for(name: str) -> None:
    assert account(planned(name)) == ACCOUNTS[name].found
    assert account(folded(name).report.plan) == (ACCOUNTS[name].untied or ACCOUNTS[name].found)


@each_model
def test_outputs_are_kept_exactly(name: str) -> None:
    case = folded(name)
    assert case.report.passed
    double, made = in_float64(case.model, case.report.plan, case.inputs)
    for inputs in variations(case.inputs):
        assert relative_error(run(made, inputs), run(double, inputs)) < 1e-12
    with torch.no_grad():  # a fault as small as this in one layer would show
        some_weight(made, case.report.plan).select(-1, 0).mul_(1 + 1e-6)
    assert relative_error(run(made, case.inputs), run(double, case.inputs)) > 1e-9


@each_model
def test_the_largest_logit_is_the_same(name: str) -> None:
    case = folded(name)
    runs = [
        run_native(model, as_inputs(case.inputs), "eval", seed=0).outputs
        for model in (case.model, case.folded)
    ]
    logits = [key for key in runs[0] if key.endswith("logits")]
    assert logits
    for key in logits:
        assert torch.equal(runs[0][key].argmax(-1), runs[1][key].argmax(-1))


@each_model
def test_the_original_is_untouched_and_a_second_fold_finds_nothing(name: str) -> None:
    case = folded(name)
    state = case.model.state_dict()
    assert state.keys() == case.state.keys()
    assert all(torch.equal(state[key], value) for key, value in case.state.items())
    again = plan_fold(case.folded, as_inputs(case.inputs), choices=Choices(**UNTIE))
    assert again.steps == ()


@each_model
def test_other_calls_give_the_same(name: str) -> None:
    """With padded tokens masked; and with all hidden states, where the fold was asked to hold."""
    case = folded(name)
    given = case.inputs
    asked = {"output_hidden_states": True}
    plan = plan_fold(case.model, as_inputs(given), calls=[asked])
    double, made = in_float64(case.model, plan, given)
    calls = [{**given, **asked}]
    if "input_ids" in given:
        mask = torch.ones_like(given["input_ids"])
        mask[1, -2:] = 0
        calls.append({**given, "attention_mask": mask})
    for call in calls:
        assert relative_error(run(made, call), run(double, call)) < 1e-12


# --- norms without weights, ready for rotations ---------------------------------------------------


def norms_left(model: nn.Module, inputs: Any) -> Counter[str]:
    """Kinds of the norms that run, each with the roles of the tensors it has."""
    survey = ns.find(model, inputs)
    return Counter(f"{site.kind} {sorted(site.parameters)}" for site in survey)


def test_gpt2_becomes_rmsnorm_without_weights() -> None:
    build, inputs = builders()["gpt2"]
    model, given = build(), inputs()
    made, report = ns.fold(model, inputs=given, rmsnorm=True, **UNTIE)
    assert report.passed
    assert norms_left(model, given) == {"layernorm ['bias', 'weight']": 5}
    assert norms_left(made, given) == {"rmsnorm []": 5}
    check_exact(model, made, report.plan, given)


@pytest.mark.parametrize("tied", [False, True])
def test_llama_keeps_no_norm_weight(tied: bool) -> None:
    config = hf.LlamaConfig(**DECODER, tie_word_embeddings=tied)
    model, given = built(hf.LlamaForCausalLM, config)(), text_input()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    made, report = ns.fold(model, inputs=given, untie=tied)
    assert report.passed
    assert norms_left(made, given) == {"rmsnorm []": 5}
    assert made.lm_head.weight is not made.model.embed_tokens.weight
    check_exact(model, made, report.plan, given)


def check_exact(model: nn.Module, made: nn.Module, plan: Plan, given: dict[str, Tensor]) -> None:
    double, doubly_made = in_float64(model, plan, given)
    for inputs in variations(given):
        assert relative_error(run(doubly_made, inputs), run(double, inputs)) < 1e-12
        tokens = [
            run_native(m, as_inputs(inputs), "eval", seed=0).outputs["logits"].argmax(-1)
            for m in (model, made)
        ]
        assert torch.equal(*tokens)


# --- on the meta device ---------------------------------------------------------------------------


def test_a_large_model_is_planned_without_its_weights() -> None:
    """Wide as one of 8 billion parameters; no bias, no tie: all lands in what reads the norm."""
    layers = 6
    config = hf.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config).eval()
        given = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    plan = plan_fold(model, as_inputs(given), choices=Choices())
    assert account(plan) == {"rmsnorm: no affine": 2 * layers + 1}
    scaled = Counter(
        edit.target.split(".")[-2] for step in plan.steps for edit in step.edits if edit.axis == 1
    )
    projections = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    assert scaled == {**dict.fromkeys(projections, layers), "lm_head": 1}
    assert all(isinstance(edit, Scale) for step in plan.steps for edit in step.edits)
