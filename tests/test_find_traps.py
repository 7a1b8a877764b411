"""Every way a norm is written is found, with the right facts; what only looks like one is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.spellings import MAPS, SPELLINGS, TOKENS, Expected, Spelling
from models.spellings.by_hand import RmsBySqrtAndDivide, RmsUpcast, Tokens, settled
from models.spellings.in_forwards import (
    CallsFunctionOfTwo,
    CallsInComprehension,
    CallsInTraining,
    NormalisesWeight,
)
from models.spellings.lookalikes import NamedOnly, PassesGate, UnitBall
from models.spellings.structure import BranchesOnData, Nested, Patched
from recorder import record
from torch import Tensor, fx, nn

import normsurgery as ns

each_spelling = pytest.mark.parametrize(
    "spelling", [pytest.param(value, id=name) for name, value in SPELLINGS.items()]
)


def built(build: Any) -> nn.Module:
    torch.manual_seed(3)
    return build().eval()


def example(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def facts(site: ns.Site, expected: Expected) -> Expected:
    """The Site in the words of what was expected of it."""
    found = site.settings
    return Expected(
        kind=site.kind,
        paths=site.paths,
        form=site.form,
        calls=site.calls or 0,
        eps=None if expected.eps is None else found["eps"],
        channel_axis=found["channel_axis"],
        features=None if expected.features is None else found["features"],
        weight_offset=found.get("weight_offset", 0.0),
        settings=tuple((name, found.get(name)) for name, _ in expected.settings),
    )


@each_spelling
def test_every_spelling_has_its_facts(spelling: Spelling) -> None:
    survey = ns.find(built(spelling.build), (example(spelling.shape),))
    assert len(survey.sites) == len(spelling.sites), survey
    compared = zip(survey.sites, spelling.sites, strict=True)
    assert tuple(facts(site, expected) for site, expected in compared) == spelling.sites
    assert tuple(skip.path for skip in survey.skips) == spelling.skips
    assert all(skip.reason for skip in survey.skips)


@each_spelling
def test_every_example_is_what_it_claims(spelling: Spelling) -> None:
    """The recorder, which shares no code with find, counts the same norms of the same kinds.

    It knows no groups and no autograd function's insides, and calls a norm by statistics stored
    in an eval-mode instance norm by what runs; those rows are told apart by the facts above.
    """
    run = record(built(spelling.build), (example(spelling.shape),))
    wanted: dict[str, int] = {}
    for site in spelling.sites:
        wanted[site.kind] = wanted.get(site.kind, 0) + site.calls
    assert run.calls() == wanted


@each_spelling
def test_the_model_and_the_input_are_left_alone(spelling: Spelling) -> None:
    model, x = built(spelling.build), example(spelling.shape)
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.clone() for tensor in tensors]
    kept = [dict(module.__dict__) for module in model.modules()]
    state, copy = torch.get_rng_state(), x.clone()
    ns.find(model, (x,))
    assert all(map(torch.equal, tensors, before)) and torch.equal(x, copy)
    assert [tensor.grad for tensor in model.parameters()] == [None] * len(list(model.parameters()))
    assert torch.equal(torch.get_rng_state(), state)
    for module, attributes in zip(model.modules(), kept, strict=True):
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[name] is value for name, value in attributes.items())


def test_both_arms_of_a_branch_on_data_are_found() -> None:
    """One norm of the two runs; the other is found all the same and is known not to have run."""
    survey = ns.find(built(BranchesOnData), (example(TOKENS),))
    assert {site.path: site.kind for site in survey.sites} == {
        "positive": "layernorm",
        "negative": "rmsnorm",
    }
    assert {site.path: site.calls or 0 for site in survey.sites} == {"positive": 1, "negative": 0}
    assert survey.skips == ()


def test_a_norm_of_a_weight_is_no_norm_of_an_activation() -> None:
    """Swapping it with the batch norms would destroy the convolution."""
    survey = ns.find(built(NormalisesWeight), (example(MAPS),))
    assert [site for site in survey.sites if site.attach == "norm"] == []
    assert survey.skips == ()


def test_a_gated_norm_is_not_the_plain_norm_that_it_is_without_its_gate() -> None:
    """The module is more than an RMSNorm of its first input: replacing it would drop the gate."""
    survey = ns.find(built(PassesGate), (example(TOKENS),))
    (site,) = survey.sites
    assert (site.path, site.kind) == ("norm", "gatedrmsnorm")
    assert site.settings["inputs"] == {"gate": "gate"}


def test_a_subclass_of_layer_norm_that_does_not_normalise_is_no_site() -> None:
    """isinstance says LayerNorm, the forward does not normalise: a class alone proves nothing."""
    model = built(lambda: Tokens(settled(NamedOnly(12))))
    survey = ns.find(model, (example(TOKENS),))
    assert survey.sites == ()


def test_a_forward_set_on_the_instance_is_not_identified_by_its_class() -> None:
    survey = ns.find(built(Patched), (example(TOKENS),))
    assert survey.sites == ()


def test_a_hook_that_changes_the_output_is_not_overlooked() -> None:
    """With its hook the module is no LayerNorm: only the call inside it may be a Site."""
    model = built(lambda: Tokens(settled(nn.LayerNorm(12))))
    model.norm.register_forward_hook(lambda module, args, output: 2 * output + 1)
    survey = ns.find(model, (example(TOKENS),))
    assert [(site.form, site.path) for site in survey.sites] == [("call", "norm")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["rms in float32", "layer by var", "torch layer", "F.layer_norm"])
def test_other_types_than_float32(name: str, dtype: torch.dtype) -> None:
    spelling = SPELLINGS[name]
    survey = ns.find(built(spelling.build).to(dtype), (example(spelling.shape).to(dtype),))
    assert [site.kind for site in survey.sites] == [site.kind for site in spelling.sites]
    assert survey.skips == ()
    assert str(dtype) in {
        f"torch.{site.dtype}".replace("torch.torch.", "torch.") for site in survey
    }


@pytest.mark.parametrize("name", ["layer by var", "torch layer", "F.layer_norm", "called twice"])
def test_a_graph_module_is_searched(name: str) -> None:
    spelling = SPELLINGS[name]
    model = fx.symbolic_trace(built(spelling.build))
    survey = ns.find(model, (example(spelling.shape),))
    assert [site.kind for site in survey.sites] == [site.kind for site in spelling.sites]
    assert survey.skips == ()


@pytest.mark.parametrize("name", ["rms in float32", "torch layer", "F.layer_norm", "torch batch"])
def test_an_exported_program_is_searched(name: str, tmp_path: Path) -> None:
    """A `.pt2` has no modules left: its norms are nodes, and it carries its own inputs."""
    spelling = SPELLINGS[name]
    x = example(spelling.shape)
    program = torch.export.export(built(spelling.build), (x,), strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    survey = ns.find(torch.export.load(tmp_path / "model.pt2"))
    assert [site.kind for site in survey.sites] == [site.kind for site in spelling.sites]
    assert survey.skips == ()


def test_what_runs_in_no_forward_is_still_in_the_survey() -> None:
    """A norm in an unused branch is found by its type and has no calls."""
    model = built(lambda: Tokens(settled(nn.LayerNorm(12))))
    model.unused = settled(nn.BatchNorm1d(7))
    survey = ns.find(model, (example(TOKENS),))
    assert {site.path: site.calls or 0 for site in survey} == {"norm": 1, "unused": 0}


def test_without_inputs_types_are_still_found() -> None:
    survey = ns.find(built(lambda: Tokens(settled(nn.LayerNorm(12)))))
    assert [(site.kind, site.path) for site in survey] == [("layernorm", "norm")]


def test_a_call_in_a_comprehension_is_one_site_or_says_why_not() -> None:
    """The comprehension is a function of its own, with frames of its own, and runs twice."""
    survey = ns.find(built(CallsInComprehension), (example(TOKENS),))
    assert [(site.kind, site.calls) for site in survey] == [("layernorm", 2)] or survey.skips


def test_a_norm_that_runs_in_training_only_is_found() -> None:
    survey = ns.find(built(CallsInTraining), (example(TOKENS),))
    assert [site.kind for site in survey] == ["layernorm"]
    assert any("train" in note for note in survey.sites[0].notes)


def test_a_function_that_normalises_two_tensors_is_not_taken_for_one_norm() -> None:
    """No expression of any forward has one of the two as its value: Skips, not half a rewrite."""
    survey = ns.find(built(CallsFunctionOfTwo), (example(TOKENS),))
    assert survey.sites == ()
    assert survey.skips and all(skip.reason for skip in survey.skips)


def test_nested_inputs_and_outputs() -> None:
    survey = ns.find(built(Nested), ({"x": {"inner": example(TOKENS)}},))
    assert [(site.kind, site.path) for site in survey] == [("rmsnorm", "norm")]


def test_a_projection_on_the_unit_ball_is_no_l2_norm() -> None:
    """Short vectors are left as they are; a Site of l2norm would make them long."""
    survey = ns.find(built(lambda: Tokens(UnitBall())), (example(TOKENS),))
    assert survey.sites == ()
    assert [skip.path for skip in survey.skips] == ["norm"]


def test_a_model_on_the_meta_device() -> None:
    """No numbers are there to run on, and the proof draws its own."""
    with torch.device("meta"):
        model, x = Tokens(RmsUpcast(12)).eval(), torch.empty(TOKENS)
    survey = ns.find(model, (x,))
    assert [(site.kind, site.path) for site in survey] == [("rmsnorm", "norm")]
    assert all(parameter.is_meta for parameter in model.parameters())


def test_torch_transformer_encoder() -> None:
    """In eval without gradients torch runs a fused path that calls no norm at all."""
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
    model = built(lambda: nn.TransformerEncoder(layer, 2))
    survey = ns.find(model, (example(TOKENS),))
    assert [site.kind for site in survey] == ["layernorm"] * 4
    assert [site.calls for site in survey] == [1] * 4


def test_norms_of_weights_by_parametrization_are_no_sites() -> None:
    """weight_norm and spectral_norm divide a weight by a length; activations are left alone."""
    with_norm = torch.nn.utils.parametrizations.weight_norm(nn.Linear(12, 12))
    with_spectral = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(12, 12))
    survey = ns.find(built(lambda: nn.Sequential(with_norm, with_spectral)), (example(TOKENS),))
    assert [site for site in survey if site.attach == "norm"] == []
    assert survey.skips == ()


class AfterLinear(nn.Module):
    """The linear's output is itself a view of a product; the formula starts from it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 12))


class CentresFirst(AfterLinear):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        d = x - x.mean(-1, keepdim=True)
        return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


class CentresInPlaceOfItself(AfterLinear):
    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x = x - x.mean(-1, keepdim=True)
        return self.gain * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("model", [CentresFirst, CentresInPlaceOfItself])
def test_a_layer_norm_in_steps_is_not_taken_for_the_rms_norm_of_its_centred_input(
    model: type[AfterLinear],
) -> None:
    """x - mean(x) divided by its root mean square is a layer norm of x, whatever made x."""
    (site,) = ns.find(model(), (example(TOKENS),)).sites
    assert (site.kind, site.settings["eps"]) == ("layernorm", 1e-6)


def test_a_norm_that_runs_on_no_tokens_is_proven_all_the_same() -> None:
    """An audio branch that gets no audio: nothing in, nothing out, and still an RMS norm."""
    survey = ns.find(Tokens(settled(RmsBySqrtAndDivide(12, 1e-6))), (torch.randn(2, 0, 12),))
    assert [site.kind for site in survey.sites] == ["rmsnorm"]
