"""What stands in the place of a parallel branch that went into another one: it adds nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Zero(int):
    """The number 0. Adding it to a tensor gives that very tensor: no kernel runs.

    Everything else computes with it as with any 0, so that a forward may do what it likes with it;
    what cannot take a number raises TypeError.
    """

    def __add__(self, other: Any) -> Any:
        return self if isinstance(other, int) and other == 0 else other

    __radd__ = __add__

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if len(args) == 2 and not kwargs:
            left, right = args
            if function in _SUMS and isinstance(left, Zero):
                return right
            if function in _SUMS or (function in _DIFFERENCES and isinstance(right, Zero)):
                return left
        return function(*tree_map(_plain, tuple(args)), **tree_map(_plain, dict(kwargs or {})))


_SUMS = frozenset(
    {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
)
_DIFFERENCES = frozenset({torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__})
_ZERO = Zero(0)


def _plain(leaf: Any) -> Any:
    return 0 if isinstance(leaf, Zero) else leaf


class NeutralBranch(nn.Module):
    """A branch of a sum that gives Zero, whatever it is called with; it has no tensors."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _ZERO
