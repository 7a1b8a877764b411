"""Small models of any architecture of transformers, and inputs they run on, by general rules.

Nothing here knows an architecture; `CONSTRAINTS` is all that had to be said by name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, ResNetConfig
from transformers.models.auto import configuration_auto, modeling_auto
from transformers_zoo import randomise

LARGEST_MODEL = 400_000_000  # parameters
VOCABULARY = 1000
EXPERTS = 16  # two in each of the eight groups that some routers choose among
WIDTH_DIVISORS = (16, 4, 1)  # tried in turn: group norms and rotary positions need some width

# Integers that are no width, so that dividing them would change what the model accepts.
NO_WIDTH = re.compile(
    r"vocab|token|position|image|patch|_ids?$|length|window|rate|theta|context|seq|frame|sample"
    r"|fft|chunk|bucket|stride|kernel|max_|n_ctx|mel|crop|tile|grid|resolution|codebook|label"
    r"|layer|depth|version|period|expert|group|hop|temperature|scale|year|quer|point|memory|level"
)
DEPTH = re.compile(r"(^|_)(layers?|depth|n_blocks|num_blocks)$")
SPECIAL_TOKEN = re.compile(r"(_token_id|_token_index|_token_ids|^(pad|bos|eos|sep|cls)_index)$")
IMAGE = re.compile(r"^(image_size|img_size|input_size)$")
# What a configuration must say and no general rule would know.
CONSTRAINTS: dict[str, Any] = {
    "use_cache": False,
    "use_pretrained_backbone": False,
    "use_timm_backbone": False,
    "use_mamba_kernels": False,
    "dtype": "float32",
}


# --- small configurations -------------------------------------------------------------------------


def shrink(config: PreTrainedConfig, divisor: int) -> None:
    """Make a configuration and those inside it small, in place."""
    values = vars(config)
    depths = {v for k, v in values.items() if DEPTH.search(k) and _is_int(v) and v > 2}
    kept = _kept_layers(values, depths)
    for name, value in list(values.items()):
        if isinstance(value, PreTrainedConfig) and value.model_type == "timm_backbone":
            values[name] = _own_backbone(value, divisor)
        elif isinstance(value, PreTrainedConfig):
            shrink(value, divisor)
        elif name in CONSTRAINTS:
            setattr(config, name, CONSTRAINTS[name])
        elif not name.startswith("_"):
            small = _shrunk(name, value, values, divisor, depths, kept)
            if small is not value:
                values[name] = small


def _own_backbone(config: PreTrainedConfig, divisor: int) -> PreTrainedConfig:
    """In place of a backbone from a package that need not be there, one of transformers' own."""
    resnet = ResNetConfig(depths=[1, 1, 1, 1], out_indices=getattr(config, "out_indices", None))
    shrink(resnet, divisor)
    return resnet


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kept_layers(values: dict[str, Any], depths: set[int]) -> int:
    """Two layers, or as many as it takes to see every type of layer that a list names."""
    per_layer = [v for v in values.values() if isinstance(v, list) and len(v) in depths and v]
    kept = 2
    for types in per_layer:
        if all(isinstance(kind, (str, int)) for kind in types) and len(set(types)) <= 4:
            kept = max(kept, 1 + max(types.index(kind) for kind in set(types)))
    return kept


def _shrunk(
    name: str, value: Any, values: dict[str, Any], divisor: int, depths: set[int], kept: int
) -> Any:
    if DEPTH.search(name) and _is_int(value) and value > kept:
        return kept
    if isinstance(value, (list, tuple)) and len(value) in depths and len(value) > kept:
        return value[:kept]
    if name == "depths":
        return type(value)(min(depth, 2) for depth in value)
    if re.search(r"vocab_size$", name) and _is_int(value):
        return min(value, VOCABULARY)
    if re.search(r"experts$", name) and _is_int(value):
        return min(value, EXPERTS)
    if SPECIAL_TOKEN.search(name):
        return _small_token(value)
    if IMAGE.search(name):
        return _small_image(value, values.get("patch_size"))
    return value if NO_WIDTH.search(name) else _narrow(value, divisor)


def _small_token(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_small_token(token) for token in value)
    return value % VOCABULARY if _is_int(value) and value >= VOCABULARY else value


def _small_image(value: Any, patch: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_small_image(side, patch) for side in value)
    side = 4 * patch if _is_int(patch) and patch >= 8 else 64
    return min(value, side) if _is_int(value) else value


def _narrow(value: Any, divisor: int) -> Any:
    if isinstance(value, (list, tuple)) and value and all(map(_is_int, value)):
        return type(value)(_narrow(width, divisor) for width in value)
    if not _is_int(value) or value < 64 or value % divisor:
        return value
    return value // divisor


# --- models and inputs ----------------------------------------------------------------------------


def architectures() -> list[str]:
    return sorted(set(configuration_auto.CONFIG_MAPPING_NAMES))


def model_class(config: PreTrainedConfig) -> type[nn.Module] | None:
    """The bare model of a configuration, else the first of the auto classes that knows it."""
    mappings = [modeling_auto.MODEL_MAPPING]
    mappings += [
        getattr(modeling_auto, name)
        for name in sorted(vars(modeling_auto))
        if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING")
    ]
    for mapping in mappings:
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    return None


def build(name: str, divisor: int) -> tuple[nn.Module, PreTrainedConfig]:
    """A small model of an architecture. Raises what its own code raises if it does not fit."""
    config = configuration_auto.CONFIG_MAPPING[name]()
    shrink(config, divisor)
    cls = model_class(config)
    if cls is None:
        raise LookupError("no auto class has a model for it")
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > LARGEST_MODEL:
        raise MemoryError(f"{size:,} parameters")
    torch.manual_seed(0)
    return randomise(cls(config).eval().float()), config


def candidates(model: nn.Module, config: PreTrainedConfig) -> Iterator[dict[str, Tensor]]:
    """Inputs to try: by the main input's name first, then by what the forward accepts."""
    accepted = set(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    texts = {n: _ids() for n in ("input_ids", "decoder_input_ids") if n in accepted}
    for make in _makers(main, config):
        values = {main: make()}
        yield values
        yield {**texts, **values}
        yield {**texts, **values, **_masks(accepted)}
    if "input_ids" in accepted:
        yield texts
    for name in ("pixel_values", "input_values", "input_features"):
        if name in accepted:
            for make in _makers(name, config):
                yield {**texts, name: make()}


def _ids() -> Tensor:
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def _masks(accepted: set[str]) -> dict[str, Tensor]:
    known = {
        "attention_mask": torch.ones(2, 9, dtype=torch.long),
        "bbox": torch.ones(2, 9, 4).long(),
    }
    return {name: value for name, value in known.items() if name in accepted}


def _makers(name: str, config: PreTrainedConfig) -> list[Callable[[], Tensor]]:
    if name.endswith("input_ids"):
        return [_ids]
    if name in ("pixel_values", "pixel_values_videos", "images"):
        channels = _setting(config, "num_channels", "in_channels", "in_chans") or 3
        sides = _side(config)
        frames = _setting(config, "num_frames") or 2
        return [
            _noise(2, channels, *sides),
            _noise(2, frames, channels, *sides),
            _noise(2, channels, 64, 64),
            _noise(2, channels, 224, 224),
        ]
    mels = _setting(config, "num_mel_bins", "feature_size", "input_feat_per_channel") or 80
    length = _setting(config, "max_length", "max_source_positions") or 100
    return [
        _noise(2, 4000),
        _noise(2, 1, 4000),
        _noise(2, 100, mels),
        _noise(2, mels, 100),
        _noise(2, mels, 2 * length),
        _noise(2, length, mels),
        _noise(2, 9, mels),
    ]


def _noise(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _setting(config: PreTrainedConfig, *names: str) -> Any:
    """The first of the settings that this configuration, or one inside it, has."""
    for place in (config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))):
        for name in names:
            if getattr(place, name, None) is not None:
                return getattr(place, name)
    return None


def _side(config: PreTrainedConfig) -> tuple[int, int]:
    size = _setting(config, "image_size", "img_size")
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[-1])
    return (size, size) if _is_int(size) else (64, 64)


def runnable_inputs(model: nn.Module, config: PreTrainedConfig) -> dict[str, Tensor] | None:
    """The first inputs on which the model runs; what it said to the others is not of interest."""
    for inputs in candidates(model, config):
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception:
            continue
        return inputs
    return None
