"""Putting a new forward on one instance: a subclass of its own class, made for it alone.

An owner that is a norm by its class (a BatchNorm2d with an activation in its forward) is none any
more: it gets a class like its own that is no subclass of that norm's, since whoever asks for a norm
by its class would look for statistics and weights that it has not.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping
from typing import Any

from torch import nn

from normsurgery.errors import CannotRewrite, UsageError
from normsurgery.spec import specs
from normsurgery.surgery.owner.functions import in_class, unrelated
from normsurgery.surgery.owner.rewriting import Rewriting

MARK = "__normsurgery_owner__"


def install(owner: nn.Module, rewriting: Rewriting, modules: Mapping[str, nn.Module]) -> None:
    """Give `owner` the new forward and the new norms, and take the moved tensors from it."""
    if "forward" in vars(owner):
        raise CannotRewrite("its forward was replaced on the instance, not by its class")
    taken = [name for name in modules if hasattr(owner, name)]
    if taken:
        raise CannotRewrite(f"it already has an attribute {taken[0]!r}")
    try:
        owner.__class__ = _subclass(original_class(owner), rewriting)
    except TypeError as error:
        raise CannotRewrite(f"its class cannot be subclassed for one instance: {error}") from error
    for name in rewriting.moved:
        _remove(owner, name)
    for path in dict.fromkeys(name.rpartition(".")[0] for name in rewriting.moved):
        if path and _is_empty(owner.get_submodule(path)):
            owner.set_submodule(path, Emptied(owner.get_submodule(path)))
    for name, module in modules.items():
        owner.add_module(name, module)


def original_class(owner: nn.Module) -> type[nn.Module]:
    """The user's class of a module, rewritten or not."""
    found: type[nn.Module] = getattr(type(owner), MARK, type(owner))
    return found


def is_rewritten(module: nn.Module) -> bool:
    return hasattr(type(module), MARK)


def restore(owner: nn.Module) -> None:
    """Give a rewritten owner its original class back (its tensors are the caller's to restore)."""
    owner.__class__ = original_class(owner)


class Emptied(nn.Module):
    """What stays of a module that only lent its tensors to its owner's forward: its settings.

    A call raises UsageError; the norm that has the tensors now is called in its owner's forward.
    """

    def __init__(self, former: nn.Module) -> None:
        super().__init__()
        internals = vars(nn.Module())
        settings = {n: v for n, v in vars(former).items() if n not in internals}
        vars(self).update(settings)
        self.train(former.training)
        for name, buffer in former.named_buffers(recurse=False):  # a counter nobody advances
            self.register_buffer(name, buffer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError(
            "this module is empty: its tensors moved to the norm that its owner calls now. "
            "Call that one."
        )

    def extra_repr(self) -> str:
        return "its tensors moved to the norm that its owner calls"


def _is_empty(module: nn.Module) -> bool:
    held = any(tensor.is_floating_point() for tensor in (*module.parameters(), *module.buffers()))
    return not held and not any(True for _ in module.children())


def _remove(owner: nn.Module, dotted: str) -> None:
    parent, _, name = dotted.rpartition(".")
    module = owner.get_submodule(parent)
    module._parameters.pop(name, None)
    module._buffers.pop(name, None)
    module._non_persistent_buffers_set.discard(name)


def _subclass(original: type[nn.Module], rewriting: Rewriting) -> type[nn.Module]:
    base: Any = original
    forward = rewriting.forward
    norms = [spec for spec in specs() if spec.attach == "norm" and spec.found_by_class]
    if issubclass(original, tuple(cls for spec in norms for cls in spec.classes)):
        base = unrelated(base)
        forward = in_class(forward, dict(zip(original.__mro__, base.__mro__, strict=True)))

    def refuse_pickle(self: nn.Module, protocol: Any) -> Any:
        raise UsageError(
            f"{original.__name__} has a rewritten forward, which no pickle can hold: "
            "save the model with normsurgery.artefacts.save, which stores its original classes "
            "and the plan, and makes the rewrite again on load."
        )

    def deep_copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        return _rebuilt(self, base, memo)

    def shallow_copy(self: nn.Module) -> nn.Module:
        return _rebuilt(self, base, None)

    def describe(self: nn.Module) -> str:
        try:
            return str(base.extra_repr(self))
        except AttributeError:  # it tells of tensors that have moved
            return "its norm is called by its forward"

    def load(
        self: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *rest: Any,
    ) -> None:
        # A class that migrates old formats would look for the tensors that have moved.
        metadata = {**local_metadata, "version": self._version}
        base._load_from_state_dict(self, state_dict, prefix, metadata, *rest)

    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        MARK: original,
        "forward": forward,
        "__reduce_ex__": refuse_pickle,
        "_load_from_state_dict": load,
        "extra_repr": describe,
    }
    if not hasattr(base, "__deepcopy__"):
        namespace["__deepcopy__"] = deep_copy
    if not hasattr(base, "__copy__"):
        namespace["__copy__"] = shallow_copy
    return types.new_class(original.__name__, (base,), exec_body=lambda ns: ns.update(namespace))


def _rebuilt(owner: nn.Module, base: type[nn.Module], memo: dict[int, Any] | None) -> nn.Module:
    """A copy of `owner` by the protocol that `copy` follows, which `__reduce_ex__` refuses."""
    make, arguments, state = (*base.__reduce_ex__(owner, 4), None)[:3]
    if memo is None:
        copied: nn.Module = make(*arguments)
        return _with_state(copied, state.copy() if isinstance(state, dict) else state)
    copied = make(*copy.deepcopy(arguments, memo))
    memo[id(owner)] = copied
    return _with_state(copied, copy.deepcopy(state, memo))


def _with_state(module: nn.Module, state: Any) -> nn.Module:
    if state is not None:
        module.__setstate__(state)  # type: ignore[no-untyped-call]
    return module
