"""Folds into a layer that parallel branches have become: its Step comes first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, fx

from normsurgery.fold.channels import vector
from normsurgery.fold.checks import Check
from normsurgery.fold.edits import AddIdentity, AddProduct, Centre, Create, Edit, Scale, Shift
from normsurgery.fold.ground import Affine, Ground, Landing, MergedLayer, Refused
from normsurgery.fold.kernels import Geometry, Sizes
from normsurgery.fold.landings import affine_at
from normsurgery.fold.parallel_branches import BranchSum
from normsurgery.graph.nodes import in_order, inputs_of, outputs_of, shape
from normsurgery.steps import Merge, Step


def merged_layer(found: BranchSum, step: Step) -> MergedLayer:
    """What the sum becomes by its step."""
    kept = found.kept
    bias = kept.bias.name if kept.bias is not None else f"{found.label}.bias"
    nodes = {node for branch in found.branches for node in branch.nodes}
    return MergedLayer(
        source=found.branches[0].source,
        output=found.output,
        nodes=in_order(nodes),
        weight=kept.weight.name,
        bias=bias,
        has_bias=kept.bias is not None or any(edit.target == bias for edit in step.edits),
        shape=tuple(kept.weight.tensor.shape),
        channel_axis=kept.channel_axis,
        groups=found.geometry.groups,
        padding=found.geometry.padding,
        centre=_centre(found.geometry, tuple(kept.weight.tensor.shape)),
    )


def _centre(geometry: Geometry, shape: Sizes) -> Sizes | None:
    """Where the kernel of an identity lies, if it has a place."""
    square = shape[0] == shape[1] * geometry.groups
    if not square or any(stride != 1 for stride in geometry.stride):
        return None
    found = tuple(p // d for p, d in zip(geometry.padding, geometry.dilation, strict=True))
    inside = all(at < size for at, size in zip(found, geometry.kernel, strict=True))
    exact = all(
        at * d == p for at, d, p in zip(found, geometry.dilation, geometry.padding, strict=True)
    )
    return found if inside and exact else None


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


def on_merged_residual(
    ground: Ground, node: fx.Node, channels: Tensor, affine: Affine
) -> tuple[MergedLayer, Landing] | None:
    """The layer gives scale * (y + x) + shift - x instead of y; `node` adds its input x to that.

    None where the node adds up other values. Raises Refused.
    """
    for merged in ground.merged:
        ends = {merged.source, merged.output}
        if set(inputs_of(node)) != ends or merged.centre is None:
            continue
        if len({shape(value) for value in (*ends, *outputs_of(node))}) > 1:
            continue
        ground.require_only(merged.output, (node,))
        landing = on_merged_output(ground, merged, channels, affine)
        placed = affine_at(ground, node, channels, merged.channel_axis, affine)
        if placed.scale is None:
            return merged, landing
        scaled = AddIdentity(merged.weight, placed.scale, merged.centre, merged.groups)
        once = AddIdentity(merged.weight, None, merged.centre, merged.groups, -1)
        return merged, replace(landing, edits=(*landing.edits, scaled, once))
    return None


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


def with_unpadded(decided: Mapping[int, Step]) -> dict[int, Step]:
    """The decisions; where a norm takes the padding of branches, it takes that of those which stay.

    A norm that was decided before the merge knows them all.
    """
    gone = {
        path for made in decided.values() if isinstance(made, Merge) for path in made.branches[1:]
    }
    return {index: _padded_by_others(made, gone) for index, made in decided.items()}


def _padded_by_others(made: Step, gone: set[str]) -> Step:
    if gone.isdisjoint(made.options.get("unpadded", ())):
        return made
    paths = [path for path in made.options["unpadded"] if path not in gone]
    return replace(made, options={**made.options, "unpadded": paths})
