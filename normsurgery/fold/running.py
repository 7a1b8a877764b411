"""Edits, run in order on float64 tensors by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normsurgery.errors import UsageError
from normsurgery.fold.edits import (
    AddIdentity,
    AddKernel,
    AddProduct,
    AddTensor,
    Bake,
    Centre,
    Copy,
    Create,
    Drop,
    Edit,
    Fill,
    Scale,
    Shift,
    Vector,
)
from normsurgery.fold.vectors import values
from normsurgery.fold.weight_formulas import baked


def run(
    edits: Sequence[Edit], tensors: MutableMapping[str, Tensor], *, inplace: bool = False
) -> None:
    """Run the edits in order on `tensors`, whose entries are replaced.

    All tensors an edit reads or changes must be float64, and none but these are looked at. The
    tensors given are left as they are, unless `inplace`: then one that shares memory with no other
    is changed itself, which needs half the memory. No two entries come to share memory. Nothing
    here asks for a gradient. Raises UsageError, naming edit and tensor, where a tensor is missing
    or does not fit; edits before that one have then been carried out.
    """
    memory = _Memory(tensors, _unshared(tensors) if inplace else set())
    with torch.no_grad():
        for edit in edits:
            _RUN[type(edit)](edit, memory)


def _unshared(tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that alone use their memory, each of their elements once."""
    storages = {name: _storage(tensor) for name, tensor in tensors.items()}
    users = Counter(storages.values())
    return {
        name
        for name, tensor in tensors.items()
        if users[storages[name]] == 1 and tensor.is_contiguous()
    }


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class _Memory:
    """The tensors by name, and the names of those that may be changed in place."""

    tensors: MutableMapping[str, Tensor]
    own: set[str]

    def read(self, edit: Edit, name: str) -> Tensor:
        if name not in self.tensors:
            raise UsageError(
                f"{_described(edit)}: there is no tensor {name}. "
                "Run the edits on the model they were planned for, or make the plan again."
            )
        tensor = self.tensors[name]
        if tensor.dtype != torch.float64:
            raise UsageError(
                f"{_described(edit)}: {name} is {tensor.dtype}, and edits are computed in float64. "
                "Convert it first, and cast the result once."
            )
        return tensor.detach()

    def change(self, edit: Edit, name: str) -> Tensor:
        """The tensor of that name, to be changed in place."""
        tensor = self.read(edit, name)
        if name not in self.own:
            self.put(name, tensor.clone(memory_format=torch.contiguous_format))
        return self.tensors[name]

    def put(self, name: str, tensor: Tensor) -> None:
        """Set an entry to a tensor that nothing else holds."""
        self.tensors[name] = tensor
        self.own.add(name)

    def vector(self, edit: Edit, vector: Vector) -> Tensor:
        by_role = {role: self.read(edit, name) for role, name in vector.tensors.items()}
        try:
            return values(vector, by_role)
        except UsageError as error:
            raise UsageError(f"{_described(edit)}: {error}") from error


def _described(edit: Edit) -> str:
    return f"{type(edit).__name__} of {edit.target}"


def _unfit(edit: Edit, what: str) -> UsageError:
    return UsageError(
        f"{_described(edit)}: {what}. "
        "The edits were planned for a model of other sizes; make the plan again."
    )


def _sizes(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _along(edit: Edit, vector: Tensor, target: Tensor, axis: int, groups: int) -> Tensor:
    """The vector, shaped to broadcast over target with its first axis split into groups."""
    grouped = _grouped(edit, target, groups)
    shape = [1] * grouped.dim()
    _require_axis(edit, target, axis)
    axis = axis % target.dim() + 1
    shape[axis] = grouped.shape[axis]
    shape[0] = groups
    if vector.numel() != groups * grouped.shape[axis]:
        raise _unfit(
            edit,
            f"the vector has {vector.numel()} elements, and axis {axis - 1} of {_sizes(target)} "
            f"in {groups} groups wants {groups * grouped.shape[axis]}",
        )
    return vector.reshape(shape)


def _grouped(edit: Edit, tensor: Tensor, groups: int) -> Tensor:
    """A view whose new first axis is the groups."""
    if tensor.dim() == 0 or groups < 1 or tensor.shape[0] % groups:
        raise _unfit(edit, f"{_sizes(tensor)} cannot be split into {groups} groups along axis 0")
    return tensor.view(groups, tensor.shape[0] // groups, *tensor.shape[1:])


def _require_axis(edit: Edit, tensor: Tensor, *axes: int) -> None:
    for axis in axes:
        if not -tensor.dim() <= axis < tensor.dim():
            raise _unfit(edit, f"there is no axis {axis} in {_sizes(tensor)}")


def _require_equal_shape(edit: Edit, target: Tensor, what: str, added: Tensor) -> None:
    if target.shape != added.shape:
        raise _unfit(edit, f"target has {_sizes(target)}, {what} has {_sizes(added)}")


def _scale(edit: Scale, memory: _Memory) -> None:
    target, by = memory.read(edit, edit.target), memory.vector(edit, edit.by)
    factors = _along(edit, by, target, edit.axis, edit.groups)
    _grouped(edit, memory.change(edit, edit.target), edit.groups).mul_(factors)


def _shift(edit: Shift, memory: _Memory) -> None:
    target, by = memory.read(edit, edit.target), memory.vector(edit, edit.by)
    added = _along(edit, by, target, edit.axis, 1)
    memory.change(edit, edit.target).unsqueeze(0).add_(added)


def _add_product(edit: AddProduct, memory: _Memory) -> None:
    target, weight = memory.read(edit, edit.target), memory.read(edit, edit.weight)
    by = memory.vector(edit, edit.by)
    _require_axis(edit, weight, edit.axis, edit.out_axis)
    if edit.groups > 1:
        product = _grouped_product(edit, weight, by)
    else:
        product = _product(edit, weight, by, target.dim() - 1)
    _require_equal_shape(edit, target, f"what is added ({edit.weight} times the vector)", product)
    memory.change(edit, edit.target).add_(product)


def _product(edit: AddProduct, weight: Tensor, by: Tensor, leading: int) -> Tensor:
    _along(edit, by, weight, edit.axis, 1)
    axes = list(range(weight.dim()))
    kept = [*axes[:leading], axes[edit.out_axis]]
    if axes[edit.axis] in kept or len(set(kept)) < len(kept):
        raise _unfit(
            edit,
            f"axis {edit.axis} is summed over and axes {kept} are kept, of {_sizes(weight)}",
        )
    return torch.einsum(weight, axes, by, [axes[edit.axis]], kept)


def _grouped_product(edit: AddProduct, weight: Tensor, by: Tensor) -> Tensor:
    """The group is an axis of its own, of the weight as of the vector and of the result."""
    vector = _along(edit, by, weight, edit.axis, edit.groups).reshape(edit.groups, -1)
    axes = list(range(weight.dim() + 1))
    inputs, outputs = axes[1:][edit.axis], axes[1:][edit.out_axis]
    grouped = _grouped(edit, weight, edit.groups)
    return torch.einsum(grouped, axes, vector, [0, inputs], [0, outputs]).reshape(-1)


def _create(edit: Create, memory: _Memory) -> None:
    if edit.target in memory.tensors:
        raise UsageError(
            f"{_described(edit)}: there is such a tensor already, "
            f"{_sizes(memory.tensors[edit.target])}. Make the plan again."
        )
    like = memory.tensors.get(edit.like)
    device = torch.device("cpu") if like is None else like.device
    memory.put(edit.target, torch.zeros(edit.shape, dtype=torch.float64, device=device))


def _copy(edit: Copy, memory: _Memory) -> None:
    source = memory.read(edit, edit.source)
    memory.put(edit.target, source.clone(memory_format=torch.contiguous_format))


def _centre(edit: Centre, memory: _Memory) -> None:
    target = memory.read(edit, edit.target)
    _require_axis(edit, target, edit.axis)
    memory.change(edit, edit.target).sub_(target.mean(edit.axis, keepdim=True))


def _fill(edit: Fill, memory: _Memory) -> None:
    target = memory.read(edit, edit.target)
    full = torch.full(target.shape, edit.value, dtype=torch.float64, device=target.device)
    memory.put(edit.target, full)


def _drop(edit: Drop, memory: _Memory) -> None:
    if edit.target not in memory.tensors:
        raise UsageError(
            f"{_described(edit)}: there is no such tensor. "
            "Run the edits on the model they were planned for, or make the plan again."
        )
    del memory.tensors[edit.target]
    memory.own.discard(edit.target)


def _bake(edit: Bake, memory: _Memory) -> None:
    tensors = {role: memory.read(edit, name) for role, name in edit.tensors.items()}
    try:
        result = baked(edit, tensors)
    except (RuntimeError, LookupError) as error:
        sizes = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in tensors.items())
        raise _unfit(
            edit, f"the formula of {edit.kind} does not run on {sizes} ({error})"
        ) from error
    if _storage(result) in {_storage(tensor) for tensor in tensors.values()}:
        result = result.clone()
    memory.put(edit.target, result)


def _add_kernel(edit: AddKernel, memory: _Memory) -> None:
    target, source = memory.read(edit, edit.target), memory.read(edit, edit.source)
    _require_kernel(edit, target, source)
    window = _window(edit.at, source.shape[2:])
    memory.change(edit, edit.target)[window].add_(source, alpha=edit.factor)


def _window(at: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    """All channels, and in each spatial dimension so many positions from `at` on."""
    spans = (slice(start, start + size) for start, size in zip(at, sizes, strict=True))
    return (slice(None), slice(None), *spans)


def _require_kernel(edit: AddKernel, target: Tensor, source: Tensor) -> None:
    same = target.dim() == source.dim() == len(edit.at) + 2 and target.shape[:2] == source.shape[:2]
    sizes = zip(target.shape[2:], source.shape[2:], edit.at, strict=False)
    if same and all(0 <= at <= large - small for large, small, at in sizes):
        return
    raise _unfit(
        edit,
        f"{edit.source} of {_sizes(source)} at {edit.at} does not lie in target, {_sizes(target)}",
    )


def _add_tensor(edit: AddTensor, memory: _Memory) -> None:
    target, source = memory.read(edit, edit.target), memory.read(edit, edit.source)
    _require_equal_shape(edit, target, edit.source, source)
    memory.change(edit, edit.target).add_(source, alpha=edit.factor)


def _add_identity(edit: AddIdentity, memory: _Memory) -> None:
    target = memory.read(edit, edit.target)
    _require_identity(edit, target)
    outputs = torch.arange(target.shape[0], device=target.device)
    by = torch.ones((), dtype=torch.float64, device=target.device)
    if edit.by is not None:
        by = memory.vector(edit, edit.by)
        _along(edit, by, target, 0, 1)
    centre = memory.change(edit, edit.target)
    for at in reversed(edit.at):
        centre = centre.select(-1, at)
    centre[outputs, outputs % target.shape[1]] += edit.factor * by


def _require_identity(edit: AddIdentity, target: Tensor) -> None:
    square = target.dim() > 1 and target.shape[0] == target.shape[1] * edit.groups
    spatial = target.shape[2:]
    inside = len(edit.at) == len(spatial) and all(
        0 <= at < size for at, size in zip(edit.at, spatial, strict=True)
    )
    if not (square and inside):
        raise _unfit(
            edit,
            f"target, {_sizes(target)} in {edit.groups} groups, has no identity at {edit.at}",
        )


_RUN: Mapping[type, Callable[[Any, _Memory], None]] = {
    Scale: _scale,
    Shift: _shift,
    AddProduct: _add_product,
    Create: _create,
    Copy: _copy,
    Centre: _centre,
    Fill: _fill,
    Drop: _drop,
    Bake: _bake,
    AddKernel: _add_kernel,
    AddTensor: _add_tensor,
    AddIdentity: _add_identity,
}
