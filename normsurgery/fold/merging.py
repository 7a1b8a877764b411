"""Parallel branches as Steps, and carrying these out: one layer holds what several did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normsurgery.errors import CannotRewrite
from normsurgery.fold.affines import affine_of
from normsurgery.fold.edits import (
    AddIdentity,
    AddKernel,
    AddTensor,
    Create,
    Drop,
    Edit,
    Shift,
)
from normsurgery.fold.ground import Ground
from normsurgery.fold.neutral import NeutralBranch
from normsurgery.fold.parallel_branches import KIND, Branch, BranchSum
from normsurgery.fold.running import run
from normsurgery.fold.weight_formulas import relative_error
from normsurgery.fold.weights import bind
from normsurgery.precision import float64_copy, lifted
from normsurgery.spec import Fidelity
from normsurgery.steps import Merge, MergedNorm, Step
from normsurgery.surgery.owner import OwnerCall
from normsurgery.surgery.source import module_at
from normsurgery.surgery.tree import replace_everywhere
from normsurgery.survey import Site

BOUND = 1e-9  # float64 against float64
Calls = Sequence[OwnerCall]


def merge_steps(ground: Ground, sums: Sequence[BranchSum], planned: Sequence[Edit]) -> list[Step]:
    """For each sum a Step that puts it into one layer, and one for each norm that it takes in.

    planned: the edits of the steps before, in which a branch may get a bias that it had not. The
    steps of the norms hold no edits: the sum's has them. Sums count on from the last Site.
    """
    created = {edit.target for edit in planned if isinstance(edit, Create)}
    steps: list[Step] = []
    for number, found in enumerate(sums, len(ground.located.survey)):
        steps.append(_step(ground, found, number, created))
        steps += [MergedNorm(site, "identity", {}, Fidelity.EVAL) for site in found.identities]
    return steps


def _step(ground: Ground, found: BranchSum, number: int, created: set[str]) -> Merge:
    layer = ground.model.get_submodule(found.label)
    site = Site(
        index=number,
        kind=KIND,
        paths=(found.label,),
        form="module",
        class_name=type(layer).__name__,
        parameters={},
        settings={},
        dtype=str(found.kept.weight.tensor.dtype).removeprefix("torch."),
        calls=1,
    )
    return Merge(
        site=site,
        to="identity",
        options={},
        fidelity=Fidelity.EVAL,
        notes=(f"holds what {len(found.branches)} branches did", *found.notes),
        edits=_edits(ground, found, created),
        owner=found.owner,
        branches=tuple(branch.path for branch in found.branches),
        places=found.places,
    )


def _edits(ground: Ground, found: BranchSum, created: set[str]) -> tuple[Edit, ...]:
    kept = found.kept
    weight, bias = kept.weight.name, _bias_name(found.branches[0])
    edits: list[Edit] = []
    biases: list[Edit] = []
    for branch, at in zip(found.branches[1:], found.at[1:], strict=True):
        if branch.layer is not None:
            edits.append(AddKernel(weight, branch.layer.weight.name, at, branch.sign))
            own = _bias_name(branch)
            if branch.layer.bias is not None or own in created:
                biases.append(AddTensor(bias, own, branch.sign))
        elif branch.run is not None:
            affine = affine_of(branch.run.site)
            groups = found.geometry.groups
            edits.append(AddIdentity(weight, affine.scale, at, groups, branch.sign))
            if affine.shift is not None:
                factor = branch.sign * affine.shift.factor
                biases.append(Shift(bias, replace(affine.shift, factor=factor)))
    if biases and kept.bias is None and bias not in created:
        edits.append(Create(bias, (kept.weight.tensor.shape[0],), weight))
    gone = [name for branch in found.branches[1:] for name in _tensors_of(branch, created)]
    gone += [name for place in found.places for name in _left_in(ground, place)]
    return (*edits, *biases, *(Drop(name) for name in dict.fromkeys(gone)))


def _bias_name(branch: Branch) -> str:
    """The name of a layer's bias, which may yet have to be created."""
    assert branch.layer is not None
    bias = branch.layer.bias
    return bias.name if bias is not None else f"{branch.path}.bias"


def _tensors_of(branch: Branch, created: set[str]) -> list[str]:
    if branch.run is not None:
        return list(branch.run.site.parameters.values())
    assert branch.layer is not None
    own = _bias_name(branch)
    held = branch.layer.bias is not None or own in created
    return [branch.layer.weight.name, *([own] if held else [])]


def _left_in(ground: Ground, place: str) -> list[str]:
    """What a state_dict holds of a module, except the tensors of norms: their own steps say so."""
    of_norms = {name for site in ground.located.survey for name in site.parameters.values()}
    saved = ground.model.get_submodule(place).state_dict(prefix=f"{place}.")
    return [name for name in saved if name not in of_norms]


# --- in memory ------------------------------------------------------------------------------------


def apply_merges(
    model: nn.Module,
    steps: Sequence[Step],
    calls: Mapping[str, Calls] | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Put the branches of each step with `edits` into one of them, in place.

    The norms that were folded into a branch must be gone (nn.Identity), and its weights changed; a
    norm that is a branch itself is still there.

    calls: of each owner, by its path, to prove on that its forward takes the branches that add
        nothing: in float64 it gives what it gave before, to 1e-9. None: it was proven before.
    values: the tensors that follow from the merges, by name. None: they are to be loaded.

    Returns, by the label of a step, why its branches cannot be merged; these are as they were.
    Raises UsageError where the model is not the one that was planned for.
    """
    refused: dict[str, str] = {}
    for step in (step for step in steps if isinstance(step, Merge)):
        try:
            if calls is not None:
                _prove(model, step, calls.get(step.owner, ()))
        except CannotRewrite as error:
            refused |= dict.fromkeys((step.site.label, *step.branches), error.reason)
            continue
        _put_neutral(model, step.places)
    for name, value in (values or {}).items() if not refused else ():
        _bind(model, name, value)
    return refused


def _kept(step: Merge) -> dict[str, None]:
    """The tensors that the step's edits change or make."""
    return dict.fromkeys(edit.target for edit in step.edits if not isinstance(edit, Drop))


def _put_neutral(model: nn.Module, places: Sequence[str]) -> None:
    for place in places:
        old = module_at(model, place)
        replace_everywhere(model, old, NeutralBranch().train(old.training))


def _prove(model: nn.Module, step: Merge, calls: Calls) -> None:
    """Raises CannotRewrite unless the owner gives the same with its branches in one of them."""
    given = [call for call in calls if not call.training]
    if not given:
        raise CannotRewrite("no call of its forward was recorded to prove a merge on")
    path = step.owner
    owner = module_at(model, path)
    if any(tensor.is_meta for tensor in (*owner.parameters(), *owner.buffers())):
        raise CannotRewrite("it has no values (meta device) to prove a merge on")
    before, after = float64_copy(owner), float64_copy(owner)
    prefix = f"{path}." if path else ""
    named = (*after.named_parameters(), *after.named_buffers())
    tensors = {
        prefix + name: tensor.detach() for name, tensor in named if tensor.is_floating_point()
    }
    run([edit for edit in step.edits if not isinstance(edit, Drop)], tensors)
    for name in _kept(step):
        _bind(after, name.removeprefix(prefix), tensors[name])
    _put_neutral(after, [place.removeprefix(prefix) for place in step.places])
    for call in given:
        _require_same(before, after, call)


def _require_same(before: nn.Module, after: nn.Module, call: OwnerCall) -> None:
    """Outputs, and what the call changes of its inputs. Raises CannotRewrite."""
    seen: list[list[Tensor]] = []
    for owner in (before, after):
        args, kwargs = tree_map(_double, (call.args, dict(call.kwargs)))
        try:
            with torch.no_grad(), lifted():
                output = owner(*args, **kwargs)
        except Exception as error:  # the user's forward may raise anything
            raise CannotRewrite(
                f"its forward does more with a branch than add it: {type(error).__name__}: {error}"
            ) from error
        seen.append([t for t in tree_leaves((output, args, kwargs)) if isinstance(t, Tensor)])
    made, wanted = seen[1], seen[0]
    same = len(made) == len(wanted) and all(
        relative_error(a.double(), b.double()) <= BOUND for a, b in zip(made, wanted, strict=True)
    )
    if not same:
        raise CannotRewrite("with its branches in one layer its output differs")


def _double(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().double() if leaf.is_floating_point() else leaf.detach().clone()


def _bind(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    old = getattr(module_at(model, path), attribute, None)
    bind(model, name, value, old if isinstance(old, Tensor) else None)
