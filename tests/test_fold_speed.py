"""What a report says of speed: norms that run are counted, times are taken of both models alike."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.errors import CannotTrace
from normsurgery.folding import speed
from normsurgery.folding.speed import ON_A_CPU, Latency, Speed, measure_speed
from normsurgery.inputs import Inputs


class Written(nn.Module):
    """A module that is called twice, a norm as a call and one as a formula, and a counter."""

    runs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.unused = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x = F.layer_norm(self.norm(self.norm(x)), (8,))
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


INPUTS = Inputs((torch.randn(2, 8),))


def test_every_norm_that_runs_is_counted_as_often_as_it_does() -> None:
    assert dict(speed.norm_operators(Written(), INPUTS)) == {"layernorm": 3, "rmsnorm": 1}


def test_operators_are_those_of_one_forward() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Identity(), nn.Sigmoid())
    assert speed.operators(model, INPUTS) == 2


def test_measuring_changes_neither_model_nor_the_random_state() -> None:
    """A counter in a buffer, dropout in train mode: what a hundred runs would move."""
    model = nn.Sequential(Written(), nn.Dropout()).train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    measured = measure_speed(model, model, INPUTS, budget_s=0.05)
    assert torch.equal(torch.rand(2), expected)
    assert (float(model[0].runs), model.training) == (0.0, True)
    assert measured.norms_before == measured.norms_after


class Turns(nn.Module):
    """Writes down who ran."""

    def __init__(self, name: str, ran: list[str]) -> None:
        super().__init__()
        self.name, self.ran = name, ran

    def __deepcopy__(self, memo: dict[int, Any]) -> Turns:
        return Turns(self.name, self.ran)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        self.ran.append(self.name)
        return x


def test_the_models_run_by_turns_in_inference_mode() -> None:
    """A machine that slows down halfway must slow both alike."""
    ran: list[str] = []
    measured = speed.measure_latency(Turns("a", ran), Turns("b", ran), INPUTS, budget_s=0.0)
    assert ran == ["a", "b"] * (1 + 2 * speed.FEWEST_ROUNDS)
    assert measured.rounds == speed.FEWEST_ROUNDS
    assert (measured.device, measured.threads) == ("cpu", torch.get_num_threads())


def test_a_long_budget_ends_after_enough_rounds() -> None:
    measured = speed.measure_latency(Written(), Written(), INPUTS, budget_s=60.0)
    assert measured.rounds == speed.MOST_ROUNDS


def test_the_ratio_is_above_one_where_the_result_is_faster() -> None:
    latency = Latency(before=0.3, after=0.2, again=0.24, rounds=5, device="cpu", threads=1)
    assert (latency.ratio, latency.control) == (0.3 / 0.2, 0.3 / 0.24)


@pytest.mark.parametrize(
    ("device", "after", "said"), [("cpu", 0, True), ("cpu", 2, False), ("cuda", 0, False)]
)
def test_where_the_time_is_on_a_cpu_is_said_when_norms_are_gone(
    device: str, after: int, said: bool
) -> None:
    latency = Latency(0.3, 0.2, 0.24, 5, device, 1)
    norms = {"batchnorm": after} if after else {}
    told = str(Speed({"batchnorm": 2}, norms, 9, 7, latency))
    assert (ON_A_CPU in told) == said
    assert told.startswith(f"norms per forward: 2 batchnorm -> {'2 batchnorm' if after else 0}; ")


def test_speed_survives_json_in_a_report() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    _, report = ns.fold(model, inputs=(torch.ones(2, 1, 4, 4),), time=True)
    assert report.speed is not None
    told = json.loads(json.dumps(report.to_json()))
    assert ns.Report.from_json(told).speed == report.speed
    assert told["speed"]["latency"]["ratio"] == report.speed.latency.ratio
    assert "norms per forward: 1 batchnorm -> 0" in str(report)


def test_a_model_that_does_not_run_is_no_zero() -> None:
    with pytest.raises(CannotTrace):
        measure_speed(nn.Linear(3, 3), nn.Linear(3, 3), INPUTS)
