"""In which order a norm casts, told bit for bit in half precision: float64 cannot show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.find.proof import Proof
from normsurgery.spec import Source, get
from normsurgery.treecopy import tree_copy


def cast_order(module: nn.Module, proof: Proof, shape: tuple[int, ...]) -> dict[str, Any]:
    """The proof's settings, with `cast` where the norm has registered cast orders and one fits."""
    settings = dict(proof.reading.settings)
    if not get(proof.kind).casts:
        return settings
    found = _fitting(module, proof, shape)
    return {**settings, "cast": found} if found is not None else settings


def fitting_cast(expected: Tensor, x: Tensor, source: Source) -> str | None:
    """The registered cast order in which the norm of `source` gives the very bits `expected`."""
    known = get(source.kind)
    itself = known.conversion(source.kind)
    if itself is None or len(source.settings.get("normalized_shape", [0])) != 1:
        return None
    for cast in known.casts:
        with torch.no_grad():
            if torch.equal(itself.build(source, cast=cast)(x), expected):
                return cast
    return None


def _fitting(module: nn.Module, proof: Proof, shape: tuple[int, ...]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).bfloat16()
    theirs = tree_copy(module, clone=True).to_empty(device="cpu").bfloat16().eval()
    weight = torch.randn(proof.reading.settings["features"], generator=generator).bfloat16()
    with torch.no_grad():
        for tensor in (*theirs.parameters(), *theirs.buffers()):
            if tensor.numel() == weight.numel():
                tensor.copy_(weight.reshape(tensor.shape))
        try:
            expected = theirs(x)
        except Exception:  # a module that takes more than the input, or no bfloat16: no order told
            return None
    return fitting_cast(expected, x, _source(proof, weight))


def _source(proof: Proof, weight: Tensor) -> Source:
    tensors: Mapping[str, Tensor] = dict.fromkeys(proof.reading.tensors, weight)
    return Source(
        kind=proof.kind,
        where="",
        settings=proof.reading.settings,
        tensors=tensors,
        training=False,
        dtype=weight.dtype,
        device=weight.device,
    )
