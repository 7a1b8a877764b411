"""The rules: for one norm, where its scale and shift can go. The first that matches decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from normsurgery.flow.flow import Operand
from normsurgery.flow.nodes import operator, shape
from normsurgery.flow.operators import CONVOLUTION, Kind, kind_of
from normsurgery.folding.affines import affine_of, is_affine
from normsurgery.folding.agreement import Agreed, agree
from normsurgery.folding.backward import Backward
from normsurgery.folding.channel_pad import ChannelPad
from normsurgery.folding.channels import along_axis
from normsurgery.folding.checks import Check
from normsurgery.folding.explicit_pad import padded_readers
from normsurgery.folding.forward import Forward
from normsurgery.folding.ground import Ground, Landing, Refused, Run
from normsurgery.folding.unlisted import is_unlisted
from normsurgery.rewriting.obstacles import lost_fact
from normsurgery.rewriting.source import tensor_at
from normsurgery.survey import Site


@dataclass(frozen=True)
class Proposal:
    """A fold of one norm that the data flow allows.

    to, options: what is left of the norm. gone: nothing is left, its output is its input.
    changed: values that hold other numbers afterwards.
    """

    rule: str
    agreed: Agreed
    landings: tuple[Landing, ...]
    changed: frozenset[fx.Node]
    to: str
    options: Mapping[str, Any] = field(default_factory=dict)
    gone: bool = False
    notes: tuple[str, ...] = ()


def into_producer(ground: Ground, site: Site, runs: Sequence[Run]) -> Proposal:
    """Backwards, into whatever makes its input. Raises Refused."""
    walk = Backward(ground)
    landings: list[Landing] = []
    for run in runs:
        ground.require_inner(run)
        landings += walk.through_run(run, _channels(site, run.start), affine_of(site))
    return Proposal(
        "into producer",
        agree(ground, landings),
        tuple(landings),
        frozenset(walk.changed),
        "identity",
        gone=True,
        notes=_rank_notes(ground, site, runs, landings),
    )


def into_consumers(ground: Ground, site: Site, runs: Sequence[Run]) -> Proposal:
    """Forwards, into everything that reads its output. Raises Refused."""
    walk = Forward(ground)
    landings: list[Landing] = []
    for run in runs:
        ground.require_inner(run)
        channels = _channels(site, run.end)
        landings += walk.consumers(run.end, channels, affine_of(site))
    if not landings:
        raise Refused(Check.NO_NEIGHBOUR, "nothing reads its output")
    whole = is_affine(site)
    return Proposal(
        "into consumers",
        agree(ground, landings),
        tuple(landings),
        frozenset(walk.changed),
        "identity" if whole else site.kind,
        {} if whole else {"affine": False},
        gone=whole,
        notes=_rank_notes(ground, site, runs, landings),
    )


def into_padding_consumers(ground: Ground, site: Site, runs: Sequence[Run]) -> Proposal:
    """Into convolutions that pad with zeros: what is left pads in their place. Raises Refused."""
    affine = affine_of(site)
    asked = ground.choices.explicit_pad and not ground.choices.keep_classes
    # A norm that is known by its operations alone has no tensors to pad with by their roles.
    if not asked or affine.shift is None or is_unlisted(site):
        raise Refused(Check.NO_NEIGHBOUR, "explicit padding is not asked for")
    found = []
    for run in runs:
        ground.require_inner(run)
        channels = _channels(site, run.end)
        found.append(padded_readers(ground, run.end, channels, affine))
    first = found[0]
    if any(padded.amounts != first.amounts for padded in found):
        raise Refused(Check.ZERO_PADDING, "it is called again where other amounts are padded")
    if site.form != "module" or site.settings.get("channel_axis", 1) != 1:
        raise Refused(Check.NOT_REWRITABLE, "only a module over axis 1 is replaced by a padding")
    lost = lost_fact(ground.model, site, ChannelPad(torch.empty(0), first.amounts))
    if lost is not None:
        raise Refused(Check.NOT_REWRITABLE, lost)
    landings = tuple(landing for padded in found for landing in padded.landings)
    paths = dict.fromkeys(path for padded in found for path in padded.paths)
    number = sum(padded.elements for padded in found)
    kept = {} if is_affine(site) else {"affine": False}
    return Proposal(
        "into consumers, explicit padding",
        agree(ground, landings),
        landings,
        frozenset[fx.Node]().union(*(padded.changed for padded in found)),
        "identity" if is_affine(site) else site.kind,
        {**kept, "pad": list(first.amounts), "unpadded": list(paths)},
        notes=(f"pads {number} elements explicitly on these inputs",),
    )


def standalone(ground: Ground, site: Site, runs: Sequence[Run]) -> Proposal:
    """To one multiplication and addition, where it can go nowhere. Raises Refused."""
    if site.kind == "affine" or ground.choices.keep_classes:
        raise Refused(Check.NO_NEIGHBOUR)
    if not ground.choices.untie:
        _require_own_tensors(ground, site, runs)
    return Proposal("standalone affine", Agreed(()), (), frozenset(), "affine")


def _require_own_tensors(ground: Ground, site: Site, runs: Sequence[Run]) -> None:
    """An affine has tensors of its own: those of the norm are no other module's. Raises Refused.

    What a norm read that is gone, nobody reads any more.
    """
    gone = [ground.ends[end] for end in ground.gone]
    nodes = {n for run in (*runs, *gone) for n in run.nodes}
    left = tuple(f"{path}." for run in gone for path in run.site.paths if path)
    for name in (name for name in site.parameters.values() if name not in ground.created):
        operand = Operand(name, tensor_at(ground.model, name), ())
        names = [n for n in ground.flow.names(operand.tensor) if not n.startswith(left)]
        others = [other for other in names if not _is_one_place(ground, other, name)]
        readers = [use for use in ground.flow.uses(operand) if use not in nodes]
        if others or readers:
            told = f"{name} is {others[0]}" if others else f"{ground.path(readers[0])} reads {name}"
            raise Refused(Check.TIED, told, "untie=True makes an affine with tensors of its own.")


def _is_one_place(ground: Ground, first: str, second: str) -> bool:
    """Whether two names are of one attribute of one module, which may be bound at several paths."""
    (path, _, own), (other, _, others) = first.rpartition("."), second.rpartition(".")
    return own == others and ground.model.get_submodule(path) is ground.model.get_submodule(other)


def _rank_notes(
    ground: Ground, site: Site, runs: Sequence[Run], landings: Sequence[Landing]
) -> tuple[str, ...]:
    """In two dimensions axis 1 is the last one; with more the norm and a linear layer part."""
    flat = all(len(shape(run.start)) == 2 for run in runs)
    if not flat or site.settings.get("channel_axis") != 1:
        return ()
    first = [landing.nodes[0] for landing in landings]
    linear = [n for n in first if kind_of(n) is Kind.LAYER and operator(n) != CONVOLUTION]
    if not linear:
        return ()
    where = ground.path(linear[0])
    return (f"for two dimensions: with more, it works on axis 1 and {where} on the last",)


def _channels(site: Site, value: fx.Node) -> Tensor:
    sizes = shape(value)
    axis = int(site.settings.get("channel_axis", 1))
    features = site.settings.get("features")
    spans = len(site.settings.get("normalized_shape", ())) > 1
    if spans or len(sizes) < 2 or features != sizes[axis % len(sizes)]:
        raise Refused(Check.AXIS, "its weight does not run along one axis of its input")
    return along_axis(sizes, axis)


# Of one norm, and those of its runs that are meant, in one recorded call.
Rule = Callable[[Ground, Site, Sequence[Run]], Proposal]
AFFINE_RULES: Sequence[Rule] = (into_producer, into_padding_consumers, into_consumers)
TAIL_RULES: Sequence[Rule] = (into_padding_consumers, into_consumers)
