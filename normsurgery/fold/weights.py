"""The edits of a plan on a model in memory: results are put wherever the old tensors were bound."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from normsurgery.fold.editing import edited, kept_like, made_by, needed_by
from normsurgery.fold.edits import Create
from normsurgery.plan import MERGED, Step
from normsurgery.surgery.owner.biases import give_biases
from normsurgery.surgery.source import module_at, tensor_at

_Slot = tuple[dict[str, Any], str]  # a registry of a module and a name in it


def edit_weights(model: nn.Module, steps: Sequence[Step]) -> dict[str, Tensor]:
    """Run the edits of all steps on the model's tensors, in place of which new ones are bound.

    A model without values (on the meta device) is only given room. Returns the tensors of merged
    layers, which are not there yet. Raises CannotHold where a weight is not finite or its dtype
    cannot hold the folded one; the model is untouched then.
    """
    before = {name: tensor_at(model, name) for name in needed_by(steps)}
    if any(tensor.is_meta for tensor in before.values()):
        make_room(model, steps)
        return {}
    results = edited(steps, before)
    merged = _of_merged(steps)
    # The branches get what the norms make of them: the merge is proven on them.
    apart = [_without(step, merged) for step in steps if step.rule != MERGED] if merged else steps
    made = made_by(apart)
    slots = _slots(model)
    for name, result in (edited(apart, before) if merged else results).items():
        if name in made:
            _create(model, name, result)
        else:
            _bind(before[name], result, slots.pop(id(before[name]), ()))
    _give_to_graphs(model, apart)
    return {name: results[name] for name in merged}


def _of_merged(steps: Sequence[Step]) -> set[str]:
    """The tensors of layers that are only made when their branches are merged."""
    edits = [edit for step in steps if step.rule == MERGED for edit in step.edits]
    return {edit.target for edit in edits if isinstance(edit, Create)}


def _without(step: Step, targets: Collection[str]) -> Step:
    """The step without its edits of these tensors."""
    return replace(step, edits=tuple(edit for edit in step.edits if edit.target not in targets))


def make_room(model: nn.Module, steps: Sequence[Step]) -> None:
    """Give the model the tensors that the edits bring into being, for a state_dict to fill."""
    for name, edit in made_by(steps).items():
        if name in _of_merged(steps):
            continue
        like = tensor_at(model, kept_like(name, made_by(steps)))
        shape = edit.shape if isinstance(edit, Create) else like.shape
        _create(model, name, torch.zeros(shape, dtype=like.dtype, device=like.device))
    _give_to_graphs(model, [step for step in steps if step.rule != MERGED])


def _give_to_graphs(model: nn.Module, steps: Sequence[Step]) -> None:
    """Let the calls in graphs have the biases that were created; modules look for theirs."""
    created = [edit for step in steps for edit in step.edits if isinstance(edit, Create)]
    graphs = [(p, m) for p, m in model.named_modules() if isinstance(m, fx.GraphModule)]
    for path, graph in graphs if created else ():
        prefix = f"{path}." if path else ""
        inside = [edit for edit in created if edit.target.startswith(prefix)]
        give_biases(
            graph, [(tensor_at(model, e.like), e.target.removeprefix(prefix)) for e in inside]
        )


def _create(model: nn.Module, name: str, value: Tensor) -> None:
    """Give the model a parameter of that name."""
    path, _, attribute = name.rpartition(".")
    module = module_at(model, path)
    like = module._parameters.get("weight")
    trained = like is None or like.requires_grad
    module.register_parameter(attribute, nn.Parameter(value, requires_grad=trained))


def _bind(old: Tensor, value: Tensor, slots: Sequence[_Slot]) -> None:
    """Put a tensor wherever the old one is bound."""
    new: Tensor = value
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        new.__dict__.update(vars(old))
    for registry, attribute in slots:
        registry[attribute] = new


def _slots(model: nn.Module) -> dict[int, list[_Slot]]:
    """Where each tensor is bound, by the `id` of it."""
    found: dict[int, list[_Slot]] = {}
    for module in model.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for registry in registries:
            for name, held in registry.items():
                found.setdefault(id(held), []).append((registry, name))
    return found
