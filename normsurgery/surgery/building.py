"""A step with its new module, before it is put in its place, and where its tensors come from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from normsurgery import steps
from normsurgery.errors import UsageError
from normsurgery.spec import Source
from normsurgery.steps import Duplicate, Step
from normsurgery.surgery.inherit import is_transient, tensor_in
from normsurgery.surgery.keymap import Entries, Made, Move
from normsurgery.surgery.names import join
from normsurgery.surgery.owner import Placement
from normsurgery.surgery.owner.rewriting import tensor_names
from normsurgery.surgery.relation import (
    Moved,
    Relation,
    relation_of_layers,
    relation_of_norms,
    tensors_in,
)
from normsurgery.surgery.replay import Replay
from normsurgery.surgery.source import (
    build,
    conversion_of,
    module_at,
    parse_dtype,
    source_of,
    what_is_left,
)
from normsurgery.treecopy import tree_copy


@dataclass(frozen=True)
class Built:
    """A step with its new module, before it is put in its place.

    locals: role -> local name of the old tensor in the module (for a call: below its owner).
    unsaved: name in the model -> shape, of the old buffers that a state_dict does not hold.
    """

    step: Step
    source: Source
    old: nn.Module
    new: nn.Module
    relation: Relation
    locals: Mapping[str, str]
    unsaved: Mapping[str, tuple[int, ...]]


def built_step(model: nn.Module, step: Step, init: str) -> Built:
    source = source_of(model, step.site)
    unsaved = {
        name: tuple(source.tensors[role].shape)
        for role, name in step.site.parameters.items()
        if is_transient(model, name)
    }
    old = module_at(model, step.site.path)
    if isinstance(step, Duplicate):
        new = tree_copy(old, clone=True)
        same = {name: Moved(name) for name in tensors_in(new)}
        return Built(step, source, old, new, Relation(same), {name: name for name in same}, unsaved)
    if isinstance(step, steps.Replay):
        names = _locals(old, step, source.tensors)
        relation = Relation({role: Moved(role) for role in source.tensors})
        return Built(step, source, old, replayed(step, source), relation, names, unsaved)
    conversion = conversion_of(step)
    if conversion is None:
        raise UsageError(
            f"{step.site.label}: there is no conversion from {step.site.kind} to {step.to}. "
            "The plan was made with another version; make a new one."
        )
    names = _locals(old, step, source.tensors) if step.site.attach == "norm" else {}
    kept, options = what_is_left(source, step)
    new = build(conversion, kept, options, init)
    if step.site.attach == "norm":
        relation = relation_of_norms(conversion, kept, names, options, init)
        return Built(step, source, old, new, relation, names, unsaved)
    relation = relation_of_layers(old, new)
    names = {name: name for name in tensors_in(old)}
    return Built(step, source, old, new, relation, names, unsaved)


def replayed(step: Step, source: Source) -> nn.Module:
    site = step.site
    if site.call is None or not site.call.operations:
        raise UsageError(
            f"{site.label}: the plan has no operations to replay. Make a new plan with inputs."
        )
    return Replay(source, site.call.operations, parse_dtype(site.dtype or "float32"))


def _locals(old: nn.Module, step: Step, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Role -> name of the tensor below `old`, whichever alias the site names it by."""
    if step.site.form != "module":
        return tensor_names(old, Placement(step.site, "", old))
    own = tensors_in(old)
    found: dict[str, str] = {}
    for role, full_name in step.site.parameters.items():
        name = next((name for name, tensor in own.items() if tensor is tensors[role]), None)
        found[role] = name or full_name.rpartition(".parametrizations.")[2].split(".")[0]
        if name is None and ".parametrizations." not in full_name:
            found[role] = full_name.rpartition(".")[2]
    return found


def note(
    position: int,
    item: Built,
    aliases: Sequence[str],
    entries: Entries,
    prefix: str,
    kept: Collection[str],
) -> set[str]:
    """Collect the key map's entries of one step; returns the old local names that moved."""
    gone: set[str] = set()
    for name in sorted(saved_names(item.new)):
        moved, old_name = _origin(item, name)
        if moved is None or old_name is None:
            computed = name in item.relation.computed
            made = (Made(join(p, prefix + name), position, name, computed) for p in aliases)
            entries.made += made
            entries.unsaved.update(item.unsaved)
            continue
        gone.add(old_name)
        for path in aliases:
            old, new = join(path, old_name), join(path, prefix + name)
            entries.moved.append(Move(old, new, moved.offset, old_name in kept))
    return gone


def _origin(item: Built, name: str) -> tuple[Moved | None, str | None]:
    """How a tensor of the new module moved, and the old local name it moved from.

    Below a parametrization that was inherited with its tensor, the names after it are the same.
    """
    moved = item.relation.moved.get(name)
    if moved is not None:
        return moved, item.locals.get(moved.role)
    head, _, rest = name.partition("parametrizations.")
    tensor, _, below = rest.partition(".")
    moved = item.relation.moved.get(head + tensor)
    if not rest or moved is None or moved.role not in item.locals:
        return None, None
    return moved, f"parametrizations.{item.locals[moved.role]}.{below}"


def moved_names(item: Built) -> dict[str, str]:
    """Local name in the new module -> in the old one, of every tensor that moved."""
    return {
        new: item.locals[moved.role]
        for new, moved in item.relation.moved.items()
        if moved.role in item.locals
    }


def came_from(item: Built) -> Iterator[tuple[Tensor, float, list[list[str]]]]:
    """(old tensor, offset, new tensors made from it, each as all its names in the new module)."""
    found: dict[Moved, dict[int, list[str]]] = {}
    for name, moved in item.relation.moved.items():
        if not _is_parametrized(item.new, name):
            same = found.setdefault(moved, {})
            same.setdefault(id(tensor_in(item.new, name)), []).append(name)
    for moved, copies in found.items():
        old = _old_tensor(item, moved)
        if old is not None:
            yield old, moved.offset, list(copies.values())


def _old_tensor(item: Built, moved: Moved) -> Tensor | None:
    if not isinstance(item.step, Duplicate) and item.step.site.attach == "norm":
        return item.source.tensors.get(moved.role)
    return tensors_in(item.old).get(moved.role)


def _is_parametrized(module: nn.Module, name: str) -> bool:
    path, _, local = name.rpartition(".")
    return parametrize.is_parametrized(module.get_submodule(path), local)


def saved_names(module: nn.Module) -> set[str]:
    """Names of the tensors that a state_dict of `module` holds, through every alias."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for path, child in module.named_modules(remove_duplicate=False):
        saved = set(child._buffers) - child._non_persistent_buffers_set
        names |= {join(path, name) for name in saved if child._buffers[name] is not None}
    return names
