"""Rewriting one forward: every form of owner, swapped to itself, does what it did."""

from __future__ import annotations

import copy
import inspect
import io
import linecache
import traceback

import pytest
import torch
from models.owner_sites import (
    converted,
    inner_forward,
    rewritten,
    same,
    site,
    swap_to_itself,
    unsettled,
)
from models.owners import (
    CALL,
    ONE,
    OWNERS,
    Affine,
    C,
    Counter,
    Decorated,
    IfTraining,
    NoneDefault,
    PrivateNames,
    ran_decorators,
    x,
)
from torch import nn
from torch.nn import functional as F

from normsurgery.errors import NormsurgeryError
from normsurgery.flow import positions
from normsurgery.rewriting.owner import Placement, reapply, restore, rewrite_owner


@pytest.mark.parametrize("label", OWNERS)
def test_owner_swapped_to_itself_is_unchanged(label):
    """Prototype A1: traced owners lost modes, None arms, attributes, and their class."""
    cls, output, origin, calls = OWNERS[label]
    owner = unsettled(cls())
    owner.register_forward_hook(lambda module, args, result: None)
    swapped = swap_to_itself(owner, [site(owner, output, **origin)], calls)
    assert set(dict(swapped.named_parameters())) == {
        "fc.weight",
        "fc.bias",
        "norm_0.weight",
        "norm_0.bias",
    }
    assert swapped.fc.weight.shape == owner.fc.weight.shape
    assert len(swapped._forward_hooks) == 1
    assert not ran_decorators[1:]


@pytest.mark.parametrize("label", OWNERS)
def test_another_norm_is_really_used(label):
    """A rewrite that leaves the old expression in place would pass every identity test."""
    cls, output, origin, calls = OWNERS[label]
    owner = unsettled(cls())
    found = site(owner, output, **origin)

    class Seven(nn.Module):
        def forward(self, value):
            self.seen = value.shape
            return torch.full_like(value, 7.0)

    seven = Seven()
    rewrite_owner(owner, [Placement(found, "norm_0", seven)], calls)
    owner(*calls[0].args)
    assert seven.seen == (2, 5, C)
    assert "weight" not in dict(owner.named_parameters())
    restore(owner)
    assert type(owner) is cls
    with pytest.raises(AttributeError):
        owner(*calls[0].args)


def test_an_argument_that_no_recorded_call_gave_is_there():
    """A forward made from what ran alone would lack the mask, and raise on the first call of it."""
    owner = unsettled(NoneDefault())
    found = site(owner, CALL, name="h")
    swapped = copy.deepcopy(owner)
    rewrite_owner(swapped, [Placement(found, "norm_0", converted(swapped, found))], ONE)
    same(owner(x(), mask=x()), swapped(x(), mask=x()))
    same(owner(x(), x()), swapped(x(), x()))
    assert inspect.signature(type(swapped).forward) == inspect.signature(NoneDefault.forward)


# ---------------------------------------------------------------- what a rewritten owner is


def test_reapply_needs_no_inputs():
    """On load the plan alone must give the same model."""
    owner, found, swapped = rewritten()
    fresh = unsettled(IfTraining())
    reapply(fresh, [Placement(found, "norm_0", converted(fresh, found))])
    fresh.load_state_dict(swapped.state_dict())
    same(fresh.eval()(x()), swapped.eval()(x()))
    same(fresh.eval()(x()), owner.eval()(x()))


def test_pickle_is_refused_and_copies_work():
    """Prototype A10: a pickled rewritten owner came back as the old model, without a word."""
    _, _, swapped = rewritten()
    with pytest.raises(NormsurgeryError, match="artefacts"):
        torch.save(swapped, io.BytesIO())
    with pytest.raises(NormsurgeryError, match="artefacts"):
        torch.save(nn.Sequential(swapped), io.BytesIO())
    shallow = copy.copy(swapped)
    assert shallow.fc is swapped.fc
    deep = copy.deepcopy(nn.Sequential(swapped, swapped))
    assert deep[0] is deep[1]
    assert deep[0] is not swapped
    same(deep[0].eval()(x()), swapped.eval()(x()))


@pytest.mark.parametrize("label", ["if self.training", "decorators", "closure"])
def test_rewritten_owners_compile_and_export(label):
    """A forward made in a way the compiler does not follow would break the graph at every norm."""
    cls, output, origin, _ = OWNERS[label]
    owner = unsettled(cls())
    found = site(owner, output, **origin)
    swapped = swap_to_itself(owner, [found], ONE).eval()
    expected = swapped(x())
    compiled = torch.compile(swapped, fullgraph=True, backend="aot_eager")
    same(expected, compiled(x()))
    torch._dynamo.reset()
    if label != "decorators":  # its wrapper counts calls in a cell, which export refuses
        same(expected, torch.export.export(swapped, (x(),)).module()(x()))


def test_restore_gives_the_class_back():
    """`undo` puts the very class back."""
    _, _, swapped = rewritten()
    restore(swapped)
    assert type(swapped) is IfTraining


def test_another_instance_is_untouched():
    """The class is shared: only this instance may change."""
    before = IfTraining.forward
    rewritten()
    assert IfTraining.forward is before


def test_getsource_and_tracebacks_show_the_new_forward():
    """Generated code without source cannot be debugged, nor found again."""
    _, found, swapped = rewritten(Decorated, name="h")
    function = inner_forward(type(swapped))
    assert "self.norm_0(h)" in inspect.getsource(function)
    assert positions.source_hash(function) != found.call.source_hash
    assert positions.function_name(function, type(swapped)) == found.call.function
    linecache.checkcache()
    try:
        swapped("no tensor")
    except TypeError:
        shown = traceback.format_exc()
    assert "self.fc(x) * scale" in shown


def test_attributes_read_at_run_time_stay_live():
    """Prototype A1: a traced forward keeps the scale it was traced with."""
    _, _, swapped = rewritten(PrivateNames, name="h")
    before = swapped.fc.weight.detach().clone()
    seen = []
    swapped.norm_0.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    swapped(x())
    swapped._PrivateNames__factor = 3.0
    swapped(x())
    assert torch.equal(seen[1], swapped.fc(x()) * 3.0)
    assert torch.equal(before, swapped.fc.weight)


def test_a_parameter_that_other_code_reads_stays():
    """Deleting it would break `regularisation`; keeping it in silence would be an orphan."""

    class Shared(Affine):
        def regularisation(self):
            return self.weight.square().sum()

        def forward(self, x):
            h = self.fc(x)
            return F.layer_norm(h, (C,), self.weight, self.bias, 1e-5)

    owner = unsettled(Shared())
    found = site(owner, CALL, name="h")
    rewriting = rewrite_owner(owner, [Placement(found, "norm_0", converted(owner, found))], ONE)
    assert rewriting.moved == ("bias",)
    assert "regularisation" in rewriting.kept["weight"]
    owner.regularisation()


def test_the_owner_is_as_it_was_after_the_proof():
    """Prototype A1: running the user's forward on the live object left its marks there."""
    owner = unsettled(Counter())
    state = torch.get_rng_state()
    found = site(owner, OWNERS["counter attribute"][1], origin="self.last")
    norm = converted(owner, found)
    rewrite_owner(owner, [Placement(found, "norm_0", norm)], ONE)
    assert owner.n == 0
    assert owner.last is None
    assert owner.norm_0 is norm
    assert torch.equal(state, torch.get_rng_state())


def test_a_second_rewrite_of_one_owner():
    """A swapped owner is found and swapped again: its new source is where its forward is."""
    inner = "F.layer_norm(h, (C,), self.weight, self.bias, 1e-5)"

    class Both(Affine):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(C))

        def forward(self, x, **kwargs):
            h = self.fc(x)
            h = F.layer_norm(h, (C,), self.weight, self.bias, 1e-5)
            return F.layer_norm(h + x, (C,), self.gain)

    owner = unsettled(Both())
    once = swap_to_itself(owner, [site(owner, inner, name="h")], ONE)
    last = "F.layer_norm(h + x, (C,), self.gain)"
    found = site(once, last, origin="h + x", parameters={"weight": "gain"})
    rewrite_owner(once, [Placement(found, "norm_1", converted(once, found))], ONE)
    same(owner(x()), once(x()))
    assert [name for name, _ in once.named_children()] == ["fc", "norm_0", "norm_1"]
    restore(once)
    assert type(once) is Both
