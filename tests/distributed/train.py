"""Run by torchrun: trains a small swapped model under DistributedDataParallel, for each norm.

    python -m torch.distributed.run --standalone --nproc-per-node 2 train.py RESULTS

Every rank writes what it saw to RESULTS/<norm>.<rank>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import normsurgery as ns
from normsurgery.norms.gates import GateTap
from normsurgery.norms.randomaggregation import layers

STEPS = 12
TARGETS = ("groupnorm", "randomaggregation", "neuronwise", "weightstandardization")
WHOLE = [0, 1, 2, 3, 4, 5, 6, 7]
HALVES = [WHOLE[:4], WHOLE[4:]]


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    ).double()


def swapped(to: str) -> nn.Module:
    x, _ = batch(0)
    return ns.swap(small_model(), to, inputs=(x,))[0]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The whole batch of one step, for all ranks."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (8,), generator=generator)


def train(model: nn.Module, shares: list[list[int]]) -> list[float]:
    """Losses of a few steps; the gradients of the shares (samples of the batch) are averaged."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        for share in shares:
            loss = nn.functional.cross_entropy(model(x[share]), y[share])
            (loss / len(shares)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


def recorded_paths(model: nn.Module) -> list[list[str]]:
    """A list per layer that fills with the candidates its forwards take."""
    taken: list[list[str]] = []
    for layer in layers(model):
        seen: list[str] = []
        taken.append(seen)
        for name, norm in layer.candidates.items():
            norm.register_forward_hook(lambda *_, name=name, seen=seen: seen.append(name))
    return taken


def main(results: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for to in TARGETS:
        model = swapped(to)
        if rank == 1:  # as after loading a checkpoint on rank 0 only
            for layer in layers(model):
                layer.generator[1] += 5
        taken = recorded_paths(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        losses = train(DistributedDataParallel(model), [HALVES[rank]])
        saved: dict[str, Any] = {
            "losses": losses,
            "before": before,
            "state": model.state_dict(),
            "paths": taken,
            "taps": sum(isinstance(module, GateTap) for module in model.modules()),
        }
        torch.save(saved, results / f"{to}.{rank}.pt")
    # Tearing the group down can deadlock: this thread joins gloo's while it holds the GIL, which
    # that one needs to drop the last all-reduce. So the process ends here, once both are through.
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
