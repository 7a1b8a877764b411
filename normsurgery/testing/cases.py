"""What the checks run on: examples, inputs that show faults, and how outputs are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.spec import Example, NormSpec
from normsurgery.verify.judge import Verdict, judge

MODES = (True, False)
LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)
DRAWS = 12  # runs in which a random norm takes each of its paths


def random_input(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """float64, every channel with its own mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 1.7 + 0.6


def hard_inputs(shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """What shows a wrong eps, a biased or one-pass variance, a lost bias."""
    plain = random_input(shape, seed=1)
    yield "random", plain
    yield "tiny variance", plain * 3e-3
    yield "large mean", plain + 1e4  # at 1e3 a one-pass variance is still within 1e-10
    yield "constant", torch.full(shape, 2.5, dtype=torch.float64)
    yield "near zero", plain * 1e-13


def each_case(spec: NormSpec) -> Iterator[tuple[Example, tuple[int, ...]]]:
    for example in spec.examples():
        for shape in example.inputs:
            yield example, shape


def modes(spec: NormSpec) -> tuple[bool, ...]:
    """A random norm draws its path in training, so one run says nothing about the next."""
    return (False,) if spec.random else MODES


def made(example: Example, training: bool) -> nn.Module:
    torch.manual_seed(0)
    return example.module().double().train(training)


def first(spec: NormSpec) -> tuple[nn.Module, tuple[int, ...]]:
    example = spec.examples()[0]
    return made(example, True), example.inputs[0]


def run(module: Callable[..., Any], x: Tensor, **further: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = module(x, **further)
    return y


def judge_with_floor(y: Tensor, expected: Tensor) -> Verdict:
    """Judged against outputs of size 1 at least, since a norm may make zeros of a constant."""
    one = torch.ones(1, dtype=torch.float64)
    return judge(torch.cat([y.flatten(), one]), torch.cat([expected.flatten(), one]))


def is_torch_class(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def require(verdict: Verdict, what: str) -> None:
    if verdict.passed is not True:
        raise AssertionError(f"{what}: {verdict}")


def same(a: Tensor, b: Tensor) -> bool:
    return judge(a, b).passed is True


def by_name(module: nn.Module, dotted: str) -> Any:
    value: Any = module
    for part in dotted.split("."):
        value = getattr(value, part)
    return value
