"""Old checkpoints and optimizer states cross a swap, in both directions where nothing is lost."""

from __future__ import annotations

import json

import pytest
import torch
from models.sites import survey_of
from models.traps import Convolutional, Parts, SharedWeight, Tied, nothing_neutral
from torch import nn

from normsurgery.errors import UsageError
from normsurgery.rewriting.application import Applied, apply
from normsurgery.rewriting.keymap import KeyMap, Move
from normsurgery.survey import Site, Survey
from normsurgery.swapping.planning import plan
from normsurgery.treecopy import tree_copy

SHAPES = {"norm1": (2, 8, 8, 8), "block.1": (2, 16, 8, 8)}
CONVOLUTIONAL = [
    *("groupnorm", "layernorm2d", "layernorm_chw", "instancenorm", "rmsnorm", "affine"),
    *("identity", "dyt", "batchnorm", "randomaggregation", "evonorm-s0"),
]


class OnePlusWeight(nn.Module):
    """A hand-written RMS norm that scales by 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.gain)


def swapped(model: nn.Module, survey: Survey, to: str, **selection: object) -> Applied:
    made = plan(survey, model, to, **selection)  # type: ignore[arg-type]
    return apply(tree_copy(model, clone=True), made, None)


def equal_states(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("to", CONVOLUTIONAL)
def test_swapping_a_loaded_model_is_loading_a_swapped_one(to: str) -> None:
    """Also where new tensors are computed from old ones: batchnorm -> affine folds statistics."""
    model, trained = nothing_neutral(Convolutional(), 1), nothing_neutral(Convolutional(), 2)
    survey = survey_of(model, SHAPES)
    new = swapped(model, survey, to)
    new.model.load_state_dict(new.keymap.load(trained.state_dict()))
    equal_states(new.model, swapped(trained, survey, to).model)


@pytest.mark.parametrize("to", ["rmsnorm", "dyt", "affine", "identity", "layernorm"])
def test_the_same_for_norms_of_tokens(to: str) -> None:
    model, trained = nothing_neutral(Parts(), 1), nothing_neutral(Parts(), 2)
    new = swapped(model, survey_of(model), to)
    new.model.load_state_dict(new.keymap.load(trained.state_dict()))
    equal_states(new.model, swapped(trained, survey_of(model), to).model)


def offset_survey(model: nn.Module) -> Survey:
    settings = {"eps": 1e-6, "channel_axis": -1, "features": 8, "normalized_shape": [8]}
    site = Site(
        index=0,
        kind="rmsnorm",
        paths=("0",),
        form="module",
        class_name="OnePlusWeight",
        parameters={"weight": "0.gain"},
        settings={**settings, "weight_offset": 1.0, "cast": "none"},
    )
    return Survey("Sequential", (site,), ())


def test_a_weight_that_moves_from_one_plus_weight_is_shifted() -> None:
    model = nothing_neutral(nn.Sequential(OnePlusWeight(), nn.Linear(8, 2)))
    new = swapped(model, offset_survey(model), "layernorm")
    assert Move("0.gain", "0.weight", 1.0) in new.keymap.moved
    loaded = new.keymap.load(model.state_dict())
    assert torch.equal(loaded["0.weight"], model.state_dict()["0.gain"] + 1)
    assert torch.equal(new.model.state_dict()["0.weight"], loaded["0.weight"])
    back = new.keymap.reverse(loaded)
    assert set(back) == set(model.state_dict())
    assert torch.equal(back["0.gain"], loaded["0.weight"] - 1)


def test_an_unchanged_model_has_an_empty_key_map() -> None:
    model = nothing_neutral(Convolutional())
    keymap = swapped(model, survey_of(model, SHAPES), "batchnorm").keymap
    assert not keymap
    state = model.state_dict()
    assert keymap.load(state) == keymap.reverse(state) == state


def test_tied_names_have_an_entry_each() -> None:
    model = nothing_neutral(Tied())
    keymap = swapped(model, survey_of(model, {"norm1": (2, 8, 4, 4)}), "dyt").keymap
    assert keymap.created == ("norm1.alpha", "norm2.alpha", "block.1.alpha")
    assert {"norm1.running_var", "norm2.running_var", "block.1.running_var"} <= set(keymap.dropped)
    loaded = keymap.load(model.state_dict())
    swapped(model, survey_of(model), "dyt").model.load_state_dict(loaded)


def test_reverse_undoes_load_where_nothing_is_lost() -> None:
    model = nothing_neutral(SharedWeight())
    keymap = swapped(model, survey_of(model), "dyt").keymap
    there = keymap.load(model.state_dict())
    back = keymap.reverse(there)
    assert set(back) == set(model.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_reverse_refuses_to_forget_what_was_learned() -> None:
    model = nothing_neutral(SharedWeight())
    keymap = swapped(model, survey_of(model), "dyt").keymap
    there = keymap.load(model.state_dict())
    there["norm2.alpha"] = there["norm2.alpha"] * 2
    with pytest.raises(UsageError, match=r"no place for norm2\.alpha"):
        keymap.reverse(there)


def test_reverse_names_the_keys_that_are_lost() -> None:
    model = nothing_neutral(Convolutional())
    new = swapped(model, survey_of(model, SHAPES), "groupnorm")
    with pytest.raises(UsageError, match=r"norm1\.running_mean"):
        new.keymap.reverse(new.model.state_dict())


def test_a_foreign_state_dict_is_named() -> None:
    model = nothing_neutral(Convolutional())
    keymap = swapped(model, survey_of(model, SHAPES), "affine").keymap
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"norm1.*missing.*module\."):
        keymap.load(wrapped)


class Unsaved(nn.Module):
    """A batch norm, some of whose buffers are in no state_dict. Input (N, 8, 4, 4)."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        for name in names:
            value = self.norm.get_buffer(name)
            delattr(self.norm, name)
            self.norm.register_buffer(name, value, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


STATISTICS = ("running_mean", "running_var")


@pytest.mark.parametrize("to", ["randomaggregation", "dyt", "evonorm-s0"])
@pytest.mark.parametrize("names", [STATISTICS, STATISTICS[:1]])
def test_what_needs_no_unsaved_buffer_is_loaded_without_it(to: str, names: tuple[str, ...]) -> None:
    model, trained = nothing_neutral(Unsaved(*names), 1), nothing_neutral(Unsaved(*names), 2)
    survey = survey_of(model, {"norm": (2, 8, 4, 4)})
    new = swapped(model, survey, to)
    keymap = KeyMap.from_json(json.loads(json.dumps(new.keymap.to_json())), new.plan)
    assert keymap == new.keymap and keymap.made
    new.model.load_state_dict(keymap.load(trained.state_dict()))
    equal_states(new.model, swapped(trained, survey, to).model)


@pytest.mark.parametrize("name", STATISTICS)
def test_what_is_computed_from_an_unsaved_buffer_is_named(name: str) -> None:
    """No checkpoint holds it, so the value that affine folds in is not to be had from one."""
    model = nothing_neutral(Unsaved(name))
    keymap = swapped(model, survey_of(model), "affine").keymap
    made = r"norm\.bias" if name == "running_mean" else r"norm\.bias, norm\.weight"
    with pytest.raises(UsageError, match=rf"^{made} of the new model .* norm\.{name}, .*not save"):
        keymap.load(model.state_dict())
    live = {**model.state_dict(), f"norm.{name}": model.norm.get_buffer(name)}
    loaded = keymap.load(live)
    assert torch.equal(
        loaded["norm.bias"], swapped(model, survey_of(model), "affine").model.norm.bias
    )


def test_a_missing_key_of_a_saved_buffer_is_still_missed() -> None:
    model = nothing_neutral(Unsaved("running_mean"))
    keymap = swapped(model, survey_of(model, {"norm": (2, 8, 4, 4)}), "dyt").keymap
    state = model.state_dict()
    del state["norm.running_var"]
    with pytest.raises(UsageError, match=r"norm\.running_var are missing"):
        keymap.load(state)


def test_a_key_map_survives_json() -> None:
    model = nothing_neutral(Tied())
    keymap = swapped(model, survey_of(model, {"norm1": (2, 8, 4, 4)}), "affine").keymap
    data = json.loads(json.dumps(keymap.to_json()))
    again = KeyMap.from_json(data, keymap.plan)
    assert again == keymap
    state = model.state_dict()
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.load(state).values(), keymap.load(state).values(), strict=True)
    )


# Optimizer states


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(count):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def scaled_down(model: nn.Module) -> nn.Module:
    """Random parameters of ordinary size, so that a few optimizer steps stay finite."""
    with torch.no_grad():
        for parameter in nothing_neutral(model).parameters():
            parameter.mul_(0.2)
    return model.eval()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("given", ["optimizer", "state_dict"])
def test_resuming_a_copied_model_takes_identical_steps(grouped: bool, given: str) -> None:
    model = scaled_down(Convolutional())

    def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
        if not grouped:
            return torch.optim.AdamW(net.parameters(), lr=1e-2)
        decayed = [p for p in net.parameters() if p.dim() > 1]
        others = [p for p in net.parameters() if p.dim() <= 1]
        groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed}]
        return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)

    optimizer = optimizer_of(model)
    steps(model, optimizer, 3)
    new = swapped(model, survey_of(model, SHAPES), "batchnorm")
    names = [
        [name for name, p in model.named_parameters() if p.dim() <= 1],
        [name for name, p in model.named_parameters() if p.dim() > 1],
    ]
    state = optimizer if given == "optimizer" else optimizer.state_dict()
    carried = new.keymap.optimizer_state(
        state, model, new.model, names=names if grouped and given == "state_dict" else None
    )
    resumed = optimizer_of(new.model)
    resumed.load_state_dict(carried)
    ours, theirs = steps(model, optimizer, 3), steps(new.model, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    equal_states(model, new.model)


def test_moments_follow_moved_parameters_and_new_ones_start_empty() -> None:
    model = scaled_down(Convolutional())
    optimizer = torch.optim.Adam(model.named_parameters(), lr=1e-2)
    steps(model, optimizer, 2)
    new = swapped(model, survey_of(model, SHAPES), "dyt", only=("block.*",))
    carried = new.keymap.optimizer_state(optimizer.state_dict(), model, new.model)
    by_name = dict(zip([n for n, _ in new.model.named_parameters()], range(99), strict=False))
    old = dict(zip([n for n, _ in model.named_parameters()], range(99), strict=False))
    assert by_name["block.1.alpha"] not in carried["state"]
    before = optimizer.state_dict()["state"]
    for name in ("head.weight", "block.1.weight", "norm1.bias"):
        moment = carried["state"][by_name[name]]["exp_avg"]
        assert torch.equal(moment, before[old[name]]["exp_avg"])
    resumed = torch.optim.Adam(new.model.named_parameters(), lr=1e-2)
    resumed.load_state_dict(carried)
    alpha = new.model.get_parameter("block.1.alpha").clone()
    steps(new.model, resumed, 2)
    assert not torch.equal(alpha, new.model.get_parameter("block.1.alpha"))


@pytest.mark.parametrize("to", ["batchnorm", "groupnorm", "dyt"])
@pytest.mark.parametrize("given", ["optimizer", "state_dict"])
def test_an_optimizer_in_another_order_keeps_its_order(to: str, given: str) -> None:
    """By position, as torch loads it, a group in any other order gives moments to strangers."""
    model = scaled_down(Convolutional())
    backwards = [name for name, _ in model.named_parameters()][::-1]
    optimizer = torch.optim.AdamW([model.get_parameter(name) for name in backwards], lr=1e-2)
    steps(model, optimizer, 3)
    new = swapped(model, survey_of(model, SHAPES), to)
    state = optimizer if given == "optimizer" else optimizer.state_dict()
    names = None if given == "optimizer" else [backwards]
    carried = new.keymap.optimizer_state(state, model, new.model, names=names)
    added = [name for name, _ in new.model.named_parameters() if name not in backwards]
    order = [*backwards, *added]
    resumed = torch.optim.AdamW([new.model.get_parameter(name) for name in order], lr=1e-2)
    resumed.load_state_dict(carried)
    assert bool(added) is (to == "dyt")
    for name in backwards:
        before = optimizer.state[model.get_parameter(name)]["exp_avg"]
        assert torch.equal(resumed.state[new.model.get_parameter(name)]["exp_avg"], before)
    assert not any(new.model.get_parameter(name) in resumed.state for name in added)


def test_a_computed_parameter_does_not_inherit_moments() -> None:
    """batchnorm -> affine keeps the name norm1.weight for another quantity."""
    model = scaled_down(Convolutional())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    steps(model, optimizer, 2)
    new = swapped(model, survey_of(model, SHAPES), "affine")
    carried = new.keymap.optimizer_state(optimizer, model, new.model)
    names = [name for name, _ in new.model.named_parameters()]
    assert names.index("norm1.weight") not in carried["state"]
    assert names.index("conv1.weight") in carried["state"]


def test_groups_without_names_are_refused() -> None:
    model = scaled_down(Convolutional())
    groups = [{"params": [p]} for p in model.parameters()]
    state = torch.optim.SGD(groups, lr=0.1, momentum=0.9).state_dict()
    keymap = swapped(model, survey_of(model, SHAPES), "dyt").keymap
    with pytest.raises(UsageError, match="names="):
        keymap.optimizer_state(state, model, model)


def test_frozen_parameters_outside_the_optimizer_stay_outside() -> None:
    model = scaled_down(Convolutional())
    model.norm1.requires_grad_(False)  # type: ignore[operator, union-attr]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    steps(model, optimizer, 1)
    new = swapped(model, survey_of(model, SHAPES), "dyt")
    carried = new.keymap.optimizer_state(optimizer.state_dict(), model, new.model)
    resumed = torch.optim.Adam([p for p in new.model.parameters() if p.requires_grad], lr=1e-2)
    resumed.load_state_dict(carried)
    assert not new.model.get_parameter("norm1.alpha").requires_grad
