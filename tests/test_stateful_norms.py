"""Norms with a state that updates, a gradient of their own, or a second input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.norms.batchrenorm import BatchRenorm
from normsurgery.norms.examples import randomised
from normsurgery.norms.gatedrmsnorm import GatedRMSNorm
from normsurgery.norms.powernorm import PowerNorm
from normsurgery.testing import random_input
from normsurgery.verify.judge import judge

X = random_input((2, 5, 12)).float()


class Gated(nn.Module):
    """A norm that is handed its gate, by position or by name."""

    def __init__(self, norm: nn.Module, by_name: bool = False) -> None:
        super().__init__()
        self.norm, self.by_name = norm, by_name
        self.data, self.gate = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Any:
        if self.by_name:
            return self.norm(self.data(x), gate=self.gate(x))
        return self.norm(self.data(x), self.gate(x))


class SigmoidGated(nn.Module):
    """What looks like a gated norm and is none: another gate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = x * torch.sigmoid(gate)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Ungated(nn.Module):
    """A gated norm's argument that has no effect on it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def hub_norm(name: str) -> nn.Module:
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    made: dict[str, Any] = {
        "mamba2": lambda: MambaRMSNormGated(12, 4),
        "mamba2, one group": lambda: MambaRMSNormGated(12, 12),
        "qwen3-next": lambda: Qwen3NextRMSNormGated(12),
    }
    return randomised(made[name]())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(
    ("name", "group", "norm_first"),
    [("mamba2", 4, False), ("mamba2, one group", 12, False), ("qwen3-next", 12, True)],
)
def test_a_gated_norm_is_found_with_its_gate_explained(
    name: str, group: int, norm_first: bool, by_name: bool, batch: int
) -> None:
    (site,) = ns.find(Gated(hub_norm(name), by_name).eval(), inputs=(X[:batch],)).sites
    assert (site.kind, site.form, site.label) == ("gatedrmsnorm", "module", "norm")
    assert site.settings["inputs"] == {"gate": "gate"}
    assert site.settings["group_size"] == group
    assert site.settings["norm_before_gate"] is norm_first
    assert site.proof_error is not None and site.proof_error < 1e-10


@pytest.mark.parametrize("norm", [SigmoidGated, Ungated])
def test_another_gate_is_not_taken_for_it(norm: type[nn.Module]) -> None:
    survey = ns.find(Gated(norm()).eval(), inputs=(X,))
    assert "gatedrmsnorm" not in {site.kind for site in survey.sites}


def test_a_gated_norm_stays_and_becomes_no_norm_without_a_gate() -> None:
    model = Gated(hub_norm("mamba2")).eval()
    folded, _ = ns.fold(model, inputs=(X,))
    assert torch.equal(folded(X), model(X))
    with pytest.raises(ns.NormsurgeryError, match="no conversion from gatedrmsnorm"):
        ns.swap(model, to="rmsnorm", inputs=(X,))


def test_the_two_orders_of_norm_and_gate_are_two_functions() -> None:
    gate = random_input((2, 5, 12), seed=3).float()
    first, last = GatedRMSNorm(12), GatedRMSNorm(12, norm_before_gate=True)
    assert not judge(first(X, gate), last(X, gate)).passed


@pytest.mark.parametrize("kind", ["batchrenorm", "powernorm"])
def test_in_eval_it_folds_into_the_convolution_before_it(kind: str) -> None:
    norms = {"batchrenorm": BatchRenorm(4), "powernorm": PowerNorm(4, channel_axis=1)}
    model = nn.Sequential(nn.Conv2d(3, 4, 3), randomised(norms[kind])).double().eval()
    x = random_input((2, 3, 6, 6))
    folded, _ = ns.fold(model, inputs=(x,))
    assert [type(m) for m in folded] == [nn.Conv2d, nn.Identity]
    assert judge(folded(x), model(x)).passed


def test_a_batch_norm_becomes_a_batch_renorm_with_the_same_outputs_in_eval() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), randomised(nn.BatchNorm2d(4))).double().eval()
    x = random_input((2, 3, 6, 6))
    swapped, report = ns.swap(model, to="batchrenorm", inputs=(x,))
    assert type(swapped[1]) is BatchRenorm
    assert [step.fidelity.name for step in report.plan.steps] == ["EVAL"]
    assert judge(swapped(x), model(x)).passed


def test_with_the_clamps_shut_a_batch_renorm_trains_as_a_batch_norm() -> None:
    shut, plain = BatchRenorm(6, r_max=1.0, d_max=0.0).double(), nn.BatchNorm1d(6).double()
    x = random_input((8, 6)).requires_grad_()
    (of_shut,) = torch.autograd.grad(shut(x).pow(3).sum(), x)
    (of_plain,) = torch.autograd.grad(plain(x).pow(3).sum(), x)
    assert judge(shut(x), plain(x)).passed
    assert judge(of_shut, of_plain).passed
    assert judge(shut.running_mean, plain.running_mean).passed


def test_backward_moves_the_running_product_of_a_power_norm() -> None:
    """The paper's nu: nu (1 - a mean(x^ x^)) + a mean(dy/dx^ x^)."""
    norm = randomised(PowerNorm(6)).double().train()
    x, g = random_input((8, 6)), random_input((8, 6), seed=5)
    old, root = norm.running_product.clone(), (norm.running_square + norm.eps).sqrt()
    hat = x / root
    norm(x.requires_grad_()).backward(g)
    assert norm.weight is not None
    found = (g * norm.weight.detach() * hat.detach()).mean(0)
    expected = old * (1 - 0.1 * hat.detach().square().mean(0)) + 0.1 * found
    assert judge(norm.running_product, expected).passed
