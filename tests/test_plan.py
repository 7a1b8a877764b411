"""Plans: selection, rules, options, promises, refusals, and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models.sites import survey_of
from models.traps import Convolutional, Parts, ReadsWeight, Tied, nothing_neutral
from torch import nn

from normsurgery.errors import CannotConvert, PromiseBroken, UnknownName, UsageError
from normsurgery.plan import Plan
from normsurgery.selection import Rule, parse_options
from normsurgery.spec import Fidelity
from normsurgery.steps import Step
from normsurgery.surgery.planning import plan

SHAPES = {"norm1": (2, 8, 8, 8), "block.1": (2, 16, 8, 8)}


@pytest.fixture
def model() -> nn.Module:
    return nothing_neutral(Convolutional())


def paths(made: Plan) -> list[str]:
    return [step.site.path for step in made.steps]


def test_a_plan_is_deterministic_and_survives_json(model: nn.Module, tmp_path: Path) -> None:
    rules = ["batchnorm block.* -> groupnorm num_groups=4", "* -> affine"]
    first = plan(survey_of(model, SHAPES), model, rules=rules)
    second = plan(survey_of(model, SHAPES), model, rules=rules)
    assert first == second
    assert [step.to for step in first.steps] == ["affine", "groupnorm"]
    first.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.to_json() == first.to_json()
    assert again.steps[1].options["num_groups"] == 4
    assert again.fidelity is Fidelity.RETRAIN
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_planning_reads_the_model_and_the_random_state_only(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, state = list(model.modules()), torch.get_rng_state()
    plan(survey_of(model, SHAPES), model, "groupnorm")
    assert list(model.modules()) == modules
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"only": ("block.*",)}, ["block.1"]),
        ({"only": ("1",)}, ["block.1"]),
        ({"only": (0,)}, ["norm1"]),
        ({"only": "norm*"}, ["norm1"]),
        ({"exclude": ("norm1",)}, ["block.1"]),
        ({"only": ("*",), "exclude": (1,)}, ["norm1"]),
        ({"kind": "BN"}, ["norm1", "block.1"]),
    ],
)
def test_selection(model: nn.Module, selection: dict[str, object], expected: list[str]) -> None:
    made = plan(survey_of(model, SHAPES), model, "groupnorm", **selection)  # type: ignore[arg-type]
    assert paths(made) == expected
    left = {"norm1", "block.1"} - set(expected)
    assert {skip.path for skip in made.skips if skip.reason == "not selected"} == left


def test_a_site_is_selected_by_any_of_its_names() -> None:
    made = plan(survey_of(Tied()), Tied(), "layernorm2d", only=("block.*",))
    assert made.steps[0].site.paths == ("norm1", "norm2", "block.1")


def test_a_pattern_that_matches_nothing_names_near_ones(model: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"'blok\.1'.*block\.1"):
        plan(survey_of(model), model, "groupnorm", only=("blok.1",))
    with pytest.raises(UsageError, match="matches '7'"):
        plan(survey_of(model), model, "groupnorm", exclude=("7",))


def test_a_plan_without_sites_lists_the_kinds_present(model: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"batchnorm \(2\)") as caught:
        plan(survey_of(model), model, "groupnorm", kind="layernorm")
    assert caught.value.exit_code == 2


def test_a_model_without_norms_says_so() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="Linear has no normalization"):
        plan(survey_of(model), model, "groupnorm")


def test_the_first_rule_that_matches_decides(model: nn.Module) -> None:
    survey = survey_of(model, SHAPES)
    made = plan(survey, model, rules=["* norm1 -> rms", "batchnorm -> identity", "* -> affine"])
    assert [step.to for step in made.steps] == ["rmsnorm", "identity"]


def test_sites_that_no_rule_names_are_left_alone(model: nn.Module) -> None:
    made = plan(survey_of(model, SHAPES), model, rules=["batchnorm block.* -> groupnorm"])
    assert paths(made) == ["block.1"]
    assert [skip.path for skip in made.skips] == ["norm1"]


@pytest.mark.parametrize(
    "text", ["groupnorm", "-> groupnorm", "bn ->", "a b c -> gn", "bn -> gn 4"]
)
def test_a_rule_that_cannot_be_read_shows_how_to_write_one(text: str) -> None:
    with pytest.raises(UsageError, match="Write"):
        Rule.parse(text)


def test_rules_take_any_spelling_of_a_norm_and_json_values() -> None:
    assert Rule.parse("BatchNorm -> group-norm num_groups=4") == Rule(
        "groupnorm", "batchnorm", "*", {"num_groups": 4}
    )
    assert parse_options(["a=true", "b=0.5", "c=text"]) == {"a": True, "b": 0.5, "c": "text"}
    with pytest.raises(UnknownName, match="groupnorm"):
        Rule.parse("batchnorm -> gruopnorm")


def test_a_target_and_rules_together_are_refused(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="either"):
        plan(survey_of(model), model, "groupnorm", rules=["* -> affine"])
    with pytest.raises(UsageError, match="give a target"):
        plan(survey_of(model), model)


def test_an_unknown_option_lists_the_valid_ones(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="num_groups"):
        plan(survey_of(model, SHAPES), model, "groupnorm", options={"groups": 4})


def test_an_impossible_option_is_an_error_and_not_a_skip(model: nn.Module) -> None:
    with pytest.raises(CannotConvert):
        plan(survey_of(model, SHAPES), model, "groupnorm", options={"num_groups": 5})


def test_a_site_that_cannot_become_the_norm_is_a_skip_with_the_reason() -> None:
    """opacus #567: GroupNorm(4, 4) on (N, 4) erases the data, every output is beta."""
    model = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 2), nn.BatchNorm1d(2))
    survey = survey_of(model, {"0": (8, 64), "2": (8, 2)})
    made = plan(survey, model, "groupnorm")
    assert paths(made) == ["0"]
    assert made.steps[0].options["num_groups"] * 4 <= 64
    (skip,) = made.skips
    assert skip.path == "2" and "constant" in skip.reason and skip.hint


def test_when_every_site_is_refused_the_reasons_are_the_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(UsageError, match=r"every selected site.*constant"):
        plan(survey_of(model, {"0": (8, 2)}), model, "groupnorm")


def test_require_refuses_beforehand_and_names_the_sites(model: nn.Module) -> None:
    survey = survey_of(model, SHAPES)
    rules = ["* norm1 -> affine", "* -> groupnorm"]
    with pytest.raises(PromiseBroken, match=r"1 of 2 steps.*block\.1") as caught:
        plan(survey, model, rules=rules, require="eval")
    assert caught.value.exit_code == 1
    assert "norm1" not in str(caught.value)
    made = plan(survey, model, "affine", require=Fidelity.EVAL)
    assert made.fidelity is Fidelity.EVAL


def test_fresh_parameters_promise_nothing(model: nn.Module) -> None:
    made = plan(survey_of(model, SHAPES), model, "affine", init="reset")
    assert made.fidelity is Fidelity.RETRAIN
    with pytest.raises(UsageError, match="copy, reset"):
        plan(survey_of(model, SHAPES), model, "affine", init="zero")  # type: ignore[arg-type]


def test_the_same_kind_is_a_copy_that_promises_everything(model: nn.Module) -> None:
    made = plan(survey_of(model, SHAPES), model, "batchnorm")
    assert {step.action for step in made.steps} == {"copy"}
    assert made.fidelity is Fidelity.IDENTICAL


def test_a_norm_whose_tensors_a_parent_reads_is_a_skip() -> None:
    """Falcon-Mamba and 16 more read `self.norm.weight`: a replacement would be ignored."""
    model = ReadsWeight()
    made = plan(survey_of(model), model, "dyt")
    assert paths(made) == ["called", "typed"]
    reasons = {skip.path: skip.reason for skip in made.skips}
    assert "self.norm.weight" in reasons["norm"] or "self.norm.bias" in reasons["norm"]
    assert "self.norms.*." in reasons["norms.0"]


def test_asking_for_the_dtype_of_a_weight_needs_a_weight() -> None:
    """T5 reads `self.norm.weight.dtype`: harmless, unless the replacement has no weight."""
    model = ReadsWeight()
    made = plan(survey_of(model), model, "identity")
    assert paths(made) == ["called"]
    reasons = {skip.path: skip.reason for skip in made.skips}
    assert "has no weight" in reasons["typed"]


def test_a_copy_may_be_read() -> None:
    model = ReadsWeight()
    assert len(plan(survey_of(model), model, "layernorm").steps) == 4


def test_steps_say_what_will_happen(model: nn.Module) -> None:
    text = str(plan(survey_of(model, SHAPES), model, "groupnorm", only=("norm1",)))
    assert "norm1  batchnorm -> groupnorm num_groups=8  [2, 8, 8, 8]  RETRAIN" in text
    assert "block.1  batchnorm  skipped: not selected" in text


def test_a_file_that_is_no_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"steps": 3}))
    with pytest.raises(UsageError, match="not a plan"):
        Plan.load(tmp_path / "a.json")
    with pytest.raises(UsageError, match=r"b\.json"):
        Plan.load(tmp_path / "b.json")


def test_a_plan_holds_every_field_of_a_step(model: nn.Module) -> None:
    for step in plan(survey_of(model, SHAPES), model, "groupnorm").steps:
        assert Step.from_json(json.loads(json.dumps(step.to_json()))).to_json() == step.to_json()


def test_weightless_norms_are_planned() -> None:
    model = Parts()
    assert "bare" in paths(plan(survey_of(model), model, "rmsnorm"))
