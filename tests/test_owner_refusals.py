"""Rewriting one forward is refused, with the reason, where it would not be faithful."""

from __future__ import annotations

import dataclasses
import textwrap

import pytest
import torch
from models.owner_sites import refusal, site, swap_to_itself, unsettled
from models.owners import CALL, ONE, Affine, C, IfTraining
from torch import nn
from torch.nn import functional as F

from normsurgery.errors import CannotRewrite
from normsurgery.flow import positions
from normsurgery.rewriting.owner import Placement, reapply
from normsurgery.survey import CallSite, Origin

# ------------------------------------------- what a trace would freeze or lose, and source keeps

SCALE = 2.0
HOSTILE = {
    "an attribute": "h = h * self.p",
    "a global value": "h = h * SCALE",
    "a context": "with torch.no_grad():\n        h = h * 2",
    "a helper": "h = free_norm(h, h[0, 0], h[0, 0])",
    "an augmented assignment": "h += 1",
    "an attribute assignment": "self.last = h",
    "an item assignment": "h[0] = 1.0",
    "a loop": "for _ in range(2):\n        h = h * 2",
    "a comprehension": "h = sum([h for _ in range(2)])",
    "a test on data": "if h.sum() > 0:\n        h = h * 2",
    "a test on a shape": "if h.dim() == 3:\n        h = h * 2",
    "a test that proxies fail": "h = h * 2 if torch.is_tensor(h) else h",
    "an identity of a result": "h = h * 2 if h is not None else h",
    "a random constant": "h = h + torch.rand(C)",
    "a builtin": "h = h * len(h)",
    "a child that is asked": "h = h * 2 if self.fc.training else h",
    "a string": "h = h * (2 if f'{h}' else 3)",
}


def forward_with(tmp_path, line: str) -> type:
    """An owner whose forward has this line, with source on disk."""
    norm = "F.layer_norm(h, (C,), self.weight, self.bias, 1e-5)"
    text = f"class Hostile(Affine):\n  def forward(self, x):\n    h = self.fc(x)\n    {line}\n"
    path = tmp_path / "hostile.py"
    path.write_text(f"{text}    return {norm}\n")
    namespace = {**globals(), "__name__": "hostile"}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace["Hostile"], norm


@pytest.mark.parametrize("what", HOSTILE)
def test_what_else_a_forward_does_is_kept(what, tmp_path):
    """Prototype A1: each of these is silently frozen, lost or fails when a forward is traced."""
    cls, norm = forward_with(tmp_path, HOSTILE[what])
    owner = unsettled(cls())
    swap_to_itself(owner, [site(owner, norm, name="h")], ONE)


# ---------------------------------------------------------------- refused, with the reason


def free_norm(value, weight, bias):
    value = value * 1
    return F.layer_norm(value, (C,), weight, bias, 1e-5)


def free_more(value, weight, bias):
    return F.layer_norm(value, (C,), weight, bias, 1e-5) * 2


class FreeFunction(Affine):
    def forward(self, x):
        return free_norm(self.fc(x), self.weight, self.bias)


class FreeFunctionMore(Affine):
    def forward(self, x):
        return free_more(self.fc(x), self.weight, self.bias)


class InLambda(Affine):
    def forward(self, x):
        norm = lambda v: F.layer_norm(v, (C,), self.weight, self.bias, 1e-5) * 2  # noqa: E731
        return norm(self.fc(x))


class TwoInOne(Affine):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(C)) for _ in range(2)])

    def forward(self, x):
        for weight in self.weights:
            x = self.fc(F.layer_norm(x, (C,), weight))
        return x


def test_a_helper_whose_value_is_the_norm_is_rewritten():
    """The call expression in the forward returns the norm, so nothing outside needs to change."""
    owner = unsettled(FreeFunction())
    output = "free_norm(self.fc(x), self.weight, self.bias)"
    swap_to_itself(owner, [site(owner, output, origin="self.fc(x)")], ONE)


def test_a_helper_that_does_more_is_refused():
    """Replacing its call would lose what the helper does after the norm."""
    owner = unsettled(FreeFunctionMore())
    output = "free_more(self.fc(x), self.weight, self.bias)"
    assert "output" in refusal(owner, site(owner, output, origin="self.fc(x)"))


def test_a_function_outside_any_forward_is_refused():
    """Its source belongs to every caller."""
    owner = unsettled(FreeFunctionMore())
    found = site(
        owner,
        "F.layer_norm(value, (C,), weight, bias, 1e-5)",
        name="value",
        function=free_more,
    )
    assert "outside any forward" in refusal(owner, found)


def test_a_lambda_inside_forward_is_refused():
    """The position is in another frame than the forward's."""
    owner = unsettled(InLambda())
    inside = site(owner, "F.layer_norm(v, (C,), self.weight, self.bias, 1e-5)", name="v")
    assert "lambda" in refusal(owner, inside)
    assert "output" in refusal(owner, site(owner, "norm(self.fc(x))", origin="self.fc(x)"))


def test_one_expression_that_is_several_norms_is_refused():
    """Equal weights at the start would hide that the loop reads another one each time."""
    owner = TwoInOne()
    found = site(
        owner,
        "F.layer_norm(x, (C,), weight)",
        name="x",
        parameters={"weight": "weights.0"},
    )
    assert "output" in refusal(owner, found)


def test_no_source_is_refused():
    """A class made by exec has positions but no source."""
    namespace: dict = {"Affine": Affine, "F": F, "C": C}
    exec(
        textwrap.dedent(
            """
            class NoSource(Affine):
                def forward(self, *args):
                    return F.layer_norm(args[0], (C,), self.weight, self.bias, 1e-5)
            """
        ),
        namespace,
    )
    owner = unsettled(namespace["NoSource"]())
    with pytest.raises(OSError):
        positions.source_hash(type(owner).forward)
    other = site(IfTraining(), CALL, name="h")
    call = CallSite(f"{__name__}:NoSource.forward", "0" * 64, other.call.output, Origin("h"))
    type(owner).forward.__module__ = __name__
    assert "no source" in refusal(owner, dataclasses.replace(other, call=call))


def test_another_source_is_refused_naming_both_hashes():
    """A plan from another version of the class would put the norm at a random expression."""
    owner = unsettled(IfTraining())
    found = site(owner, CALL, name="h")
    planned = dataclasses.replace(
        found, call=dataclasses.replace(found.call, source_hash="ab" * 32)
    )
    with pytest.raises(CannotRewrite) as raised:
        reapply(owner, [Placement(planned, "norm_0", nn.Identity())])
    assert "abababababab" in str(raised.value)
    assert found.call.source_hash[:12] in str(raised.value)
    assert type(owner) is IfTraining


def test_without_a_recorded_call_nothing_is_accepted():
    """A rewrite that nothing has shown to be right is not made."""
    owner = unsettled(IfTraining())
    assert "recorded" in refusal(owner, site(owner, CALL, name="h"), [])


def test_a_value_made_in_a_branch_is_not_captured():
    """The name kept for it would not exist where the branch was not taken."""

    class InBranch(Affine):
        def forward(self, x):
            pair = (x, 1)
            if self.n == 0:
                pair = (self.fc(x), 2)
            return F.layer_norm(pair[0], (C,), self.weight, self.bias, 1e-5)

    owner = unsettled(InBranch())
    output = "F.layer_norm(pair[0], (C,), self.weight, self.bias, 1e-5)"
    found = site(owner, output, origin="self.fc(x)")
    assert "may have changed" in refusal(owner, found)


def test_instance_forward_is_refused():
    """A forward put on the instance runs instead of the class's, which a new class cannot reach."""
    owner = unsettled(IfTraining())
    found = site(owner, CALL, name="h")
    owner.forward = owner.forward
    assert "instance" in refusal(owner, found)
