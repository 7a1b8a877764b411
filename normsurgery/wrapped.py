"""Models that come in a wrapper: what is unwrapped, and what is refused with the way out."""

from __future__ import annotations

import sys

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from normsurgery.errors import CannotRead, UsageError


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The module to operate on, and what to say about it.

    Raises UsageError for what is no module, for a distributed wrapper, a fully sharded or a
    TorchScript model; CannotRead for one whose lazy parameters have no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the model is a {type(model).__name__}. Give a torch.nn.Module, a fx.GraphModule or "
            "an ExportedProgram; normsurgery.artefacts.load(path).model is the one in a file."
        )
    notes: tuple[str, ...] = ()
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
        notes = ("the model was compiled; what comes back is not: call torch.compile again",)
    wrapper = _distributed_wrapper(model)
    if wrapper is not None:
        raise UsageError(
            f"the model is wrapped in {wrapper}, whose hooks are bound to the present parameters. "
            "Swap the inner model (its .module) and wrap the result again."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            "the model itself is TorchScript, whose code cannot be edited. "
            "Start from the Python model it was scripted from."
        )
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise CannotRead(
            f"{lazy[0]} of {type(model).__name__} is lazy and has no shape yet. "
            "Run one forward on the model first."
        )
    return model, notes


def has_mode(model: nn.Module) -> bool:
    """Whether train and eval mode are two for the model.

    In a graph of ATen operators, as of an exported program, each says for itself what it computes
    with; only a module put into it may have statistics.
    """
    if not isinstance(model, fx.GraphModule):
        return True
    if not any(isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes):
        return True
    called = (n.target for n in model.graph.nodes if n.op == "call_module")
    return any(True for path in called for _ in model.get_submodule(path).buffers())


def _distributed_wrapper(model: nn.Module) -> str | None:
    classes: list[type] = [nn.parallel.DistributedDataParallel, nn.DataParallel]
    sharded = sys.modules.get("torch.distributed.fsdp")
    if sharded is not None:
        names = ("FullyShardedDataParallel", "FSDPModule")
        classes += [getattr(sharded, name) for name in names if hasattr(sharded, name)]
    for module in model.modules():
        for cls in classes:
            if isinstance(module, cls):
                return cls.__name__
    return None
