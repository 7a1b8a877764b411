"""What is left of a norm in inference, where the norm says it itself: `NormSpec.strip`.

A neuron-wise layer is the plain layer it computes; a random aggregation is the norm on its path.
"""

from __future__ import annotations

from torch import nn

from normsurgery import spec as registry
from normsurgery.errors import NormsurgeryError
from normsurgery.find.by_type import all_paths
from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.edits import Copy, Drop
from normsurgery.spec import Fidelity, NormSpec
from normsurgery.steps import Step, Strip
from normsurgery.surgery.inherit import hooks, tensor_in, tie
from normsurgery.surgery.references import ModuleReferences
from normsurgery.surgery.source import module_at
from normsurgery.surgery.tree import replace_everywhere
from normsurgery.survey import Site, Skip, Survey


def strippable(module: nn.Module) -> NormSpec | None:
    """The norm of exactly this class that has an inference form as a module of its own."""
    return next(
        (
            found
            for found in registry.specs()
            if found.strip is not None
            and found.attach != "weight"
            and type(module) in found.classes
        ),
        None,
    )


def _site(module: nn.Module, spec: NormSpec, paths: tuple[str, ...], index: int) -> Site:
    reading = spec.read(module)
    prefix = f"{paths[0]}." if paths[0] else ""
    weight = next(module.parameters(), None)
    return Site(
        index=index,
        kind=spec.name,
        paths=paths,
        form="module",
        class_name=type(module).__name__,
        parameters={role: prefix + name for role, name in reading.tensors.items()},
        settings=dict(reading.settings),
        dtype=str(weight.dtype).removeprefix("torch.") if weight is not None else None,
        attach=spec.attach,
    )


def strip_steps(model: nn.Module, survey: Survey) -> tuple[list[Step], list[Skip]]:
    """A Step or a Skip for every module with an inference form; no tensor changes its values.

    Step.to is the kind of norm that is left, "identity" for a plain layer.
    """
    steps: list[Step] = []
    skips: list[Skip] = []
    listed = {site.paths: site for site in survey.sites if site.form == "module"}
    paths = all_paths(model)
    for module in model.modules():
        spec = strippable(module)
        if spec is None:
            continue
        own = paths[id(module)]
        number = len(survey) + len(steps) + len(skips)
        site = listed.get(own) or _site(module, spec, own, number)
        outcome = _step(model, module, spec, site)
        if isinstance(outcome, Step):
            steps.append(outcome)
        else:
            skips.append(Skip(site.label, outcome.reason, outcome.hint, site.kind))
    return steps, skips


def apply_strip(model: nn.Module, step: Step) -> nn.Module:
    """Carry out a Step of `strip_steps` on `model`, in place; returns the (new) root.

    The tensors that stay are the very objects they were, so that every tie is kept.
    """
    old = module_at(model, step.site.path)
    spec = registry.get(step.site.kind)
    assert spec.strip is not None
    new = spec.strip(old)
    for old_name, new_name in _names(old, new, spec).items():
        tie([(new, new_name)], tensor_in(old, old_name))
    hooks(old, new)
    model = replace_everywhere(model, old, new)
    for left, instead in spec.idle(model) if spec.idle is not None else ():
        model = replace_everywhere(model, left, instead)
    return model


def _step(model: nn.Module, module: nn.Module, spec: NormSpec, site: Site) -> Step | NoMatch:
    assert spec.strip is not None
    holder = ModuleReferences(model).holder_of(module)
    if holder is not None:
        where = f"it is also held by {holder}, outside the module tree"
        return NoMatch(Check.NOT_REWRITABLE, where)
    try:
        left = spec.strip(module)
    except NormsurgeryError as error:
        return NoMatch(Check.COMPUTES, str(error))
    kind = next((s.name for s in registry.specs() if type(left) in s.classes), "identity")
    prefix = f"{site.path}." if site.path else ""
    names = _names(module, left, spec)
    renamed = {old: new for old, new in names.items() if old != new}
    gone = [name for name in module.state_dict() if names.get(name) != name]
    return Strip(
        site=site,
        to=kind,
        options={},
        fidelity=Fidelity.FORWARD if spec.attach == "layer" else Fidelity.EVAL,
        edits=(
            *(Copy(prefix + new, prefix + old) for old, new in renamed.items()),
            *(Drop(prefix + name) for name in gone),
        ),
    )


def _names(old: nn.Module, new: nn.Module, spec: NormSpec) -> dict[str, str]:
    """Local name in `old` -> in `new` of each tensor that stays."""
    left = next((s for s in registry.specs() if type(new) in s.classes), None)
    if left is None:
        return {name: name for name in new.state_dict()}
    roles = left.read(new).tensors
    return {name: roles[role] for role, name in spec.read(old).tensors.items() if role in roles}
