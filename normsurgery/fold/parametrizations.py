"""Weights that a norm computes, baked in: the layer becomes a plain one that holds the result.

Weight norm and spectral norm (torch's parametrizations and its older hooks), and weight
standardization (the parametrization, or written in the forward of a layer's subclass). The layer
is changed in place, not replaced: its paths, its hooks and whoever holds it stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from normsurgery.find.by_type import all_paths
from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.computed_weights import ComputedWeight, computed_weights, refusal_of
from normsurgery.fold.inference_forms import apply_strip, strip_steps
from normsurgery.fold.plain_layers import make_plain
from normsurgery.spec import Fidelity
from normsurgery.steps import BakeWeight, Step, Strip
from normsurgery.surgery.inherit import tensor_in
from normsurgery.surgery.source import module_at
from normsurgery.survey import Site, Skip, Survey


def baked_steps(model: nn.Module, survey: Survey) -> tuple[list[Step], list[Skip]]:
    """A Step for every weight that a norm computes and that can be baked in, and for every norm
    whose `strip` says what is left of it in inference; a Skip with the reason for the others.

    Every Site of `survey` that acts on a weight is one or the other, and keeps its index; Sites
    that `find` does not list (weight norm, spectral norm, neuron-wise layers) count on from there.
    The model is read, never changed; it may be on the meta device. A Step's layer was proven: run
    in float64, plain and as it was, it agrees to 1e-10 (a meta layer with random weights).
    """
    listed = {
        name: site
        for site in survey.sites
        if site.attach == "weight"
        for name in site.parameters.values()
    }
    steps, skips = strip_steps(model, survey)
    decided: set[int] = set()
    for paths, found in _found_in(model, listed):
        known = next((listed[n] for n in found.parameters.values() if n in listed), None)
        number = known.index if known else len(survey) + len(steps) + len(skips)
        decided.add(number)
        site = _site(found, paths, number)
        refusal = found.refusal or refusal_of(model, found)
        if refusal is None:
            steps.append(_step(site, found))
        else:
            skips.append(Skip(site.label, refusal.reason, refusal.hint, site.kind))
    for site in survey.sites:
        if site.attach == "weight" and site.index not in decided:
            where = f"the weight of {site.path}, which is no layer of torch's"
            reason = NoMatch(Check.NOT_REWRITABLE, where).reason
            skips.append(Skip(site.label, reason, "", site.kind))
    return steps, skips


def apply_baked(model: nn.Module, step: Step) -> nn.Module:
    """Carry out a Step of `baked_steps` on `model`, in place; returns the (new) root.

    The weight is computed in float64 and cast once, to the dtype of what it is made of. Whether it
    needs a gradient, and attributes set on the parameter, are those of its original.
    Raises UsageError where the model is not the one that was planned for.
    """
    if isinstance(step, Strip):
        return apply_strip(model, step)
    make_plain(module_at(model, step.site.path), step.edits, step.site.path)
    return model


def _found_in(
    model: nn.Module, listed: Mapping[str, Site]
) -> list[tuple[tuple[str, ...], ComputedWeight]]:
    """What is known, and of the rest what is a parametrization or is listed as a norm."""
    paths = all_paths(model)
    return [
        (paths[id(module)], found)
        for module in model.modules()
        for found in computed_weights(module, paths[id(module)][0])
        if found.in_forward is False or found.refusal is None or found.target in listed
    ]


def _site(found: ComputedWeight, paths: tuple[str, ...], index: int) -> Site:
    module = found.module
    axis = found.settings.get("output_axis", int(isinstance(module, _ConvTransposeNd)))
    channels = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
    tensor: Tensor = tensor_in(module, next(iter(found.tensors.values())))
    return Site(
        index=index,
        kind=found.kind,
        paths=paths,
        form="module",
        class_name=type(module).__name__,
        parameters=found.parameters,
        settings={**found.settings, "channel_axis": axis, "features": channels},
        dtype=str(tensor.dtype).removeprefix("torch."),
        attach="weight",
    )


def _step(site: Site, found: ComputedWeight) -> Step:
    return BakeWeight(
        site=site,
        to="identity",
        options={},
        fidelity=Fidelity.EVAL if found.kind == "spectralnorm" else Fidelity.FORWARD,
        edits=found.edits,
    )
