"""The copy that is exported in half precision, and what the cast would lose."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from normsurgery.edits.casting import NAMES, Loss, cast
from normsurgery.errors import UnknownName, UsageError
from normsurgery.numerics.precision import materialise_eps
from normsurgery.treecopy import tree_copy

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SAID = 5


def wanted_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """The type by its name. Raises UnknownName for any other than fp32, fp16 and bf16."""
    if name is None:
        return None
    known = {**DTYPES, **{str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}}
    spelled = str(name).removeprefix("torch.")
    if spelled not in known:
        raise UnknownName("dtype", spelled, DTYPES)
    return known[spelled]


def own_dtype(model: nn.Module) -> torch.dtype:
    """The type most of the floating elements of a model have; float32 where there are none."""
    counts: dict[torch.dtype, int] = {}
    for tensor in model.parameters():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def cast_copy(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, tuple[str, ...]]:
    """A clone of `model` in `dtype`, every value rounded once, and what to say about it.

    The machine epsilon that a norm takes stays that of the model as it is. A transformers model
    keeps its unsaved buffers (rotary frequencies) as they are, as its from_pretrained(dtype=...)
    does: rounded, they would turn far positions by whole radians.

    Raises UsageError naming each weight or statistic that `dtype` cannot hold: one that overflows,
    or whose small values are off by more than rounding.
    """
    losses = dict(_losses(model, dtype))
    serious = {name: loss for name, loss in losses.items() if loss.serious}
    if serious:
        raise UsageError(_refusal(serious, dtype))
    copied = tree_copy(model, clone=True)
    materialise_eps(copied)
    kept = _kept_buffers(copied)
    copied.to(dtype)
    for (module, name), value in kept.items():
        setattr(module, name, value)
    return copied, _told(losses, dtype)


def _losses(model: nn.Module, dtype: torch.dtype) -> list[tuple[str, Loss]]:
    found = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        value = tensor.detach().double()
        finite = value.isfinite()  # a mask of -inf is one in any type
        _, loss = cast(value[finite], dtype)
        if loss is not None:
            found.append((name, replace(loss, total=value.numel())))
    return found


def _told(losses: dict[str, Loss], dtype: torch.dtype) -> tuple[str, ...]:
    if not losses:
        return ()
    name, worst = max(losses.items(), key=lambda item: item[1].share)
    return (
        f"{len(losses)} tensors have values too small for full precision in {NAMES[dtype]}, all "
        "off by less than rounding does to the largest value beside them; most in "
        f"{name}: {worst.elements} of {worst.total} values",
    )


def _refusal(losses: dict[str, Loss], dtype: torch.dtype) -> str:
    told = "; ".join(f"{name}: {loss}" for name, loss in list(losses.items())[:_SAID])
    more = f"; and {len(losses) - _SAID} more" if len(losses) > _SAID else ""
    return (
        f"{NAMES[dtype]} cannot hold this model: {told}{more}. Export it in bf16 or fp32, or "
        "rescale what is too large or too small."
    )


def _kept_buffers(model: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """Floating buffers that are not saved, of a transformers model."""
    import sys

    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return {}
    return {
        (module, name): buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and buffer.is_floating_point()
    }
