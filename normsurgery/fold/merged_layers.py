"""Folds into a layer that parallel branches have become: its weights are made by its Step first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from normsurgery.fold.checks import Check
from normsurgery.fold.edits import AddProduct, Create, Edit, Scale, Shift
from normsurgery.fold.ground import Affine, Ground, Landing, MergedLayer, Refused
from normsurgery.fold.landings import affine_at
from normsurgery.fold.parallel_branches import BranchSum
from normsurgery.plan import Step


def merged_layer(found: BranchSum, step: Step) -> MergedLayer:
    """What the sum becomes by its step."""
    first = found.branches[0].layer
    assert first is not None
    weight = next(edit.target for edit in step.edits if isinstance(edit, Create))
    nodes = {node.index: node for branch in found.branches for node in branch.nodes}
    return MergedLayer(
        source=found.branches[0].source,
        output=found.output,
        nodes=tuple(nodes[index] for index in sorted(nodes)),
        weight=weight,
        bias=f"{weight.removesuffix('weight')}bias",
        has_bias=bool(step.options["bias"]),
        shape=tuple(step.options["shape"]),
        channel_axis=first.channel_axis,
        groups=int(step.options["groups"]),
        pads=any(step.options["padding"]),
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
            raise Refused(Check.ZERO_PADDING, f"{where} and its parallel branches pad with zeros")
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


def _created(ground: Ground, merged: MergedLayer) -> list[Create]:
    if _has_bias(ground, merged):
        return []
    return [Create(merged.bias, merged.shape[:1], merged.weight)]


def _has_bias(ground: Ground, merged: MergedLayer) -> bool:
    return merged.has_bias or merged.bias in ground.created


def with_bias(merges: Sequence[Step], made: Step) -> tuple[list[Step], Step]:
    """The merges, each with the bias that `made` wants of its layer, and `made` without making it.

    A layer is made with all its tensors.
    """
    wanted = {edit.target: edit for edit in made.edits if isinstance(edit, Create)}
    found: list[Step] = []
    for step in merges:
        weight = next((edit.target for edit in step.edits if isinstance(edit, Create)), "")
        bias = wanted.get(f"{weight.removesuffix('weight')}bias")
        if bias is not None:
            options = {**step.options, "bias": True}
            step = replace(step, options=options, edits=(*step.edits, bias))
            made = replace(made, edits=tuple(edit for edit in made.edits if edit != bias))
        found.append(step)
    return found, made
