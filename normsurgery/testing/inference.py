"""Inference forms: one scale and one shift, and the plain module that is left after stripping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normsurgery.errors import CannotConvert
from normsurgery.spec import NormSpec
from normsurgery.testing.cases import each_case, made, random_input, require, run
from normsurgery.testing.conversions import sources
from normsurgery.testing.invariances import affine_in_eval
from normsurgery.verify.judge import judge


def check_inference_form(spec: NormSpec) -> None:
    """`as_affine` is what eval computes; where it refuses, eval is no scale and shift."""
    if spec.as_affine is None:
        assert spec.why_not_affine, f"{spec.name}: neither as_affine nor why_not_affine"
        return
    applied = 0
    for example, shape in each_case(spec):
        module = made(example, False)
        try:
            scale, shift = spec.as_affine(module)
        except CannotConvert:
            assert not affine_in_eval(spec, module, shape), (
                f"{spec.name} ({example.label}): as_affine refuses what is a scale and a shift"
            )
            continue
        axis = spec.read(module).settings["channel_axis"]
        x = random_input(shape)
        expected = x * _along(scale, x, axis) + _along(shift, x, axis)
        assert scale.dtype == shift.dtype == torch.float64
        assert scale.shape == shift.shape == (shape[axis],)
        require(judge(run(module, x), expected), f"{spec.name} ({example.label}), as_affine")
        applied += 1
    assert applied, f"{spec.name}: as_affine refuses every example"


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
