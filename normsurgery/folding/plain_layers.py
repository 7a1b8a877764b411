"""Making a layer whose weight is computed a plain one that holds it, in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from normsurgery.edits.types import Bake, Drop, Edit
from normsurgery.edits.weight_formulas import baked
from normsurgery.errors import UsageError
from normsurgery.finding.places import LAYERS
from normsurgery.rewriting.inherit import tensor_in

HookOfWeight = WeightNorm | SpectralNorm


def hooks_of_weight(module: nn.Module) -> list[HookOfWeight]:
    """torch's older hooks that compute a weight before each forward."""
    registered = module._forward_pre_hooks.values()
    return [hook for hook in registered if isinstance(hook, (WeightNorm, SpectralNorm))]


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch's that a layer is, or is a subclass of."""
    return next((cls for cls in type(module).__mro__ if cls in LAYERS), None)


def make_plain(module: nn.Module, edits: Sequence[Edit], path: str) -> None:
    """Do `edits` (a Bake and its Drops) to the module at `path`, in place."""

    def local(name: str) -> str:
        return name.removeprefix(f"{path}.") if path else name

    (edit,) = (edit for edit in edits if isinstance(edit, Bake))
    try:
        tensors = {r: tensor_in(module, local(name)) for r, name in edit.tensors.items()}
    except (AttributeError, AssertionError) as error:
        raise UsageError(
            f"{path}: the plan reads {', '.join(edit.tensors.values())}, which the model does not "
            "have. Make a new plan for this model."
        ) from error
    attribute = local(edit.target)
    original = tensors["v" if edit.kind == "weightnorm" else "weight"]
    value = baked(edit, {role: tensor.detach().double() for role, tensor in tensors.items()})
    weight = nn.Parameter(value.to(original.dtype), original.requires_grad)
    vars(weight).update(vars(original))
    if parametrize.is_parametrized(module, attribute):
        _take_parametrization_off(module, attribute)
    elif edit.target in edit.tensors.values():  # the forward computed it
        module.__class__ = plain_class(module) or type(module)
    else:
        _take_hook_off(module, attribute)
    for name in (local(edit.target) for edit in edits if isinstance(edit, Drop)):
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
    _hold(module, attribute, weight)


def _hold(module: nn.Module, attribute: str, weight: nn.Parameter) -> None:
    """Register the weight, before the other parameters, as a plain layer does."""
    others = {name: value for name, value in module._parameters.items() if name != attribute}
    module._parameters.clear()
    vars(module).pop(attribute, None)
    setattr(module, attribute, weight)  # a recurrent layer also lists its weights elsewhere
    module._parameters.update(others)


def _take_parametrization_off(module: nn.Module, attribute: str) -> None:
    """Without torch's own removal, which edits a class that a copy of the module shares."""
    lists: Any = module.parametrizations
    parametrized = type(module)
    if len(lists) == 1:
        module.__class__ = parametrized.__bases__[0]
        del module._modules["parametrizations"]
        _keep_hooks(module, "_load_state_dict_pre_hooks", lambda hook: not _is_torchs(hook))
        return
    left_out = ("__dict__", "__weakref__", attribute)
    own = {name: value for name, value in vars(parametrized).items() if name not in left_out}
    module.__class__ = type(parametrized.__name__, parametrized.__bases__, own)
    del lists[attribute]


def _is_torchs(hook: Any) -> bool:
    """The hook by which a parametrized weight norm loads the old format."""
    return getattr(hook.hook, "__module__", "") == parametrizations.__name__


def _take_hook_off(module: nn.Module, attribute: str) -> None:
    for old in [hook for hook in hooks_of_weight(module) if hook.name == attribute]:
        for registry in ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
            _keep_hooks(module, registry, partial(_is_foreign_to, old))


def _is_foreign_to(old: HookOfWeight, hook: Any) -> bool:
    """Neither the hook of the weight nor one of the state_dict that serves it."""
    return hook is not old and getattr(getattr(hook, "hook", hook), "fn", None) is not old


def _keep_hooks(module: nn.Module, registry: str, keep: Callable[[Any], bool]) -> None:
    """A new registry: an edit in place can be undone only where the old one stays as it was."""
    held = vars(module)[registry]
    if not all(keep(hook) for hook in held.values()):
        vars(module)[registry] = OrderedDict((k, hook) for k, hook in held.items() if keep(hook))
