"""A norm swapped to its own kind: the class of that kind, and no bit changes where it was of it."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from models.spellings import SPELLINGS, Spelling
from test_find_traps import built, example
from torch import Tensor, fx, nn

import normsurgery as ns
from normsurgery import spec
from normsurgery.inputs import flatten_outputs
from normsurgery.precision import float64_copy, lifted
from normsurgery.surgery.replay import Replay
from normsurgery.treecopy import tree_copy

WITH_SITES = {name: spelling for name, spelling in SPELLINGS.items() if spelling.sites}
LEAVES_TORCH = "forward that cannot be exported"  # goes through numpy, which has no bfloat16


def kinds(survey: ns.Survey) -> list[str]:
    return sorted({site.kind for site in survey.sites if site.attach == "norm"})


def run(model: nn.Module, x: Tensor, *, training: bool) -> list[Tensor]:
    """Outputs of one pass from one random state, and the gradient at the input where it has one."""
    model.train(training)
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    outputs = list(flatten_outputs(model(x)).values())
    try:
        # Weighted: a plain sum of what is normalised is constant.
        weighted = [(y.double().flatten() ** 2 * torch.arange(y.numel())).sum() for y in outputs]
        torch.stack(weighted).sum().backward()
    except RuntimeError:  # a formula that writes in place over what backward needs
        return outputs
    assert x.grad is not None
    return [*outputs, x.grad]


def agree(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().abs().max()) <= 1e-10 * float(a.detach().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name,spelling", [pytest.param(n, s, id=n) for n, s in WITH_SITES.items()])
def test_every_spelling_becomes_its_kind(name: str, spelling: Spelling, dtype: torch.dtype) -> None:
    """A formula in a forward keeps its operations, and a module of the kind's own class its bits;
    a module of another class (hand-written, fused) becomes one of the kind, which rounds elsewhere
    and says the same in float64. Inputs other than the recorded one count, of another batch too."""
    if name == LEAVES_TORCH and dtype is torch.bfloat16:
        return
    model, x = built(spelling.build).to(dtype), example(spelling.shape).to(dtype)
    other = torch.randn(5, *spelling.shape[1:]).to(dtype)
    survey = ns.find(model, (x,))
    for kind in kinds(survey):
        same, report = ns.swap(model, kind, kind=kind, inputs=(x,))
        assert not [skip for skip in report.plan.skips if skip.reason != "not selected"]
        sites = [site for site in survey.sites if site.kind == kind]
        pairs = [
            (model.get_submodule(site.path), same.get_submodule(site.path))
            for site in sites
            if site.form == "module"
        ]
        assert all(old is not new and type(new) in spec.get(kind).classes for old, new in pairs)
        thawed = any(site.settings.get("frozen") and site.form == "module" for site in sites)
        promised = ns.Fidelity.EVAL if thawed else ns.Fidelity.IDENTICAL
        assert report.plan.fidelity is promised
        of_kind = all(type(old) is type(new) for old, new in pairs)
        for training, given in itertools.product((False,) if thawed else (False, True), (x, other)):
            if of_kind:
                old, new = tree_copy(model, clone=True), tree_copy(same, clone=True)
                one, two = (run(side, given, training=training) for side in (old, new))
                assert all(itertools.starmap(torch.equal, zip(one, two, strict=True)))
                continue
            sides = (float64_copy(model), float64_copy(same))
            with lifted():
                one, two = (run(side, given.double(), training=training) for side in sides)
            # A formula that writes in place over what backward needs has no gradient.
            assert all(itertools.starmap(agree, zip(one, two, strict=False))), (kind, training)
        state, moved = same.state_dict(), report.keymap.load(model.state_dict())
        carried = set(state) - {made.new for made in report.keymap.made}
        assert carried and all(torch.equal(moved[key], state[key]) for key in carried)


FORMULA = "formula over several statements"


def test_a_replayed_formula_holds_data_and_survives_json() -> None:
    """The plan carries the operations, so that the file is loaded again without inputs."""
    spelling = SPELLINGS[FORMULA]
    model, x = built(spelling.build), example(spelling.shape)
    same, report = ns.swap(model, spelling.sites[0].kind, inputs=(x,))
    (replay,) = [module for module in same.modules() if isinstance(module, Replay)]
    assert json.loads(json.dumps(replay.operations)) == replay.operations
    plan = ns.Plan.from_json(json.loads(json.dumps(report.plan.to_json())))
    again = ns.rebuild(built(spelling.build), plan)
    again.load_state_dict(same.state_dict())
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_a_replayed_formula_in_another_dtype_computes_the_registered_one() -> None:
    """The forward might cast elsewhere in another type; bits are promised for the recorded one."""
    spelling = SPELLINGS[FORMULA]
    model, x = built(spelling.build), example(spelling.shape)
    same, _ = ns.swap(model, spelling.sites[0].kind, inputs=(x,))
    wide = ns.verify(model.double().eval(), same.double().eval(), (x.double(),), hard=False)
    assert wide.passed


def test_a_formula_in_a_graph_module_keeps_its_bits() -> None:
    spelling = SPELLINGS[FORMULA]
    model, x = fx.symbolic_trace(built(spelling.build).eval()), example(spelling.shape)
    same, report = ns.swap(model, spelling.sites[0].kind, inputs=(x,))
    assert isinstance(same, fx.GraphModule) and len(report.plan.steps) == 1
    assert torch.equal(same(x), model(x))
