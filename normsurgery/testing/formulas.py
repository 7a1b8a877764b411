"""The numbers: the module against its float64 formula, in every precision, and its gradients."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
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
                module, further = made(example, training), example.named(x)
                expected = spec.reference(module, x, **further)
                y = run(module, x, **further)
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
            if spec.gradient is not None:
                moved = max(moved, _gradient_movement(example, name, x))
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


def _gradient_movement(example: Example, name: str, x: Tensor) -> float:
    """Of a tensor that backward alone reads."""
    gradients = []
    for factor in (1.0, 1.01):
        module, given = made(example, True), x.clone().requires_grad_()
        by_name(module, name).data.mul_(factor)
        torch.autograd.backward(module(given).square().sum())
        assert given.grad is not None
        gradients.append(given.grad)
    before, after = gradients
    return float((after - before).abs().max() / before.abs().max())


def check_low_precision(spec: NormSpec) -> None:
    """In float32, bfloat16 and float16: as near the truth as plain torch is by the formula."""
    for example, shape in each_case(spec):
        for dtype in LOW_PRECISION:
            for training in modes(spec):
                module = made(example, training).to(dtype)
                x = random_input(shape).to(dtype)
                further = example.named(x)
                expected = spec.reference(module, x, **further)
                native = _native(spec, module, x, further)
                y = run(module, x, **further)
                verdict = judge(y, expected)
                if verdict.passed is not True:
                    verdict = judge(y, expected, native)
                require(verdict, f"{spec.name} ({example.label}, {dtype}, training={training})")


def _native(spec: NormSpec, module: nn.Module, x: Tensor, further: Mapping[str, Tensor]) -> Tensor:
    """What torch computes in the type of `x`: its own class, else the formula op by op."""
    if is_torch_class(module):
        return run(copy.deepcopy(module), x)
    reading = spec.read(module)
    tensors = {role: by_name(module, name).detach() for role, name in reading.tensors.items()}
    settings = reading.settings
    return spec.formula(x, tensors, settings, module.training, **further).to(x.dtype)


def check_gradients(spec: NormSpec) -> None:
    """Analytic gradients equal numeric ones, for the input and (of norms) every parameter."""
    for example in spec.examples():
        for training in modes(spec):
            module = made(example, training)
            x = random_input(example.inputs[0]).requires_grad_()
            learned = dict(module.named_parameters()) if spec.attach == "norm" else {}
            further = dict(example.named(x.detach()))
            if spec.gradient is not None:
                _require_own_gradient(spec, module, x, f"{example.label}, training={training}")
                continue

            def forward(
                x: Tensor,
                *values: Tensor,
                module: nn.Module = module,
                names: Any = tuple(learned),
                further: Any = further,
            ) -> Tensor:
                given = dict(zip(names, values, strict=False))
                named = dict(zip(further, values[len(given) :], strict=True))
                return torch.func.functional_call(module, given, (x,), named)  # type: ignore[no-any-return]

            others = (tensor.requires_grad_() for tensor in further.values())
            torch.autograd.gradcheck(forward, (x, *learned.values(), *others), fast_mode=True)


def _require_own_gradient(spec: NormSpec, module: nn.Module, x: Tensor, which: str) -> None:
    """What backward gives is what the norm's own float64 reference of it says."""
    assert spec.gradient is not None
    tensors, settings = spec.values(module)
    roles = {name: role for role, name in spec.read(module).tensors.items()}
    tensors = {role: tensor.clone() for role, tensor in tensors.items()}
    y = module(x)
    g = random_input(tuple(y.shape), seed=4)
    expected = spec.gradient(x.detach(), g, tensors, settings, module.training)
    torch.autograd.backward((y * g).sum())
    found = {roles[name]: p.grad for name, p in module.named_parameters()} | {"input": x.grad}
    assert set(found) == set(expected), f"{spec.name}: gradients of {set(expected)} are declared"
    for role, gradient in found.items():
        assert gradient is not None, f"{spec.name} ({which}): {role} has no gradient"
        require(judge(gradient, expected[role]), f"{spec.name} ({which}), gradient of {role}")


def check_update(spec: NormSpec) -> None:
    """A call in training moves the state as the norm says, twice; one in eval leaves it."""
    assert spec.update is not None
    for example in spec.examples():
        module = made(example, True)
        names = spec.read(module).tensors
        for seed in (1, 2):
            x = random_input(example.inputs[0], seed)
            tensors, settings = spec.values(module)
            expected = spec.update(x, {r: t.clone() for r, t in tensors.items()}, settings)
            run(module, x)
            assert expected, f"{spec.name}: its update names no state"
            for role, value in expected.items():
                found = by_name(module, names[role])
                require(judge(found, value), f"{spec.name} ({example.label}), state {role}")
        before = copy.deepcopy(module.eval().state_dict())
        run(module, random_input(example.inputs[0], 3))
        kept = all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert kept, f"{spec.name} ({example.label}): a call in eval moves its state"


def check_further_inputs(spec: NormSpec) -> None:
    """Each further input moves the output, so that one that is ignored cannot pass."""
    given = [example for example in spec.examples() if example.further is not None]
    assert given, f"{spec.name}: no example gives {', '.join(spec.inputs)}"
    for example in given:
        module, x = made(example, False), random_input(example.inputs[0])
        further = dict(example.named(x))
        y = run(module, x, **further)
        for name, tensor in further.items():
            moved = run(module, x, **{**further, name: tensor * 1.01})
            change = float((moved - y).abs().max() / y.abs().max())
            assert change >= VISIBLE, f"{spec.name} ({example.label}): {name} changes nothing"
