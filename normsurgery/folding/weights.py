"""The edits of a plan on a model in memory: results are put wherever the old tensors were bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from normsurgery.edits.types import Create, Drop, Edit, reads
from normsurgery.folding.editing import edited, kept_like, made_by, needed_by
from normsurgery.rewriting.owner.biases import give_biases
from normsurgery.rewriting.source import module_at, tensor_at
from normsurgery.steps import Merge, Step

# Registry of a module and name in it, of each place that binds a tensor, by the `id` of that.
Slots = dict[int, list[tuple[dict[str, Any], str]]]


def edit_weights(model: nn.Module, steps: Sequence[Step]) -> dict[str, Tensor]:
    """Run the edits of all steps on the model's tensors, in place of which new ones are bound.

    A model without values (on the meta device) is only given room. Returns the tensors that merges
    of branches change, which are bound when these are done. Raises CannotHold where a weight is not
    finite or its dtype cannot hold the folded one; the model is untouched then.
    """
    before = {name: tensor_at(model, name) for name in needed_by(steps)}
    if any(tensor.is_meta for tensor in before.values()):
        make_room(model, steps)
        return {}
    results = edited(steps, before)
    # The branches get what the norms make of them: the merge is proven on them.
    apart, late = _before_merges(steps)
    made = made_by(apart)
    slots = slots_of(model)
    for name, result in (edited(apart, before) if late else results).items():
        bind(model, name, result, None if name in made else before[name], slots)
    _give_to_graphs(model, apart)
    return {name: results[name] for name in late if name in results}


def _before_merges(steps: Sequence[Step]) -> tuple[Sequence[Step], set[str]]:
    """The steps without merges and without what follows from these, and the tensors that do."""
    late: set[str] = set()
    apart: list[Step] = []
    for step in steps:
        kept: list[Edit] = []
        for edit in step.edits:
            if isinstance(step, Merge) and isinstance(edit, Drop):
                continue
            if isinstance(step, Merge) or not late.isdisjoint((edit.target, *reads(edit))):
                late.add(edit.target)
            else:
                kept.append(edit)
        apart.append(replace(step, edits=tuple(kept)))
    return apart, late


def make_room(model: nn.Module, steps: Sequence[Step]) -> None:
    """Give the model the tensors that the edits bring into being, for a state_dict to fill."""
    for name, edit in made_by(steps).items():
        like = tensor_at(model, kept_like(name, made_by(steps)))
        shape = edit.shape if isinstance(edit, Create) else like.shape
        bind(model, name, torch.zeros(shape, dtype=like.dtype, device=like.device), None)
    _give_to_graphs(model, steps)


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


def bind(
    model: nn.Module, name: str, value: Tensor, old: Tensor | None, slots: Slots | None = None
) -> None:
    """Put a tensor wherever the old one is bound; a new name gets a parameter of its own.

    slots: of the model before any of its tensors is replaced, where many are.
    """
    if old is None:
        path, _, attribute = name.rpartition(".")
        module = module_at(model, path)
        _unbind(module, attribute, slots)
        like = module._parameters.get("weight")
        trained = like is None or like.requires_grad
        module.register_parameter(attribute, nn.Parameter(value, requires_grad=trained))
        return
    new: Tensor = value
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        new.__dict__.update(vars(old))
    bound = slots_of(model) if slots is None else slots
    for registry, attribute in bound.pop(id(old), ()):
        registry[attribute] = new


def _unbind(module: nn.Module, attribute: str, slots: Slots | None) -> None:
    """The place that gets a tensor of its own is no place of the one that it shared any more."""
    held = module._parameters.get(attribute)
    if slots is None or id(held) not in slots:
        return
    own = module._parameters
    slots[id(held)] = [s for s in slots[id(held)] if s[0] is not own or s[1] != attribute]


def slots_of(model: nn.Module) -> Slots:
    """Where each tensor is bound, by the `id` of it."""
    found: Slots = {}
    for module in model.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for registry in registries:
            for name, held in registry.items():
                found.setdefault(id(held), []).append((registry, name))
    return found
