"""The edits with which a norm takes up a scale and a shift of its output, or of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from normsurgery.edits.types import Create, Edit, Fill, Scale, Shift
from normsurgery.flow.flow import Operand
from normsurgery.folding.affines import AFFINE_ROLES, affine_of, is_affine, uses_batch
from normsurgery.folding.ground import Affine, Ground, Landing, Run, is_torch_layer
from normsurgery.folding.landings import affine_at
from normsurgery.folding.unlisted import is_unlisted
from normsurgery.rewriting.source import tensor_at
from normsurgery.spec import get
from normsurgery.survey import Site


def on_norm_output(ground: Ground, run: Run, channels: Tensor, affine: Affine) -> Landing | None:
    """The weight and bias of a norm take up an affine of its output; None where it has none."""
    site = run.site
    node = run.nodes[-1] if run.nodes else None
    offset = float(site.settings.get("weight_offset", 0.0))
    if node is None or site.attach != "norm" or offset:
        return None
    known = get(site.kind)
    if known.affine is not None and not known.tail:
        return None
    wanted = [role for role in ("weight", "bias") if role not in site.parameters]
    created = _created(ground, site, wanted) if wanted else []
    if "weight" in wanted and not created:
        return None
    if "bias" in wanted and not created and affine.shift is not None:
        return None
    placed = affine_at(ground, node, channels, int(site.settings.get("channel_axis", 1)), affine)
    edits: list[Edit] = list(created)
    tensors = _statistic(ground, site) if created else []
    names = {edit.target.rpartition(".")[2]: edit.target for edit in created}
    for role, name in {**site.parameters, **names}.items():
        if role not in ("weight", "bias"):
            continue
        if role in site.parameters and name not in ground.created:
            tensor = tensor_at(ground.model, name)
            if tensor.dim() != 1:
                return None
            tensors.append(Operand(name, tensor, (0,)))
        edits += [Scale(name, placed.scale, 0)] if placed.scale is not None else []
        if role == "bias" and placed.shift is not None:
            edits.append(Shift(name, placed.shift))
    return Landing(run.nodes, tuple(tensors), tuple(edits))


def _statistic(ground: Ground, site: Site) -> list[Operand]:
    """A tensor that every run of the norm reads, to tell whether all of them agree on new ones."""
    name = site.parameters[get(site.kind).centre]
    return [Operand(name, tensor_at(ground.model, name), (0,))]


def on_norm_input(ground: Ground, run: Run, channels: Tensor, affine: Affine) -> Landing | None:
    """A norm with statistics is given x instead of scale * x + shift; None where it is no such.

    g * (scale * x + shift - mean) + bias: the mean takes up the shift; before the weight, and so g,
    takes up the scale, what is left of the mean goes to the bias. Raises Refused.
    """
    site = run.site
    centre = get(site.kind).centre
    if centre not in site.parameters or uses_batch(run) or not run.nodes:
        return None
    if not is_affine(site) or is_unlisted(site):
        return None
    ground.require_inner(run)
    axis = int(site.settings.get("channel_axis", 1))
    placed = affine_at(ground, run.nodes[0], channels, axis, affine)
    if placed.scale is not None and site.settings.get("weight_offset"):
        return None
    roles = (centre, *(AFFINE_ROLES if placed.scale is not None else ()))
    missing = [role for role in roles if role not in site.parameters]
    created = _created(ground, site, missing) if missing else []
    if missing and not created:
        return None
    tensors = [
        Operand(name, tensor_at(ground.model, name), (0,))
        for role in roles
        if (name := site.parameters.get(role)) is not None and name not in ground.created
    ]
    if any(operand.tensor.dim() != 1 for operand in tensors):
        return None
    return Landing(run.nodes, tuple(tensors), (*created, *_in_front(site, created, placed)))


def _in_front(site: Site, created: Sequence[Create | Fill], affine: Affine) -> list[Edit]:
    """The edits on the tensors of a norm with statistics."""
    names = {edit.target.rpartition(".")[2]: edit.target for edit in created} | {**site.parameters}
    mean, edits = names[get(site.kind).centre], list[Edit]()
    if (turned := affine.over(-1.0).shift) is not None:
        edits.append(Shift(mean, turned))
    own = affine_of(site).shift
    if affine.scale is None or own is None:
        return edits
    without = {role: name for role, name in own.tensors.items() if role != "bias"}
    return [
        *edits,
        Shift(names["bias"], replace(own, tensors=without)),
        Fill(mean, 0.0),
        Scale(names["weight"], affine.scale, 0),
    ]


def _created(ground: Ground, site: Site, roles: Sequence[str]) -> list[Create | Fill]:
    """A neutral weight and bias for a norm of torch's with statistics that was made without."""
    statistic = site.parameters.get(get(site.kind).centre)
    if statistic is None or site.form != "module" or ground.choices.keep_classes:
        return []
    module = ground.model.get_submodule(site.path)
    if not is_torch_layer(module) or any(role not in module._parameters for role in roles):
        return []
    prefix = f"{site.path}." if site.path else ""
    shape = tuple(tensor_at(ground.model, statistic).shape)
    edits: list[Create | Fill] = []
    for role in roles:
        edits.append(Create(prefix + role, shape, statistic))
        edits += [Fill(prefix + role, 1.0)] if role == "weight" else []
    return edits
