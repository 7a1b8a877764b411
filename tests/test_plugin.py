"""A third party's norm, whose scale and shift the tool knows from its spec alone, goes all the way:
found, swapped to, folded, exported, verified."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normsurgery as ns
from normsurgery import spec
from normsurgery.fold.affines import affine_of
from normsurgery.fold.editjson import edit_from_json, edit_to_json
from normsurgery.fold.edits import Shift
from normsurgery.fold.vectors import values
from normsurgery.testing import Check, norm_checks

sys.path.insert(0, str(Path(__file__).with_name("plugin")))
from meanabsnorm.runningrms import NORM, RunningRMS

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BOUND = 1e-10  # in float64, relative


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kept = spec._Registry(specs=dict(spec._registry.specs), plugins_loaded=True)
    monkeypatch.setattr(spec, "_registry", kept)
    spec.register(NORM)
    yield


def net() -> nn.Sequential:
    """Behind a convolution, and in front of one: a norm of each."""
    torch.manual_seed(0)
    norms = [NORM.examples()[0].module() for _ in range(2)]
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
    return nn.Sequential(first, norms[0], nn.ReLU(), norms[1], second).eval()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_it_is_found() -> None:
    sites = ns.find(net(), inputs=(X,)).sites
    assert [site.kind for site in sites] == ["runningrms", "runningrms"]


def test_it_is_swapped_to_and_from() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    model[1].weight.data.fill_(2.5)
    swapped, _ = ns.swap(model, to="runningrms", inputs=(X,))
    assert type(swapped[1]) is RunningRMS
    assert torch.equal(swapped[1].gain, model[1].weight)
    back, _ = ns.swap(swapped, to="batchnorm", inputs=(X,))
    assert type(back[1]) is nn.BatchNorm2d


def test_it_folds_into_what_is_before_and_behind_it() -> None:
    model = net()
    folded, _ = ns.fold(model, inputs=(X,))
    assert not any(isinstance(module, RunningRMS) for module in folded.modules())
    with torch.no_grad():
        x = X.double()
        assert relative(folded.double()(x), model.double()(x)) < 1e-6
        again, _ = ns.fold(model, inputs=(x,))
        assert relative(again(x), model(x)) < BOUND


def test_it_is_exported_and_verified(tmp_path: Any) -> None:
    report = ns.export(net(), tmp_path / "model.onnx", inputs=(X,))
    assert report.onnx is not None
    evidence = ns.verify(net(), tmp_path / "model.onnx", inputs=(X,))
    assert evidence.passed


def test_its_edits_are_computed_from_their_json_alone() -> None:
    site = ns.find(net(), inputs=(X,)).sites[0]
    affine = affine_of(site)
    assert affine.shift is not None and affine.scale is not None
    edit = edit_from_json(edit_to_json(Shift("bias", affine.shift)))
    assert isinstance(edit, Shift)
    names = {role: name.removeprefix("1.") for role, name in edit.by.tensors.items()}
    state = net()[1].double().state_dict()
    by_role = {role: state[name] for role, name in names.items()}
    assert torch.equal(values(edit.by, by_role), state["offset"])
    scale = state["gain"] / (state["running_square"] + 1e-5).sqrt()
    assert relative(values(affine.scale, by_role), scale) < BOUND


def test_a_scale_and_shift_that_the_spec_gives_wrongly_is_refused() -> None:
    """What the fold makes is measured against the model: a wrong `affine` cannot pass."""

    def wrong(tensors: Any, settings: Any) -> Any:
        return tensors["gain"], tensors["offset"]

    spec._registry.specs["runningrms"] = replace(NORM, affine=wrong)
    try:
        folded, report = ns.fold(net(), inputs=(X,))
    except ns.NormsurgeryError:
        return
    passed = report.evidence is not None and report.evidence.passed
    assert not passed or any(isinstance(module, RunningRMS) for module in folded.modules())


@pytest.mark.parametrize("check", norm_checks(NORM), ids=lambda check: check.name.replace(" ", "-"))
def test_the_public_checks_hold_for_it(check: Check) -> None:
    check()
