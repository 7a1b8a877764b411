"""Judges what a pickle would do by names alone, before anything is imported or built.

Which packages it names, what it would call and with which arguments, what it would create, and
which states it would give to what it created.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from normsurgery.artefacts import allowed
from normsurgery.artefacts.nodes import (
    Call,
    Name,
    New,
    Persistent,
    Program,
    Sequence,
    Table,
    path_to,
)
from normsurgery.artefacts.opcodes import interpret
from normsurgery.errors import CannotRead

_LITERAL = (str, bytes, int, float, bool, type(None))
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)
_CALL_SLOTS = frozenset({"forward", "_call_impl", "_wrapped_call_impl", "_compiled_call_impl"})


class Refused(CannotRead):
    """One thing in a pickle that is not allowed: the attribute path, the name, and why.

    `root` is the class of the whole object, `module:Class`, where it is known.
    """

    def __init__(self, path: str, what: str, why: str, root: str = "") -> None:
        self.path, self.what, self.why, self.root = path, what, why, root
        super().__init__(f"{path or 'the object itself'}: {what} {why}")


@dataclass(frozen=True)
class Vetted:
    """A pickle whose every step was judged: the names it uses, and what each of them may be."""

    program: Program
    names: tuple[str, ...]


def vet(data: bytes, trust: Iterable[str] = ()) -> Vetted:
    """Judge the pickle at the start of `data` by names alone. Raises Refused or MalformedPickle."""
    return judge(interpret(data), allowed.PACKAGES | frozenset(trust))


def judge(program: Program, packages: frozenset[str]) -> Vetted:
    """Judge all that `program` would do, reachable from its result or not. Raises Refused."""
    root = root_class(program)
    checks: dict[type, Callable[[Any, frozenset[str]], tuple[str, str] | None]] = {
        Name: _refuse_name,
        Call: _refuse_call,
        New: _refuse_new,
        Persistent: _refuse_reference,
    }
    for node in program.nodes:
        refusal = checks[type(node)](node, packages)
        if refusal is not None:
            raise Refused(path_to(program.root, node), *refusal, root)
    for target, _ in program.builds:
        raise Refused(path_to(program.root, target), str(target), "would be given a state", root)
    if program.newer_opcodes:
        raise Refused(
            "",
            f"the pickle protocol {program.protocol}",
            "is newer than safe loading reads. Save the file again with torch.save's own protocol",
            root,
        )
    names = dict.fromkeys(str(node) for node in program.nodes if isinstance(node, Name))
    return Vetted(program, tuple(names))


def root_class(program: Program) -> str:
    """`module:Class` of the object a pickle holds, or of the first one in a dict around it."""
    candidates = [program.root]
    if isinstance(program.root, Table):
        candidates = [value for _, value in program.root.pairs()]
    for node in candidates:
        if isinstance(node, New) and isinstance(node.cls, Name):
            return f"{node.cls.module}:{node.cls.name}"
    return ""


def _refuse_name(node: Name, packages: frozenset[str]) -> tuple[str, str] | None:
    name = str(node)
    if name in FIXED_NAMES or is_torch_value(node):
        return None
    if not (_DOTTED.fullmatch(node.module) and _DOTTED.fullmatch(node.name)):
        return repr(name), "is not the name of a class or a function"
    if "__main__" in node.module.split("."):
        return name, "was defined in a script, so its code is not in any package"
    if "__" in name:
        return name, "reaches into Python itself"
    for prefix, why in allowed.CODE.items():
        if _within(node.module, prefix):
            return name, why
    top = node.module.partition(".")[0]
    if top not in packages:
        return name, f"is outside the packages that are known to ship models ({top})"
    if top == "torch" and not any(_within(node.module, part) for part in allowed.TORCH_LAYERS):
        return name, "is neither a layer of torch nor one of the functions models carry"
    return None


FIXED_NAMES = (
    allowed.STORAGES
    | allowed.TENSOR_CLASSES
    | allowed.TENSOR_REBUILDERS
    | allowed.VALUES
    | allowed.PLAIN_TYPES
    | allowed.FUNCTIONS
    | allowed.PLAIN_CLASSES
    | {allowed.REBUILD_WITH_STATE, allowed.DEFAULT_DICT, allowed.ENCODE, allowed.PARTIAL}
)


def _within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def is_torch_value(node: Name) -> bool:
    return node.module == "torch" and isinstance(vars(torch).get(node.name), _TORCH_VALUES)


def is_tensor_part(name: str) -> bool:
    """Whether a name belongs to a tensor or to a plain value, not to an object around them."""
    if name in _TENSOR_PARTS:
        return True
    module, _, last = name.rpartition(".")
    return is_torch_value(Name(module, last))


_TENSOR_PARTS = (
    allowed.STORAGES
    | allowed.TENSOR_CLASSES
    | allowed.TENSOR_REBUILDERS
    | {allowed.REBUILD_WITH_STATE, allowed.ENCODE, "builtins.set", "collections.OrderedDict"}
    | {"torch.Size", "torch.device", "torch.serialization._get_layout"}
)


def _refuse_new(node: New, packages: frozenset[str]) -> tuple[str, str] | None:
    if not isinstance(node.cls, Name):
        return "something computed", "would be created as an object"
    name = str(node.cls)
    if name in FIXED_NAMES and name not in allowed.PLAIN_CLASSES | {"collections.OrderedDict"}:
        return name, "would be created as an object"
    if not (isinstance(node.args, Sequence) and not node.args.items):
        return name, "would be created with arguments from the file"
    if node.items:
        return name, "is filled like a dict or list, which safe loading does not do"
    return _refuse_states(name, node.states) or _refuse_hooks(node.states)


def _refuse_hooks(states: list[Any]) -> tuple[str, str] | None:
    """Hooks and a `forward` on the instance are code that runs with the model."""
    for state in states:
        for key, value in state.pairs() if state is not None else ():
            if key in _CALL_SLOTS and value is not None:
                return f"{key} on the object", "would run in place of the class's own code"
            if not (isinstance(key, str) and key.endswith("_hooks")):
                continue
            for hook in getattr(value, "items", ())[1::2]:
                if not _is_known_hook(hook):
                    return f"a hook in {key}", "would run with the model"
    return None


# `_forward_hooks_with_kwargs` and its like hold flags, the dicts of hooks hold what is called.
def _is_known_hook(hook: Any) -> bool:
    if isinstance(hook, _LITERAL):
        return True
    if not isinstance(hook, New):
        return False
    if str(hook.cls) == allowed.WRAPPED_HOOK:
        tables = [state for state in hook.states if isinstance(state, Table)]
        return bool(tables) and all(_is_known_hook(table.get("hook")) for table in tables)
    return str(hook.cls) in allowed.PLAIN_CLASSES


def _refuse_states(name: str, states: list[Any]) -> tuple[str, str] | None:
    if all(isinstance(state, Table) or state is None for state in states):
        return None
    return name, "would be given a state that is not a dict of attributes"


def _refuse_reference(node: Persistent, packages: frozenset[str]) -> tuple[str, str] | None:
    key = node.key
    if isinstance(key, Sequence) and key.kind is tuple and len(key.items) == 5:
        tag, storage, record, location, size = key.items
        plain = isinstance(record, str) and isinstance(location, str) and isinstance(size, int)
        known = isinstance(storage, Name) and str(storage) in allowed.STORAGES
        if tag == "storage" and plain and known:
            return None
    return "a reference to something other than a tensor's storage", "is in the file"


def _refuse_call(node: Call, packages: frozenset[str]) -> tuple[str, str] | None:
    if not isinstance(node.function, Name):
        return "something computed", "would be called"
    name = str(node.function)
    if not (isinstance(node.args, Sequence) and node.args.kind is tuple):
        return name, "would be called with something that is no tuple of arguments"
    check = _CALLS.get(name)
    if check is not None:
        return check(name, node)
    if name in FIXED_NAMES or name.startswith("builtins."):
        return name, "would be called"
    return _refuse_enum_call(name, node)


def _refuse_enum_call(name: str, node: Call) -> tuple[str, str] | None:
    """A call with one literal may be an enum's member; `resolve` makes sure that it is one."""
    if node.states or node.items or len(node.args.items) != 1:
        return name, "would be called with arguments from the file"
    if not isinstance(node.args.items[0], _LITERAL):
        return name, "would be called with arguments from the file"
    return None


def _allow_value(name: str, node: Call) -> tuple[str, str] | None:
    if name == "collections.OrderedDict":
        return _refuse_states(name, node.states)
    if node.items and name != "collections.Counter":
        return name, "is filled like a dict or list, which safe loading does not do"
    return _no_state(name, node)


def _no_state(name: str, node: Call) -> tuple[str, str] | None:
    return (name, "would be given a state") if node.states else None


def _allow_default_dict(name: str, node: Call) -> tuple[str, str] | None:
    factory = node.args.items[:1]
    if node.items:
        return name, "has entries, which safe loading does not restore"
    if factory and not (factory[0] is None or str(factory[0]) in allowed.PLAIN_TYPES):
        return name, f"would call {factory[0]} for a missing key"
    return _no_state(name, node)


def _allow_encode(name: str, node: Call) -> tuple[str, str] | None:
    text, codec = [*node.args.items, None, None][:2]
    if isinstance(text, str) and codec == "latin1" and not node.states:
        return None
    return name, "would be called for something other than bytes"


def _allow_rebuild(name: str, node: Call) -> tuple[str, str] | None:
    if any(isinstance(item, Call) and item.items for item in node.args.items):
        return name, "would be given hooks"
    if name.endswith("_rebuild_parameter_with_state"):
        return _refuse_tensor_state(name, node.args.items[3:]) or _no_state(name, node)
    return _no_state(name, node)


def _allow_rebuild_with_state(name: str, node: Call) -> tuple[str, str] | None:
    if len(node.args.items) != 4:
        return name, "would be called with unusual arguments"
    function, cls, args, state = node.args.items
    if not (isinstance(function, Name) and str(function) in allowed.TENSOR_REBUILDERS):
        return name, f"would call {function}"
    if not (isinstance(cls, Name) and str(cls) in allowed.TENSOR_CLASSES):
        return name, f"would make a tensor of the class {cls}"
    if not isinstance(args, Sequence):
        return name, "would be called with unusual arguments"
    inner = _allow_rebuild(str(function), Call(function, args))
    return inner or _refuse_tensor_state(name, [state]) or _no_state(name, node)


def _refuse_tensor_state(name: str, states: list[Any]) -> tuple[str, str] | None:
    """A tensor's extra attributes are set one by one, so none may be one that a tensor defines."""
    for state in states:
        tables = state.items if isinstance(state, Sequence) else [state]
        for table in tables:
            if table is None:
                continue
            if not isinstance(table, Table):
                return name, "would be given a state that is not a dict of attributes"
            for key, _ in table.pairs():
                if not isinstance(key, str) or hasattr(torch.Tensor, key):
                    return name, f"would set the tensor attribute {key!r}"
    return None


def _allow_partial(name: str, node: Call) -> tuple[str, str] | None:
    """A partial is data if what it would call is a name, judged like any other, on plain values."""
    if len(node.args.items) != 1 or len(node.states) != 1:
        return name, "is not written the way Python writes one"
    target, state = node.args.items[0], node.states[0]
    if not (isinstance(state, Sequence) and len(state.items) == 4):
        return name, "would be given a state that is not its own"
    function, args, keywords, attributes = state.items
    if not isinstance(target, Name) or (function is not target and str(function) != str(target)):
        return name, "would call something other than a layer or an activation"
    if str(target) in FIXED_NAMES - allowed.FUNCTIONS:
        return name, f"would call {target}"
    if attributes is not None or not _plain([args, keywords]):
        return name, f"would call {target} with objects from the file"
    return None


def _plain(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, (Sequence, Table)):
            if not _plain(value.items):
                return False
        elif not (
            isinstance(value, _LITERAL) or (isinstance(value, Name) and is_torch_value(value))
        ):
            return False
    return True


_CALLS: Mapping[str, Callable[[str, Call], tuple[str, str] | None]] = {
    **dict.fromkeys(allowed.VALUES, _allow_value),
    **dict.fromkeys(allowed.TENSOR_REBUILDERS, _allow_rebuild),
    allowed.REBUILD_WITH_STATE: _allow_rebuild_with_state,
    allowed.DEFAULT_DICT: _allow_default_dict,
    allowed.ENCODE: _allow_encode,
    allowed.PARTIAL: _allow_partial,
}
