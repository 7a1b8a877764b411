"""A norm on one sample without a batch axis, which torch's instance norms take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.errors import UsageError
from normsurgery.norms.examples import randomised


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.InstanceNorm1d(3, track_running_stats=True), (3, 15)),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, True, track_running_stats=True)),
            (3, 7, 8),
        ),
    ],
    ids=["alone", "behind a convolution"],
)
def test_a_sample_without_a_batch_axis_has_its_channels_first(
    model: nn.Module, shape: tuple[int, ...]
) -> None:
    model = randomised(model).eval()
    x = torch.randn(*shape)
    for changed, report in (ns.fold(model, inputs=(x,)), ns.swap(model, "affine", inputs=(x,))):
        assert report.passed
        batch = torch.stack([x, 2 * x])
        for given in (x, batch):
            torch.testing.assert_close(changed(given), model(given))
    with pytest.raises(UsageError, match="neither the second nor the last"):
        ns.swap(model, "groupnorm", inputs=(x,))


def test_a_call_in_the_forward_of_the_model_itself_is_no_module_of_torch(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.instance_norm(x)

    inputs = (torch.randn(1, 2, 8),)
    report = ns.export(Net(), tmp_path / "model.onnx", inputs=inputs, force=True)
    found = [(norm.kind, norm.operator) for norm in report.onnx.norms]
    assert found == [("instancenorm", "InstanceNormalization")]
