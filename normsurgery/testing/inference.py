"""Inference forms: one scale and one shift, and the plain module that is left after stripping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normsurgery.spec import NormSpec
from normsurgery.testing.cases import each_case, made, random_input, require, run
from normsurgery.testing.conversions import sources
from normsurgery.testing.invariances import affine_in_eval
from normsurgery.verify.judge import judge


def check_inference_form(spec: NormSpec) -> None:
    """`affine` is what eval computes; where it gives none, eval is no scale and shift."""
    if spec.affine is None:
        assert spec.why_not_affine, f"{spec.name}: neither affine nor why_not_affine"
        return
    applied = 0
    for example, shape in each_case(spec):
        module = made(example, False)
        tensors, settings = spec.values(module)
        parts = spec.affine(tensors, settings)
        if parts is None:
            assert not affine_in_eval(spec, module, shape), (
                f"{spec.name} ({example.label}): affine gives none of what is a scale and a shift"
            )
            continue
        axis = settings["channel_axis"]
        assert all(p is None or p.dtype == torch.float64 for p in parts)
        assert all(p is None or p.shape in ((), (1,), (shape[axis],)) for p in parts)
        scale, shift = parts
        x = random_input(shape)
        scaled = x if scale is None else x * _along(scale, x, axis)
        expected = scaled if shift is None else scaled + _along(shift, x, axis)
        require(judge(run(module, x), expected), f"{spec.name} ({example.label}), affine")
        _require_same_parts(spec, parts, settings, tensors, example.label)
        applied += 1
    assert applied, f"{spec.name}: affine gives none for any example"


def _require_same_parts(
    spec: NormSpec, parts: Any, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], of: str
) -> None:
    """Which parts there are is learnt from vectors of ones, before there are any values."""
    assert spec.affine is not None
    features = int(settings.get("features") or 1)
    ones = {role: torch.ones(features, dtype=torch.float64) for role in tensors}
    probed = spec.affine(ones, settings)
    there = None if probed is None else [part is not None for part in probed]
    assert there == [part is not None for part in parts], (
        f"{spec.name} ({of}): of vectors of ones `affine` gives other parts"
    )


def check_strip(spec: NormSpec) -> None:
    """What is left after stripping computes the same bits in eval."""
    assert spec.strip is not None
    for source, x in sources(spec, ""):
        conversion = spec.conversion(source.kind)
        assert conversion is not None
        module = conversion.build(source).eval()
        stripped = spec.strip(module).eval()
        same = torch.equal(run(stripped, x), run(module, x))
        assert same, f"{spec.name} of {source.where}: stripping changes outputs"


def _along(vector: Tensor, x: Tensor, axis: int) -> Tensor:
    shape = [1] * x.dim()
    shape[axis] = math.prod(vector.shape)
    return vector.reshape(shape)
