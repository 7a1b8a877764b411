"""The calls that owners of functional norms get while the model runs, to prove a rewrite on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from normsurgery.errors import CannotTrace
from normsurgery.rewriting.owner import OwnerCall
from normsurgery.rewriting.source import module_at
from normsurgery.treecopy import tree_copy

if TYPE_CHECKING:
    from normsurgery.inputs import Inputs


def recorded_calls(
    model: nn.Module, paths: Sequence[str], inputs: Inputs | None
) -> dict[str, tuple[OwnerCall, ...]]:
    """Every call of the modules at `paths` in one eval and one train run of a copy of `model`.

    Raises CannotTrace where the eval run fails; a train run that fails (batch norm on one value)
    adds no calls.
    """
    if not paths or inputs is None:
        return {}
    found: dict[str, list[OwnerCall]] = {path: [] for path in paths}
    for training in (False, True):
        try:
            _record(model, found, inputs, training)
        except Exception as error:  # a model may fail in any way
            if not training:
                raise CannotTrace(
                    f"{type(model).__name__} does not run on the inputs: "
                    f"{type(error).__name__}: {error}. Give inputs that it takes."
                ) from error
    return {path: tuple(calls) for path, calls in found.items()}


def _record(
    model: nn.Module, found: dict[str, list[OwnerCall]], inputs: Inputs, training: bool
) -> None:
    copied = tree_copy(model, clone=True).train(training)
    for path, calls in found.items():

        def note(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            calls: list[OwnerCall] = calls,
        ) -> None:
            calls.append(OwnerCall(args, dict(kwargs), module.training))

        module_at(copied, path).register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        inputs.call(copied)
