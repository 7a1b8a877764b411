"""A norm on one sample without a batch axis, which torch's instance norms take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
