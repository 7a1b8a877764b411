"""In which order a norm casts, told bit for bit in bfloat16: float64 cannot show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from normsurgery.find.proof import Proof
from normsurgery.treecopy import tree_copy


def cast_order(module: nn.Module, proof: Proof, shape: tuple[int, ...]) -> dict[str, Any]:
    """The proof's settings, with `cast` where the norm has registered cast orders and one fits."""
    settings = dict(proof.reading.settings)
    if proof.kind != "rmsnorm" or len(settings.get("normalized_shape", [0])) != 1:
        return settings
    found = _fitting(module, proof.reading.tensors, settings, shape)
    return {**settings, "cast": found} if found is not None else settings


def _fitting(
    module: nn.Module,
    tensors: Mapping[str, str],
    settings: Mapping[str, Any],
    shape: tuple[int, ...],
) -> str | None:
    from normsurgery.norms.rmsnorm import CASTS, RMSNorm

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).bfloat16()
    theirs = tree_copy(module, clone=True).to_empty(device="cpu").bfloat16().eval()
    weight = torch.randn(settings["features"], generator=generator).bfloat16()
    with torch.no_grad():
        for tensor in (*theirs.parameters(), *theirs.buffers()):
            if tensor.numel() == weight.numel():
                tensor.copy_(weight.reshape(tensor.shape))
        try:
            expected = theirs(x)
        except Exception:  # a module that takes more than the input, or no bfloat16: no order told
            return None
        for cast in CASTS:
            ours = RMSNorm(
                settings["features"],
                settings["eps"],
                channel_axis=settings["channel_axis"],
                weight_offset=settings["weight_offset"],
                eps_outside=settings["eps_outside"],
                cast=cast,
                elementwise_affine="weight" in tensors,
            ).bfloat16()
            if ours.weight is not None:
                ours.weight.copy_(weight)
            if torch.equal(ours(x), expected):
                return cast
    return None
