"""What other tools get wrong when they replace norms. Each docstring describes one such failure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.sites import survey_of
from models.traps import BatchNormSubclass, Convolutional, Tied, nothing_neutral
from torch import Tensor, nn
from torch.nn import functional as F

import normsurgery as ns
from normsurgery.surgery.application import apply
from normsurgery.surgery.planning import plan
from normsurgery.treecopy import tree_copy

IMAGES = (torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1)),)
NORMS = (nn.BatchNorm2d, nn.GroupNorm)


def groupnorm(model: nn.Module, **arguments: Any) -> nn.Module:
    changed, report = ns.swap(model, "groupnorm", inputs=IMAGES, **arguments)
    assert report.plan.steps
    return changed


def kinds(model: nn.Module) -> list[str]:
    return [
        type(m).__name__
        for _, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, NORMS)
    ]


class TwoParents(nn.Module):
    """One norm in two parents."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(8)
        self.first = nn.Sequential(norm)
        self.second = nn.Sequential(nn.ReLU(), norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class TwoNames(nn.Module):
    """One norm under two names of one parent."""

    def __init__(self) -> None:
        super().__init__()
        self.before = self.after = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.relu(self.before(x)))


@pytest.mark.parametrize("make", [Tied, TwoParents, TwoNames])
def test_every_name_of_a_norm_is_replaced_by_one_object(make: type[nn.Module]) -> None:
    """composer and timm go through `named_children`, which lists a module once: the second name
    keeps the old norm. torchao makes two different norms of one. opacus skips the second name."""
    model = nothing_neutral(make())
    changed = groupnorm(model)
    assert "BatchNorm2d" not in kinds(changed)
    assert len(kinds(changed)) == len(kinds(model))
    assert len({m for m in changed.modules() if isinstance(m, nn.GroupNorm)}) == 1


def test_learned_weights_and_eps_are_not_thrown_away() -> None:
    """opacus `ModuleValidator.fix`: weight 3 becomes 1, bias 0, eps 1e-3 becomes 1e-5."""
    model = nothing_neutral(nn.Sequential(nn.BatchNorm2d(8, eps=1e-3)))
    changed = groupnorm(model)
    assert torch.equal(changed[0].weight, model[0].weight)
    assert torch.equal(changed[0].bias, model[0].bias)
    assert changed[0].eps == 1e-3


def test_an_eps_of_zero_stays_zero() -> None:
    """Liger writes `eps or eps or 1e-6`: an eps of 0 becomes another."""
    model = nothing_neutral(nn.Sequential(nn.LayerNorm(8, eps=0.0)))
    made = plan(survey_of(model), model, "layernorm")
    assert apply(tree_copy(model, clone=True), made, None).model[0].eps == 0.0


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_kept(training: bool) -> None:
    """composer and opacus: an eval model comes back with norms in train mode."""
    changed = groupnorm(nothing_neutral(TwoNames()).train(training))
    assert all(module.training is training for module in changed.modules())


def test_half_precision_is_kept() -> None:
    """composer and opacus put a float32 norm into a half-precision model."""
    model = nothing_neutral(TwoNames()).to(torch.bfloat16)
    changed, _ = ns.swap(model, "groupnorm", inputs=(IMAGES[0].to(torch.bfloat16),))
    assert {p.dtype for p in changed.parameters()} == {torch.bfloat16}


def test_frozen_norms_stay_frozen() -> None:
    """composer: requires_grad is True again where it was switched off."""
    changed = groupnorm(nothing_neutral(TwoNames()).requires_grad_(False))
    assert not any(p.requires_grad for p in changed.parameters())


def test_a_subclass_that_changes_nothing_is_replaced() -> None:
    """opacus compares `type(x) in FIXERS`, and leaves a subclass in the model without a word."""
    assert kinds(groupnorm(nn.Sequential(BatchNormSubclass(8)))) == ["GroupNorm"]


def test_a_norm_without_affine_parameters_is_replaced_without_them() -> None:
    """opacus skips `affine=False`, since the module is not "trainable"; others add a weight."""
    changed = groupnorm(nn.Sequential(nn.BatchNorm2d(8, affine=False)))
    assert kinds(changed) == ["GroupNorm"]
    assert not list(changed.parameters())


def test_a_model_that_is_itself_a_norm_is_replaced() -> None:
    """composer goes through children only: 0 replaced, no message."""
    assert isinstance(groupnorm(nothing_neutral(nn.BatchNorm2d(8))), nn.GroupNorm)


def test_a_hook_on_a_norm_is_neither_lost_nor_an_error() -> None:
    """composer and SyncBatchNorm.convert lose it; opacus copies by torch.save and fails on it."""
    model = nothing_neutral(TwoNames())
    seen: list[torch.Size] = []
    model.before.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    changed = groupnorm(model, only=("before",))
    seen.clear()
    changed(*IMAGES)
    assert seen == [IMAGES[0].shape] * 2


class NormAndActivation(nn.BatchNorm2d):
    """Batch norm fused with its activation in one class, as timm writes it."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.act = nn.SiLU()
        self.drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            self.momentum or 0.0,
            self.eps,
        )
        return self.act(self.drop(x))


def test_the_activation_inside_a_norm_is_not_dropped() -> None:
    """composer and SyncBatchNorm.convert replace timm's BatchNormAct2d whole: 49 activations
    become 16, and the output is off by 1e6. opacus leaves it in, and calls the model valid."""
    model = nothing_neutral(nn.Sequential(nn.Conv2d(8, 8, 1), NormAndActivation(8)))
    changed = groupnorm(model)
    calls: list[int] = []
    changed[1].act.register_forward_hook(lambda *_: calls.append(1))
    y = changed(*IMAGES)
    assert calls == [1]
    assert type(changed[1]).__name__ == "NormAndActivation" and kinds(changed[1])[-1] == "GroupNorm"
    normed = changed[1].get_submodule("norm_0")(changed[0](*IMAGES))
    assert torch.equal(y, F.silu(normed))


def test_swapping_such_a_norm_to_itself_changes_nothing() -> None:
    """SyncBatchNorm.convert must be the identity in eval mode, and is off by 1e5 to 2e9."""
    model = nothing_neutral(nn.Sequential(nn.Conv2d(8, 8, 1), NormAndActivation(8))).eval()
    changed, report = ns.swap(model, "batchnorm", inputs=IMAGES)
    assert report.passed and torch.equal(changed(*IMAGES), model(*IMAGES))
    assert set(model[1].state_dict()) != set(changed[1].state_dict())


class FunctionalOnModule(nn.Module):
    """Calls F.batch_norm with the tensors of a module that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training)


def test_a_functional_norm_on_a_modules_tensors_still_runs() -> None:
    """opacus and composer replace the module, and the first forward fails: no running_mean."""
    model = nothing_neutral(nn.Sequential(nn.Conv2d(8, 8, 1), FunctionalOnModule()))
    changed, report = ns.swap(model, "groupnorm", inputs=IMAGES)
    norms = [m for m in changed.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == len(report.plan.steps) == 1
    bn = model[1].bn
    expected = F.group_norm(model[0](*IMAGES), norms[0].num_groups, bn.weight, bn.bias)
    assert torch.equal(changed(*IMAGES), expected)


def test_several_kinds_in_one_model_do_not_disturb_each_other() -> None:
    """opacus `fix(replace_bn_with_in=True)` on a model with an InstanceNorm: TypeError, since the
    option goes to every fixer."""
    model = nothing_neutral(
        nn.Sequential(nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(2, 8))
    )
    changed, _ = ns.swap(
        model,
        rules=["batchnorm -> groupnorm num_groups=2", "instancenorm -> layernorm2d"],
        inputs=IMAGES,
    )
    assert isinstance(changed[0], nn.GroupNorm) and changed[0].num_groups == 2
    assert not isinstance(changed[1], nn.InstanceNorm2d)
    assert isinstance(changed[2], nn.GroupNorm)
    assert torch.equal(changed[2].weight, model[2].weight)


def test_one_value_per_group_is_refused() -> None:
    """opacus #567: BatchNorm1d(4) -> GroupNorm(4, 4) on (N, 4): every output is beta."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    changed, _ = ns.swap(model, "groupnorm", inputs=(torch.randn(8, 4),))
    with torch.no_grad():
        y = changed(torch.randn(8, 4))
    assert changed[1].num_groups == 1
    assert bool((y.std(0) > y.abs().mean() * 0.01).all())
    with pytest.raises(ns.NormsurgeryError, match="constant"):
        ns.swap(model, "groupnorm", options={"num_groups": 4}, inputs=(torch.randn(8, 4),))


def test_a_branch_that_is_never_taken_keeps_working() -> None:
    """A walker that traces replaces only what ran; a norm behind a flag is left behind."""

    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.flag = False

        def forward(self, x: Tensor) -> Tensor:
            return self.unused(x) if self.flag else self.used(x)

    model = nothing_neutral(Flagged())
    _, report = ns.swap(model, "layernorm2d", inputs=IMAGES)
    assert {step.site.path for step in report.plan.steps} == {"used", "unused"}


def test_names_of_classes_do_not_matter() -> None:
    """Tools that look for "norm" in a class name replace a head and miss a renamed norm."""
    model = nothing_neutral(Convolutional())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = type("Zq", (type(module),), {"__module__": "zq"})
    changed, _ = ns.swap(model, "groupnorm", inputs=(torch.randn(2, 3, 8, 8),))
    assert sum(isinstance(m, nn.GroupNorm) for m in changed.modules()) == 2


class LendsItsTensors(nn.Module):
    """As above, with more in its forward than the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        y = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training)
        return y.relu()


def test_a_module_that_lent_its_tensors_can_be_printed_and_says_so_when_called() -> None:
    """Its tensors are gone: printing it failed in extra_repr, and a call would have run without."""
    model = nothing_neutral(LendsItsTensors())
    changed, _ = ns.swap(model, "groupnorm", inputs=IMAGES)
    assert "GroupNorm" in repr(changed) and "its tensors moved" in repr(changed)
    with pytest.raises(ns.NormsurgeryError, match="empty"):
        changed.bn(*IMAGES)
    assert changed.bn.eps == model.bn.eps
    left = {n for n, t in changed.bn.state_dict().items() if t.is_floating_point()}
    assert not left
