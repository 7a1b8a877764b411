"""Models whose structure or control flow hides a norm from a walk over modules or from a tracer."""

from __future__ import annotations

from typing import Any

from models.spellings.by_hand import RmsByRsqrt, RmsBySqrtAndDivide, RmsUpcast, Tokens, settled
from torch import Tensor, nn


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 12), settled(nn.LayerNorm(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.norm(x)))


class Tied(nn.Module):
    """One norm under two names, called under both."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.first = nn.Linear(12, 12), settled(nn.LayerNorm(12))
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.linear(self.first(x)))


class BranchesOnData(nn.Module):
    """Which of the two norms runs depends on the values; no tracer can take it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.positive, self.negative = settled(nn.LayerNorm(12)), RmsByRsqrt(12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if x.sum().item() > 1e9:
            return self.negative(y)
        return self.positive(y)


class ListOfNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([settled(nn.LayerNorm(12)), RmsByRsqrt(12, 1e-6)])
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(self.linear(x))
        return x


class TakesAnything(nn.Module):
    """A forward of `*args` and `**kwargs`, which FX cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 12), RmsUpcast(12)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        (x,) = args or tuple(kwargs.values())
        return {"y": self.norm(self.linear(x))}


class LeavesTorch(nn.Module):
    """Goes through numpy, which neither FX nor `torch.export` can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 12), RmsBySqrtAndDivide(12)

    def forward(self, x: Tensor) -> Tensor:
        largest = float(x.detach().cpu().numpy().max())
        return self.norm(self.linear(x)) * largest


class CallsForward(Tokens):
    """Calls the norm's `forward` and not the norm, so that no hook of it runs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm.forward(self.before(x)))


class SharesWeight(nn.Module):
    """Two norms that share one weight: two Sites."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = settled(nn.LayerNorm(12)), settled(nn.LayerNorm(12))
        self.second.weight = self.first.weight
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.linear(self.first(x)))


class Nested(nn.Module):
    """Takes and gives dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 12), RmsUpcast(12)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"out": [self.norm(self.linear(batch["x"]["inner"]))]}


class Patched(Tokens):
    """A LayerNorm whose `forward` was replaced on the instance, as offloading libraries do."""

    def __init__(self) -> None:
        super().__init__(settled(nn.LayerNorm(12)))
        self.norm.forward = self.norm.weight.mul  # type: ignore[method-assign]
