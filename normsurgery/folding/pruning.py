"""nn.Identity, left where a norm was: taken out where nothing refers to it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from torch import nn

from normsurgery.rewriting.tree import bindings


def prune_identities(model: nn.Module, paths: Iterable[str]) -> tuple[str, ...]:
    """Take the nn.Identity at each path out of the nn.Sequential that holds it, in place.

    The names of the modules behind it stay, so no state_dict key moves. One stays where a class
    reads the Sequential by index, where it has another parent too, or where it is all there is.
    Returns the paths that are gone.
    """
    gone = [path for path in paths if _can_go(model, path)]
    for path in gone:
        parent, _, name = path.rpartition(".")
        del model.get_submodule(parent)._modules[name]
    return tuple(gone)


def _can_go(model: nn.Module, path: str) -> bool:
    parent_path, _, name = path.rpartition(".")
    if not name:
        return False
    parent, module = model.get_submodule(parent_path), model.get_submodule(path)
    if not isinstance(parent, nn.Sequential) or type(parent).forward is not nn.Sequential.forward:
        return False
    if type(module) is not nn.Identity or len(parent._modules) < 2:
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks
    alone = len(bindings(model, module)) == 1
    return alone and not hooked and not _is_indexed(model, parent_path)


def _is_indexed(model: nn.Module, path: str) -> bool:
    """Whether some class of the model reads parts of the Sequential by their place."""
    name = path.rpartition(".")[2]
    if not name:
        return False
    wanted = re.compile(rf"\b{re.escape(name)}\s*\[")
    return any(wanted.search(_source(cls)) for cls in {type(module) for module in model.modules()})


def _source(cls: type) -> str:
    if cls.__module__.startswith("torch.nn."):
        return ""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""
