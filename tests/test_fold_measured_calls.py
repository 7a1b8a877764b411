"""A fold holds for every measured call; what no call ran is looked at by its names alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.errors import CannotTrace, UsageError
from normsurgery.flow.measured_calls import relatives
from normsurgery.folding.checks import Check
from normsurgery.inputs import Inputs
from normsurgery.norms.examples import randomised
from normsurgery.steps import Merge

C = 4
X = torch.randn(2, C, 6, 6, dtype=torch.float64)


class Net(nn.Module):
    """A convolution and its norm; each model below asks for one of them in another way too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)


def ready(model: type[nn.Module]) -> nn.Module:
    return randomised(model().double().eval(), 0).double().eval()


def fold(model: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    folded, report = ns.fold(model, inputs=(X,), **options)
    assert report.passed is not False
    return folded, report


def is_folded(report: Any) -> bool:
    return [step.to for step in report.plan.steps] == ["identity"]


def why(report: Any) -> str:
    """Why the norm is no more than one affine."""
    (step,) = report.plan.steps
    assert step.to == "affine"
    return " ".join(step.notes)


# --- which calls are made -------------------------------------------------------------------------


class Arguments(Net):
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        flag: bool = True,
        maybe: bool | None = None,
        anything=None,  # type: ignore[no-untyped-def]
        size: int = 3,
    ) -> Tensor:
        return self.bn(self.conv(x))


def test_relatives_are_one_argument_away() -> None:
    calls = {call.name: call for call in relatives(ready(Arguments), Inputs((X,)))}
    assert list(calls) == [
        "batch 1",
        "batch 3",
        "another image size",
        "mask given",
        "flag=False",
        "maybe=True",
        "anything given",
    ]
    assert calls["batch 3"].alternatives[0].args[0].shape == (3, C, 6, 6)
    assert calls["another image size"].alternatives[0].args[0].shape == (2, C, 7, 7)
    assert not any(call.binds for call in calls.values())


def test_what_was_given_is_taken_the_other_way() -> None:
    given = Inputs((X, torch.ones(2)), {"flag": False, "maybe": False})
    names = [call.name for call in relatives(ready(Arguments), given)]
    assert names[-3:] == ["flag=True", "maybe=True", "anything given"]


def test_sequences_get_another_length() -> None:
    ids = Inputs((), {"ids": torch.zeros(2, 8, dtype=torch.long)})
    (call,) = (c for c in relatives(nn.Embedding(5, 5), ids) if "axis 1" in c.name)
    assert [inputs.kwargs["ids"].shape[1] for inputs in call.alternatives] == [7, 9]


def test_the_report_lists_what_was_measured_and_what_does_not_run() -> None:
    _, report = fold(
        nn.Sequential(nn.Flatten(), nn.Linear(144, C), nn.BatchNorm1d(C)).double().eval()
    )
    assert {call.name: call.ran for call in report.plan.calls} == {
        "the example": True,
        "batch 1": True,
        "batch 3": True,
        "another image size": False,
    }


# --- what they refuse -----------------------------------------------------------------------------


class Flag(Net):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        y = self.conv(x)
        return torch.tanh(y) if raw else self.bn(y)


class Optional(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if mask is None else torch.tanh(y * mask)


class Unannotated(Net):
    def forward(self, x, mask=None):  # type: ignore[no-untyped-def]
        y = self.conv(x)
        return self.bn(y) if mask is None else torch.tanh(y * mask)


class Batch(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if x.shape[0] != 3 else torch.tanh(y)


class Size(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if x.shape[-1] % 2 == 0 else torch.tanh(y)


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (Flag, "raw=True"),
        (Optional, "mask given"),
        (Unannotated, "mask given"),
        (Batch, "batch 3"),
        (Size, "another image size"),
    ],
)
def test_a_call_that_reads_the_layer_without_the_norm_refuses(
    model: type[nn.Module], call: str
) -> None:
    _, report = fold(ready(model))
    assert why(report).startswith(Check.OUTPUT_USED.value)
    assert f"in the call with {call}" in why(report)


class Deep(Net):
    """Another value of the number is no relative: only who calls so can say it."""

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if depth == 1 else torch.tanh(y)


def test_a_call_of_the_user_counts() -> None:
    assert is_folded(fold(ready(Deep))[1])
    _, report = fold(ready(Deep), calls=[{"depth": 2}])
    assert "in the call with depth=2" in why(report)
    _, report = fold(ready(Deep), calls=[(X, 2)])
    assert "in the call with (tensor[2, 4, 6, 6], 2)" in why(report)


def test_a_call_of_the_user_that_does_not_run_is_an_error() -> None:
    with pytest.raises(CannotTrace):
        fold(ready(Deep), calls=[{"depth": "x", "other": 1}])
    with pytest.raises(UsageError, match="calls holds a mapping"):
        fold(ready(Deep), calls=[3])


class Beside(Net):
    """Hands out what the norm gives, to who asks."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(C, C, 1)
        self.norm = nn.GroupNorm(2, C)

    def forward(self, x: Tensor, features: bool = False) -> dict[str, Tensor]:
        normed = self.norm(x)
        out = {"y": self.head(normed)}
        return {**out, "features": normed} if features else out


def test_an_output_beside_those_of_the_example_is_named_and_binds_where_it_was_asked_for() -> None:
    model = ready(Beside)
    folded, report = fold(model)
    changed = {call.name: call.changed for call in report.plan.calls if call.changed}
    assert changed == {"features=True": ("features",)}
    with torch.no_grad():
        assert not torch.allclose(folded(X, True)["features"], model(X, True)["features"])
    _, report = fold(model, calls=[{"features": True}])
    (skip,) = (skip for skip in report.plan.skips if skip.path == "norm")
    assert skip.reason.startswith(Check.RETURNED.value)


class Stages(nn.Module):
    """A norm that goes backwards, one that goes forwards, and a sum; all can be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
        self.left = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
        self.right = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
        self.norm, self.head = nn.GroupNorm(2, C), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor, stages: bool = False, branch: bool = False) -> Any:
        raw = self.conv(x)
        first = self.bn(raw).relu()
        left = self.left(first)
        total = (left + self.right(first)).relu()
        normed = self.norm(total)
        y = self.head(normed)
        given = (y, raw, first, total, normed) if stages else (y,)
        return (*given, left) if branch else given


def test_the_outputs_that_are_named_are_those_that_hold_other_numbers() -> None:
    model = ready(Stages)
    folded, report = fold(model)
    (named,) = [call.changed for call in report.plan.calls if call.changed]
    with torch.no_grad():
        pairs = zip(folded(X, True, True), model(X, True, True), strict=True)
        other = [not torch.allclose(after, before) for after, before in pairs]
    assert other == [False, True, False, False, True, False]
    assert named == ("1", "4")


class NoBranch(Stages):
    def forward(self, x: Tensor, stages: bool = False) -> Any:
        return super().forward(x, stages)


@pytest.mark.parametrize(("model", "merged"), [(Stages, False), (NoBranch, True)])
def test_a_branch_that_some_call_returns_stays_a_branch(
    model: type[nn.Module], merged: bool
) -> None:
    _, report = fold(ready(model))
    assert any(isinstance(step, Merge) for step in report.plan.steps) is merged


def test_a_step_names_the_modules_that_give_other_numbers() -> None:
    _, report = fold(ready(Beside))
    assert report.plan.steps[0].changes == ("norm",)


# --- what no call ran -----------------------------------------------------------------------------


class Unreached(Net):
    """A line that no call runs: the number is never 7."""

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        if depth == 7:
            return self.conv(x)
        return self.bn(self.conv(x))


class UnreachedMethod(Net):
    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        return self.bn(self.conv(x)) if depth == 1 else self.other(x)

    def other(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


class UnreachedWeight(Net):
    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        if depth == 7:
            return x * self.conv.weight.mean()
        return self.bn(self.conv(x))


@pytest.mark.parametrize("model", [Unreached, UnreachedMethod, UnreachedWeight])
def test_a_line_that_no_call_ran_and_that_names_the_layer_refuses(model: type[nn.Module]) -> None:
    reason = why(fold(ready(model))[1])
    assert reason.startswith(Check.UNRUN.value)
    assert "names self.conv" in reason and " on line " in reason


class Raises(Net):
    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        if depth == 7:
            raise ValueError(f"not with {self.conv}")
        if self.training:
            x = x + self.conv(x)
        if depth == 8:
            return x.to(self.conv.weight.dtype)
        return self.bn(self.conv(x))


class Guarded(Net):
    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        if depth == 7:
            if not hasattr(self, "second"):
                raise ValueError("made without a second convolution")
            return self.second(self.conv(x))
        return self.bn(self.conv(x))


def wrapping(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, x: Tensor) -> Any:
        return function(self, x) if x is None else self.bn(self.conv(x))

    return wrapper


class Decorated(Net):
    """The decorator chose another implementation, as libraries do by their configuration."""

    @wrapping
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Unasked(Net):
    """A method that forward does not name is a caller of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def initialise(self) -> None:
        nn.init.zeros_(self.conv.weight)


@pytest.mark.parametrize("model", [Raises, Guarded, Decorated, Unasked])
def test_what_gives_no_output_in_eval_mode_does_no_harm(model: type[nn.Module]) -> None:
    assert is_folded(fold(ready(model))[1])


# --- what decides that a norm runs ----------------------------------------------------------------


class ByIndex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.domain = nn.Conv2d(C, C, 1), 0
        self.bns = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.bns[self.domain](self.conv(x))


class BySetting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.normed = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.normed:
            y = self.bn(y)
        return torch.relu(y)


class ByPresence(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.bn is not None:
            y = self.bn(y)
        return torch.relu(y)


def notes(model: type[nn.Module]) -> str:
    _, report = fold(ready(model))
    return " ".join(report.plan.steps[0].notes)


def test_a_norm_beside_it_that_never_ran_is_said() -> None:
    assert "bns.1 beside it ran in no measured call" in notes(ByIndex)


def test_a_setting_that_decides_is_said_with_its_line() -> None:
    assert "decided by `if self.normed` on line" in notes(BySetting)
    assert notes(ByPresence) == "", "that the norm is there is no condition"


def test_a_debuggers_trace_function_is_put_back() -> None:
    before = sys.gettrace()

    def trace(*_: Any) -> None:
        return None

    sys.settrace(trace)
    try:
        fold(ready(BySetting), verify=False)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
