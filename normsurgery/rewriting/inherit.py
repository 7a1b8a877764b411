"""What a new module takes over from the one it replaces, besides the values of its tensors."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.utils import parametrize

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def inherit(
    tensors: Mapping[str, Tensor], old: nn.Module, new: nn.Module, moved: Mapping[str, str]
) -> None:
    """Mode, requires_grad, hooks, parametrizations and persistence, from `old` to `new`.

    `tensors`: the old norm's, by role; `moved`: local tensor name in `new` -> in `old`.
    """
    new.train(old.training)
    inherit_tensors(tensors, old, new, moved)
    _parametrizations(old, new, moved)
    hooks(old, new)


def inherit_tensors(
    tensors: Mapping[str, Tensor], old: nn.Module, new: nn.Module, moved: Mapping[str, str]
) -> None:
    """requires_grad, attributes set on a parameter, and whether a buffer is saved.

    A parameter that did not move is as the conversion made it, but in a frozen norm it is frozen.
    """
    affine = [tensors[role] for role in ("weight", "bias") if role in tensors]
    trained = any(tensor.requires_grad for tensor in affine) if affine else True
    for name, parameter in new.named_parameters():
        origin = tensor_in(old, moved[name]) if name in moved else None
        if parameter.is_floating_point():
            as_made = parameter.requires_grad and trained
            parameter.requires_grad_(as_made if origin is None else origin.requires_grad)
        if isinstance(origin, nn.Parameter):
            vars(parameter).update(vars(origin))
    for name, _ in new.named_buffers():
        if name in moved and is_transient(old, moved[name]):
            owner, local = _owner(new, name)
            owner._non_persistent_buffers_set.add(local)


def hooks(old: nn.Module, new: nn.Module) -> None:
    """Share the hooks of `old` with `new`, so that a handle the user holds removes them from both.

    Hooks that are methods of the old module itself are its own machinery and stay behind.
    """
    for registry in HOOKS:
        theirs, own = vars(old).get(registry), vars(new).get(registry)
        if not theirs:
            continue
        carried = {key: _rebound(hook, old, new) for key, hook in theirs.items()}
        unchanged = all(carried[key] is hook for key, hook in theirs.items())
        if unchanged and not own:
            vars(new)[registry] = theirs
            continue
        merged: OrderedDict[Any, Any] = OrderedDict(own or {})
        merged.update((key, hook) for key, hook in carried.items() if hook is not None)
        vars(new)[registry] = merged
    if vars(old).get("_is_full_backward_hook") is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


def hooked_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters with a hook of their own, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    }


def _rebound(hook: Any, old: nn.Module, new: nn.Module) -> Any:
    if isinstance(hook, types.MethodType) and hook.__self__ is old:
        return None
    if isinstance(hook, _WrappedHook) and hook.with_module and hook.module() is old:
        inner = hook.hook
        return None if getattr(inner, "__self__", None) is old else _WrappedHook(inner, new)
    return hook


def _parametrizations(old: nn.Module, new: nn.Module, moved: Mapping[str, str]) -> None:
    if not parametrize.is_parametrized(old):
        return
    for name, origin in moved.items():
        if not parametrize.is_parametrized(old, origin) or parametrize.is_parametrized(new, name):
            continue
        lists = old.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        theirs = lists[origin]
        assert isinstance(theirs, parametrize.ParametrizationList)
        for parametrization in theirs:
            parametrize.register_parametrization(
                new, name, copy.deepcopy(parametrization), unsafe=True
            )
        ours = new.parametrizations
        assert isinstance(ours, nn.ModuleDict)
        _copy_originals(theirs, ours[name])


def _copy_originals(theirs: nn.Module, ours: nn.Module) -> None:
    for name, original in theirs.named_parameters(recurse=False):
        clone = nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)
        ours.register_parameter(name, clone)


def tie(places: Sequence[tuple[nn.Module, str]], shared: Tensor) -> None:
    """Bind one tensor object in all these (module, local name) places."""
    for module, name in places:
        owner, local = _owner(module, name)
        if local in owner._parameters and isinstance(shared, nn.Parameter):
            owner._parameters[local] = shared
        elif local in owner._buffers and not isinstance(shared, nn.Parameter):
            owner._buffers[local] = shared


def tensor_in(module: nn.Module, name: str) -> Tensor:
    owner, local = _owner(module, name)
    tensor = getattr(owner, local)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, local = name.rpartition(".")
    return module.get_submodule(path), local


def is_transient(module: nn.Module, name: str) -> bool:
    """Whether `name` is a buffer that a state_dict does not hold."""
    owner, local = _owner(module, name)
    return local in owner._non_persistent_buffers_set
