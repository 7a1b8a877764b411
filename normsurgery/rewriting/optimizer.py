"""Carrying an optimizer's state across a swap: its moments follow the parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normsurgery.errors import UsageError

OptimizerState = Mapping[str, Any] | torch.optim.Optimizer


def carried_state(
    state: OptimizerState,
    old_model: nn.Module,
    new_model: nn.Module,
    moved: Mapping[str, str],
    changed: set[str],
    names: Sequence[Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The optimizer state_dict for an optimizer over the new model.

    Args:
        state: the old optimizer, or its state_dict.
        moved: old parameter name -> new one; a name it does not have is unchanged.
        changed: new parameters whose value is not an old one; they start with an empty state.
        names: parameter names of each group of a state_dict that has several groups and no
            `param_names` (torch writes them where the optimizer was given named parameters). A
            state_dict of one group without names is taken to be in the order of the old model.

    A group in the order of `old_model.parameters()` comes back in that of `new_model.parameters()`.
    Any other group keeps its own order: each parameter stands where the one it came from stood, and
    new ones stand behind, so build the new optimizer in that order. A new parameter joins the group
    that holds most parameters of the module it took the place of, else of the nearest module around
    it. Raises UsageError where it is not known which parameter an entry is.
    """
    old_groups = _group_names(state, old_model, names)
    saved = state.state_dict() if isinstance(state, torch.optim.Optimizer) else state
    new_groups = [
        _in_order(members, group, old_model, moved)
        for members, group in zip(_assigned(old_groups, new_model, moved), old_groups, strict=True)
    ]
    entries = _entries(saved, old_groups, old_model)
    came_from = {moved.get(name, name): name for group in old_groups for name in group}
    result: dict[str, Any] = {"state": {}, "param_groups": []}
    index = 0
    for group, members in zip(saved["param_groups"], new_groups, strict=True):
        settings = {k: copy.deepcopy(v) for k, v in group.items() if not k.startswith("param")}
        settings["params"] = list(range(index, index + len(members)))
        if "param_names" in group:
            settings["param_names"] = list(members)
        result["param_groups"].append(settings)
        for name in members:
            entry = None if name in changed else entries.get(came_from.get(name, ""))
            if entry is not None:
                result["state"][index] = copy.deepcopy(entry)
            index += 1
    return result


def _group_names(
    state: OptimizerState, model: nn.Module, names: Sequence[Sequence[str]] | None
) -> list[list[str]]:
    """The names of the parameters in each group, in the optimizer's order."""
    if isinstance(state, torch.optim.Optimizer):
        known = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = [[known.get(id(p)) for p in group["params"]] for group in state.param_groups]
        if any(name is None for group in groups for name in group):
            raise UsageError(
                "the optimizer holds parameters that are not of the old model. "
                "Give the model it was made for."
            )
        return [[name for name in group if name is not None] for group in groups]
    groups_of_state = state["param_groups"]
    if names is not None:
        given = [list(group) for group in names]
    elif all("param_names" in group for group in groups_of_state):
        given = [list(group["param_names"]) for group in groups_of_state]
    elif len(groups_of_state) == 1:
        given = [_names_by_count(model, len(groups_of_state[0]["params"]))]
    else:
        raise UsageError(
            f"this optimizer state has {len(groups_of_state)} parameter groups and no names, so "
            "which parameter an entry belongs to is not known. Give the optimizer itself, or "
            "names=[[...], ...] with the names of each group."
        )
    counts = [len(group["params"]) for group in groups_of_state]
    if [len(group) for group in given] != counts:
        raise UsageError(
            f"the optimizer state has groups of {counts} parameters, "
            f"and names are known for {[len(group) for group in given]}."
        )
    return given


def _names_by_count(model: nn.Module, count: int) -> list[str]:
    """All parameters, or all that are trained: whichever the state has an entry for."""
    everything = [name for name, _ in model.named_parameters()]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return trained if count == len(trained) else everything


def _entries(
    saved: Mapping[str, Any], groups: Sequence[Sequence[str]], model: nn.Module
) -> dict[str, Mapping[str, Any]]:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    entries: dict[str, Mapping[str, Any]] = {}
    for group, members in zip(saved["param_groups"], groups, strict=True):
        for index, name in zip(group["params"], members, strict=True):
            if name not in shapes:
                raise UsageError(f"the old model has no parameter {name!r}.")
            entry = saved["state"].get(index)
            if entry is not None:
                _check_shapes(name, entry, shapes[name])
                entries[name] = entry
    return entries


def _check_shapes(name: str, entry: Mapping[str, Any], shape: torch.Size) -> None:
    for key, value in entry.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.dim() != len(shape):
            continue
        if value.shape != shape and value.numel() >= shape.numel():
            raise UsageError(
                f"the optimizer's {key} for {name} has shape {tuple(value.shape)}, the parameter "
                f"{tuple(shape)}: the state belongs to another model or another order."
            )


def _assigned(
    old_groups: Sequence[Sequence[str]], new_model: nn.Module, moved: Mapping[str, str]
) -> list[list[str]]:
    """The new model's parameters in the groups of the old optimizer."""
    group_of = {
        moved.get(name, name): number for number, group in enumerate(old_groups) for name in group
    }
    old_group_of = {name: number for number, group in enumerate(old_groups) for name in group}
    groups: list[list[str]] = [[] for _ in old_groups]
    frozen_out = {name for name, _ in new_model.named_parameters()} - set(group_of)
    for name, parameter in new_model.named_parameters():
        if name not in frozen_out:
            groups[group_of[name]].append(name)
        elif parameter.requires_grad:
            groups[_nearest_group(name, {**old_group_of, **group_of})].append(name)
    return groups


def _in_order(
    members: Sequence[str],
    old_group: Sequence[str],
    old_model: nn.Module,
    moved: Mapping[str, str],
) -> list[str]:
    """`members`, which are in the order of the new model, in the order of the old group."""
    wanted = set(old_group)
    if list(old_group) == [name for name, _ in old_model.named_parameters() if name in wanted]:
        return list(members)
    place = {moved.get(name, name): number for number, name in enumerate(old_group)}
    return sorted(members, key=lambda name: place.get(name, len(place)))


def _nearest_group(name: str, group_of: Mapping[str, int]) -> int:
    path = name
    while path:
        path = path.rpartition(".")[0]
        prefix = f"{path}." if path else ""
        near = [number for known, number in group_of.items() if known.startswith(prefix)]
        if near:
            return max(set(near), key=lambda number: (near.count(number), -number))
    return 0
