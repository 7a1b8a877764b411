"""Norms around branches that become one layer: where it writes to a stream, and where it pads."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from models.merged_streams import CASES, Asks, row
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.errors import NormsurgeryError
from normsurgery.fold.channel_pad import ChannelPad
from normsurgery.fold.edits import Centre
from normsurgery.norms.examples import randomised
from normsurgery.report import Report

BOUND = 1e-9  # relative, float64 against float64


def made(name: str, seed: int = 0) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The model with random values, an input for it and options of a fold."""
    build, shape, options, _ = CASES[name]
    model = randomised(build().double().eval(), seed).eval()
    return model, given(2, shape), options


def given(batch: int, shape: tuple[int, ...]) -> Tensor:
    source = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *shape, generator=source, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_same_on_every_batch(name: str) -> None:
    model, x, options = made(name)
    folded, report = ns.fold(model, inputs=(x,), **options)
    assert report.passed
    for batch in (1, 2, 3, 5):
        other = given(batch, CASES[name][1])
        assert error(folded(other), model(other)) < BOUND


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of_each_norm(name: str) -> None:
    model, x, options = made(name)
    _, report = ns.fold(model, inputs=(x,), verify=False, **options)
    found = {step.site.label: (step.to, step.rule) for step in report.plan.steps}
    assert found == CASES[name][3]


@pytest.mark.parametrize("name", CASES)
def test_a_second_fold_finds_nothing(name: str) -> None:
    model, x, options = made(name)
    folded, _ = ns.fold(model, inputs=(x,), verify=False, **options)
    assert not ns.fold(folded, inputs=(x,), verify=False, **options)[1].plan.steps


@pytest.mark.parametrize("name", CASES)
def test_the_structure_is_made_again_without_weights(name: str) -> None:
    model, x, options = made(name)
    folded, report = ns.fold(model, inputs=(x,), verify=False, **options)
    read = Report.from_json(json.loads(json.dumps(report.to_json())))
    fresh = ns.rebuild(made(name, 7)[0], read)
    fresh.load_state_dict(folded.state_dict())
    assert torch.equal(fresh(x), folded(x))


@pytest.mark.parametrize("name", CASES)
def test_loading_and_folding_commute(name: str) -> None:
    model, x, options = made(name)
    other = made(name, 7)[0]
    folded, report = ns.fold(model, inputs=(x,), verify=False, **options)
    wanted, _ = ns.fold(other, inputs=(x,), verify=False, **options)
    loaded = report.keymap.load(other.state_dict())
    assert loaded.keys() == wanted.state_dict().keys()
    assert all(torch.equal(loaded[k], t) for k, t in wanted.state_dict().items())
    changed = copy.deepcopy(folded)
    changed.load_state_dict(loaded)
    assert error(changed(x), other(x)) < BOUND


@pytest.mark.parametrize("name", CASES)
def test_a_change_in_place_is_taken_back(name: str) -> None:
    model, x, options = made(name)
    before, wanted = list(model.state_dict()), model(x)
    _, report = ns.fold(model, inputs=(x,), inplace=True, verify=False, **options)
    report.undo()
    assert list(model.state_dict()) == before
    assert torch.equal(model(x), wanted)


def test_the_merged_layer_is_centred_and_not_its_branches() -> None:
    model, x, options = made("scaled branches write to a stream")
    folded, report = ns.fold(model, inputs=(x,), verify=False, **options)
    edits = [edit for step in report.plan.steps for edit in step.edits]
    centred = [edit.target for edit in edits if isinstance(edit, Centre)]
    assert sorted(centred) == ["emb.bias", "emb.weight", "mlp.p2.bias", "mlp.p2.weight"]
    merged = folded.get_submodule("mlp.p2")
    assert isinstance(merged, nn.Linear)
    assert merged.weight.mean(0).abs().max() < 1e-12
    assert merged.bias.mean().abs() < 1e-12


@pytest.mark.parametrize(
    ("name", "stays"), [("kernels of one size", "1.b.0"), ("kernels of two sizes", "1.a.0")]
)
def test_the_merged_layer_pads_no_more(name: str, stays: str) -> None:
    model, x, options = made(name)
    folded, report = ns.fold(model, inputs=(x,), verify=False, **options)
    step = next(s for s in report.plan.steps if s.site.label == "1.n")
    assert step.options["unpadded"] == [stays]
    merged = folded.get_submodule(stays)
    assert isinstance(merged, nn.Conv2d) and merged.padding == (0, 0)
    assert isinstance(folded.get_submodule("1.n"), ChannelPad)


def test_the_padding_is_offered_where_only_branches_see_it() -> None:
    model, x, _ = made("a norm in front of a convolution beside a scale")
    _, report = ns.fold(model, inputs=(x,), verify=False)
    step = next(s for s in report.plan.steps if s.site.label == "1")
    assert step.to == "affine"
    assert any("pad with zeros" in note and "pad='explicit'" in note for note in step.notes)


def test_a_channel_without_a_scale_has_nothing_to_pad_with() -> None:
    model, x, options = made("kernels of two sizes")
    norm = model.get_submodule("1.n")
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight[1] = 0.0
    folded, report = ns.fold(model, inputs=(x,), verify=False, **options)
    assert not [step for step in report.plan.steps if "pad" in step.options]
    assert error(folded(x), model(x)) < BOUND


def test_a_plan_with_a_merge_that_is_impossible_is_refused() -> None:
    model, x, options = made("kernels of one size")
    _, report = ns.fold(model, inputs=(x,), verify=False, **options)
    other = randomised(row(Asks(3, nn.BatchNorm2d(4))).double().eval())
    with pytest.raises(NormsurgeryError):
        ns.fold(other, plan=report.plan, inputs=(x,))
