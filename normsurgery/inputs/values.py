"""The arguments of one call of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from normsurgery.errors import UsageError


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments; `spelling` are the `--input` texts that repeat them."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    spelling: tuple[str, ...] = ()

    def call(self, model: nn.Module | ExportedProgram) -> Any:
        """The output of `model` for these arguments."""
        runnable = model.module() if isinstance(model, ExportedProgram) else model
        return runnable(*self.args, **self.kwargs)

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Inputs:
        """The same arguments on `device`, floating tensors as `dtype`; integers keep their type."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        args, kwargs = tree_map(moved, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs, self.spelling)


def as_inputs(value: Inputs | tuple[Any, ...] | Mapping[str, Any] | Tensor | None) -> Inputs:
    """Inputs from a tuple of positional or a mapping of keyword arguments, or from one tensor.

    None means a call without arguments. Raises UsageError for anything else.
    """
    if isinstance(value, Inputs):
        return value
    if value is None:
        return Inputs()
    if isinstance(value, Tensor):
        return Inputs((value,))
    if isinstance(value, Mapping):
        return Inputs((), dict(value))
    if isinstance(value, (tuple, list)):
        return Inputs(tuple(value))
    raise UsageError(
        f"inputs are a tuple of positional arguments, a dict of keyword arguments or Inputs, "
        f"not {type(value).__name__}."
    )
