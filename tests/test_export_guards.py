"""Dynamic axes that small sizes are excluded from, as strided convolutions do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.errors import CannotTrace
from normsurgery.exporting.dynamic import Axes, Axis
from normsurgery.exporting.guards import least_sizes

AXES = Axes((Axis("x", 2, "h", 32), Axis("x", 3, "w", 32)), None)


def message(name: str, axis: int, guard: str) -> str:
    size = f"L['x'].size()[{axis}]"
    return (
        f"  - Not all values of {name} = {size} in the specified range 2 <= {name} satisfy the "
        f"generated guard {guard.replace('n', size)}.\n"
    )


@pytest.mark.parametrize(
    ("guards", "least"),
    [
        ([("h", 2, "(1 + (((-1) + n) // 2)) != 1")], {"h": 3}),
        ([("h", 2, "(n // 2) != 1"), ("h", 2, "((n + 3) // 4) != 1")], {"h": 5}),
        ([("h", 2, "n != 1"), ("w", 3, "n >= 7")], {"h": 2, "w": 7}),
        ([("h", 2, "(n % 2) == 0")], {}),  # no size from which on it holds
        ([("h", 2, "n != 40")], {}),  # larger than the example
        ([("h", 2, "n <= 100")], {}),
        ([("h", 2, "max(n, 3) != 3")], {}),  # more than arithmetic
        ([("h", 2, "n != 1"), ("w", 3, "(n % 2) == 0")], {}),
    ],
)
def test_the_least_size_from_which_on_all_guards_hold(
    guards: list[tuple[str, int, str]], least: dict[str, int]
) -> None:
    assert least_sizes("".join(message(*guard) for guard in guards), AXES) == least


def strided() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
    ).eval()


def test_images_of_any_size_that_strides_leave_something_of(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    report = ns.export(
        strided(), tmp_path / "s.onnx", inputs=(x,), dynamic={0: "batch", 2: "h", 3: "w"}
    )
    assert report.passed, report
    assert {"h is 5 at least", "w is 5 at least"} <= {note.split(":")[0] for note in report.notes}


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 3, x.shape[2] // 2, 2, x.shape[3]).sum(3)


def test_a_size_that_must_be_even_is_still_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CannotTrace, match="dynamic axis h"):
        ns.export(Halves(), tmp_path / "h.onnx", inputs=(x,), dynamic={2: "h"})
    assert not list(tmp_path.iterdir())
