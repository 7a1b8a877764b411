"""Carrying out a Plan on a model, in place: build everything, then edit, then say what moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from normsurgery.errors import CannotRewrite
from normsurgery.fold.channel_pad import without_padding
from normsurgery.fold.edits import Drop
from normsurgery.plan import Plan
from normsurgery.spec import Source, get
from normsurgery.steps import (
    BakeWeight,
    Duplicate,
    FoldStep,
    Merge,
    MergedNorm,
    Step,
    Strip,
    Swap,
    Untie,
)
from normsurgery.surgery import fastpath
from normsurgery.surgery.building import (
    Built,
    built_step,
    came_from,
    moved_names,
    note,
    saved_names,
)
from normsurgery.surgery.inherit import inherit, inherit_tensors, tensor_in, tie
from normsurgery.surgery.keymap import Entries, KeyMap, Move
from normsurgery.surgery.names import join
from normsurgery.surgery.owner import OwnerCall, Placement, reapply, rewrite_owner
from normsurgery.surgery.owner.graphs import rewrite_graph_module
from normsurgery.surgery.references import ModuleReferences
from normsurgery.surgery.relation import tensors_in
from normsurgery.surgery.sharing import shared_tensors
from normsurgery.surgery.source import module_at
from normsurgery.surgery.tree import Bindings, paths_of, paths_of_all, replace_everywhere
from normsurgery.survey import Skip

Calls = Mapping[str, Sequence[OwnerCall]]


@dataclass(frozen=True)
class Applied:
    """An edited model, the plan as it was carried out, and how state_dict keys moved."""

    model: nn.Module
    plan: Plan
    keymap: KeyMap
    notes: tuple[str, ...]
    new_modules: tuple[nn.Module, ...]


@dataclass
class _Progress:
    """What has been done so far, by position of the step in the plan."""

    entries: Entries = field(default_factory=Entries)
    done: dict[int, Built] = field(default_factory=dict)
    refused: list[Skip] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)

    @property
    def carried_out(self) -> list[int]:
        return sorted((*self.done, *self.layers))


def apply(model: nn.Module, plan: Plan, calls: Calls | None) -> Applied:
    """Edit `model` in place as `plan` says.

    calls: recorded calls of each owner of a call or formula, by its path, to prove the rewritten
        forward with; None: the plan was carried out before, and is only made again.

    A call that cannot be rewritten becomes a Skip of the returned plan. Raises UsageError where the
    plan is for another model, CannotConvert where a norm cannot be built, both before any norm is
    replaced; CannotRewrite where a forward that calls a module twice is not the one that was
    planned for; CannotHold, before any weight is changed, where one cannot hold what a fold makes.
    """
    from normsurgery.fold.editing import require_padding_held
    from normsurgery.fold.own_copies import make_copies
    from normsurgery.fold.weights import edit_weights, make_room

    progress = _Progress()
    progress.layers += [n for n, step in enumerate(plan.steps) if isinstance(step, Untie)]
    dropped = {edit.target for step in plan.steps for edit in step.edits if isinstance(edit, Drop)}
    gone = {name: others for name, others in aliases_of(model, plan).items() if name in dropped}
    make_copies(model, plan.steps, calls)
    model = _rebuild_layers(model, plan, progress)
    rest = {n: step for n, step in enumerate(plan.steps) if n not in progress.layers}
    waiting: Mapping[str, Tensor] | None = None
    if calls is None:
        make_room(model, tuple(rest.values()))
    else:
        waiting = edit_weights(model, tuple(rest.values()))
    merges = {n: step for n, step in rest.items() if isinstance(step, (Merge, MergedNorm))}
    rest = {n: step for n, step in rest.items() if n not in merges}
    every = paths_of_all(model)
    paths = {step.site.path: every[id(module_at(model, step.site.path))] for step in rest.values()}
    built = {n: built_step(model, step, plan.init) for n, step in rest.items()}
    if calls is not None:
        for item in built.values():
            require_padding_held(item.step, item.source)
    around = ModuleReferences(model)
    for owner_path in dict.fromkeys(s.site.path for s in rest.values() if s.site.form != "module"):
        _rewrite(model, owner_path, paths[owner_path], built, calls, progress, around)
    replaced = [item for item in built.values() if item.step.site.form == "module"]
    edited = fastpath.switch_off(
        model, [item.old for item in replaced if not isinstance(item.step, Duplicate)]
    )
    modules = {n: item for n, item in built.items() if item.step.site.form == "module"}
    padding = {n: item for n, item in modules.items() if "pad" in item.step.options}
    bindings = Bindings(model)
    for position, item in modules.items():
        if position not in padding:
            aliases = paths[item.step.site.path]
            model = _replace(model, position, item, aliases, progress, bindings)
    _merge(model, merges, calls, waiting, progress)
    # Branches are merged, and proven to be one layer, as they pad; only then is that taken away.
    bindings = Bindings(model)
    for position, item in padding.items():
        aliases = paths[item.step.site.path]
        model = _replace(model, position, item, aliases, progress, bindings)
    if not progress.refused:  # a merged layer may not be there, and the plan is made again
        for item in padding.values():
            without_padding(model, item.step.options)
    _restore_ties(model, list(progress.done.values()))
    progress.entries.aliases = gone | aliases_of(model, plan)
    carried_out = _carried_out(plan, progress)
    notes = tuple(
        f"{path}: torch's fused encoder path is switched off, since it would not call the new norms"
        for path in edited
    )
    keymap = _keymap(carried_out, progress)
    new_modules = tuple(item.new for _, item in sorted(progress.done.items()))
    return Applied(model, carried_out, keymap, notes, new_modules)


def _rebuild_layers(model: nn.Module, plan: Plan, progress: _Progress) -> nn.Module:
    """Carry out the steps that make a plain layer of one that computes its weight, or takes part
    in training only; returns the root."""
    from normsurgery.fold.parametrizations import apply_baked

    for position, step in enumerate(plan.steps):
        if isinstance(step, (BakeWeight, Strip)):
            model = apply_baked(model, step)
            progress.layers.append(position)
    return model


def _merge(
    model: nn.Module,
    merges: Mapping[int, Step],
    calls: Calls | None,
    values: Mapping[str, Tensor] | None,
    progress: _Progress,
) -> None:
    """Put parallel branches into one; where that is impossible the steps become Skips."""
    from normsurgery.fold.merging import apply_merges

    refused = apply_merges(model, list(merges.values()), calls, values)
    for position, step in merges.items():
        if step.site.label in refused:
            reason = f"its branches stay apart: {refused[step.site.label]}"
            progress.refused.append(Skip(step.site.label, reason, "", step.site.kind))
        else:
            progress.layers.append(position)


def _rewrite(
    model: nn.Module,
    owner_path: str,
    aliases: Sequence[str],
    built: Mapping[int, Built],
    calls: Calls | None,
    progress: _Progress,
    around: ModuleReferences,
) -> None:
    """Rewrite one owner with all its norms; where that is impossible its steps become Skips."""
    owner = module_at(model, owner_path)
    items = {n: item for n, item in built.items() if _is_call_of(item, owner_path)}
    before = saved_names(owner)
    for item in items.values():
        inherit_tensors(item.source.tensors, owner, item.new, moved_names(item))
    placements = [Placement(i.step.site, i.step.child, i.new, i.source) for i in items.values()]
    shared = shared_tensors(owner, placements, around)
    recorded = None if calls is None else calls.get(owner_path, ())
    try:
        names = _rewritten(owner, placements, recorded, shared, [i.step for i in items.values()])
    except CannotRewrite as error:
        progress.refused += [cannot_rewrite(item.step, error) for item in items.values()]
        return
    after = saved_names(owner)
    gone = before - after
    for (position, item), name in zip(items.items(), names, strict=True):
        progress.done[position] = item
        gone -= note(position, item, aliases, progress.entries, f"{name}.", after)
    progress.entries.dropped += [join(path, name) for path in aliases for name in sorted(gone)]


def _rewritten(
    owner: nn.Module,
    placements: Sequence[Placement],
    calls: Sequence[OwnerCall] | None,
    shared: Mapping[str, str],
    steps: Sequence[Step],
) -> Sequence[str]:
    """Rewrite the forward of one owner; returns the names of the new norms in it."""
    if isinstance(owner, fx.GraphModule):
        replacements = [(placement.site, placement.module) for placement in placements]
        return rewrite_graph_module(owner, replacements, kept=shared)
    if calls is None:
        reapply(owner, placements, shared=shared)
    elif _is_without_values(owner, calls):
        raise CannotRewrite("it has no values (meta device) to prove a rewritten forward on")
    else:
        # A fold holds in eval mode, and that is where the rewritten forward must agree.
        modes = (False,) if all(isinstance(step, FoldStep) for step in steps) else (False, True)
        rewrite_owner(owner, placements, calls, modes=modes, shared=shared)
    return [placement.name for placement in placements]


def _is_without_values(owner: nn.Module, calls: Sequence[OwnerCall]) -> bool:
    leaves = tree_leaves(([(call.args, call.kwargs) for call in calls], tensors_in(owner)))
    return any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves)


def _is_call_of(item: Built, owner_path: str) -> bool:
    return item.step.site.form != "module" and item.step.site.path == owner_path


def cannot_rewrite(step: Step, error: CannotRewrite) -> Skip:
    reason = f"its forward cannot be rewritten: {error.reason}"
    return Skip(step.site.label, reason, "", step.site.kind)


def _replace(
    model: nn.Module,
    position: int,
    item: Built,
    aliases: Sequence[str],
    progress: _Progress,
    bindings: Bindings,
) -> nn.Module:
    """Put the new module wherever the old one is bound; returns the root."""
    before = saved_names(item.old)
    if not isinstance(item.step, Duplicate):
        inherit(item.source.tensors, item.old, item.new, moved_names(item))
    model = bindings.replace(model, item.old, item.new)
    progress.done[position] = item
    gone = before - note(position, item, aliases, progress.entries, "", set())
    progress.entries.dropped += [join(path, name) for path in aliases for name in sorted(gone)]
    for path, make in companions(item.step, item.source, item.new).items():
        _replace_companion(model, path, make, progress.entries)
    return model


def companions(
    step: Step, source: Source, new: nn.Module
) -> Mapping[str, Callable[[nn.Module], nn.Module]]:
    """What else a step replaces: path -> a function from the module there to the new one."""
    conversion = get(step.to).conversion(step.site.kind)
    if not isinstance(step, Swap) or conversion is None or conversion.companions is None:
        return {}
    return conversion.companions(source, new, step.options)


def _replace_companion(
    model: nn.Module,
    path: str,
    make: Callable[[nn.Module], nn.Module],
    entries: Entries,
) -> None:
    """Replace a module that keeps its tensors, perhaps under other names."""
    old = module_at(model, path)
    aliases = paths_of(model, old)
    before = {id(tensor): name for name, tensor in tensors_in(old).items()}
    new = make(old)
    if new is old:
        return
    replace_everywhere(model, old, new)
    for name, tensor in tensors_in(new).items():
        entries.moved += [
            Move(join(alias, before[id(tensor)]), join(alias, name))
            for alias in aliases
            if id(tensor) in before
        ]


def _restore_ties(model: nn.Module, done: Sequence[Built]) -> None:
    """Tensors that were one object before are one object again.

    A new module may hold several tensors that came from one old one (an ensemble's members). They
    stay apart: the first is the one that is tied to whatever the old tensor was tied to.
    """
    bound = {id(tensor) for tensor in tensors_in(model).values()}
    slots: dict[tuple[int, float, int], list[tuple[nn.Module, str]]] = {}
    olds: dict[int, Tensor] = {}
    for item in done:
        for old, offset, copies in came_from(item):
            olds[id(old)] = old
            for rank, names in enumerate(copies):
                places = slots.setdefault((id(old), offset, rank), [])
                places += [(item.new, name) for name in names]
    for (identity, offset, rank), places in slots.items():
        stays = offset == 0.0 and rank == 0 and identity in bound
        if stays or len(places) > 1:
            tie(places, olds[identity] if stays else tensor_in(*places[0]))


def _carried_out(plan: Plan, progress: _Progress) -> Plan:
    steps = tuple(plan.steps[position] for position in progress.carried_out)
    return replace(plan, steps=steps, skips=(*progress.refused, *plan.skips))


def aliases_of(model: nn.Module, plan: Plan) -> dict[str, tuple[str, ...]]:
    """The other names of tensors that the edits of folds change."""
    edits = (edit for step in plan.steps for edit in step.edits)
    held: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    held.update(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, tensor in held.items():
        names.setdefault(id(tensor), []).append(name)
    targets = dict.fromkeys(edit.target for edit in edits if edit.target in held)
    found = {t: tuple(n for n in names[id(held[t])] if n != t) for t in targets}
    return {target: others for target, others in found.items() if others}


def _keymap(carried_out: Plan, progress: _Progress) -> KeyMap:
    """The key map, its step numbers counting in the plan as it was carried out."""
    numbers = {position: number for number, position in enumerate(progress.carried_out)}
    entries = progress.entries
    entries.made = [replace(made, step=numbers[made.step]) for made in entries.made]
    return entries.keymap(carried_out)
