"""Modules that the runs did not reach: each is tried alone, on an input its own tensors suggest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.errors import NormsurgeryError
from normsurgery.graph import Flow, record
from normsurgery.inputs import Inputs


def recordings_alone(module: nn.Module, watched: frozenset[Callable[..., Any]]) -> Iterator[Flow]:
    """One recorded run of `module` by itself for each input shape that its tensors suggest."""
    for shape in _suggested(module):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        example = next(iter((*module.parameters(), *module.buffers())))
        try:
            yield record(module, Inputs((x.to(example),)), watched=watched)
        except NormsurgeryError:
            continue


def is_candidate(module: nn.Module) -> bool:
    """A module without children whose tensors are all as long as each other: it may be a norm."""
    return not any(True for _ in module.children()) and bool(_suggested(module))


def _suggested(module: nn.Module) -> Sequence[tuple[int, ...]]:
    held: list[Tensor] = [
        tensor
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if tensor.is_floating_point() and tensor.numel() > 1
    ]
    sizes = {tensor.numel() for tensor in held}
    vectors = all(max(tensor.shape) == tensor.numel() for tensor in held)  # no matrix, no table
    if len(sizes) != 1 or len(held) > 4 or not vectors:
        return ()
    features = sizes.pop()
    return ((2, 3, features), (2, features, 5, 3), (2, features), (2, features, 5))
