"""The numbers: the module against its float64 formula, in every precision, and its gradients."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.spec import Example, NormSpec
from normsurgery.testing.cases import (
    DRAWS,
    LOW_PRECISION,
    MODES,
    by_name,
    each_case,
    hard_inputs,
    is_torch_class,
    judge_with_floor,
    made,
    modes,
    random_input,
    require,
    run,
)
from normsurgery.verify.judge import judge

VISIBLE = 1e-8  # a hundred times what float64 comparisons forgive: less is a neutral parameter


def check_reading(spec: NormSpec) -> None:
    """What is read of a module is JSON, and names tensors it has."""
    for example in spec.examples():
        module = made(example, True)
        reading = spec.read(module)
        json.dumps(dict(reading.settings), allow_nan=False)
        missing = {"eps"} - set(reading.settings) if spec.attach == "norm" else set()
        assert not missing, f"{spec.name} ({example.label}): settings lack {missing}"
        for role, name in reading.tensors.items():
            value = by_name(module, name)
            assert isinstance(value, Tensor), f"{spec.name}: {role} is {type(value).__name__}"


def check_formula(spec: NormSpec) -> None:
    """The module equals its formula in float64, in both modes, on hard inputs."""
    compared = 0
    for example, shape in each_case(spec):
        for training in modes(spec):
            for label, x in hard_inputs(shape):
                module = made(example, training)
                expected = spec.reference(module, x)
                y = run(module, x)
                verdict = (
                    judge_with_floor(y, expected) if label == "constant" else judge(y, expected)
                )
                where = f"{spec.name} ({example.label}, {label}, training={training})"
                require(verdict, where)
                compared += verdict.compared
    assert compared, f"{spec.name}: no example was compared"


def check_nothing_neutral(spec: NormSpec) -> None:
    """One percent of any tensor moves the output, so a norm that ignores it cannot pass."""
    for example in spec.examples():
        x = random_input(example.inputs[0])
        for role, name in spec.read(made(example, False)).tensors.items():
            moved = max(_movement(spec, example, name, x, training) for training in MODES)
            assert moved >= VISIBLE or _is_counter(made(example, False), name), (
                f"{spec.name} ({example.label}): {role} off by 1% moves the output by {moved:.3g} "
                f"of its size, less than {VISIBLE:.0e}"
            )


def _is_counter(module: nn.Module, name: str) -> bool:
    return not by_name(module, name).is_floating_point()


def _movement(spec: NormSpec, example: Example, name: str, x: Tensor, training: bool) -> float:
    draws = DRAWS if spec.random else 1
    module, moved = made(example, training), made(example, training)
    tensor = by_name(moved, name)
    if tensor.is_floating_point():
        tensor.data.mul_(1.01)
    before = torch.stack([run(module, x) for _ in range(draws)])
    after = torch.stack([run(moved, x) for _ in range(draws)])
    return float((after - before).abs().max() / before.abs().max())


def check_low_precision(spec: NormSpec) -> None:
    """In float32, bfloat16 and float16: as near the truth as plain torch is by the formula."""
    for example, shape in each_case(spec):
        for dtype in LOW_PRECISION:
            for training in modes(spec):
                module = made(example, training).to(dtype)
                x = random_input(shape).to(dtype)
                expected = spec.reference(module, x)
                native = _native(spec, module, x)
                y = run(module, x)
                verdict = judge(y, expected)
                if verdict.passed is not True:
                    verdict = judge(y, expected, native)
                require(verdict, f"{spec.name} ({example.label}, {dtype}, training={training})")


def _native(spec: NormSpec, module: nn.Module, x: Tensor) -> Tensor:
    """What torch computes in the type of `x`: its own class, else the formula op by op."""
    if is_torch_class(module):
        return run(copy.deepcopy(module), x)
    reading = spec.read(module)
    tensors = {role: by_name(module, name).detach() for role, name in reading.tensors.items()}
    return spec.formula(x, tensors, reading.settings, module.training).to(x.dtype)


def check_gradients(spec: NormSpec) -> None:
    """Analytic gradients equal numeric ones, for the input and (of norms) every parameter."""
    for example in spec.examples():
        for training in modes(spec):
            module = made(example, training)
            x = random_input(example.inputs[0]).requires_grad_()
            learned = dict(module.named_parameters()) if spec.attach == "norm" else {}

            def forward(
                x: Tensor, *values: Tensor, module: nn.Module = module, names: Any = tuple(learned)
            ) -> Tensor:
                given = dict(zip(names, values, strict=True))
                return torch.func.functional_call(module, given, (x,))  # type: ignore[no-any-return]

            torch.autograd.gradcheck(forward, (x, *learned.values()), fast_mode=True)
