"""Evidence and reports made by hand, with every sort of thing in them that a report can show."""

from __future__ import annotations

import math
from typing import Any

import torch

from normsurgery.exporting.facts import Canonical, EpsFact, OnnxFacts
from normsurgery.plans import Plan
from normsurgery.report import Report
from normsurgery.rewriting.keymap import KeyMap
from normsurgery.verifying.evidence import Comparison, Drift, Evidence, LeftOut
from normsurgery.verifying.judge import Verdict, judge
from normsurgery.verifying.stages import Blame, Coverage, InnerValue, Stage

OPERATORS = ("MatMul", "Add", "LayerNormalization", "Gelu", "MatMul", "Add", "Softmax", "Reshape")
MODULES = {"LayerNormalization": "norm1", "MatMul": "mlp.fc1", "Gelu": "mlp.act"}
CASES = ("example", "random", "large mean 1000", "tiny variance", "zeros", "batch 7")
STAGES = ("exported program", "raw graph", "optimised graph", "onnxruntime all")
SOURCE = "modeling_vit.py:123 in forward: x = self.norm1(x) if n < 3 else x"
COUNT = 64  # values inside
FIRST_BAD, NOT_FINITE, OPEN = 40, 50, 20


class Verdicts:
    """Verdicts of judge() on random tensors; float32 results, and native torch 1e-7 off."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def off_by(self, error: float, native: float = 1e-7) -> Verdict:
        truth = self._drawn()
        found = (truth + error * self._drawn()).float()
        return judge(found, truth, (truth + native * self._drawn()).float())

    def exact(self) -> Verdict:
        values = self._drawn().float()
        return judge(values, values.double(), values)

    def not_finite(self) -> Verdict:
        truth = self._drawn()
        found = truth.float()
        found[1, 2] = math.nan
        return judge(found, truth, truth.float())

    def _drawn(self) -> torch.Tensor:
        return torch.randn(4, 8, generator=self.generator, dtype=torch.float64)


def evidence(*, bad: bool, **changed: Any) -> Evidence:
    """Evidence of an export that went well, or of one in which everything went wrong."""
    verdicts = Verdicts()
    made: dict[str, Any] = {
        "seed": 7,
        "comparisons": _comparisons(verdicts, bad),
        "left_out": (LeftOut("not run", "", "cuda", "", "this machine has no CUDA device"),),
        "inputs": "--input 2x3x224x224",
        "stages": _stages(verdicts, bad),
        "inner": tuple(_inner(verdicts, index, bad) for index in range(COUNT)),
        "coverage": Coverage(COUNT + 2, COUNT, COUNT - COUNT // len(OPERATORS)),
        "blamed": blame(verdicts) if bad else None,
        "notes": ("float16 on this provider is computed in float32",),
    }
    return Evidence(**{**made, **changed})


def _comparisons(verdicts: Verdicts, bad: bool) -> tuple[Comparison, ...]:
    def error(case: str) -> float:
        return 1e-3 if bad and case == "tiny variance" else 1e-7

    names = ("output last_hidden_state", "output pooler_output")
    return tuple(
        Comparison(case, "cpu", "eval", "plain", name, verdicts.off_by(error(case)))
        for case in CASES
        for name in names
    )


def _stages(verdicts: Verdicts, bad: bool) -> tuple[Stage, ...]:
    written, fused = {"LayerNormalization": 8}, {"SkipLayerNormalization": 8}
    return tuple(
        Stage(
            name,
            "cpu",
            verdicts.off_by(1e-4 if bad and number > 1 else 1e-7),
            fused if name.endswith("all") else written,
            400 - 40 * number,
        )
        for number, name in enumerate(STAGES)
    )


def _inner(verdicts: Verdicts, index: int, bad: bool) -> InnerValue:
    operator = OPERATORS[index % len(OPERATORS)]
    layer = index * 4 // COUNT
    return InnerValue(
        value=f"val_{index}",
        node=f"node_{index}",
        operator=operator,
        module=f"vit.layers.{layer}.{MODULES.get(operator, 'attention')}",
        source=SOURCE,
        against="graph" if operator == "Reshape" else "source",
        verdict=_inner_verdict(verdicts, index, operator, bad),
        total_ulps=0.1 * (index + 1) * (300 if bad and index >= FIRST_BAD else 1),
    )


def _inner_verdict(verdicts: Verdicts, index: int, operator: str, bad: bool) -> Verdict:
    if bad and index == NOT_FINITE:
        return verdicts.not_finite()
    if bad and index >= FIRST_BAD:
        return verdicts.off_by(1e-4)
    if index == OPEN:
        return verdicts.off_by(1e-7, native=1e-2)
    return verdicts.exact() if operator == "Reshape" else verdicts.off_by(5e-8)


def blame(verdicts: Verdicts) -> Blame:
    return Blame(
        kind="graph",
        node=f"node_{FIRST_BAD}",
        operator="Sqrt",
        value=f"val_{FIRST_BAD}",
        fx_node="rsqrt_3",
        module="vit.layers.2.norm1",
        source=SOURCE,
        verdict=verdicts.off_by(1e-4),
        inherited=3e-8,
        case="tiny variance",
        detail="epsilon 1e-06, the source has 1e-05",
    )


def facts(**changed: Any) -> OnnxFacts:
    sites = [f"vit.layers.{layer}.norm1" for layer in range(4)]
    norms = [Canonical(site, "layernorm", "LayerNormalization") for site in sites]
    made: dict[str, Any] = {
        "path": "model.onnx",
        "opset": 20,
        "opset_reason": "GroupNormalization of opset 21 has no kernel in onnxruntime",
        "dtype": "float32",
        "nodes": 400,
        "bytes": 1_234_567,
        "inputs": {"pixel_values": "float32[batch, 3, 224, 224]"},
        "outputs": {"last_hidden_state": "float32[batch, 197, 768]"},
        "operators": {"LayerNormalization": 8},
        "switched": ("vit.dropout", "vit.norm"),
        "norms": (*norms, Canonical("stem.norm", "groupnorm", "", "it is unsafe as one operator")),
        "eps": tuple(EpsFact(site, 1e-5, f"node_of_{site}") for site in sites),
    }
    return OnnxFacts(**{**made, **changed})


def report(*, bad: bool = False, **changed: Any) -> Report:
    plan = Plan("ViTModel", ())
    made: dict[str, Any] = {
        "verb": "export",
        "plan": plan,
        "keymap": KeyMap(plan),
        "evidence": evidence(bad=bad),
        "versions": {"torch": "2.13.0", "onnx": "1.23.2"},
        "onnx": facts(),
    }
    return Report(**{**made, **changed})


def drifting() -> Evidence:
    """What a swap that changes outputs measures."""
    return Evidence(0, drifts=(Drift("example", "output logits", 0.25, 0.97),), promise="RETRAIN")
