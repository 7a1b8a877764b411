"""Which normalizations run in a model, counted from the ATen operators that execute.

An independent truth for `find`: it imports nothing of normsurgery and looks at no class, no name
and no attribute of a module. One forward runs under a dispatch mode that writes down every operator
with its operands; afterwards two things are counted in what was written down:

- the operators that are norms themselves (layer, batch, group and RMS norm);
- formulas: a tensor that is scaled by the inverse root of its own second moment. The root is
  `rsqrt`, `sqrt`, a power of a half, `std` or a vector norm; the moment is a mean or a sum of
  squares or a variance. So a softmax, a gate, a GELU, an attention scale, a rotation or a ratio of
  norms is none: either there is no root, or what is scaled is not what was squared.

What depends on parameters alone normalises a weight and is counted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recorder.kinds import Norm, norm_of, scaled_by_offset
from recorder.writing import Writer, watched


@dataclass(frozen=True)
class Record:
    """All norms of one forward, in the order they ran."""

    norms: tuple[Norm, ...]

    def calls(self, attach: str = "norm") -> dict[str, int]:
        return dict(Counter(norm.kind for norm in self.norms if norm.attach == attach))

    def sites(self, attach: str = "norm") -> dict[str, int]:
        distinct = {norm.site: norm.kind for norm in self.norms if norm.attach == attach}
        return dict(Counter(distinct.values()))

    def offset_one(self) -> int:
        return len({norm.site for norm in self.norms if norm.offset_one and norm.attach == "norm"})

    def owners(self) -> list[nn.Module | None]:
        return list({id(norm.owner): norm.owner for norm in self.norms}.values())


def record(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Record:
    """The norms that one forward of `model` runs, without gradients and in the mode it is in."""
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    writer = Writer(model, inputs)
    with torch.no_grad(), watched(model, writer), writer:
        model(*args, **kwargs)
    offsets = scaled_by_offset(writer.values)
    norms = (norm_of(value, writer.frame_of[id(value)], offsets) for value in writer.values)
    return Record(tuple(norm for norm in norms if norm is not None))
