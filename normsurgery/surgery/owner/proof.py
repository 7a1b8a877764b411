"""Acceptance of a rewritten forward: with each norm swapped to itself nothing may change.

Both the owner and its rewriting run on clones in float64, with the casts inside lifted and with
parameters and statistics moved away from their neutral values, over every recorded call in train
and in eval mode. Outputs, gradients, statistics, attributes, arguments and random state must agree.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normsurgery import spec
from normsurgery.errors import CannotRead, CannotRewrite, NormsurgeryError
from normsurgery.precision import float64_copy, lifted
from normsurgery.randomstate import random_state_kept
from normsurgery.spec import Source
from normsurgery.surgery.owner.install import install
from normsurgery.surgery.owner.rewriting import (
    OwnerCall,
    Placement,
    Rewriting,
    tensor_at,
    tensor_names,
)
from normsurgery.surgery.relation import tensors_in
from normsurgery.treecopy import tree_copy

RELATIVE = 1e-10  # the criterion for formulas in float64
SEED = 0x5EED


@dataclass(frozen=True)
class _Run:
    """All that one call of an owner did; `gradients` is None where autograd refuses it."""

    error: type[Exception] | None
    output: Any
    arguments: Any
    gradients: tuple[Tensor | None, ...] | None
    random_state: tuple[Any, ...]
    tensors: Mapping[str, Tensor]
    attributes: Mapping[str, Any]


def prove(
    owner: nn.Module,
    rewriting: Rewriting,
    placements: Sequence[Placement],
    calls: Sequence[OwnerCall],
    modes: Sequence[bool] = (False, True),
) -> None:
    """Raise CannotRewrite unless the rewriting computes what the owner does, in these modes.

    Nothing of `owner` is touched. A mode in which the original itself raises on every call proves
    nothing and is no objection; if it raises everywhere, the rewriting is refused.
    """
    if not calls:
        raise CannotRewrite("no call of its forward was recorded to prove a rewriting on")
    with random_state_kept(owner):
        try:
            original = float64_copy(owner)
        except CannotRead as error:
            raise CannotRewrite(f"nothing can be proven on a copy: {error}") from error
        _leave_neutral(original)
        rewritten = float64_copy(original)
        # A copy holds none of the tensors by which a norm of another path is known.
        own = [tensor_names(owner, placement) for placement in placements]
        names = _put_identities(original, rewritten, rewriting, placements, own)
        ran = [
            _compare(original, rewritten, rewriting, names, replace(call, training=training))
            for call in calls
            for training in modes
        ]
    if not any(ran):
        raise CannotRewrite("its forward raises in float64, so that no rewriting can be proven")


def _put_identities(
    original: nn.Module,
    rewritten: nn.Module,
    rewriting: Rewriting,
    placements: Sequence[Placement],
    names: Sequence[Mapping[str, str]],
) -> dict[str, str]:
    """Install the rewriting with each norm as itself; old buffer name -> new one.

    names: for each placement, role -> name of the old norm's tensor below the owner.
    """
    modules: dict[str, nn.Module] = {}
    renamed: dict[str, str] = {}
    for placement, own in zip(placements, names, strict=True):
        if placement.copied:
            modules[placement.name] = tree_copy(rewritten.get_submodule(placement.copied))
            continue
        module = _identity(original, placement, own)
        modules[placement.name] = module
        reading = spec.get(placement.site.kind).read(module)
        for role, attribute in reading.tensors.items():
            if role in own and attribute in module._buffers:
                renamed[own[role]] = f"{placement.name}.{attribute}"
    install(rewritten, rewriting, modules)
    return renamed


def _identity(owner: nn.Module, placement: Placement, own: Mapping[str, str]) -> nn.Module:
    """The norm that stood there, as a module of its own kind, in float64."""
    kind = placement.site.kind
    conversion = spec.get(kind).conversion(kind)
    if conversion is None:
        raise CannotRewrite(f"{kind} cannot be converted to itself, so nothing can be proven")
    elsewhere = placement.source.tensors if placement.source else {}
    tensors = {role: tensor.detach().double() for role, tensor in elsewhere.items()}
    tensors.update({role: tensor_at(owner, name) for role, name in own.items()})
    source = Source(
        kind=kind,
        where=placement.site.path,
        settings=placement.site.settings,
        tensors=tensors,
        shape=placement.site.shape,
        training=owner.training,
        dtype=torch.float64,
        device=next((t.device for t in tensors.values()), None),
    )
    try:
        return conversion.build(source).double()
    except NormsurgeryError as error:
        raise CannotRewrite(f"its norm cannot be rebuilt as itself: {error}") from error


def _leave_neutral(model: nn.Module) -> None:
    """Move every parameter and statistic away from 0 and 1, and from each other."""
    _seed()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.rand(2, *parameter.shape, dtype=parameter.dtype).to(parameter.device)
                parameter.mul_(1 + noise[0] / 4).add_(noise[1] / 8)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                noise = torch.rand(buffer.shape, dtype=buffer.dtype).to(buffer.device)
                buffer.mul_(1 + noise / 4)


def _seed() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.default_generator.manual_seed(SEED)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(SEED)


def _random_state() -> tuple[Any, ...]:
    """Of every generator that a forward on the CPU may draw from."""
    drawn: Any = np.random.get_state(legacy=True)
    return random.getstate(), drawn[1].tobytes(), drawn[2], torch.default_generator.get_state()


def _compare(
    original: nn.Module,
    rewritten: nn.Module,
    rewriting: Rewriting,
    renamed: Mapping[str, str],
    call: OwnerCall,
) -> bool:
    new = set(dict(rewritten.named_children())) - set(dict(original.named_children()))
    before, after = _run(original, call), _run(rewritten, call, new)
    where = f"in {'train' if call.training else 'eval'} mode"
    if before.error is not after.error:
        raise CannotRewrite(
            f"{where} its forward raises {_name(before.error)}, rewritten {_name(after.error)}"
        )
    if before.error is not None:
        return False
    for what in ("output", "arguments", "random_state", "gradients"):
        if what == "gradients" and before.gradients is None:
            continue
        _agree(getattr(before, what), getattr(after, what), f"{what.replace('_', ' ')} {where}")
    for name, tensor in before.tensors.items():
        if name not in rewriting.moved:
            _agree(tensor, after.tensors[name], f"{name} {where}")
        elif name in renamed:
            _agree(tensor.flatten(), after.tensors[renamed[name]].flatten(), f"{name} {where}")
    _agree(before.attributes, after.attributes, f"attributes {where}")
    return True


def _run(model: nn.Module, call: OwnerCall, ignored: Collection[str] = ()) -> _Run:
    """One call on a fresh copy, so that no call sees what another left behind."""
    copied = float64_copy(model).train(call.training)
    arguments = _cloned((call.args, dict(call.kwargs)))
    _seed()
    output: Any = None
    error: type[Exception] | None = None
    gradients: tuple[Tensor | None, ...] | None = None
    with lifted(), torch.enable_grad():
        try:
            output = copied(*arguments[0], **arguments[1])
        except Exception as raised:  # whatever the user's forward raises, both must raise
            error = type(raised)
        else:
            gradients = _gradients(output, arguments)
    return _Run(
        error,
        output,
        arguments,
        gradients,
        _random_state(),
        tensors_in(copied),
        _attributes(copied, frozenset(ignored)),
    )


def _gradients(output: Any, arguments: Any) -> tuple[Tensor | None, ...] | None:
    """Of the floating arguments, for a random cotangent (a sum would cancel after a norm).

    None where autograd refuses, as it does after some in-place operations.
    """
    generator = torch.Generator().manual_seed(SEED)
    total: Tensor | None = None
    for leaf in _leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point():
            cotangent = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
            part = (leaf * cotangent.to(leaf.device)).sum()
            total = part if total is None else total + part
    wanted = [t for t in _leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]
    if total is None or not wanted:
        return ()
    try:
        return torch.autograd.grad(total, wanted, allow_unused=True)
    except RuntimeError:
        return None


def _cloned(value: Any) -> Any:
    """The arguments, floating ones in float64 and asking for gradients."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value.detach().clone()
        leaf = value.detach().double().requires_grad_()
        return leaf.clone() if leaf is value else leaf * 1  # not a leaf: it may be written to
    if isinstance(value, (list, tuple)):
        items = [_cloned(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    return value


def _attributes(model: nn.Module, ignored: frozenset[str]) -> dict[str, Any]:
    """Plain attributes of every module but the new norms, for what a forward may have changed."""
    internals = set(vars(nn.Module()))
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        if path.partition(".")[0] not in ignored
        for name, value in vars(module).items()
        if name not in internals
    }


def _agree(before: Any, after: Any, what: str) -> None:
    """Raise CannotRewrite unless both hold equal values in equal structures."""
    first, second = list(_leaves(before)), list(_leaves(after))
    if len(first) != len(second):
        raise CannotRewrite(f"{what} has another structure after the rewrite")
    scale = max((_size(leaf) for leaf in first), default=0.0)
    for one, other in zip(first, second, strict=True):
        if not _same(one, other, scale):
            raise CannotRewrite(f"with its norm swapped to itself, {what} differs")


def _size(leaf: Any) -> float:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.numel():
        return 0.0
    return float(leaf.detach().abs().nan_to_num(0.0, 0.0, 0.0).max())


def _same(one: Any, other: Any, scale: float) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and (_is_opaque(one) or _equal(one, other))
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.requires_grad != other.requires_grad:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = torch.isfinite(one)
    if not torch.equal(finite, torch.isfinite(other)):
        return False
    error = (one - other).detach()[finite].abs()
    return not error.numel() or float(error.max()) <= RELATIVE * scale


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (ValueError, TypeError, RuntimeError):  # it compares to something else than a truth
        return True


def _is_opaque(value: Any) -> bool:
    """An object that only knows its identity: two copies of it are never equal."""
    own = any("__eq__" in vars(base) for base in type(value).__mro__[:-1])
    return callable(value) or not own


def _leaves(value: Any, around: tuple[int, ...] = ()) -> Iterator[Any]:
    """Tensors and plain values in nested containers, dataclasses and other mappings, in order."""
    if id(value) in around:  # a container that holds itself
        return
    inside = (*around, id(value))
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item, inside)
    elif isinstance(value, (list, tuple)):
        yield type(value)
        for item in value:
            yield from _leaves(item, inside)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value)
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), inside)
    else:
        yield value


def _name(error: type[Exception] | None) -> str:
    return error.__name__ if error else "nothing"
