"""Which tables the integers of a call index, read off one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from normsurgery.inputs import Inputs
from normsurgery.treecopy import tree_copy
from normsurgery.verifying.hard_ids import is_integer
from normsurgery.verifying.runners import fresh, same_randomness, set_mode


def embedding_rows(model: nn.Module, inputs: Inputs) -> dict[int, int]:
    """Position of each integer input (in flattening order) -> rows of the smallest table that it
    indexes, by nn.Embedding or F.embedding, unchanged or cast to another integer type.

    A model that does not run gives nothing.
    """
    given = fresh(inputs)
    leaves = tree_flatten((given.args, dict(given.kwargs)))[0]
    ids = {leaf.data_ptr(): p for p, leaf in enumerate(leaves) if is_integer(leaf)}
    if not ids:
        return {}
    copied = tree_copy(model, clone=True)
    noted = _Lookups(ids)
    try:
        set_mode(copied, "eval")
        with torch.no_grad(), same_randomness(0), noted:
            given.call(copied)
    except Exception:  # whether the model runs at all is for the runners to say
        return {}
    return noted.rows


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the tables that the ids at these addresses look rows up in."""

    def __init__(self, ids: Mapping[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ids = dict(ids)
        self.casts: list[Tensor] = []  # kept, or another tensor might get the address
        self.rows: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        found = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", None)
        if packet is torch.ops.aten._to_copy and is_integer(args[0]) and is_integer(found):
            position = self.ids.get(args[0].data_ptr())
            if position is not None:
                self.casts.append(found)
                self.ids[found.data_ptr()] = position
        elif packet is torch.ops.aten.embedding and is_integer(args[1]):
            position, rows = self.ids.get(args[1].data_ptr()), int(args[0].shape[0])
            if position is not None:
                self.rows[position] = min(rows, self.rows.get(position, rows))
        return found
