"""Eager latency of networks whose parallel branches were merged, against their own inference form.

    python benchmarks/parallel_branches.py [--runs N]

A fold keeps the forward that adds up the branches; all but one of them give a zero that runs no
kernel. The authors' reparametrisation calls one convolution instead. One line per network: layers
as trained and left; the median time of a forward of the folded model over that of the model with
its branches, and over that of the authors' form, which has the very same weights; and of the
authors' form over itself. The forwards take turns; one thread.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from models.reparametrised import Classifier, MobileOneBlock, RepVggBlock
from torch import Tensor, nn

import normsurgery as ns


def repvgg() -> nn.Module:
    """The first three stages of RepVGG-A0."""
    widths = ((3, 48, 2), (48, 48, 2), (48, 48, 1), (48, 96, 2), *[(96, 96, 1)] * 3)
    return Classifier(96, *(RepVggBlock(*width) for width in widths))


def mobileone() -> nn.Module:
    """The first two stages of MobileOne-S0."""
    blocks = [MobileOneBlock(3, 48, 3, 2)]
    for inputs, outputs, stride in ((48, 48, 2), (48, 48, 1), (48, 128, 2), (128, 128, 1)):
        blocks.append(MobileOneBlock(inputs, inputs, 3, stride, inputs, branches=4))
        blocks.append(MobileOneBlock(inputs, outputs, 1, branches=4))
    return Classifier(128, *blocks)


def reparametrised(folded: nn.Module) -> nn.Module:
    """The authors' form: each block calls its one convolution, and holds nothing else."""
    made = copy.deepcopy(folded)
    for block in made.modules():
        if isinstance(block, (RepVggBlock, MobileOneBlock)):
            kept = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
            for name in ("identity", "conv_kxk", "conv_1x1", "conv_scale"):
                block._modules.pop(name, None)
            block.reparam_conv = kept
    return made


def convolutions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def medians(models: Sequence[nn.Module], x: Tensor, runs: int) -> list[float]:
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(runs + 3):
            for found, model in zip(times, models, strict=True):
                begun = time.perf_counter()
                model(x)
                found.append(time.perf_counter() - begun)
    return [statistics.median(found[3:]) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'':10} {'layers':>12} {'/ trained':>10} {'/ own form':>11} {'own / own':>10}")
    for make in (repvgg, mobileone):
        for size in (32, 128):
            model = make().eval()
            x = torch.randn(1, 3, size, size)
            folded, report = ns.fold(model, inputs=(x,), verify=False)
            own = reparametrised(folded)
            assert torch.equal(own(x), folded(x)), report
            before, merged, first, second = medians((model, folded, own, own), x, arguments.runs)
            count = [len(convolutions(one)) for one in (model, folded)]
            print(
                f"{make.__name__:10} {count[0]:4} to {count[1]:4} {merged / before:10.2f} "
                f"{merged / first:11.2f} {second / first:10.2f}   {size} pixels"
            )


if __name__ == "__main__":
    main()
