"""Random parameters far from neutral, for the examples of every norm."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def randomised(module: AnyModule, seed: int = 0) -> AnyModule:
    """The module with every parameter of size 1.3 to 2.5 and random sign, buffers positive.

    Away from 0 and 1, so that a lost bias, scale or statistic shows; buffers are positive because
    a running variance must be.
    """
    generator = torch.Generator().manual_seed(seed)

    def sizes(tensor: torch.Tensor) -> torch.Tensor:
        return 1.3 + 1.2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for parameter in module.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.copy_(sizes(parameter) * signs)
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(sizes(buffer))
    return module
