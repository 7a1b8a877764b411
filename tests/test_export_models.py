"""Export and verification of twelve architectures, with dynamic axes, in float32 and in half.

What each file must hold is a table of literals, counted by hand from the models' sources; that it
runs at other sizes, and is right there, is measured here with onnxruntime alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers_zoo import models

import normsurgery as ns
from normsurgery.inputs import as_inputs
from normsurgery.report import Report
from normsurgery.verifying.judge import judge
from normsurgery.verifying.runners import run_float64, run_native

Axes = Mapping[str, Mapping[int, str]]

IMAGE: Axes = {"pixel_values": {0: "batch"}}
TEXT: Axes = {"input_ids": {0: "batch", 1: "sequence"}}
PAIR: Axes = {**TEXT, "decoder_input_ids": {0: "batch", 1: "target"}}
SOUND: Axes = {"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "target"}}
# The recurrence of Mamba is a Python loop over the sequence: one trace is one length.
ONE_LENGTH: Axes = {"input_ids": {0: "batch"}}
TOGETHER = 3  # any other batch size than the example's two
SIZES = {"batch": TOGETHER, "sequence": 11, "target": 4}


@dataclass(frozen=True)
class Expected:
    """What the file of one model must hold.

    norms: kind -> how many run. folded: operators of the float32 file after the default fold, at
    the chosen opset. half: operators of the fp16 file without one, at the chosen opset.
    """

    axes: Axes
    norms: Mapping[str, int]
    opset: int
    folded: Mapping[str, int]
    half_opset: int
    half: Mapping[str, int] = field(default_factory=dict)


EXPECTED = {
    # Folded into the convolutions; in half, without a fold, the eleven are there.
    "resnet": Expected(IMAGE, {"batchnorm": 11}, 20, {}, 20, {"BatchNormalization": 11}),
    # The two that normalise maps are LayerNormalization between two Transposes.
    "convnext": Expected(
        IMAGE,
        {"layernorm": 4, "layernorm2d": 2},
        20,
        {"LayerNormalization": 6},
        20,
        {"LayerNormalization": 6},
    ),
    "swin": Expected(
        IMAGE, {"layernorm": 9}, 20, {"LayerNormalization": 9}, 20, {"LayerNormalization": 9}
    ),
    "vit": Expected(
        IMAGE, {"layernorm": 5}, 20, {"LayerNormalization": 5}, 20, {"LayerNormalization": 5}
    ),
    "bert": Expected(
        TEXT, {"layernorm": 6}, 20, {"LayerNormalization": 6}, 20, {"LayerNormalization": 6}
    ),
    "gpt2": Expected(
        TEXT, {"layernorm": 5}, 20, {"LayerNormalization": 5}, 20, {"LayerNormalization": 5}
    ),
    # In half precision these cast before they scale, which no one operator does.
    "llama": Expected(TEXT, {"rmsnorm": 5}, 23, {"RMSNormalization": 5}, 20),
    "qwen3": Expected(TEXT, {"rmsnorm": 9}, 23, {"RMSNormalization": 9}, 20),
    # Gemma scales before it casts, and that is one operator in half precision too.
    "gemma3": Expected(
        TEXT, {"rmsnorm": 13}, 23, {"RMSNormalization": 13}, 23, {"RMSNormalization": 13}
    ),
    "t5": Expected(PAIR, {"rmsnorm": 12}, 23, {"RMSNormalization": 12}, 20),
    "whisper": Expected(
        SOUND, {"layernorm": 12}, 20, {"LayerNormalization": 12}, 20, {"LayerNormalization": 12}
    ),
    "mamba": Expected(ONE_LENGTH, {"rmsnorm": 3}, 23, {"RMSNormalization": 3}, 20),
}


def exported(name: str, path: Path, **options: Any) -> tuple[nn.Module, Report]:
    row, expected = models()[name], EXPECTED[name]
    model = row.build()
    return model, ns.export(model, path, row.inputs(), dynamic=expected.axes, **options)


def norm_operators(path: Path) -> dict[str, int]:
    """Counted here, in the file."""
    counts = Counter(node.op_type for node in onnx.load(path).graph.node)
    return {name: count for name, count in counts.items() if name.endswith("Normalization")}


def require_whole(name: str, report: Report, folded_away: bool) -> None:
    """Every norm, every eps, nearly every value."""
    expected, facts, evidence = EXPECTED[name], report.onnx, report.evidence
    assert facts is not None and evidence is not None and evidence.coverage is not None
    kinds = Counter(norm.kind for norm in facts.norms)
    assert kinds == ({} if folded_away else expected.norms)
    assert [fact for fact in facts.eps if not fact.found] == []
    assert len(facts.eps) == sum(kinds.values())
    assert evidence.coverage.share >= 0.9, evidence.coverage
    assert {stage.name for stage in evidence.stages} >= {
        "exported program",
        "raw graph",
        "optimised graph",
        "onnxruntime all",
    }
    axes = {text for axis in expected.axes.values() for text in axis.values()}
    written = {part for text in facts.inputs.values() for part in axes if part in text}
    assert written == axes, facts.inputs


def other_sizes(name: str) -> dict[str, Tensor]:
    """Random inputs with every dynamic axis of another size than the example's."""
    generator = torch.Generator().manual_seed(9)
    made = {}
    for key, value in models()[name].inputs().items():
        axes = EXPECTED[name].axes[key]
        shape = [SIZES[axes[i]] if i in axes else size for i, size in enumerate(value.shape)]
        if value.is_floating_point():
            made[key] = torch.randn(shape, generator=generator)
        else:
            made[key] = torch.randint(3, 90, shape, generator=generator)
    return made


def require_right_at_other_sizes(name: str, model: nn.Module, path: Path) -> None:
    """onnxruntime's outputs at other sizes, judged against the model in float64."""
    given = other_sizes(name)
    dtype = next(model.parameters()).dtype
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {key: value.numpy() for key, value in given.items()})
    truth = run_float64(model, as_inputs(given), "eval", seed=0).outputs
    native = run_native(model, as_inputs(given), "eval", seed=0).outputs
    assert set(names) == set(truth)
    for output, value in zip(names, found, strict=True):
        verdict = judge(torch.from_numpy(value), truth[output], native[output])
        assert verdict.passed or (dtype == torch.float16 and verdict.passed is None), (
            f"{output}: {verdict}"
        )


@pytest.mark.parametrize("name", EXPECTED)
def test_a_model_is_exported_and_proven_in_float32(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model, report = exported(name, path)
    assert report.evidence is not None
    assert report.passed, report.evidence.failures
    assert report.exit_code == 0
    expected = EXPECTED[name]
    require_whole(name, report, folded_away=not expected.folded)
    assert report.onnx is not None and report.onnx.opset == expected.opset
    assert norm_operators(path) == dict(report.onnx.operators) == dict(expected.folded)
    require_right_at_other_sizes(name, model, path)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_model_is_exported_and_proven_in_half(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model, report = exported(name, path, dtype="fp16", fold=False)
    assert report.evidence is not None
    assert report.passed, report.evidence.failures
    require_whole(name, report, folded_away=False)
    expected = EXPECTED[name]
    assert report.onnx is not None and report.onnx.opset == expected.half_opset
    assert report.onnx.dtype == "float16"
    assert norm_operators(path) == dict(report.onnx.operators) == dict(expected.half)
    require_right_at_other_sizes(name, model.half(), path)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_model_that_is_half_throughout_is_proven(name: str, tmp_path: Path) -> None:
    """Constants are rounded where a float32 value is made of them; T5 clamps to fp16's range."""
    model, inputs = models()[name].build().half(), models()[name].inputs()
    path = tmp_path / "model.onnx"
    ns.export(model, path, inputs, dynamic=EXPECTED[name].axes, fold=False, verify=False)
    evidence = ns.verify(model, path, inputs)
    assert evidence.passed, evidence.failures


def test_batch_norm_that_is_not_folded_stays(tmp_path: Path) -> None:
    """torch's own exporter folds it whether asked or not, and its eps is gone."""
    path = tmp_path / "model.onnx"
    _, report = exported("resnet", path, fold=False, verify=False)
    assert norm_operators(path) == {"BatchNormalization": 11}
    assert report.onnx is not None
    assert [fact.eps for fact in report.onnx.eps if fact.found] == [1e-5] * 11


def test_the_length_of_mambas_sequence_is_refused_in_one_sentence(tmp_path: Path) -> None:
    row = models()["mamba"]
    with pytest.raises(ns.NormsurgeryError, match="sequence") as refusal:
        ns.export(row.build(), tmp_path / "model.onnx", row.inputs(), dynamic=TEXT)
    assert refusal.value.exit_code == 3
    assert "7" in str(refusal.value) and "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []
