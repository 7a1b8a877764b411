"""Weight standardization inside the forward of a layer's subclass, which no class tells.

The effective weight is observed in a recorded run, and the formula that gives it is searched for,
on random weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from normsurgery.find.events import plain
from normsurgery.fold.weight_formulas import RELATIVE, relative_error
from normsurgery.graph import Flow, record
from normsurgery.graph.nodes import arguments, is_constant, name_of, operator, outputs_of, tensor
from normsurgery.inputs import Inputs
from normsurgery.norms.weightstandardization import (
    per_output,
    standardization,
    standardization_settings,
)
from normsurgery.precision import lifted
from normsurgery.treecopy import tree_copy

_LARGEST_EPS = 0.1
WEIGHT_ARGUMENT = {
    "aten::convolution": 1,
    "aten::addmm": 2,
    "aten::mm": 1,
}


def example_inputs(layer: nn.Module) -> Iterator[Tensor]:
    """Random float64 inputs of several sizes: padding that depends on the size shows up."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        yield torch.randn(3, layer.in_features, generator=generator, dtype=torch.float64)
        return
    sizes: Any = layer
    wide = 3 + max([p for p in sizes.padding if isinstance(p, int)], default=0)
    spans = [d * (k - 1) + wide for k, d in zip(sizes.kernel_size, sizes.dilation, strict=True)]
    for more in range(max(sizes.stride) + 1):
        shape = (2, sizes.in_channels, *(s + more + axis for axis, s in enumerate(spans)))
        yield torch.randn(shape, generator=generator, dtype=torch.float64)


def computes_its_weight(layer: nn.Module) -> bool:
    """Whether the forward computes with anything but the stored weight; seen on the meta device.

    Raises LookupError where its forward is not one layer's, CannotTrace where it does not run.
    """
    weight: Any = layer.weight
    x = next(example_inputs(layer)).to("meta", weight.dtype)
    recording = record(tree_copy(layer).to("meta"), Inputs((x,)))
    return name_of(plain(_weight_used(recording)[0])) != "weight"


def read_standardization(layer: nn.Module) -> tuple[dict[str, str], dict[str, Any]]:
    """The roles (role -> local name) and settings of the weight standardization in `layer`'s
    forward. `layer` is float64 and on the CPU, with random weights, and may be run.

    Raises LookupError where the weight is computed in another way.
    """
    with lifted():
        recording = record(layer, Inputs((next(example_inputs(layer)),)))
    value, node = _weight_used(recording)
    used = tensor(value)
    if operator(node) != "aten::convolution":
        used = used.t()
    ran = recording.operations[: recording.operations.index(node)]
    before = [earlier for earlier in ran if _makes_constants(earlier)]
    weight = cast(Any, layer).weight.detach()
    for settings in _hypotheses(layer, before):
        standard = standardization({"weight": weight}, settings)
        found = _factors(standard, used, layer, settings)
        if found is not None:
            return found
    raise LookupError("its weight is computed by a formula that is not known")


def _hypotheses(layer: nn.Module, nodes: Sequence[fx.Node]) -> Iterator[dict[str, Any]]:
    axis, groups = (1, layer.groups) if isinstance(layer, _ConvTransposeNd) else (0, 1)
    written = [leaf for node in nodes for leaf in tree_leaves((node.args, node.kwargs))]
    numbers = [*written, *vars(layer).values()]
    small = [n for n in numbers if isinstance(n, float) and 0.0 < n <= _LARGEST_EPS]
    for eps, correction, root in itertools.product(
        dict.fromkeys((*small, 0.0)), (0, 1), (True, False)
    ):
        yield standardization_settings(
            eps, output_axis=axis, groups=groups, correction=correction, eps_in_root=root
        )


def _factors(
    standard: Tensor, used: Tensor, layer: nn.Module, settings: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any]] | None:
    """What the standardized weight is multiplied by: a number, or a number times a parameter."""
    axis, groups = settings["output_axis"], settings["groups"]
    rows = per_output(standard, axis, groups).flatten(2)
    wanted = per_output(used, axis, groups).flatten(2)
    factor = (rows * wanted).sum(2) / rows.square().sum(2)
    if not relative_error(factor[:, :, None] * rows, wanted) <= RELATIVE:
        return None
    scale = _constant(factor, layer)
    if scale is not None:
        return {"weight": "weight"}, {**settings, "scale": scale}
    for name, gain in layer.named_parameters():
        if gain.numel() == factor.numel():
            scale = _constant(factor / gain.detach().reshape(factor.shape), layer)
            if scale is not None:
                return {"weight": "weight", "gain": name}, {**settings, "scale": scale}
    return None


def _constant(factor: Tensor, layer: nn.Module) -> float | None:
    """The one number that all elements are; a number of the layer's own, where it is one."""
    mean = factor.mean()
    if not relative_error(factor, mean.expand_as(factor)) <= RELATIVE:
        return None
    own = [1.0, *(value for value in vars(layer).values() if isinstance(value, float))]
    same = (n for n in own if relative_error(torch.full_like(mean, n), mean) <= RELATIVE)
    return next(same, float(mean))


def _weight_used(recording: Flow) -> tuple[fx.Node, fx.Node]:
    """The value that the one layer of the run takes as its weight (transposed, for a linear)."""
    layers = [node for node in recording.operations if operator(node) in WEIGHT_ARGUMENT]
    if len(layers) != 1:
        raise LookupError("its forward is not that of one layer")
    given = arguments(layers[0])[WEIGHT_ARGUMENT[operator(layers[0])]]
    if not isinstance(given, fx.Node) or not is_constant(given):
        raise LookupError("its weight depends on its input")
    return given, layers[0]


def _makes_constants(node: fx.Node) -> bool:
    return bool(outputs_of(node)) and all(map(is_constant, outputs_of(node)))
