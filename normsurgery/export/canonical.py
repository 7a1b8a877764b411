"""Norms written by hand become torch's own before export, so that ONNX's one operator is written.

The exporter writes LayerNormalization for `F.layer_norm`, and a dozen nodes for the same thing
written out. A norm is replaced only where the replacement computes what the module computes in the
type it has: in half precision the order of casts is part of that. What stays says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from normsurgery.errors import CannotRewrite, NoOperator, NormsurgeryError
from normsurgery.export.cast_first import CastFirstRMSNorm, WideRMSNorm
from normsurgery.export.facts import Canonical
from normsurgery.find.casts import fitting_cast
from normsurgery.inputs import Inputs
from normsurgery.norms.carry import effective
from normsurgery.spec import Reading, Source, get, specs
from normsurgery.surgery.calls import recorded_calls
from normsurgery.surgery.obstacles import obstacle
from normsurgery.surgery.owner import Placement, rewrite_owner
from normsurgery.surgery.owner.graphs import rewrite_graph_module
from normsurgery.surgery.references import ModuleReferences
from normsurgery.surgery.replay import Replay
from normsurgery.surgery.source import build, module_at, source_of
from normsurgery.surgery.tree import replace_everywhere
from normsurgery.survey import Site
from normsurgery.verify.judge import Verdict, judge

log = logging.getLogger("normsurgery")

HALF = (torch.float16, torch.bfloat16)
# What half precision is written as, where torch has two orders of casts.
CHOICES: Mapping[type[nn.Module], str] = {
    CastFirstRMSNorm: "normalised in float32, cast back, then times the weight, as it was",
    WideRMSNorm: "computed in float32, weight included, and cast once, as it was",
}
NO_CAST = {"cast": "float32_weight"}  # torch's own order: all in float32, cast once
OWN_CLASSES = "normsurgery.norms."
NO_OPERATOR = "ONNX has no operator for it"


class _Stays(Exception):
    """A norm that is left as it is, with the reason."""


@dataclass(frozen=True)
class _Change:
    """A norm, the module that replaces it, and what to say about the choice."""

    site: Site
    source: Source
    new: nn.Module
    note: str = ""


def canonicalised(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, tuple[Canonical, ...]]:
    """The model with every hand-written norm as torch's own, where that computes the same.

    model: in eval mode, and changed in place: give it a copy. Its class stays, unless it is a norm
        itself. inputs: in the model's dtype; the norms are looked for in a run on them.

    Returns the model and, for every normalization found, what it is and the ONNX operator of its
    kind ("" where it stays a formula), with the reason in `note`; `operator_of` says what an
    opset makes of it.
    """
    from normsurgery.find import find

    try:
        survey = find(model, inputs)
    except NormsurgeryError as error:
        log.warning("norms were not made canonical: %s", error)
        return model, (Canonical("", "", "", f"norms were not looked for: {error}"),)
    around = ModuleReferences(model)
    facts: dict[int, Canonical] = {}
    changes: list[_Change] = []
    for site in survey.sites:
        try:
            change = _change(model, site, around)
        except _Stays as stays:
            facts[site.index] = Canonical(site.label, site.kind, "", str(stays))
            continue
        note = "" if change is None else change.note
        facts[site.index] = Canonical(site.label, site.kind, _operator(site), note)
        if change is not None:
            changes.append(change)
    model, refused = _carried_out(model, changes, inputs)
    for index, reason in refused.items():
        facts[index] = replace(facts[index], operator="", note=reason)
    skipped = (Canonical(skip.path, skip.kind, "", skip.reason) for skip in survey.skips)
    return model, (*facts.values(), *skipped)


def _change(model: nn.Module, site: Site, around: ModuleReferences) -> _Change | None:
    """What replaces the norm at `site`; None where it is torch's own already. Raises _Stays."""
    if site.attach != "norm":
        raise _Stays("it normalises a weight")
    _operator(site)
    module = module_at(model, site.path)
    if site.form == "call" or (site.form == "module" and _is_own(module)):
        return None
    source = source_of(model, site)
    new = _canonical(site, source)
    reason = obstacle(model, site, copies=False, around=around)
    if reason is not None:
        raise _Stays(reason)
    _require_same(_as_it_is(site, source), new, site, source)
    return _Change(site, source, new, CHOICES.get(type(new), ""))


def _operator(site: Site) -> str:
    """The operator that computes the norm. Raises _Stays where none does."""
    known = get(site.kind).operator
    if known is None:
        raise _Stays(NO_OPERATOR)
    try:
        return known(Reading(site.parameters, site.settings))
    except NoOperator as error:
        raise _Stays(str(error)) from error


def _is_own(module: nn.Module) -> bool:
    """Torch's class or one of ours, as its forward decides, whatever a subclass adds to it."""
    owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
    if "forward" in vars(module):
        return False
    if owner.__module__.startswith("torch.nn."):
        return True
    return owner.__module__.startswith(OWN_CLASSES) and not _has_casts(module)


def _has_casts(module: nn.Module) -> bool:
    """Of a norm with orders of casts torch's own class alone is what the exporter knows."""
    return any(known.casts and isinstance(module, known.classes) for known in specs())


def _canonical(site: Site, source: Source) -> nn.Module:
    """Torch's own module for the site, in eval mode. Raises _Stays."""
    dtype = _input_dtype(site, source)
    casts = bool(get(site.kind).casts)
    promoted = casts and dtype == torch.float32  # a product with its weight is too
    if source.tensors and source.dtype != dtype and not promoted:
        raise _Stays(f"its parameters are {source.dtype} and its input is {dtype}")
    if casts and dtype in HALF:
        return _in_half(site, source, dtype).eval()
    if casts:  # an order of casts is nothing here, and torch's own class knows no offset
        return _to_itself(replace(source, dtype=dtype), {"weight_offset": 0.0, **NO_CAST})
    return _to_itself(source, {})


def _to_itself(source: Source, options: Mapping[str, Any]) -> nn.Module:
    conversion = get(source.kind).conversion(source.kind)
    assert conversion is not None
    try:
        return build(conversion, source, options, "copy").eval()
    except NormsurgeryError as error:
        raise _Stays(str(error)) from error


def _in_half(site: Site, source: Source, dtype: torch.dtype) -> nn.Module:
    """Torch's own class, or one with the casts where the norm has them."""
    sizes = list(source.settings.get("normalized_shape", [source.features]))
    weight = effective(source, "weight", sizes)
    cast = source.settings.get("cast") or _told_cast(_as_it_is(site, source), site, source)
    if cast == "none":
        raise _Stays(f"it squares in {_name(dtype)}, and the operator computes in float32")
    if cast not in get(site.kind).casts:
        raise _Stays(f"the order of its casts in {_name(dtype)} is not one that is known")
    if weight is None:
        return _to_itself(source, NO_CAST)
    if cast == "float32":
        return CastFirstRMSNorm(weight.to(dtype), source.eps)
    return WideRMSNorm(weight, source.eps)


def _told_cast(old: Callable[[Tensor], Tensor], site: Site, source: Source) -> str | None:
    """The cast order that gives the very bits of `old`."""
    dtype = _input_dtype(site, source)
    x = _shaped_input(site, source).to(dtype)
    return fitting_cast(_ran(old, x), x, replace(source, dtype=dtype))


def _as_it_is(site: Site, source: Source) -> nn.Module:
    if source.module is not None:
        return source.module
    if site.call is None or not site.call.operations:
        raise _Stays("it stands in a forward in a form that cannot be run alone")
    return Replay(source, site.call.operations, _input_dtype(site, source))


def _require_same(old: nn.Module, new: nn.Module, site: Site, source: Source) -> None:
    """Raise _Stays unless both compute the same in the type they have, on inputs that tell.

    In half precision neither may be farther off than the other allows: one that squares in float16
    overflows where the operator does not.
    """
    dtype = _input_dtype(site, source)
    for label, x in _telling(_shaped_input(site, source), dtype):
        truth = _truth(x, source)
        before, after = _ran(old, x), _ran(new, x)
        if not _within(judge(after, truth, before)):
            raise _Stays(f"the operator is farther off than it is ({label} input)")
        if dtype in HALF and not _within(judge(before, truth, after)):
            raise _Stays(
                f"in {_name(dtype)} it is farther off than the operator, which computes in float32 "
                f"({label} input), and the file shall compute what the model computes"
            )


def _within(verdict: Verdict) -> bool:
    """Passed, or UNDECIDED and yet within what would be allowed."""
    return verdict.passed is True or (verdict.passed is None and verdict.factor <= 1.0)


def _telling(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    yield "random", x.to(dtype)
    yield "tiny variance", (x * 3e-3).to(dtype)
    yield "large mean", (x + 30.0).to(dtype)
    if dtype in HALF:
        yield "large", (x * 3e3).to(dtype)


def _truth(x: Tensor, source: Source) -> Tensor:
    tensors = {role: tensor.detach().double() for role, tensor in source.tensors.items()}
    return get(source.kind).formula(x.double(), tensors, source.settings, False)


def _ran(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            y = module(x)
    except Exception as error:  # a module may want more than its input
        raise _Stays(f"it does not run alone: {type(error).__name__}: {error}") from error
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        raise _Stays("what it gives back is not a tensor like its input")
    return y


def _shaped_input(site: Site, source: Source) -> Tensor:
    """float64, of the site's shape with the axes that are not normalised made small."""
    if site.shape is None:
        raise _Stays("it was not reached in a run on the inputs")
    shape, rank = list(site.shape), len(site.shape)
    kept = len(source.settings.get("normalized_shape", ()))
    axis = source.channel_axis % rank
    for dim in range(rank):
        if dim != axis and dim < rank - kept:
            shape[dim] = max(2, min(shape[dim], 4))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _input_dtype(site: Site, source: Source) -> torch.dtype:
    named: object = getattr(torch, (site.dtype or "").removeprefix("torch."), None)
    if isinstance(named, torch.dtype):
        return named
    return source.dtype or torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _carried_out(
    model: nn.Module, changes: Sequence[_Change], inputs: Inputs
) -> tuple[nn.Module, dict[int, str]]:
    """Make the changes; returns the root, and by the index of a site why it was not changed."""
    refused: dict[int, str] = {}
    inside = [change for change in changes if change.site.form != "module"]
    owners = list(dict.fromkeys(change.site.path for change in inside))
    calls = recorded_calls(model, owners, inputs) if owners else {}
    for path in owners:
        owner = module_at(model, path)
        own = [change for change in inside if change.site.path == path]
        try:
            if isinstance(owner, fx.GraphModule):
                rewrite_graph_module(owner, [(change.site, change.new) for change in own])
            else:
                rewrite_owner(owner, _placements(owner, own), calls[path], modes=(False,))
        except CannotRewrite as error:
            reason = f"its forward cannot be rewritten: {error.reason}"
            refused.update(dict.fromkeys((change.site.index for change in own), reason))
    for change in changes:
        if change.site.form == "module":
            model = replace_everywhere(model, module_at(model, change.site.path), change.new)
    return model, refused


def _placements(owner: nn.Module, changes: Sequence[_Change]) -> list[Placement]:
    names = (f"norm_{number}" for number in range(10**6))
    free = (name for name in names if not hasattr(owner, name))
    return [Placement(c.site, next(free), c.new, c.source) for c in changes]
