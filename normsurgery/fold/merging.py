"""Parallel branches as Steps, and carrying these out: one layer in the place of several."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normsurgery.errors import CannotRewrite, UsageError
from normsurgery.fold.affines import affine_of
from normsurgery.fold.branch_forward import merged_forward
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
from normsurgery.fold.parallel_branches import KIND, BranchSum
from normsurgery.fold.running import run
from normsurgery.fold.weight_formulas import relative_error
from normsurgery.plan import Step
from normsurgery.precision import float64_copy, lifted
from normsurgery.spec import Fidelity
from normsurgery.surgery.inherit import tensor_in
from normsurgery.surgery.names import fresh_name
from normsurgery.surgery.owner import OwnerCall, Placement, Rewriting
from normsurgery.surgery.owner.install import install
from normsurgery.surgery.source import module_at
from normsurgery.survey import Site

BOUND = 1e-9  # float64 against float64
CONVOLUTIONS: Mapping[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
Calls = Sequence[OwnerCall]
RULE = "parallel branches"


def merge_steps(ground: Ground, sums: Sequence[BranchSum], planned: Sequence[Edit]) -> list[Step]:
    """For each sum a Step that makes one layer of it, and one for each norm that it takes in.

    planned: the edits of the steps before, in which a branch may get a bias that it had not. The
    steps of the norms hold no edits: the sum's has them. Sums count on from the last Site.
    """
    steps: list[Step] = []
    taken: dict[str, set[str]] = {}
    number = len(ground.located.survey)
    for found in sums:
        owner = ground.model.get_submodule(found.owner)
        names = taken.setdefault(found.owner, set(dir(owner)))
        child = fresh_name("merged", names)
        names.add(child)
        steps.append(_step(ground, found, child, number, planned))
        steps += [
            Step(site, "identity", {}, Fidelity.EVAL, "fold", rule=RULE)
            for site in found.identities
        ]
        number += 1
    return steps


def _step(
    ground: Ground, found: BranchSum, child: str, number: int, planned: Sequence[Edit]
) -> Step:
    layers = [branch for branch in found.branches if branch.layer is not None]
    prefix = f"{found.owner}.{child}." if found.owner else f"{child}."
    edits = _edits(found, prefix, planned)
    shape = next(e.shape for e in edits if isinstance(e, Create) and e.target.endswith(".weight"))
    bias = any(isinstance(e, Create) and e.target.endswith(".bias") for e in edits)
    assert layers[0].layer is not None
    weight = layers[0].layer.weight.tensor
    site = Site(
        index=number,
        kind=KIND,
        paths=found.paths,
        form="formula",
        class_name=type(ground.model.get_submodule(found.owner)).__name__,
        parameters={},
        settings={"branches": [branch.path for branch in found.branches]},
        dtype=str(weight.dtype).removeprefix("torch."),
        calls=1,
        call=found.call,
    )
    options = {**vars(found.geometry), "shape": shape, "bias": bias}
    return Step(
        site=site,
        to="identity",
        options={key: list(v) if isinstance(v, tuple) else v for key, v in options.items()},
        fidelity=Fidelity.EVAL,
        action="fold",
        notes=(f"{len(found.branches)} branches in one layer, {prefix[:-1]}", *found.notes),
        child=child,
        rule=RULE,
        edits=edits,
    )


def _edits(found: BranchSum, prefix: str, planned: Sequence[Edit]) -> tuple[Edit, ...]:
    first = found.branches[0].layer
    assert first is not None
    weight, bias = f"{prefix}weight", f"{prefix}bias"
    shape = (*first.weight.tensor.shape[:2], *found.geometry.kernel)
    created = {edit.target for edit in planned if isinstance(edit, Create)}
    edits: list[Edit] = [Create(weight, shape, first.weight.name)]
    biases: list[Edit] = []
    gone: list[str] = []
    for branch, at in zip(found.branches, found.at, strict=True):
        if branch.layer is not None:
            edits.append(AddKernel(weight, branch.layer.weight.name, at))
            bound = branch.layer.bias
            own = bound.name if bound is not None else f"{branch.path}.bias"
            gone.append(branch.layer.weight.name)
            if bound is not None or own in created:
                biases.append(AddTensor(bias, own))
                gone.append(own)
        elif branch.run is not None:
            affine = affine_of(branch.run.site)
            edits.append(AddIdentity(weight, affine.scale, at, found.geometry.groups))
            biases += [] if affine.shift is None else [Shift(bias, affine.shift)]
            gone += branch.run.site.parameters.values()
    if biases:
        edits += [Create(bias, (shape[0],), first.weight.name), *biases]
    return (*edits, *(Drop(name) for name in gone))


# --- in memory ------------------------------------------------------------------------------------


def apply_merges(
    model: nn.Module,
    steps: Sequence[Step],
    calls: Mapping[str, Calls] | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Merge the branches of each step with `edits`, in place; all steps of one owner together.

    The batch norms that were folded into a branch must be gone (nn.Identity), and its weights
    changed; a norm that is a branch itself is still there.

    calls: of each owner, by its path, to prove its new forward on: in float64 it gives what the
        branches gave, to 1e-9. None: it was proven before, and is made again.
    values: the merged tensors by name, where the edits were run already; else they run here, on the
        model's tensors in float64, and each result is cast once.

    Returns, by owner, why its forward cannot be rewritten; such an owner is as it was.
    Raises UsageError where the model is not the one that was planned for.
    """
    by_owner: dict[str, list[Step]] = {}
    for step in steps:
        if step.edits:
            by_owner.setdefault(step.site.path, []).append(step)
    refused: dict[str, str] = {}
    for path, group in by_owner.items():
        owner = module_at(model, path)
        try:
            _merge(model, owner, group, None if calls is None else calls.get(path, ()), values)
        except CannotRewrite as error:
            refused[path] = error.reason
    return refused


def reapply_merges(owner: nn.Module, steps: Sequence[Step]) -> None:
    """Rewrite the forward again of an owner that has its merged layers, and no branches any more.

    Raises CannotRewrite where its source is not the one that was planned for.
    """
    layers = {step.child: owner.get_submodule(step.child) for step in steps}
    placements = [Placement(step.site, step.child, layers[step.child]) for step in steps]
    rewriting = merged_forward(owner, placements, [name for s in steps for name in _gone(s)])
    for child in layers:
        del owner._modules[child]
    install(owner, rewriting, layers)


def _merge(
    model: nn.Module,
    owner: nn.Module,
    steps: Sequence[Step],
    calls: Calls | None,
    values: Mapping[str, Tensor] | None,
) -> None:
    layers = {step.child: _layer(model, step, values) for step in steps}
    placements = [Placement(step.site, step.child, layers[step.child]) for step in steps]
    gone = [name for step in steps for name in _gone(step)]
    rewriting = merged_forward(owner, placements, gone)
    if calls is not None:
        exact = {step.child: _layer(model, step, None) for step in steps}
        _prove(owner, rewriting, exact, steps, [call for call in calls if not call.training])
    for step in steps:
        like, merged = _original(model, step), layers[step.child]
        merged.to(like.dtype).train(owner.training).requires_grad_(like.requires_grad)
    install(owner, rewriting, layers)
    _remove_branches(owner, steps)


def _local(step: Step, name: str) -> str:
    return name.removeprefix(f"{step.site.path}.") if step.site.path else name


def _gone(step: Step) -> list[str]:
    return [_local(step, edit.target) for edit in step.edits if isinstance(edit, Drop)]


def _original(model: nn.Module, step: Step) -> Tensor:
    """The weight of the first branch, whose dtype, device and gradient the merged one takes."""
    first = next(edit for edit in step.edits if isinstance(edit, AddKernel))
    try:
        return tensor_in(model, first.source)
    except (AttributeError, AssertionError) as error:
        raise UsageError(
            f"{step.site.label}: the model has no tensor {first.source}. "
            "The plan was made for another model; make a new one for this."
        ) from error


def _layer(model: nn.Module, step: Step, values: Mapping[str, Tensor] | None) -> nn.Module:
    """The merged layer in float64, with its weights."""
    like, options = _original(model, step), step.options
    merged = _empty_layer(options, like.device)
    prefix = f"{step.site.path}." if step.site.path else ""
    tensors = _computed(model, step) if values is None else values
    for name in [name for name, _ in merged.named_parameters()]:
        value = tensors[f"{prefix}{step.child}.{name}"].detach().double()
        setattr(merged, name, nn.Parameter(value))
    return merged


def _empty_layer(options: Mapping[str, Any], device: torch.device) -> nn.Module:
    outputs, inputs = options["shape"][:2]
    place = {"bias": options["bias"], "device": "meta", "dtype": torch.float64}
    if not options["kernel"]:
        return nn.Linear(inputs, outputs, **place)
    sizes = {
        name: tuple(options[key])
        for name, key in (
            ("kernel_size", "kernel"),
            ("stride", "stride"),
            ("padding", "padding"),
            ("dilation", "dilation"),
        )
    }
    groups = int(options["groups"])
    return CONVOLUTIONS[len(options["kernel"])](
        inputs * groups, outputs, groups=groups, **sizes, **place
    )


def _computed(model: nn.Module, step: Step) -> dict[str, Tensor]:
    """Every tensor after the step's edits, in float64."""
    named = (*model.named_parameters(), *model.named_buffers())
    wanted = _names_in(step)
    tensors = {name: t.detach().double() for name, t in named if name in wanted}
    run(step.edits, tensors)
    return tensors


def _names_in(step: Step) -> set[str]:
    """The tensors that a step's edits read or drop."""
    found: set[str] = set()
    for edit in step.edits:
        by = getattr(edit, "by", None)
        found |= {edit.target, getattr(edit, "source", edit.target)}
        found |= set() if by is None else set(by.tensors.values())
    return found


def _prove(
    owner: nn.Module,
    rewriting: Rewriting,
    layers: Mapping[str, nn.Module],
    steps: Sequence[Step],
    calls: Calls,
) -> None:
    """Raises CannotRewrite unless the owner gives the same with its branches merged."""
    if not calls:
        raise CannotRewrite("no call of its forward was recorded to prove a rewriting on")
    if any(tensor.is_meta for layer in layers.values() for tensor in layer.parameters()):
        raise CannotRewrite("it has no values (meta device) to prove a rewritten forward on")
    before, after = float64_copy(owner), float64_copy(owner)
    install(after, rewriting, {name: float64_copy(module) for name, module in layers.items()})
    _remove_branches(after, steps)
    for call in calls:
        given = [tree_map(_double, (call.args, dict(call.kwargs))) for _ in range(2)]
        try:
            with torch.no_grad(), lifted():
                wanted = before(*given[0][0], **given[0][1])
                made = after(*given[1][0], **given[1][1])
        except Exception as error:  # the user's forward may raise anything
            raise CannotRewrite(
                f"with its branches merged it raises {type(error).__name__}: {error}"
            ) from error
        _require_same((made, given[1]), (wanted, given[0]))


def _double(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().double() if leaf.is_floating_point() else leaf.detach().clone()


def _require_same(made: Any, wanted: Any) -> None:
    first, second = (_tensors(tree) for tree in (made, wanted))
    same = len(first) == len(second) and all(
        relative_error(a.double(), b.double()) <= BOUND for a, b in zip(first, second, strict=True)
    )
    if not same:
        raise CannotRewrite("with its branches merged its output differs")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _remove_branches(owner: nn.Module, steps: Sequence[Step]) -> None:
    """The branches, and the modules around them that held nothing else."""
    for step in steps:
        for path in (_local(step, path) for path in step.site.settings["branches"]):
            parts = path.split(".")
            _unbind(owner, parts)
            while len(parts) > 1:
                parts.pop()
                if _is_hollow(owner.get_submodule(".".join(parts))):
                    _unbind(owner, parts)


def _unbind(owner: nn.Module, parts: Sequence[str]) -> None:
    owner.get_submodule(".".join(parts[:-1]))._modules.pop(parts[-1], None)


def _is_hollow(module: nn.Module) -> bool:
    """Without tensors, and without modules that do anything."""
    tensors: Collection[Tensor] = [*module.parameters(), *module.buffers()]
    return not tensors and all(
        isinstance(child, nn.Identity) or (any(child.children()) and _is_hollow(child))
        for child in module.children()
    )
