"""Swapped models train under torchrun, two gloo processes, without find_unused_parameters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.train import HALVES, TARGETS, WHOLE, swapped, train

SCRIPT = Path(__file__).parent / "distributed" / "train.py"
RELATIVE = 1e-10  # of float64 gradients that are summed in another order


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank saw, by norm. A parameter without a gradient makes the second step raise."""
    results = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [*command, str(SCRIPT), str(results)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return {to: [torch.load(results / f"{to}.{r}.pt") for r in range(2)] for to in TARGETS}


@pytest.mark.parametrize("to", TARGETS)
def test_ranks_stay_in_step_and_learn(ranks: dict[str, list[dict[str, Any]]], to: str) -> None:
    first, second = ranks[to]
    parameters = [name for name, _ in swapped(to).named_parameters()]
    for name in parameters:
        assert torch.equal(first["state"][name], second["state"][name]), name
    moved = [n for n in parameters if not torch.equal(first["state"][n], first["before"][n])]
    assert moved == parameters


def test_ranks_share_the_random_path(ranks: dict[str, list[dict[str, Any]]]) -> None:
    """Rank 1 starts from another generator state, as after a checkpoint was loaded on rank 0."""
    first, second = ranks["randomaggregation"]
    assert first["paths"] == second["paths"]
    assert {name for taken in first["paths"] for name in taken} == {"batchnorm", "groupnorm"}
    generators = [name for name in first["state"] if name.endswith("generator")]
    assert len(generators) == 2


def test_two_halves_are_one_batch_for_a_norm_of_samples(
    ranks: dict[str, list[dict[str, Any]]],
) -> None:
    """Group norm does not mix samples, so two ranks compute what one does on the whole batch."""
    model = swapped("groupnorm")
    train(model, [WHOLE])
    assert_close(ranks["groupnorm"][0]["state"], model)


def test_neuronwise_averages_the_mapped_gradients(
    ranks: dict[str, list[dict[str, Any]]],
) -> None:
    """Each rank maps with its own statistics; the tap of a gate behind a norm is there."""
    model = swapped("neuronwise")
    train(model, HALVES)
    assert ranks["neuronwise"][0]["taps"] == 2
    assert_close(ranks["neuronwise"][0]["state"], model)


def assert_close(state: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        error = (parameter.detach() - state[name]).abs().max() / state[name].abs().max()
        assert error <= RELATIVE, name
