"""Networks that their authors reparametrise: a fold leaves as few layers, and no norm."""

from __future__ import annotations

import copy
import json
import pickle
from functools import cache
from pathlib import Path

import onnxruntime
import pytest
import torch
from models.reparametrised import NETWORKS, network
from torch import Tensor, fx, nn

import normsurgery as ns
from normsurgery.artefacts import load
from normsurgery.artefacts.saving import save
from normsurgery.find import locate
from normsurgery.fold.neutral import NeutralBranch, Zero
from normsurgery.inputs import Inputs
from normsurgery.report import Report

BOUND = 1e-9  # relative, float64 against float64


@cache
def _folded(name: str) -> tuple[nn.Module, Report]:
    model, x = network(name)
    return ns.fold(model, inputs=(x,))


def folded(name: str) -> tuple[nn.Module, nn.Module, Tensor, Report]:
    """The network, a copy of the folded one, an input, and the report."""
    model, x = network(name)
    done, report = _folded(name)
    return model, copy.deepcopy(done), x, report


def error(made: Tensor, wanted: Tensor) -> float:
    return float(((made - wanted).abs().max() / wanted.abs().max()).detach())


def layers(model: nn.Module) -> int:
    return sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_as_few_layers_are_left_as_its_authors_leave(name: str) -> None:
    model, done, x, report = folded(name)
    assert report.passed and not report.plan.skips
    assert layers(done) == NETWORKS[name][1]
    assert all(step.to == "identity" for step in report.plan.steps)
    for batch in (x, x[:1], torch.cat([x, 2 * x])):
        assert error(done(batch), model(batch)) < BOUND
    rows = model(x)
    assert error(rows[:1], rows[1:]) > 1e3 * BOUND  # what is compared depends on the input


@pytest.mark.parametrize("name", NETWORKS)
def test_no_norm_is_left_and_a_second_fold_finds_nothing(name: str) -> None:
    _, done, x, _ = folded(name)
    assert [site.label for site in locate(done, Inputs((x,))).survey] == []
    assert ns.fold(done, inputs=(x,), verify=False)[1].plan.steps == ()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_structure_is_made_again_and_takes_the_state_dict(name: str) -> None:
    _, done, x, report = folded(name)
    read = Report.from_json(json.loads(json.dumps(report.to_json())))
    fresh = ns.rebuild(network(name, 7)[0], read)
    fresh.load_state_dict(done.state_dict(), strict=True)
    assert torch.equal(fresh(x), done(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_checkpoint_of_the_original_is_one_of_the_folded(name: str) -> None:
    _, done, x, report = folded(name)
    other = network(name, 7)[0]
    wanted, _ = ns.fold(other, inputs=(x,), verify=False)
    loaded = report.keymap.load(other.state_dict())
    assert loaded.keys() == wanted.state_dict().keys()
    assert all(torch.equal(loaded[key], t) for key, t in wanted.state_dict().items())
    done.load_state_dict(loaded, strict=True)
    assert error(done(x), other(x)) < BOUND


@pytest.mark.parametrize("name", ["RepVGG", "MobileOne s0", "FastViT"])
def test_a_saved_model_computes_the_same(name: str, tmp_path: Path) -> None:
    model, done, x, report = folded(name)
    save(model, done, report, tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt", trust=("models",)).model
    assert torch.equal(loaded(x), done(x))
    assert list(loaded.state_dict()) == list(done.state_dict())


@pytest.mark.parametrize("name", ["RepVGG", "MobileOne s0", "FastViT", "RepViT"])
def test_it_compiles_and_exports_whole(name: str, tmp_path: Path) -> None:
    _, done, x, _ = folded(name)
    wanted = done(x)
    torch._dynamo.reset()
    assert error(torch.compile(done, fullgraph=True, backend="aot_eager")(x), wanted) < BOUND
    for strict in (False, True):
        program = torch.export.export(done, (x,), strict=strict)
        assert error(program.module()(x), wanted) < BOUND
    done, x = done.float(), x.float()
    ns.export(done, tmp_path / "model.onnx", inputs=(x,), verify=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (given,) = session.get_inputs()
    (made,) = session.run(None, {given.name: x.numpy()})
    assert error(torch.from_numpy(made).double(), wanted) < 1e-4


@pytest.mark.parametrize("forward", ["+", "add", "add_", "+=", "sum", "-", "0.5 *"])
@pytest.mark.parametrize("first", [True, False])
def test_a_branch_that_adds_nothing_is_a_zero_everywhere(forward: str, first: bool) -> None:
    model = Adds(forward, first)
    x = torch.randn(2, 3)
    wanted = model.layer(x)
    if forward == "0.5 *" and first:
        wanted = 0.5 * wanted
    assert torch.equal(model(x), -wanted if forward == "-" and not first else wanted)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    traced = fx.symbolic_trace(model)
    again = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), compiled, traced)
    exported = [torch.export.export(model, (x,), strict=s).module() for s in (False, True)]
    assert all(torch.allclose(other(x), model(x)) for other in (*again, *exported))


class Adds(nn.Module):
    """Two branches of which one adds nothing."""

    def __init__(self, how: str, first: bool) -> None:
        super().__init__()
        self.how, self.first = how, first
        self.layer, self.neutral = nn.Linear(3, 3), NeutralBranch()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layer(x), self.neutral(x)
        if not self.first:
            a, b = b, a
        if self.how == "+":
            return a + b
        if self.how == "add":
            return torch.add(a, b)
        if self.how == "add_":
            return a.add_(b) if self.first else b + a
        if self.how == "+=":
            a += b
            return a
        if self.how == "sum":
            return sum([a, b])
        return a - b if self.how == "-" else 0.5 * a + b


def test_what_a_number_cannot_do_a_zero_cannot() -> None:
    zero = NeutralBranch()()
    assert isinstance(zero, Zero) and zero == 0 and 0 + zero is zero
    assert torch.equal(torch.ones(2) * zero, torch.zeros(2))
    assert torch.equal(torch.add(zero, torch.ones(2), alpha=2), 2 * torch.ones(2))
    with pytest.raises(TypeError):
        torch.stack([torch.ones(2), zero])
