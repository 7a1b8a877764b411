"""What a row of the table is, and what the rows are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SEED = 20


@dataclass(frozen=True)
class Row:
    """One model: how to build it, what to call it with, and the norms that run.

    sites: norms of activations by kind. calls: only where a kind is called another number of times.
    offset_one: how many of the sites scale by `1 + weight`.
    weights: norms that are applied to a weight and not to an activation, by kind.
    outside: those of the sites that stand in a function outside any forward, where nothing can be
        rewritten; `skips` is how many Skips say so.
    gated: how many of the RMS norms are given a gate.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    sites: Mapping[str, int]
    calls: Mapping[str, int] = field(default_factory=dict)
    offset_one: int = 0
    weights: Mapping[str, int] = field(default_factory=dict)
    outside: Mapping[str, int] = field(default_factory=dict)
    skips: int = 0
    gated: int = 0

    def expected_calls(self) -> dict[str, int]:
        return {**self.sites, **self.calls}

    def within_forwards(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The counts without those of norms that are in no forward."""
        left = {kind: count - self.outside.get(kind, 0) for kind, count in counts.items()}
        if self.gated:  # which the recorder, that sees no further than the division, does not tell
            left = {**left, "rmsnorm": left["rmsnorm"] - self.gated, "gatedrmsnorm": self.gated}
        return {kind: count for kind, count in left.items() if count}


def randomise(model: nn.Module, seed: int = SEED) -> nn.Module:
    """Move what an initialisation leaves neutral away from 0 and 1, in place.

    Parameters whose elements are all equal (norm weights, biases, layer scales) become uniform in
    (0.2, 0.8); running statistics become those of no particular data.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.copy_(0.2 + 0.6 * torch.rand(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            if name.endswith("running_var"):
                buffer.copy_(0.4 + 1.2 * torch.rand(buffer.shape, generator=generator))
    return model


def built(model_class: type[nn.Module], config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(SEED)
        config.use_cache = False
        return randomise(model_class(config).eval())

    return build


def image(size: int = 32) -> Callable[[], dict[str, Tensor]]:
    def inputs() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}

    return inputs


def _ids(length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, 90, (2, length), generator=generator)


def text_input(length: int = 7) -> dict[str, Tensor]:
    return {"input_ids": _ids(length, torch.Generator().manual_seed(SEED))}


def pair() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return {"input_ids": _ids(7, generator), "decoder_input_ids": _ids(5, generator)}


def waveform() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(SEED))}


def spectrogram() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    features = torch.randn(2, 8, 20, generator=generator)
    return {"input_features": features, "decoder_input_ids": _ids(5, generator)}


def image_and_text() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    return {"input_ids": _ids(6, generator), "pixel_values": pixels}


# What every decoder below has: two layers, hidden size 32, four heads of 8, two of them for keys.
DECODER: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CLIP_TOWER: dict[str, Any] = {**ENCODER, "projection_dim": 24}
