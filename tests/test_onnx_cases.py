"""Pairs of a model and an ONNX file: the verdict is the one that the planted cause gives.

Sixty and more faults that a random batch and a fixed tolerance let through, and correct pairs that
they reject. Of the 48 pairs of the reference torch's own verifier judges 33 rightly.
"""

from __future__ import annotations

import pytest
import torch
from onnx_cases import CASES, Case
from onnx_cases.outcome import outcome
from onnx_cases.peers import rejected_by
from torch import Tensor, nn

GOOD = [case for case in CASES if case.good]
BAD = [case for case in CASES if not case.good]
ALARMING = [case for case in GOOD if case.alarms]


def label(case: Case) -> str:
    return case.label


@pytest.mark.parametrize("case", CASES, ids=label)
def test_verdict(case: Case) -> None:
    sides = case.sides
    before = state(sides.source)
    found = outcome(sides)
    assert found.fits(case), (
        f"{case.label} ({case.cause}): wanted {case.verdict} saying /{case.why}/, got "
        f"{found.verdict}: {found.told}"
    )
    assert state(sides.source) == before, "the source was changed"


def state(source: object) -> object:
    """Every bit of a module's tensors, the mode of each of its modules, and its gradients."""
    if not isinstance(source, nn.Module):
        return None
    tensors: dict[str, Tensor] = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    return (
        {
            name: (t._version, t.detach().cpu().view(torch.uint8).tolist() if t.dim() else t.item())
            for name, t in tensors.items()
        },
        {name: module.training for name, module in source.named_modules()},
        {name: p.grad is None for name, p in source.named_parameters()},
    )


@pytest.mark.parametrize("case", ALARMING, ids=label)
def test_a_fixed_tolerance_rejects_it(case: Case) -> None:
    """So that "a good model that a fixed tolerance fails" is measured and not claimed."""
    assert rejected_by(case.sides), f"no rule rejects {case.label}"


def test_enough_cases() -> None:
    assert len(CASES) >= 60
    assert len(BAD) >= 60
    assert len(ALARMING) >= 25
    assert len({case.label for case in CASES}) == len(CASES)


def test_every_fault_names_what_must_be_said() -> None:
    assert all(case.why for case in BAD)
    assert not any(case.why for case in GOOD)
    assert all(case.cause.startswith("none: ") == case.good for case in CASES)


def test_the_column_of_torch() -> None:
    """Its nine false passes and six false alarms, as the reference lists them."""
    said = {case.label: case.torch for case in CASES if case.torch}
    assert sorted(name for name, what in said.items() if what == "false pass") == [
        "bn_half_var",
        "bn_nostats_batchdep",
        "gn21_const",
        "gn21_off10",
        "gn21_off10000",
        "ln_manual_eps1e_12",
        "random_norm",
        "rms_eps1e_08_zeros",
        "rms_eps1e_12_zeros",
    ]
    assert sorted(name for name, what in said.items() if what == "false alarm") == [
        "gn18_off100",
        "gn18_off1000",
        "gn18_off10000",
        "ln_batch0",
        "ln_off10000",
        "none_out",
    ]
