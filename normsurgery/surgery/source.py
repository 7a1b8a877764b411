"""A site of a live model as a Source: what a conversion may know about the norm it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.errors import UsageError
from normsurgery.norms.carry import AFFINE_ROLES
from normsurgery.spec import Conversion, Source, get
from normsurgery.steps import FoldStep, Step
from normsurgery.survey import Site

PARAMETRIZED = ".parametrizations."


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module that `path` names; "" is the model. Raises UsageError where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UsageError(
            f"{type(model).__name__} has no module {path!r}: {error}. "
            "The plan was made for another model; make a new one for this."
        ) from error


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name, as the model computes with it now.

    Of a parametrized tensor, the value that the parametrization gives.
    """
    if PARAMETRIZED in name:
        before, _, after = name.partition(PARAMETRIZED)
        name = f"{before}.{after.split('.')[0]}"
    path, _, attribute = name.rpartition(".")
    value = getattr(module_at(model, path), attribute, None)
    if not isinstance(value, Tensor):
        raise UsageError(
            f"{type(model).__name__} has no tensor {name!r}. "
            "The plan was made for another model; make a new one for this."
        )
    return value


def source_of(model: nn.Module, site: Site) -> Source:
    """What stands at `site` now. Its tensors are the model's own objects."""
    module = module_at(model, site.path)
    tensors = {role: tensor_at(model, name) for role, name in site.parameters.items()}
    dtype, device = _place(model, module, site, tensors)
    return Source(
        kind=site.kind,
        where=site.label,
        settings=site.settings,
        tensors=tensors,
        shape=site.shape,
        module=module if site.form == "module" else None,
        training=module.training,
        dtype=dtype,
        device=device,
    )


def conversion_of(step: Step) -> Conversion | None:
    """What builds the new norm of a step; of a fold that pads explicitly, with the padding."""
    from normsurgery.fold.channel_pad import conversion_to_padding

    conversion = get(step.to).conversion(step.site.kind)
    padded = isinstance(step, FoldStep) and "pad" in step.options
    return conversion_to_padding(conversion) if padded else conversion


def what_is_left(source: Source, step: Step) -> tuple[Source, Mapping[str, Any]]:
    """What a step's conversion starts from, and its options.

    A fold with `affine=False` has put the norm's weight and bias elsewhere; with `unpadded` it
    names convolutions, which are no business of the norm's.
    """
    if not isinstance(step, FoldStep):
        return source, step.options
    if "pad" in step.options or step.options.get("affine", True):
        named = {name: value for name, value in step.options.items() if name != "unpadded"}
        return source, named
    rest = {role: t for role, t in source.tensors.items() if role not in AFFINE_ROLES}
    options = {name: value for name, value in step.options.items() if name != "affine"}
    return replace(source, tensors=rest), options


def _place(
    model: nn.Module, module: nn.Module, site: Site, tensors: Mapping[str, Tensor]
) -> tuple[torch.dtype | None, torch.device | None]:
    """dtype and device: of the norm's own tensors, else of its input and its surroundings."""
    for tensor in tensors.values():
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    near = _first_floating(module)
    around = _first_floating(model) if near is None else near
    device = None if around is None else around.device
    recorded = None if site.dtype is None else parse_dtype(site.dtype)
    if recorded is not None:
        return recorded, device
    return (None if around is None else around.dtype), device


def _first_floating(module: nn.Module) -> Tensor | None:
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def parse_dtype(text: str) -> torch.dtype:
    """`float32` or `torch.float32` as a dtype."""
    dtype: Any = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"{text!r} is no dtype of torch.")
    return dtype


def build(
    conversion: Conversion, source: Source, options: Mapping[str, Any], init: str
) -> nn.Module:
    """Run a conversion without moving the caller's random state."""
    cuda = source.device is not None and source.device.type == "cuda"
    with torch.random.fork_rng(devices=[source.device] if cuda else []), torch.no_grad():
        return conversion.build(source, init=init, **options)
