"""Which norms are a scale and a shift per channel in eval, or end in one; and which they are."""

from __future__ import annotations

from torch import fx

from normsurgery.fold.edits import Vector
from normsurgery.fold.ground import Affine, Run
from normsurgery.fold.unlisted import affine_of_unlisted, is_unlisted
from normsurgery.graph.nodes import arguments, operator
from normsurgery.spec import get
from normsurgery.survey import Site

AFFINE_ROLES = ("weight", "bias")
STATISTICS = ("running_mean", "running_var")
_TRAINING_ARGUMENT = {
    "aten::native_batch_norm": 5,
    "aten::_native_batch_norm_legit": 5,
    "aten::cudnn_batch_norm": 5,
    "aten::batch_norm": 5,
}


def is_affine(site: Site) -> bool:
    """In eval the norm is a scale and a shift per channel, and nothing else."""
    if site.attach != "norm" or get(site.kind).as_affine is None:
        return False
    return site.kind == "affine" or set(STATISTICS) <= set(site.parameters)


def has_tail(site: Site) -> bool:
    """The norm's weight and bias come last, after everything it computes."""
    own = set(AFFINE_ROLES) & set(site.parameters)
    return site.attach == "norm" and bool(own) and get(site.kind).tail


def affine_of(site: Site) -> Affine:
    """The scale and shift that come last in a norm, as Vectors."""
    if is_unlisted(site):
        return affine_of_unlisted(site)
    roles = (*AFFINE_ROLES, *STATISTICS) if is_affine(site) else AFFINE_ROLES
    tensors = {role: site.parameters[role] for role in roles if role in site.parameters}
    known = ("eps", "weight_offset", "features")
    settings = {name: site.settings[name] for name in known if name in site.settings}
    whole = "running_var" in tensors
    scaled, shifted = whole or "weight" in tensors, whole or "bias" in tensors
    return Affine(
        Vector("scale", tensors, settings) if scaled else None,
        Vector("shift", tensors, settings) if shifted else None,
    )


def uses_batch(run: Run) -> bool:
    """Whether the norm computes with the statistics of the batch in this run."""
    return any(_node_uses_batch(node) for node in run.nodes)


def _node_uses_batch(node: fx.Node) -> bool:
    place = _TRAINING_ARGUMENT.get(operator(node))
    if place is not None:
        return bool(arguments(node)[place])
    return operator(node) == "aten::_native_batch_norm_legit_no_stats"
