"""What needs a CUDA device: models that live on one, and verification that runs there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.norms.examples import randomised
from normsurgery.onnxfile.sessions import missing_provider

pytestmark = pytest.mark.gpu

ON = "cuda"


def network() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
    )
    return randomised(model, 0).eval()


def images(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 9, 8, generator=generator).to(device, dtype)


def devices(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


def runners(evidence: ns.Evidence) -> set[str]:
    return {comparison.runner for comparison in evidence.comparisons}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_right_model_passes_on_the_device_in_its_own_type(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    copy, _ = ns.swap(model, to="batchnorm", kind="batchnorm", inputs=(images(dtype=dtype),))
    evidence = ns.verify(model, copy, (images(dtype=dtype),), on=("cpu", ON), require_runner=(ON,))
    assert evidence.passed, evidence
    assert ON in runners(evidence)


def _wrong_scale(model: nn.Module) -> None:
    model[1].weight.mul_(1.01)


def _wrong_eps(model: nn.Module) -> None:
    model[4].eps = 1e-2


@pytest.mark.parametrize("fault", [_wrong_scale, _wrong_eps])
def test_a_fault_fails_on_the_device(fault: Callable[[nn.Module], None]) -> None:
    wrong = network()
    with torch.no_grad():
        fault(wrong)
    evidence = ns.verify(network(), wrong, (images(),), on=(ON,), require_runner=(ON,))
    assert evidence.passed is False
    assert any(c.verdict.passed is False for c in evidence.comparisons if c.runner == ON)


JOBS: dict[str, Callable[[nn.Module, Any], tuple[nn.Module, ns.Report]]] = {
    "swap": lambda model, inputs: ns.swap(model, to="groupnorm", kind="batchnorm", inputs=inputs),
    "fold": lambda model, inputs: ns.fold(model, inputs=inputs),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_model_on_the_device_stays_there(job: str) -> None:
    model = network().to(ON)
    changed, report = JOBS[job](model, (images(ON),))
    assert report.passed, report
    assert devices(changed) == {ON}
    at_home, _ = JOBS[job](network(), (images(),))
    for (name, ours), (_, theirs) in zip(
        changed.state_dict().items(), at_home.state_dict().items(), strict=True
    ):
        assert torch.equal(ours.cpu(), theirs), name


def test_a_run_on_the_device_is_saved_and_judged_by_the_cpu(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "run.safetensors"
    copy, _ = ns.fold(model, inputs=(images(),), verify=False)
    ns.verify(model, copy, (images(),), on=(ON,), save=path)
    evidence = ns.verify(model, path, require_runner=(ON,))
    assert evidence.passed, evidence
    assert runners(evidence) == {ON}


def test_a_model_on_the_device_is_exported_and_verified(tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    missing = missing_provider(ON)
    report = ns.export(network().to(ON), path, inputs=(images(ON),), on=("cpu", ON))
    assert report.passed, report
    assert path.exists()
    if missing:  # onnxruntime without CUDA: said, and nothing claimed
        assert missing in str(report)
    else:
        assert report.evidence is not None
        assert ON in runners(report.evidence)
