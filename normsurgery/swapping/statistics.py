"""Running statistics of new norms, re-estimated on data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.errors import UsageError
from normsurgery.inputs import as_inputs


def estimate_statistics(
    model: nn.Module, new_modules: Sequence[nn.Module], data: Iterable[Any]
) -> str:
    """Set the running statistics of the new norms to their average over all batches of `data`.

    Each batch is what `inputs=` takes; labels must be left out. Only the new norms run in train
    mode; their momentum and every other mode is as before. Returns what was done, for the report.
    Raises UsageError where no new norm has running statistics, or where there is no batch.
    """
    norms = [norm for new in new_modules for norm in new.modules() if _has_statistics(norm)]
    if not norms:
        raise UsageError(
            "calibrate re-estimates running statistics, and none of the new norms keeps any. "
            "Leave it out and train the model instead."
        )
    batches = (data,) if isinstance(data, Tensor) else data
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()  # type: ignore[operator]
        norm.momentum = None  # type: ignore[assignment]  # a cumulative average
        norm.train()
    count = 0
    try:
        with torch.no_grad():
            for batch in batches:
                as_inputs(batch).call(model)
                count += 1
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    if count == 0:
        raise UsageError("calibrate was given no batch. Give at least one.")
    return f"running statistics of {len(norms)} new norms were estimated on {count} batches"


def _has_statistics(module: nn.Module) -> bool:
    running = module._buffers.get("running_mean") is not None
    return running and hasattr(module, "momentum") and hasattr(module, "reset_running_stats")
