"""measure(): what a plan promised is measured, and a promise that is too high is not kept."""

import pytest
import torch
from torch import Tensor, nn

from normsurgery.errors import CannotTrace
from normsurgery.inputs import Inputs
from normsurgery.plan import Plan
from normsurgery.spec import Fidelity
from normsurgery.steps import Swap
from normsurgery.survey import Site
from normsurgery.treecopy import tree_copy
from normsurgery.verify import measure
from normsurgery.verify.promise import relative_change


class Net(nn.Module):
    """Two norms between linears; `double` is called twice, `unused` never."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 12)
        self.batch = nn.BatchNorm1d(12)
        self.layer = nn.LayerNorm(12)
        self.unused = nn.LayerNorm(12)
        self.last = nn.Linear(12, classes)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape) + 1)
            self.batch.running_mean.copy_(torch.randn(12))
            self.batch.running_var.copy_(torch.rand(12) + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(torch.relu(self.batch(self.first(x)))))


class Affine(nn.Module):
    """The batch norm of eval mode, in both modes."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        with torch.no_grad():
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            shift = norm.bias.double() - norm.running_mean.double() * scale
        self.scale = nn.Parameter(scale.float())
        self.shift = nn.Parameter(shift.float())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class OtherGradient(nn.Module):
    """The same outputs as the norm inside, half the gradient."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y.detach() + (y - y.detach()) / 2


class Formula(nn.Module):
    """The LayerNorm again, summed in another order; its parameters have other names."""

    def __init__(self, norm: nn.LayerNorm, unbiased: bool = False) -> None:
        super().__init__()
        self.scale, self.shift = norm.weight, norm.bias
        self.eps, self.unbiased = norm.eps, unbiased

    def forward(self, x: Tensor) -> Tensor:
        variance = x.var(-1, keepdim=True, unbiased=self.unbiased)
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(variance + self.eps) * self.scale + self.shift


RENAMED = {"layer.weight": "layer.scale", "layer.bias": "layer.shift"}


def changed(**replaced) -> Net:
    net = tree_copy(Net(), clone=True)
    for name, make in replaced.items():
        setattr(net, name, make(getattr(net, name)))
    return net


def plan_of(**promises: Fidelity) -> Plan:
    steps = []
    for index, (path, promise) in enumerate(promises.items()):
        kind = {"batch": "batchnorm"}.get(path, "layernorm")
        site = Site(index, kind, (path,), "module", "Norm", {}, {"eps": 1e-5})
        steps.append(Swap(site, "affine", {}, promise))
    return Plan("Net", tuple(steps))


def inputs(batch: int = 4) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return Inputs((torch.randn(batch, 6, generator=generator),))


IDENTICAL, FORWARD = Fidelity.IDENTICAL, Fidelity.FORWARD
EVAL, RETRAIN = Fidelity.EVAL, Fidelity.RETRAIN


@pytest.mark.parametrize("promise", (IDENTICAL, FORWARD, EVAL))
def test_a_copy_keeps_every_promise_bit_for_bit(promise):
    evidence = measure(Net(), changed(), plan_of(batch=promise), inputs())
    assert evidence.passed and evidence.promise == promise.name
    assert all(c.verdict.same_bits for c in evidence.comparisons)
    modes = {c.mode for c in evidence.comparisons}
    assert modes == ({"eval", "train"} if promise >= FORWARD else {"eval"})
    assert {c.run for c in evidence.comparisons} >= {"plain"}


@pytest.mark.parametrize(
    ("replaced", "kept"),
    [
        ({"batch": Affine}, EVAL),
        ({"layer": OtherGradient}, FORWARD),
        ({"layer": Formula}, IDENTICAL),
        ({"layer": lambda norm: Formula(norm, unbiased=True)}, RETRAIN),
        ({"batch": lambda norm: nn.Identity()}, RETRAIN),
    ],
    ids=["affine", "gradient", "formula", "unbiased", "identity"],
)
def test_the_measured_fidelity_is_exactly_what_the_change_keeps(replaced, kept):
    """A promise that is too high is broken; the highest that is kept is measured as kept."""
    (path,) = replaced
    for promise in (EVAL, FORWARD, IDENTICAL):
        evidence = measure(
            Net(), changed(**replaced), plan_of(**{path: promise}), inputs(), names=RENAMED
        )
        assert evidence.passed == (promise <= kept), f"{promise.name}: {evidence}"
    drifting = measure(Net(), changed(**replaced), plan_of(**{path: RETRAIN}), inputs())
    assert drifting.passed and not drifting.comparisons and drifting.drifts


def test_renamed_parameters_are_compared_through_the_names():
    def doubled(norm: nn.LayerNorm) -> nn.Module:
        formula = Formula(norm)
        formula.scale.register_hook(lambda gradient: gradient * 2)
        return formula

    plan = plan_of(layer=IDENTICAL)
    evidence = measure(Net(), changed(layer=Formula), plan, inputs(), names=RENAMED)
    assert "gradient of layer.weight" in {c.quantity for c in evidence.comparisons}
    without = measure(Net(), changed(layer=Formula), plan, inputs())
    assert "gradient of layer.weight" not in {c.quantity for c in without.comparisons}
    assert "gradient of first.weight" in {c.quantity for c in without.comparisons}


def test_statistics_are_part_of_what_identical_means():
    def slower(norm: nn.BatchNorm1d) -> nn.Module:
        norm.momentum = 0.2
        return norm

    evidence = measure(Net(), changed(batch=slower), plan_of(batch=IDENTICAL), inputs())
    failed = {c.quantity for c in evidence.comparisons if c.verdict.passed is False}
    assert failed == {"statistic batch.running_mean", "statistic batch.running_var"}
    assert measure(Net(), changed(batch=slower), plan_of(batch=EVAL), inputs()).passed


def test_the_model_is_held_to_the_least_promise_and_each_part_to_its_own():
    plan = plan_of(batch=RETRAIN, layer=IDENTICAL)

    def without_norm(norm: nn.Module) -> nn.Module:
        return nn.Identity()

    good = measure(Net(), changed(batch=without_norm, layer=Formula), plan, inputs(), names=RENAMED)
    assert good.passed and good.promise == "RETRAIN" and good.drifts
    assert {c.where for c in good.comparisons} == {"layer"}
    assert "gradient of weight" in {c.quantity for c in good.comparisons}
    bad = changed(batch=without_norm, layer=lambda norm: Formula(norm, unbiased=True))
    broken = measure(Net(), bad, plan, inputs(), names=RENAMED)
    assert not broken.passed
    assert {c.where for c in broken.comparisons if c.verdict.passed is False} == {"layer"}


def test_a_part_that_the_run_never_calls_is_said_to_be_unmeasured():
    plan = plan_of(batch=RETRAIN, unused=IDENTICAL)
    evidence = measure(Net(), changed(batch=Affine), plan, inputs())
    assert {item.where for item in evidence.left_out} == {"unused"}
    assert not any(c.where == "unused" for c in evidence.comparisons)


def test_drift_is_measured_against_the_original():
    def halved(linear: nn.Linear) -> nn.Linear:
        with torch.no_grad():
            linear.weight.mul_(0.5)
            linear.bias.mul_(0.5)
        return linear

    evidence = measure(Net(), changed(last=halved), plan_of(layer=RETRAIN), inputs())
    assert evidence.passed and "outputs change" in str(evidence)
    for drift in evidence.drifts:
        assert drift.relative == 0.5, "half of everything is gone, exactly"
        assert drift.top1 == 1.0, "scaling keeps the largest logit"


def test_top1_disagreement_is_counted_per_sample():
    def negated(linear: nn.Linear) -> nn.Linear:
        with torch.no_grad():
            linear.weight.neg_()
            linear.bias.neg_()
        return linear

    evidence = measure(Net(), changed(last=negated), plan_of(layer=RETRAIN), inputs())
    assert all(d.top1 == 0.0 and d.relative == 2.0 for d in evidence.drifts)


class Language(nn.Module):
    """(N, L, vocabulary) scores, and hidden states that are no scores."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(30, hidden), nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, 30)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(self.embed(ids))
        return self.head(h), h


def test_top1_is_given_where_the_output_is_scores_over_a_vocabulary():
    ids = Inputs((torch.tensor([[3, 4, 5]]),))
    evidence = measure(Language(), Language(), plan_of(norm=RETRAIN), ids)
    by_output = {drift.output: drift.top1 for drift in evidence.drifts}
    assert by_output == {"0": 1.0, "1": None}
    assert {d.case for d in evidence.drifts} == {"example", "random ids"}


def test_a_changed_model_that_is_not_finite_or_does_not_run_breaks_any_promise():
    class Infinite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    for bad in (Infinite(), Broken()):
        net = changed(layer=lambda norm, bad=bad: bad)
        for promise in (RETRAIN, EVAL):
            assert not measure(Net(), net, plan_of(layer=promise), inputs()).passed


def test_train_mode_at_batch_one_is_not_applicable_where_the_original_refuses():
    evidence = measure(Net(), changed(), plan_of(batch=IDENTICAL), inputs(batch=1))
    assert evidence.passed
    reasons = {i.case: i.reason for i in evidence.left_out if i.mode == "train"}
    assert "more than 1 value" in reasons["example"]
    trained = {c.case for c in evidence.comparisons if c.mode == "train"}
    assert "batch 2" in trained and "example" not in trained


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.4, training=True)


def test_random_models_draw_the_same_on_both_sides():
    net = changed(batch=lambda norm: nn.Sequential(norm, Random()))
    again = changed(batch=lambda norm: nn.Sequential(norm, Random()))
    evidence = measure(net, again, plan_of(batch=IDENTICAL), inputs())
    assert evidence.passed
    assert all(c.verdict.same_bits for c in evidence.comparisons)


def test_inputs_the_original_does_not_take_are_an_error_that_says_so():
    with pytest.raises(CannotTrace, match=r"Net does not run on .*float32\[3, 7\]"):
        measure(Net(), changed(), plan_of(batch=EVAL), Inputs((torch.randn(3, 7),)))


def test_relative_change():
    ones = torch.ones(4)
    assert relative_change(ones, ones) == 0.0
    assert relative_change(ones, ones * 1.5) == 0.5
    assert relative_change(ones * 0, ones * 0) == 0.0
    assert relative_change(ones * 0, ones) == 1.0
    assert relative_change(ones, ones / 0) == float("inf")
