"""What verify must see beside a mask's fill, and what it must not blame: limits of a type, ties."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.verifying.judge import judge
from normsurgery.verifying.shaking import shaken

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.arange(8) % 4 == 0
LEAST = torch.finfo(torch.float32).min


class Masked(nn.Module):
    """x * factor + added, with `fill` where it is hidden."""

    def __init__(self, fill: float, factor: float = 1.0, added: float = 0.0) -> None:
        super().__init__()
        self.fill, self.factor, self.added = fill, factor, added

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.factor + self.added).masked_fill(HIDDEN, self.fill)


@pytest.mark.parametrize("fill", [LEAST, -1e9, -torch.inf])
def test_a_fill_is_no_scale_for_what_is_beside_it(fill: float) -> None:
    assert ns.verify(Masked(fill), Masked(fill), (X,)).passed
    assert not ns.verify(Masked(fill), Masked(fill, factor=-5.0), (X,)).passed
    assert not ns.verify(Masked(fill), Masked(fill, added=0.01), (X,)).passed


def test_what_is_large_and_computed_is_the_scale() -> None:
    """A value that stands once, or that one side misses, is no fill."""
    reference = torch.tensor([1e6, 1.0, 2.0], dtype=torch.float64)
    off = reference.float() + torch.tensor([0.0, 0.1, 0.0])
    assert judge(off, reference, reference.float()).passed
    twice = torch.tensor([1e6, 1e6, 1.0], dtype=torch.float64)
    off = twice.float() + torch.tensor([0.0, 0.0, 0.1])
    assert judge(off, twice, twice.float()).passed is False
    assert judge(off, twice, twice.float() + torch.tensor([0.0, 0.1, 0.0])).passed


def limits(of: Callable[[Tensor, torch.finfo], Tensor]) -> nn.Module:
    class Limited(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return of(x, torch.finfo(x.dtype))

    return Limited()


@pytest.mark.parametrize(
    "of",
    [
        lambda x, info: x.masked_fill(HIDDEN, info.min),
        lambda x, info: x / (x.norm(dim=-1, keepdim=True) + info.eps),
        lambda x, info: x.clamp(min=info.tiny).log(),
    ],
    ids=["min", "eps", "tiny"],
)
def test_the_limits_of_the_models_type_are_constants(
    of: Callable[[Tensor, torch.finfo], Tensor], tmp_path: Path
) -> None:
    kept = torch.finfo
    report = ns.export(limits(of), tmp_path / "limits.onnx", inputs=(X,))
    assert report.passed, report
    assert torch.finfo is kept


class IllConditioned(nn.Module):
    """One column that float32 cannot compute, beside others that are cut off at `most`."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.sin(3700 * x[:, :1]), x[:, 1:].clamp(-2.0, self.most)], -1)


def test_an_ill_conditioned_column_hides_no_fault_of_its_size() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert ns.verify(IllConditioned(2.0), IllConditioned(2.0), (x,)).passed
    assert not ns.verify(IllConditioned(2.0), IllConditioned(1.0), (x,)).passed


class Chosen(nn.Module):
    """The position of the largest, or whole numbers, of what a norm gives."""

    def __init__(self, whole: bool, weight: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.whole = nn.Linear(8, 64), nn.LayerNorm(64), whole
        if weight is not None:
            self.norm.weight.data = weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(x))
        return (x * 1e4).round().to(torch.int32) if self.whole else x.argmax(-1)


@pytest.mark.parametrize("whole", [True, False])
def test_integers_that_rounding_decides_are_no_fault(whole: bool, tmp_path: Path) -> None:
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    report = ns.export(Chosen(whole), tmp_path / "chosen.onnx", inputs=(x,))
    assert report.passed, report
    wrong = Chosen(whole, torch.linspace(1.0, 1.5, 64))
    assert not ns.verify(Chosen(whole), wrong, (x,)).passed


def test_integers_are_open_only_as_far_as_rounding_moves_them() -> None:
    reference = torch.arange(100)
    native, one, many = reference.clone(), reference.clone(), reference.clone()
    native[:2] += 1
    one[50] += 1
    many[50:70] += 1
    assert judge(one, reference, native).passed is None
    assert judge(many, reference, native).passed is False
    assert judge(one, reference, reference).passed is False


def test_every_operation_is_off_when_a_run_is_shaken() -> None:
    with shaken(1e-3, seed=0):
        made = torch.full((1000,), 2.0, dtype=torch.float64).exp()
    off = (made / torch.full((), 2.0, dtype=torch.float64).exp() - 1).abs()
    assert bool(((off > 0.9e-3) & (off < 1.1e-3)).all())
