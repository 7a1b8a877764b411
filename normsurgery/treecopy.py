"""Copies of a module tree that always work, and that keep every tie."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import parameter

from normsurgery.errors import CannotRead


def tree_copy(
    model: nn.Module, *, clone: bool = False, clone_buffers: bool = False, meta: bool = False
) -> nn.Module:
    """A copy of `model` with new module objects.

    Its tensors are the same objects (`clone=False`) or one clone of each (`clone=True`), or clones
    of all but the parameters (`clone_buffers=True`, for a run that moves statistics), or one tensor
    without values for each (`meta=True`); in any case two names of one tensor stay two names of
    one tensor. Unlike `copy.deepcopy` it takes models
    that hold an activation or an old-style `weight_norm` (non-leaf tensors). A clone keeps `grad`.
    Raises CannotRead where an attribute refuses to be copied, or where a parameter is still lazy.
    """
    memo: dict[int, Any] = {}
    for tensor in tensors_of(model):
        if parameter.is_lazy(tensor):
            raise CannotRead(
                f"{type(model).__name__} has lazy parameters without a shape. "
                "Run one forward on it first, then try again."
            )
        cloned = clone or meta or (clone_buffers and not isinstance(tensor, nn.Parameter))
        memo[id(tensor)] = _clone(tensor, meta) if cloned else tensor
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # an attribute of any class may refuse, with any exception
        raise CannotRead(
            f"{type(model).__name__} cannot be copied: an attribute refuses "
            f"({type(error).__name__}: {error}). Remove that attribute, or use inplace=True."
        ) from error


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module of the tree holds: parameters, buffers, and plain attributes."""
    seen: set[int] = set()
    for module in model.modules():
        yield from _tensors_in(vars(module), seen)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen.add(id(value))
            yield value
        return
    if value is None or isinstance(value, (bool, int, float, str)):
        return  # most attributes are; whether something is a Mapping takes long to ask
    if isinstance(value, (dict, list, tuple, set, Mapping)):
        if id(value) in seen:
            return
        seen.add(id(value))
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item, seen)


def _clone(tensor: Tensor, meta: bool) -> Any:
    with torch.no_grad():
        data = tensor.detach().to("meta") if meta else tensor.detach().clone()
        if isinstance(tensor, nn.Parameter) and tensor.is_leaf:
            new: Any = nn.Parameter(data, requires_grad=tensor.requires_grad)
            new.__dict__.update(vars(tensor))
            new.__class__ = type(tensor)
        else:
            new = data.requires_grad_(tensor.requires_grad and tensor.is_leaf)
        if tensor.is_leaf and tensor.grad is not None and not meta:
            new.grad = tensor.grad.detach().clone()
    return new
