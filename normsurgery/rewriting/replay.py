"""A formula written out in a forward, as a module that computes the very same bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.flow.operations import Operation, run
from normsurgery.spec import Source, get

HALF = (torch.float16, torch.bfloat16)


class Replay(nn.Module):
    """A norm as the operations that its forward was seen to run, its tensors by role.

    Accepts what the formula accepted and gives the same bits for inputs of the recorded dtype; for
    another dtype, where the forward might have cast elsewhere, the registered formula is computed
    (in float32 for half precision). The tensors have the names of their roles.
    """

    def __init__(self, source: Source, operations: Sequence[Operation], dtype: torch.dtype) -> None:
        super().__init__()
        self.kind = source.kind
        self.settings: Mapping[str, Any] = dict(source.settings)
        self.operations = list(operations)
        self.dtype = dtype
        self.roles = tuple(source.tensors)
        for role, tensor in source.tensors.items():
            clone = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(role, nn.Parameter(clone, tensor.requires_grad))
            else:
                self.register_buffer(role, clone)
        self.train(source.training)

    def forward(self, x: Tensor) -> Tensor:
        tensors = {role: getattr(self, role) for role in self.roles}
        if x.dtype is self.dtype:
            return run(self.operations, x, tensors)
        wide = torch.float32 if x.dtype in HALF else x.dtype
        values = {role: tensor.to(wide) for role, tensor in tensors.items()}
        y = get(self.kind).formula(x.to(wide), values, self.settings, self.training)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.kind}, {len(self.operations)} operations, {self.dtype}"
