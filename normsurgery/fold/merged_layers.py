"""Folds into a layer that parallel branches have become: its weights are made by its Step first."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from normsurgery.fold.channels import vector
from normsurgery.fold.checks import Check
from normsurgery.fold.edits import AddProduct, Centre, Create, Edit, Scale, Shift
from normsurgery.fold.ground import Affine, Ground, Landing, MergedLayer, Refused
from normsurgery.fold.landings import affine_at
from normsurgery.fold.parallel_branches import BranchSum
from normsurgery.graph.nodes import in_order
from normsurgery.plan import MERGED, Step


def merged_layer(found: BranchSum, step: Step) -> MergedLayer:
    """What the sum becomes by its step."""
    first = found.branches[0].layer
    assert first is not None
    weight = next(edit.target for edit in step.edits if isinstance(edit, Create))
    nodes = {node for branch in found.branches for node in branch.nodes}
    return MergedLayer(
        source=found.branches[0].source,
        output=found.output,
        nodes=in_order(nodes),
        weight=weight,
        bias=f"{weight.removesuffix('weight')}bias",
        has_bias=bool(step.options["bias"]),
        shape=tuple(step.options["shape"]),
        channel_axis=first.channel_axis,
        groups=int(step.options["groups"]),
        padding=tuple(step.options["padding"]),
    )


def on_merged_input(
    ground: Ground, merged: MergedLayer, channels: Tensor, affine: Affine
) -> Landing:
    """The layer is given x instead of scale * x + shift. Raises Refused."""
    placed = affine_at(ground, merged.nodes[-1], channels, merged.channel_axis, affine)
    edits: list[Edit] = []
    if placed.shift is not None:
        if merged.pads:
            where = ground.path(merged.nodes[-1])
            why = f"{where} and its parallel branches pad with zeros"
            raise Refused(Check.ZERO_PADDING, why, _hint(ground, merged))
        shift = AddProduct(merged.bias, merged.weight, placed.shift, 1, 0, merged.groups)
        edits += [*_created(ground, merged), shift]
    if placed.scale is not None:
        edits.append(Scale(merged.weight, placed.scale, 1, merged.groups))
    return Landing(merged.nodes, (), tuple(edits))


def on_merged_output(
    ground: Ground, merged: MergedLayer, channels: Tensor, affine: Affine
) -> Landing:
    """The layer gives scale * y + shift instead of y. Raises Refused."""
    placed = affine_at(ground, merged.nodes[-1], channels, merged.channel_axis, affine)
    edits: list[Edit] = []
    if placed.scale is not None:
        edits.append(Scale(merged.weight, placed.scale, 0))
        edits += [Scale(merged.bias, placed.scale, 0)] if _has_bias(ground, merged) else []
    if placed.shift is not None:
        edits += [*_created(ground, merged), Shift(merged.bias, placed.shift)]
    return Landing(merged.nodes, (), tuple(edits))


def on_merged_mean(ground: Ground, merged: MergedLayer, channels: Tensor) -> Landing:
    """The layer gives its output less the mean of that over the channels. Raises Refused."""
    if vector(channels, merged.channel_axis) is None or merged.groups > 1:
        raise Refused(Check.RESIDUAL, f"{ground.path(merged.nodes[-1])} writes along another axis")
    edits = [Centre(merged.weight, 0)]
    edits += [Centre(merged.bias, 0)] if _has_bias(ground, merged) else []
    return Landing(merged.nodes, (), tuple(edits))


def _hint(ground: Ground, merged: MergedLayer) -> str:
    """An explicit padding, where nothing else would see it."""
    inside = set(merged.nodes)
    others = [n for n in ground.flow.readers(merged.source) if n not in inside]
    if others or ground.choices.explicit_pad:
        return ""
    return "Use pad='explicit' to write the padding out."


def _created(ground: Ground, merged: MergedLayer) -> list[Create]:
    if _has_bias(ground, merged):
        return []
    return [Create(merged.bias, merged.shape[:1], merged.weight)]


def _has_bias(ground: Ground, merged: MergedLayer) -> bool:
    return merged.has_bias or merged.bias in ground.created


def with_biases(decided: Sequence[Step]) -> list[Step]:
    """The merges, each with the bias that a later step wants of its layer; that step then makes
    none. A layer is made with all its tensors at once."""
    wanted = {
        edit.target: edit
        for made in decided
        if made.rule != MERGED
        for edit in made.edits
        if isinstance(edit, Create)
    }
    given: list[Create] = []
    found: list[Step] = []
    for made in decided:
        bias = wanted.get(_bias_of_merge(made))
        if bias is not None:
            given.append(bias)
            made = replace(made, options={**made.options, "bias": True})
            made = replace(made, edits=(*made.edits, bias))
        found.append(made)
    return [_without(made, given) for made in found]


def _bias_of_merge(made: Step) -> str:
    """What the bias of the merged layer is called; "" where the step makes none."""
    path = _path_of_merge(made)
    return f"{path}.bias" if path else ""


def _path_of_merge(made: Step) -> str:
    """Of the merged layer; "" where the step makes none."""
    if made.rule != MERGED or not made.edits:
        return ""
    weight = next(edit.target for edit in made.edits if isinstance(edit, Create))
    return weight.removesuffix(".weight")


def _without(made: Step, given: Collection[Create]) -> Step:
    if made.rule == MERGED:
        return made
    return replace(made, edits=tuple(edit for edit in made.edits if edit not in given))


def with_unpadded(decided: Mapping[int, Step]) -> dict[int, Step]:
    """The decisions; where a norm takes the padding of branches, it takes that of their merge.

    A norm that was decided before the merge knows only the branches, which will be gone.
    """
    layers = {
        path: layer
        for made in decided.values()
        if (layer := _path_of_merge(made))
        for path in made.site.settings["branches"]
    }
    return {index: _from_layers(made, layers) for index, made in decided.items()}


def _from_layers(made: Step, layers: Mapping[str, str]) -> Step:
    if layers.keys().isdisjoint(made.options.get("unpadded", ())):
        return made
    paths = dict.fromkeys(layers.get(path, path) for path in made.options["unpadded"])
    return replace(made, options={**made.options, "unpadded": list(paths)})
