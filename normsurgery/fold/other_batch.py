"""The same inputs with another batch size: what holds for one batch need not hold for another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from normsurgery.inputs import Inputs


def with_other_batch(inputs: Inputs) -> Inputs | None:
    """The inputs with a batch of 1, or of 2 where it is 1; None where there is no one batch size.

    Every tensor must have the batch as its first dimension.
    """
    tensors = [
        leaf for leaf in tree_leaves((inputs.args, dict(inputs.kwargs))) if isinstance(leaf, Tensor)
    ]
    sizes = {tensor.shape[0] for tensor in tensors if tensor.dim() > 0}
    if len(sizes) != 1 or any(tensor.dim() == 0 for tensor in tensors):
        return None
    (size,) = sizes

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.cat([leaf, leaf]) if size == 1 else leaf[:1]

    kwargs: Mapping[str, Any] = tree_map(one, dict(inputs.kwargs))
    return Inputs(tree_map(one, inputs.args), kwargs)
