"""Inputs that a model's configuration describes: transformers' `config`, timm's `pretrained_cfg`.

What is asked for is read from the forward's signature and `main_input_name`; sizes come from the
configuration. No architecture is known by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_TOKENS = 16
_DECODER_TOKENS = 8
_SIDES = (64, 224)
_WAVE_FRAMES = 24
_NESTED = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "thinker_config")


def candidates(model: nn.Module, dtype: str, batch: int) -> Iterator[list[str]]:
    """Lists of `--input` texts that the model's configuration suggests, the likeliest first."""
    for config in (getattr(model, "pretrained_cfg", None), getattr(model, "default_cfg", None)):
        sizes = _get(config, "input_size")
        if isinstance(sizes, (tuple, list)) and len(sizes) == 3:
            yield [f"{dtype}[{batch},{','.join(map(str, sizes))}]"]
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        return
    yield from _transformers(model, config, main, dtype, batch)


def _transformers(
    model: nn.Module, config: Any, main: str, dtype: str, batch: int
) -> Iterator[list[str]]:
    parameters = inspect.signature(model.forward).parameters
    always = ["use_cache=False"] if "use_cache" in parameters else []
    decoder = _decoder_ids(config, parameters, batch)
    extra = [name for name in _MODALITIES if name in parameters and name != main]
    for text in _MODALITIES.get(main, _nothing)(config, dtype, batch):
        alone = [f"{main}={text}", *decoder, *always]
        yield alone
        if decoder:
            yield [f"{main}={text}", *always]
        yield from (
            [f"{main}={text}", f"{name}={other}", *decoder, *always]
            for name in extra
            for other in _MODALITIES[name](config, dtype, batch)
        )


def _decoder_ids(config: Any, parameters: Mapping[str, Any], batch: int) -> list[str]:
    if not _get(config, "is_encoder_decoder") or "decoder_input_ids" not in parameters:
        return []
    vocabulary = _find(config, "decoder_vocab_size", "vocab_size")
    return [f"decoder_input_ids=int64[{batch},{_DECODER_TOKENS}]<{vocabulary or _DECODER_TOKENS}"]


def _nothing(config: Any, dtype: str, batch: int) -> Iterator[str]:
    return iter(())


def _input_ids(config: Any, dtype: str, batch: int) -> Iterator[str]:
    vocabulary = _find(config, "vocab_size", "vocabulary_size")
    if not isinstance(vocabulary, int):
        return
    longest = _find(config, "max_position_embeddings", "n_positions")
    length = min(_TOKENS, longest) if isinstance(longest, int) and longest > 0 else _TOKENS
    yield f"int64[{batch},{length}]<{vocabulary}"


def _pixel_values(config: Any, dtype: str, batch: int) -> Iterator[str]:
    channels = _find(config, "num_channels", "in_channels", "in_chans") or 3
    sides = [_find(config, "image_size", "input_size", "img_size"), *_SIDES]
    for side in sides:
        size = _pair(side)
        if size:
            yield f"{dtype}[{batch},{channels},{size}]"
            frames = _find(config, "num_frames")
            if isinstance(frames, int):
                yield f"{dtype}[{batch},{frames},{channels},{size}]"


def _pair(side: Any) -> str | None:
    if isinstance(side, Mapping):
        side = (side.get("height"), side.get("width"))
    if isinstance(side, int):
        return f"{side},{side}"
    if isinstance(side, (tuple, list)) and len(side) == 2 and all(isinstance(s, int) for s in side):
        return f"{side[0]},{side[1]}"
    return None


def _input_values(config: Any, dtype: str, batch: int) -> Iterator[str]:
    """A wave long enough for some frames after all strides, or a spectrogram."""
    kernels, strides = _find(config, "conv_kernel"), _find(config, "conv_stride")
    if isinstance(kernels, (tuple, list)) and isinstance(strides, (tuple, list)):
        length = _WAVE_FRAMES
        for kernel, stride in zip(reversed(kernels), reversed(strides), strict=False):
            length = (length - 1) * stride + kernel
        yield f"{dtype}[{batch},{length}]"
    bins, frames = _find(config, "num_mel_bins"), _find(config, "max_length")
    if isinstance(bins, int) and isinstance(frames, int):
        yield f"{dtype}[{batch},{frames},{bins}]"
    channels = _find(config, "audio_channels")
    if isinstance(channels, int):
        yield f"{dtype}[{batch},{channels},4000]"
    yield f"{dtype}[{batch},16000]"


def _input_features(config: Any, dtype: str, batch: int) -> Iterator[str]:
    """Mel bins over time, in either order of the two axes, or as a processor gives them."""
    bins = _find(config, "num_mel_bins", "n_mels", "feature_size")
    positions = _find(config, "max_source_positions", "n_window")
    if isinstance(bins, int) and isinstance(positions, int):
        yield f"{dtype}[{batch},{bins},{2 * positions}]"
    for features in (_find(config, "feature_projection_input_dim", "input_feat_per_channel"), bins):
        if isinstance(features, int):
            yield f"{dtype}[{batch},64,{features}]"
            yield f"{dtype}[{batch},{features},64]"


_MODALITIES = {
    "input_ids": _input_ids,
    "pixel_values": _pixel_values,
    "pixel_values_videos": _pixel_values,
    "input_values": _input_values,
    "input_features": _input_features,
}


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _find(config: Any, *names: str) -> Any:
    """The first of some settings that a configuration, or one nested in it, has."""
    for holder in (config, *(_get(config, nested) for nested in _NESTED)):
        for name in names:
            value = _get(holder, name) if holder is not None else None
            if value is not None:
                return value
    return None
