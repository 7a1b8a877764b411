"""What must hold of a norm before any rule is asked."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator

from torch import fx, nn

from normsurgery.fold.affines import has_tail, is_affine, uses_batch
from normsurgery.fold.checks import Check
from normsurgery.fold.ground import Ground, Refused
from normsurgery.graph import ModuleCall
from normsurgery.spec import Law, get
from normsurgery.surgery.obstacles import obstacle
from normsurgery.surgery.references import ModuleReferences
from normsurgery.survey import Site

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def require(ground: Ground, model: nn.Module, site: Site, around: ModuleReferences) -> None:
    """Raises Refused, naming the check, where the norm must stay whatever surrounds it."""
    if site.attach == "weight":
        raise Refused(Check.ON_WEIGHT, next(iter(site.parameters.values()), ""))
    runs = ground.runs[site.index]
    if not runs:
        raise Refused(Check.NOT_RUN)
    batch = Law.BATCH_INDEPENDENT not in get(site.kind).laws or is_affine(site)
    if batch and any(map(uses_batch, runs)):
        raise Refused(Check.TRAIN_MODE if is_affine(site) else Check.NO_STATISTICS)
    if _trains(model, site):
        raise Refused(Check.TRAIN_MODE, f"{site.path} is in train mode", _EVAL)
    if not is_affine(site) and not has_tail(site):
        raise Refused(Check.COMPUTES)
    taken = 1 + len(site.settings.get("inputs", ()))
    if site.form == "module" and any(_arguments(call) != taken for call in _calls(ground, site)):
        raise Refused(Check.NOT_REWRITABLE, f"{site.path} is given more than what it normalises")
    reason = obstacle(model, site, copies=False, around=around)
    if reason is not None:
        raise Refused(Check.NOT_REWRITABLE, reason)


def _trains(model: nn.Module, site: Site) -> bool:
    return model.get_submodule(site.path).training and not model.training


_EVAL = "Call .eval() on it."


def _calls(ground: Ground, site: Site) -> Iterator[ModuleCall]:
    recording = ground.located.recording
    module = ground.model.get_submodule(site.path)
    return (call for call in recording.module_calls if call.module is module)


def _arguments(call: ModuleCall) -> int:
    return len(call.args) + len(call.kwargs)


def require_called_as(ground: Ground, site: Site, new: nn.Module) -> None:
    """What takes the norm's place must know the keyword it is called with. Raises Refused."""
    known = inspect.signature(new.forward).parameters
    for call in _calls(ground, site):
        unknown = [name for name in call.kwargs if name not in known]
        if unknown:
            raise Refused(
                Check.NOT_REWRITABLE,
                f"{site.path} is called with {unknown[0]}=, unknown to {type(new).__name__}",
                "Call it with its input as a positional argument.",
            )


def require_eval(ground: Ground, model: nn.Module, values: Collection[fx.Node]) -> None:
    """No module that was left in train mode works on the values. Raises Refused."""
    training = {path for path, module in model.named_modules() if module.training}
    if model.training or not training:
        return
    recording = ground.located.recording
    for call in recording.module_calls:
        path = recording.path(call.module)
        if path in training and not set(call.values).isdisjoint(values):
            raise Refused(Check.TRAIN_MODE, f"{path} is in train mode", _EVAL)


def require_no_hooks(
    ground: Ground, changed: Collection[fx.Node], modules: Collection[nn.Module]
) -> None:
    """No hook sees a value that changes, or belongs to a module that changes. Raises Refused."""
    recording = ground.located.recording
    for module in modules:
        if _hooks(module):
            raise Refused(Check.HOOK, f"on {recording.path(module) or 'the model'}", _REMOVE)
    for call in recording.module_calls:
        if _hooks(call.module) and not set(call.values).isdisjoint(changed):
            raise Refused(
                Check.HOOK,
                f"on {recording.path(call.module) or 'the model'} sees a value in between",
                _REMOVE,
            )


_REMOVE = "Remove the hook, or put what it does into a module."


def _hooks(module: nn.Module) -> int:
    if isinstance(module, fx.GraphModule):  # an exported program checks its inputs in a hook
        return 0
    return sum(len(getattr(module, name, ())) for name in HOOKS)
