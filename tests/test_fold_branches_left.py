"""Branches that look like one layer and are used in some other way too: left alone, with a reason.

Whatever becomes of them, the folded model computes what the original does, on any batch.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.find import locate
from normsurgery.fold.branch_surroundings import Merging
from normsurgery.fold.checks import Check
from normsurgery.fold.ground import Choices, Ground, Refused
from normsurgery.fold.parallel_branches import Apart, BranchSum
from normsurgery.fold.rules import into_producer
from normsurgery.inputs import Inputs
from normsurgery.norms.examples import randomised
from normsurgery.steps import Merge
from normsurgery.surgery.references import ModuleReferences

torch.set_num_threads(1)


def images(batch: int, seed: int = 1) -> Tensor:
    return torch.randn(
        batch, 4, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    return randomised(model.double().eval(), seed).double().eval()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ident = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.ident(x) + self.conv(x)


class ByBatch(Inner):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 5:
            return self.conv(x)
        return self.ident(x) + self.conv(x)


class ConditionInside(nn.Module):
    """The module that a branch is in goes another way for some batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.bn = ByBatch(), nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return (self.inner(x) + self.bn(self.conv(x))).relu()


class Parent(nn.Module):
    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block or Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.relu()).relu()


class ReadsDtype(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.relu().to(self.block.conv.weight.dtype)).relu()


class ReadsDtypeOfNorm(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.relu().to(self.block.ident.weight.dtype)).relu()


class ReadsInMethod(Parent):
    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.block.conv.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.cast(x.relu())).relu()


class WithDtype(Inner):
    @property
    def dtype(self) -> torch.dtype:
        return self.conv.weight.dtype


class ReadsProperty(Parent):
    """The property of another module reads it."""

    def __init__(self) -> None:
        super().__init__(WithDtype())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.relu().to(self.block.dtype)).relu()


class CountsParameters(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.relu()).relu() / sum(p.numel() for p in self.block.parameters())


class TakesFirstParameter(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.relu().to(next(self.parameters()).dtype)).relu()


class AsksForClass(Parent):
    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x.relu())
        return y.relu() if isinstance(self.block.conv, nn.Conv2d) else y


class ComputesWithNorm(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.relu()).relu() * self.block.ident.weight.mean()


class CallsInAnotherArm(Parent):
    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        if x.shape[0] == 3:
            return self.block.conv(x).relu()
        return self.block(x).relu()


class CallsNormInAnotherArm(Parent):
    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        if x.shape[0] == 3:
            return self.block.ident(x).relu()
        return self.block(x).relu()


class AddsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.c(x))
        return (y + y).relu()


class TwoBlocks(nn.Module):
    """The norms of the input have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Inner(), Inner()
        self.b.ident.weight = self.a.ident.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.relu()).relu()).relu()


def tied_to_a_norm() -> nn.Module:
    model = nn.Sequential(nn.ReLU(), Inner(), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    model[3].weight = model[1].ident.weight
    return model


def tied_to_a_bias() -> nn.Module:
    model = nn.Sequential(nn.ReLU(), Inner(), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model[3].bias = model[1].ident.bias
    return model


def tied_to_a_group_norm() -> nn.Module:
    model = nn.Sequential(nn.ReLU(), Inner(), nn.ReLU(), nn.GroupNorm(2, 4), nn.ReLU())
    model[3].weight = model[1].ident.weight
    return model


class SecondName(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.alias = self.block.ident


class HeldInList(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.held = [self.block.ident]


class References(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.references = modules
        self.p = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.references[0](x) + self.references[1](x)


class HeldElsewhere(nn.Module):
    """The module that adds the branches up holds them in a plain tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.o = nn.ModuleDict({"bn": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 4, 1)})
        self.block = References(self.o.bn, self.o.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.relu()).relu()


class NormInFrontOfLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n, self.pre, self.c = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return (self.n(x) + self.c(self.pre(x))).relu()


class NormInFrontOfNorm(NormInFrontOfLayer):
    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return (self.n(self.pre(x)) + self.c(x)).relu()


class NormInFrontOfTwo(NormInFrontOfLayer):
    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        p = self.pre(x)
        return (self.n(x) + self.c(p) + self.d(p)).relu()


class NormInFrontOfMore(NormInFrontOfTwo):
    """What the norm gives is read outside the sum too."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        p = self.pre(x)
        return (self.n(x) + self.c(p)).relu() * self.d(p).relu()


NOT_REWRITABLE = Check.NOT_REWRITABLE.value
TIED = Check.TIED.value
READS = f"{NOT_REWRITABLE}: the model itself reads self.block."
# Model -> how the reason begins why its branches stay apart.
TWO_NAMES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two blocks": (TwoBlocks, f"{TIED}: b.ident.weight has another name too"),
    "a tied norm": (tied_to_a_norm, f"{TIED}: 1.ident.weight has another name too"),
    "a tied bias": (tied_to_a_bias, f"{TIED}: 1.ident.bias has another name too"),
    "a tied group norm": (tied_to_a_group_norm, f"{TIED}: 1.ident.weight has another name too"),
}
LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    **TWO_NAMES,
    "a dtype of the norm": (
        ReadsDtypeOfNorm,
        f"{NOT_REWRITABLE}: block.ident: the model itself reads self.block.ident.weight.dtype",
    ),
    "a count": (CountsParameters, f"{READS}parameters in CountsParameters.forward"),
    "the norm's weight": (ComputesWithNorm, f"{TIED}: block.ident.weight is read by mul as well"),
    "a second name": (SecondName, f"{TIED}: block.ident.weight has another name too"),
    "a list": (HeldInList, f"{NOT_REWRITABLE}: it is also held by held, outside the module tree"),
    "a tuple": (
        HeldElsewhere,
        f"{NOT_REWRITABLE}: it is also held by block.references, outside the module tree",
    ),
}
# Not the example but another batch tells that these must stay apart.
BY_BATCH: dict[str, Callable[[], nn.Module]] = {
    "a condition inside": ConditionInside,
    "another arm": CallsInAnotherArm,
    "the norm in another arm": CallsNormInAnotherArm,
}
TOGETHER: dict[str, Callable[[], nn.Module]] = {
    "a norm in front of a layer": NormInFrontOfLayer,
    "a norm in front of a norm": NormInFrontOfNorm,
    "a norm in front of two": NormInFrontOfTwo,
    "read outside the sum": NormInFrontOfMore,
    "the first parameter": TakesFirstParameter,
    # The convolution that the sum goes into is still there.
    "a dtype": ReadsDtype,
    "a method": ReadsInMethod,
    "a property": ReadsProperty,
    "a class": AsksForClass,
}
EVERY: dict[str, Callable[[], nn.Module]] = {
    **{name: make for name, (make, _) in LEFT.items()},
    **BY_BATCH,
    **TOGETHER,
    "itself": AddsItself,
}


@pytest.mark.parametrize("name", EVERY)
def test_it_computes_what_the_original_does_on_any_batch(name: str) -> None:
    model = ready(EVERY[name]())
    done, report = ns.fold(model, inputs=(images(2),))
    assert report.passed
    for batch in (1, 2, 3, 5):
        x = images(batch, seed=batch)
        with torch.no_grad():
            wanted, made = model(x), done(x)
        assert float((made - wanted).abs().max() / wanted.abs().max()) < 1e-9
    merged = any(isinstance(step, Merge) for step in report.plan.steps)
    assert merged == (name in TOGETHER)


@pytest.mark.parametrize("name", EVERY)
def test_a_second_fold_finds_nothing(name: str) -> None:
    x = images(2)
    done, _ = ns.fold(ready(EVERY[name]()), inputs=(x,), verify=False)
    assert ns.fold(done, inputs=(x,), verify=False)[1].plan.steps == ()


@pytest.mark.parametrize("name", EVERY)
def test_a_checkpoint_of_the_original_is_one_of_the_folded(name: str) -> None:
    """What the map makes of a state_dict is what folding that model makes."""
    x = images(2)
    model, other = (ready(EVERY[name](), seed) for seed in (0, 7))
    done, report = ns.fold(model, inputs=(x,), verify=False)
    loaded = report.keymap.load(model.state_dict())
    wanted = done.state_dict()
    assert set(loaded) == set(wanted)
    assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)
    done.load_state_dict(report.keymap.load(other.state_dict()))
    with torch.no_grad():
        assert float((done(x) - other(x)).abs().max()) < 1e-9


@pytest.mark.parametrize("name", LEFT)
def test_the_branches_stay_apart_for_this_reason(name: str) -> None:
    make, reason = LEFT[name]
    _, apart = sums_of(ready(make()))
    assert apart
    assert apart[0].reason.startswith(reason)
    assert all(left.identities for left in apart)


def test_what_is_added_to_itself_is_no_sum_of_branches() -> None:
    assert sums_of(ready(AddsItself())) == ([], [])


def sums_of(model: nn.Module) -> tuple[list[BranchSum], list[Apart]]:
    """After the norms behind a layer are gone into it."""
    choices = Choices()
    ground = Ground(locate(model, Inputs((images(2),))), choices)
    for site in ground.located.survey:
        try:
            into_producer(ground, site, ground.runs[site.index])
        except Refused:
            continue
        ground.gone.update({run.end: run.start for run in ground.runs[site.index]})
    chosen = {site.index for site in ground.located.survey}
    return Merging(ground, model, ModuleReferences(model)).sums(chosen, {})
