"""What folding was for: the norms and operators of one forward, and the time it takes, measured."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from normsurgery.finding import find
from normsurgery.inputs import Inputs
from normsurgery.randomstate import random_state_kept
from normsurgery.treecopy import tree_copy

FEWEST_ROUNDS, MOST_ROUNDS = 3, 200
ON_A_CPU = (
    "on a CPU most of a folded network's time is in its convolutions and matrix products, not in "
    "its norms"
)


@dataclass(frozen=True)
class Latency:
    """Median seconds of one forward, the two models by turns.

    again: of the original in every other turn; what it differs from `before` by is noise.
    """

    before: float
    after: float
    again: float
    rounds: int
    device: str
    threads: int

    @property
    def ratio(self) -> float:
        """The original's time over the result's: above 1 the result is faster."""
        return self.before / self.after

    @property
    def control(self) -> float:
        """The original's time over its own; as far from 1 as a ratio may be by chance."""
        return self.before / self.again


@dataclass(frozen=True)
class Speed:
    """One forward before and after a fold.

    norms_before, norms_after: norms that run, by kind, as `find` counts them; an affine that is
        left where a norm was is counted as that.
    operators_before, operators_after: ATen operators that run, views included.
    """

    norms_before: Mapping[str, int]
    norms_after: Mapping[str, int]
    operators_before: int
    operators_after: int
    latency: Latency

    def to_json(self) -> dict[str, Any]:
        latency = {"ratio": self.latency.ratio, "control": self.latency.control}
        return {**asdict(self), "latency": {**asdict(self.latency), **latency}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Speed:
        latency = {k: v for k, v in data["latency"].items() if k not in ("ratio", "control")}
        return cls(**{**data, "latency": Latency(**latency)})

    def __str__(self) -> str:
        latency = self.latency
        threads = f", threads: {latency.threads}" if latency.device == "cpu" else ""
        lines = [
            f"norms per forward: {_counted(self.norms_before)} -> {_counted(self.norms_after)}; "
            f"operators: {self.operators_before} -> {self.operators_after}",
            f"latency: {1e3 * latency.before:.4g} ms -> {1e3 * latency.after:.4g} ms, ratio "
            f"{latency.ratio:.2f} (the original against itself: {latency.control:.2f}; medians of "
            f"{latency.rounds} interleaved runs on {latency.device}{threads})",
        ]
        fewer = sum(self.norms_after.values()) < sum(self.norms_before.values())
        if fewer and latency.device == "cpu":
            lines.append(ON_A_CPU)
        return "\n".join(lines)


def measure_speed(
    before: nn.Module, after: nn.Module, inputs: Inputs, *, budget_s: float = 2.0
) -> Speed:
    """Both models in eval mode on these inputs; neither is changed.

    budget_s: how long to time; a slow model takes longer, since each runs at least three times.
    Raises CannotTrace where one does not run on the inputs.
    """
    return Speed(
        norms_before=dict(norm_operators(before, inputs)),
        norms_after=dict(norm_operators(after, inputs)),
        operators_before=operators(before, inputs),
        operators_after=operators(after, inputs),
        latency=measure_latency(before, after, inputs, budget_s=budget_s),
    )


def norm_operators(model: nn.Module, inputs: Inputs) -> Counter[str]:
    """How many norms run in one forward, by kind: modules, calls and formulas, as `find` counts."""
    counted: Counter[str] = Counter()
    for site in find(_ready(model), inputs):
        counted[site.kind] += site.calls or 0
    return +counted


def operators(model: nn.Module, inputs: Inputs) -> int:
    """How many ATen operators run in one forward in eval mode."""
    ready, counted = _ready(model), _Count()
    with random_state_kept(model), torch.no_grad(), counted:
        inputs.call(ready)
    return counted.total


def measure_latency(
    before: nn.Module, after: nn.Module, inputs: Inputs, *, budget_s: float = 2.0
) -> Latency:
    """Median times of both models, interleaved, so that what slows the machine slows both.

    The original always runs after the result and the result after the original, so that neither
    finds its weights in the cache more often than the other.
    """
    device = _device(before)
    models = {"before": _ready(before), "after": _ready(after)}
    models["again"] = models["before"]
    given = inputs.to(device=device)
    taken: dict[str, list[float]] = {name: [] for name in models}
    with random_state_kept(before), torch.inference_mode():
        for model in (models["before"], models["after"]):
            _seconds(model, given, device)
        start = time.perf_counter()
        for done in range(MOST_ROUNDS):
            if done >= FEWEST_ROUNDS and time.perf_counter() - start > budget_s:
                break
            for name in ("before", "after", "again", "after"):
                taken[name].append(_seconds(models[name], given, device))
    medians = {name: median(seconds) for name, seconds in taken.items()}
    rounds = len(taken["before"])
    return Latency(**medians, rounds=rounds, device=device.type, threads=torch.get_num_threads())


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


def _ready(model: nn.Module) -> nn.Module:
    """A copy in eval mode that may run: it shares the parameters, and what it moves is its own."""
    copied = tree_copy(model, clone_buffers=True)
    for module in copied.modules():
        module.training = False
    return copied


def _seconds(model: nn.Module, inputs: Inputs, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    inputs.call(model)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(model: nn.Module) -> torch.device:
    tensor = next(model.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _counted(norms: Mapping[str, int]) -> str:
    return " + ".join(f"{count} {kind}" for kind, count in norms.items()) or "0"
