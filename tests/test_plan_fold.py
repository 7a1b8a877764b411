"""`ns.plan` plans folds too, on a survey that may come from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.errors import UsageError


class ByHand(nn.Module):
    """A module, a call and a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.norm = nn.GroupNorm(2, 8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        x = nn.functional.group_norm(x, 2, self.norm.weight, self.norm.bias)
        x = x.relu().mean((2, 3))
        return self.head(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made = ByHand().eval()
    for tensor in (*made.parameters(), *made.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0)
    return made.double()


INPUTS = (torch.randn(2, 3, 9, 9, dtype=torch.float64),)


def test_a_survey_that_was_saved_leads_to_the_plan_that_fold_makes(
    model: nn.Module, tmp_path: Path
) -> None:
    ns.find(model, INPUTS).save(tmp_path / "survey.json")
    survey = ns.Survey.load(tmp_path / "survey.json")
    made = ns.plan(survey, model, fold=True, inputs=INPUTS)
    assert [step.site.kind for step in made.steps] == ["batchnorm", "rmsnorm"]
    own = ns.fold(model, inputs=INPUTS)[1].plan
    assert made.steps == own.steps and made.calls == own.calls
    folded, report = ns.fold(model, plan=ns.Plan.from_json(made.to_json()), inputs=INPUTS)
    assert report.passed
    with torch.no_grad():
        other = torch.randn(3, 3, 12, 12, dtype=torch.float64)
        wanted, got = model(other), folded(other)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-12


def test_the_inputs_of_the_survey_are_drawn_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    survey = ns.find(model)
    assert [step.rule for step in ns.plan(survey, model, fold=True).steps] == ["into producer"]


def test_the_selection_and_the_promise_hold(model: nn.Module) -> None:
    survey = ns.find(model, INPUTS)
    one = ns.plan(survey, model, fold=True, inputs=INPUTS, kind="rmsnorm")
    assert [step.site.kind for step in one.steps] == ["rmsnorm"]
    with pytest.raises(ns.NormsurgeryError, match="forward is required"):
        ns.plan(survey, model, fold=True, inputs=INPUTS, require="forward")


def test_options_of_the_other_verb_are_refused(model: nn.Module) -> None:
    survey = ns.find(model, INPUTS)
    with pytest.raises(UsageError, match="to is no option of a fold"):
        ns.plan(survey, model, "groupnorm", fold=True, inputs=INPUTS)
    with pytest.raises(UsageError, match="untie is no option of a swap"):
        ns.plan(survey, model, "groupnorm", untie=True)
    with pytest.raises(UsageError, match="train mode"):
        ns.plan(survey, model.train(), fold=True, inputs=INPUTS)
    by_class = ns.Survey(survey.model, survey.sites, survey.skips)
    with pytest.raises(UsageError, match="give the inputs"):
        ns.plan(by_class, model.eval(), fold=True)


def test_a_file_that_is_no_survey_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"steps": []}')
    with pytest.raises(UsageError, match=r"plan\.json is not a survey"):
        ns.Survey.load(tmp_path / "plan.json")
