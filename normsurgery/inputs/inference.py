"""Finds inputs that a model accepts: those it carries, those its configuration says, usual sizes.

Everything tried is a list of `--input` texts, so that what was found can always be repeated.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normsurgery.errors import CannotTrace
from normsurgery.inputs import configured
from normsurgery.inputs.spelling import parse, spell
from normsurgery.inputs.values import Inputs
from normsurgery.randomstate import random_state_kept
from normsurgery.treecopy import tree_copy

BATCH = 2
_MOST_TRIALS = 80
_FIRST_LAYERS = 6
_SIDES_2D = (64, 224, 32, 28, 96, 128, 256, 299, 384, 512, 16, 8)
_SIDES_1D = (64, 256, 1000, 4000, 16000, 128, 32, 16)
_SIDES_3D = (16, 32, 64, 8)
_POSITIONS = 16


def infer(model: nn.Module | ExportedProgram) -> Inputs:
    """Inputs of batch 2 (where that can be chosen) that `model` accepts, on its device.

    In this order: the example inputs of an exported program; what the configuration of a
    transformers or timm model says; shapes that fit the first layers, at usual sizes. Each is tried
    on a copy of the tree in eval mode without gradients; the model and torch's random state stay as
    they are. Raises CannotTrace with what was tried.
    """
    if isinstance(model, ExportedProgram):
        return _carried(model)
    device = _device(model)
    working = tree_copy(model).eval()
    tried: dict[str, str] = {}
    for texts in islice(_distinct(_candidates(working)), _MOST_TRIALS):
        inputs = parse(texts).to(device=device)
        error = _error_of(working, inputs)
        if error is None:
            return inputs
        tried[" ".join(texts)] = error
    raise CannotTrace(_nothing_found(model, tried))


def _carried(program: ExportedProgram) -> Inputs:
    if program.example_inputs is None:
        raise CannotTrace(
            "the exported program carries no example inputs. Give them as --input, for example "
            "--input 1x3x224x224."
        )
    args, kwargs = program.example_inputs
    texts = [spell(value) for value in args]
    texts += [f"{name}={spell(value)}" for name, value in kwargs.items()]
    return Inputs(tuple(args), dict(kwargs), tuple(texts))


def _device(model: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in _tensors(model)), None)


def _dtype(model: nn.Module) -> str:
    floating = (tensor.dtype for tensor in _tensors(model) if tensor.is_floating_point())
    return str(next(floating, torch.float32)).removeprefix("torch.")


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _error_of(model: nn.Module, inputs: Inputs) -> str | None:
    try:
        with torch.no_grad(), random_state_kept(model):
            inputs.call(model)
    except Exception as error:  # a model may fail on wrong inputs in any way
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
    return None


def _nothing_found(model: nn.Module, tried: Mapping[str, str]) -> str:
    shown = "; ".join(f"{texts} ({error})" for texts, error in islice(tried.items(), 3))
    more = f"; and {len(tried) - 3} more" if len(tried) > 3 else ""
    signature = ", ".join(_required(model)) or "none"
    return (
        f"no inputs were found that {type(model).__name__} accepts. Tried {shown or 'none'}{more}. "
        f"Its forward needs: {signature}. Give them as --input, for example --input 1x3x224x224 or "
        "--input input_ids=int64[1,16]<30522, or in Python as inputs=(x,)."
    )


def _distinct(candidates: Iterable[list[str]]) -> Iterator[list[str]]:
    seen: set[tuple[str, ...]] = set()
    for texts in candidates:
        if tuple(texts) not in seen:
            seen.add(tuple(texts))
            yield texts


def _candidates(model: nn.Module) -> Iterator[list[str]]:
    dtype = _dtype(model)
    yield from configured.candidates(model, dtype, BATCH)
    required = _required(model)
    if not required:
        yield []
    count = max(len(required), 1)
    first = list(islice(_by_layer(model, dtype), _FIRST_LAYERS))
    for sizes in first:
        for text in sizes:
            yield [text] * count
    if count > 1 and len(first) >= count:
        yield [sizes[0] for sizes in first[:count]]
    for text in _images(3, dtype):
        yield [text] * count


def _required(model: nn.Module) -> list[str]:
    """Parameters of forward that have no default."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (ValueError, TypeError):
        return ["?"]
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [p.name for p in parameters if p.kind in named and p.default is p.empty]
    return found or (["?"] if any(p.kind is p.VAR_POSITIONAL for p in parameters) else [])


def _by_layer(model: nn.Module, dtype: str) -> Iterator[list[str]]:
    """For each layer from the first on, the inputs that fit it."""
    for module in model.modules():
        texts = _fitting(module, dtype)
        if texts:
            yield texts


def _fitting(module: nn.Module, dtype: str) -> list[str]:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return [f"int64[{BATCH},{_POSITIONS}]<{module.num_embeddings}"]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return _tokens(tuple(module.normalized_shape), dtype)
    if isinstance(module, nn.RNNBase):
        return _tokens((module.input_size,), dtype)
    if isinstance(module, nn.MultiheadAttention):
        return _tokens((module.embed_dim,), dtype)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() == 0:
        return _fitting_statistics(module, dtype)
    if isinstance(module, nn.Bilinear):
        return []
    if weight.dim() == 1:
        return _fitting_vector(module, weight.shape[0], dtype)
    if weight.dim() == 2:
        return _fitting_matrix(module, weight, dtype)
    return _fitting_convolution(module, weight, dtype)


def _fitting_statistics(module: nn.Module, dtype: str) -> list[str]:
    """A norm without affine parameters, told by the size it says."""
    features = getattr(module, "num_features", None)
    return _fitting_vector(module, features, dtype) if isinstance(features, int) else []


def _fitting_vector(module: nn.Module, features: int, dtype: str) -> list[str]:
    """A norm over channels, or over the last axis: by its class where it is torch's, else both."""
    spatial = {
        1: [_text(dtype, BATCH, features, _POSITIONS), _text(dtype, BATCH, features)],
        2: [_text(dtype, BATCH, features, 8, 8)],
        3: [_text(dtype, BATCH, features, 4, 4, 4)],
    }
    for dimensions, classes in _NORMS_BY_DIMENSIONS.items():
        if isinstance(module, classes):
            return spatial[dimensions]
    if isinstance(module, nn.GroupNorm):
        return spatial[2] + spatial[1]
    return _tokens((features,), dtype) + spatial[2] + spatial[1] + spatial[3]


_NORMS_BY_DIMENSIONS: dict[int, tuple[type[nn.Module], ...]] = {
    1: (nn.BatchNorm1d, nn.InstanceNorm1d),
    2: (nn.BatchNorm2d, nn.InstanceNorm2d),
    3: (nn.BatchNorm3d, nn.InstanceNorm3d),
}


def _fitting_matrix(module: nn.Module, weight: Tensor, dtype: str) -> list[str]:
    inputs = getattr(module, "in_features", weight.shape[1])
    return [_text(dtype, BATCH, inputs), *_tokens((inputs,), dtype), *_flattened(inputs, dtype)]


def _flattened(features: int, dtype: str) -> list[str]:
    """Square images whose pixels are as many as a first linear layer takes."""
    for channels in (1, 3):
        side = int((features / channels) ** 0.5)
        if side > 1 and channels * side * side == features:
            return [_text(dtype, BATCH, channels, side, side)]
    return []


def _fitting_convolution(module: nn.Module, weight: Tensor, dtype: str) -> list[str]:
    channels = getattr(module, "in_channels", None)
    if not isinstance(channels, int):
        return []
    spatial = weight.dim() - 2
    if spatial == 1:
        return [_text(dtype, BATCH, channels, side) for side in _SIDES_1D]
    if spatial == 2:
        return _images(channels, dtype)
    return [_text(dtype, BATCH, channels, *([side] * spatial)) for side in _SIDES_3D]


def _images(channels: int, dtype: str) -> list[str]:
    return [_text(dtype, BATCH, channels, side, side) for side in _SIDES_2D]


def _tokens(features: tuple[int, ...], dtype: str) -> list[str]:
    return [_text(dtype, BATCH, _POSITIONS, *features), _text(dtype, BATCH, *features)]


def _text(dtype: str, *sizes: int) -> str:
    if dtype == "float32" and len(sizes) > 1:
        return "x".join(map(str, sizes))
    return f"{dtype}[{','.join(map(str, sizes))}]"


__all__ = ["infer"]
