"""What casting a tensor loses, when it is cast block by block."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from normsurgery.edits.casting import Loss, cast


@dataclass
class Losses:
    """The losses of the blocks of one tensor, and the size of its largest element so far."""

    found: list[tuple[Loss, float]] = field(default_factory=list)
    largest: float = 0.0

    def cast(self, exact: Tensor, dtype: torch.dtype) -> Tensor:
        """A float64 block in `dtype`; what that loses is kept in mind."""
        result, loss = cast(exact, dtype)
        size = max(abs(float(end)) for end in exact.aminmax()) if exact.numel() else 0.0
        self.largest = max(self.largest, size)
        if loss is not None:
            self.found.append((loss, size))
        return result

    def serious(self, total: int) -> Loss | None:
        """The loss of the whole tensor of `total` elements, or None if it is no reason to refuse.

        A share counts in the largest element of its block; here in that of the tensor.
        """
        kinds = [loss.kind for loss, _ in self.found]
        kind = next((k for k in ("not finite", "overflow", "underflow") if k in kinds), None)
        same = [(loss, size) for loss, size in self.found if loss.kind == kind]
        if not same:
            return None
        whole = replace(
            max((loss for loss, _ in same), key=lambda loss: loss.error),
            elements=sum(loss.elements for loss, _ in same),
            total=total,
            share=max(loss.share * (size / self.largest) for loss, size in same),
        )
        return whole if whole.serious else None
