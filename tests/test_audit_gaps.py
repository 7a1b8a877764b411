"""Adapters around norms, calls in half precision swapped to themselves, plans that mix forms."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normsurgery as ns


class Adapted(nn.Module):
    """A low-rank adapter around a module, with attribute access falling through, as PEFT has it."""

    def __init__(self, base_layer: nn.Module, features: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(features, 2, bias=False)
        self.up = nn.Linear(2, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)


class Called(nn.Module):
    """A functional layer norm beside a batch norm that is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.shift = nn.Parameter(torch.randn(8))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, times: float = 2.0) -> Tensor:
        x = self.linear(x)
        if mask is not None:
            x = x * mask
        return self.norm(F.layer_norm(x, (8,), self.scale, self.shift, 1e-3)) * times


def test_a_norm_inside_an_adapter_is_swapped_and_the_adapter_stays() -> None:
    """A walker that meets the wrapper's `weight` (through its `__getattr__`) replaces the adapter
    or leaves the norm below it in place."""
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(nn.Linear(8, 8), 8), Adapted(nn.LayerNorm(8), 8))
    changed, report = ns.swap(model, "rmsnorm", inputs=(torch.randn(2, 8),))
    assert [step.site.path for step in report.plan.steps] == ["1.base_layer"]
    assert isinstance(changed[1], Adapted) and isinstance(changed[1].base_layer, nn.RMSNorm)
    assert torch.equal(changed[1].up.weight, model[1].up.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_functional_call_swapped_to_its_own_kind_computes_the_same_bits(
    dtype: torch.dtype,
) -> None:
    """A norm rebuilt from its settings rounds an eps or multiplies in another order."""
    torch.manual_seed(0)
    model = Called().to(dtype)
    x = torch.randn(4, 6).to(dtype)
    changed, report = ns.swap(model, "layernorm", kind="layernorm", inputs=(x,))
    assert report.plan.fidelity is ns.Fidelity.IDENTICAL
    assert changed.norm_0 not in list(model.modules())
    for training in (True, False):
        model.train(training)
        changed.train(training)
        for scale in (1, 50):
            y = (torch.randn(16, 6) * scale).to(dtype)
            assert torch.equal(model(y), changed(y))
            assert torch.equal(model(y, times=3.0), changed(y, times=3.0))
            assert torch.equal(model(y, y.new_ones(8)), changed(y, y.new_ones(8)))


def test_a_plan_that_mixes_modules_and_calls_is_carried_out_from_json() -> None:
    """A plan that keeps a live object, or the index of a call, does another thing once saved."""
    torch.manual_seed(0)
    model, x = Called().eval(), torch.randn(4, 6)
    rules = ["layernorm -> rmsnorm", "batchnorm -> affine"]
    plan = ns.plan(ns.find(model, (x,)), model, rules=rules)
    again = ns.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    from_file, _ = ns.swap(model, plan=again, inputs=(x,))
    direct, _ = ns.swap(model, rules=rules, inputs=(x,))
    assert torch.equal(from_file(x), direct(x)) and not torch.equal(from_file(x), model(x))
    assert torch.equal(from_file(x, times=4.0), 2 * from_file(x))
