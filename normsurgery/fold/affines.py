"""Which norms are a scale and a shift per channel in eval, or end in one; and which they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from normsurgery.fold.edits import Vector
from normsurgery.fold.ground import Affine, Run
from normsurgery.fold.unlisted import affine_of_unlisted, is_unlisted
from normsurgery.graph.nodes import argument
from normsurgery.spec import AffineOf, get, weight_and_bias
from normsurgery.survey import Site

AFFINE_ROLES = ("weight", "bias")


def is_affine(site: Site) -> bool:
    """In eval the norm is a scale and a shift per channel, and nothing else."""
    if site.attach != "norm":
        return False
    affine = get(site.kind).affine
    return is_unlisted(site) or (
        affine is not None and affine(_ones(site), site.settings) is not None
    )


def has_tail(site: Site) -> bool:
    """The norm's weight and bias come last, after everything it computes."""
    own = set(AFFINE_ROLES) & set(site.parameters)
    return site.attach == "norm" and bool(own) and get(site.kind).tail


def affine_of(site: Site) -> Affine:
    """What the norm is in eval, or else what comes last in it, as Vectors."""
    if is_unlisted(site):
        return affine_of_unlisted(site)
    if is_affine(site):
        return _as_vectors(get(site.kind).scale_and_shift, site)
    return _as_vectors(weight_and_bias, site)


def _as_vectors(affine: AffineOf, site: Site) -> Affine:
    """Vectors of the parts that are not neutral, of the tensors and settings that they need."""
    ones, settings = _Noted(_ones(site)), _Noted(site.settings)
    parts = affine(ones, settings)
    assert parts is not None
    tensors = {role: site.parameters[role] for role in site.parameters if role in ones.read}
    known = {n: v for n, v in site.settings.items() if n in settings.read or n == "features"}
    scale, shift = parts
    return Affine(
        None if scale is None else Vector("scale", tensors, known, kind=site.kind),
        None if shift is None else Vector("shift", tensors, known, kind=site.kind),
    )


def _ones(site: Site) -> dict[str, torch.Tensor]:
    """In place of the norm's tensors, where only what becomes of them matters."""
    features = int(site.settings.get("features") or 1)
    return {role: torch.ones(features, dtype=torch.float64) for role in site.parameters}


class _Noted(Mapping[str, Any]):
    """A mapping that notes what of it is looked at."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values_of, self.read = values, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self.values_of[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_of)

    def __len__(self) -> int:
        return len(self.values_of)


def uses_batch(run: Run) -> bool:
    """Whether the norm computes with the statistics of the batch in this run."""
    return any(_node_uses_batch(node) for node in run.nodes)


def _node_uses_batch(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return any(
        bool(argument(node, place, known.name, known.default_value))
        for place, known in enumerate(schema.arguments if schema is not None else ())
        if known.name in ("training", "use_input_stats")
    )
