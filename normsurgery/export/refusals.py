"""What is not exported, and why: a graph that would still train, draw, or has no values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from normsurgery.errors import CannotRead, CannotTrace
from normsurgery.export.places import where
from normsurgery.inputs import Inputs
from normsurgery.inputs.outputs import flatten_outputs
from normsurgery.randomstate import random_state_kept
from normsurgery.treecopy import tree_copy
from normsurgery.verify.judge import judge

_SAID = 4  # as many places are named in one sentence
_PROBABILITIES = ("p", "dropout_p", "dropout", "probability")
_TRAINING = ("train", "training")


def require_values(model: nn.Module) -> tuple[str, ...]:
    """Notes on weights that are not finite. Raises CannotRead for tensors on the meta device."""
    notes = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CannotRead(
                f"{name} of {type(model).__name__} is on the meta device and has no values. Load "
                "the weights first."
            )
        if tensor.is_floating_point() and tensor.isnan().any():
            notes.append(f"{name} has {int(tensor.isnan().sum())} values that are NaN")
    return tuple(notes)


def require_steady(model: nn.Module, inputs: Inputs) -> None:
    """Run the model twice from other random states; raise CannotTrace where that shows.

    A number that Python or numpy draws leaves no operation in a trace: it would be frozen.
    """
    runs = []
    for seed in (0, 1):
        copied = tree_copy(model, clone_buffers=True)
        with random_state_kept(copied), torch.no_grad():
            _seed(seed)
            runs.append(flatten_outputs(inputs.call(copied)))
    for name, first in runs[0].items():
        if not _same(runs[1].get(name), first):
            raise CannotTrace(
                f"{type(model).__name__} draws random numbers in eval mode: with another seed its "
                f"output {name} is another. A trace would freeze one draw. Take the randomness out "
                "of the eval forward, or give the random values as an input."
            )


def _seed(seed: int) -> None:
    import random

    import numpy as np

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _same(second: Tensor | None, first: Tensor) -> bool:
    if second is None or second.shape != first.shape:
        return False
    if torch.equal(first, second) or not first.numel():
        return True
    reference = first.double() if first.is_floating_point() else first
    return judge(second, reference).passed is not False


def require_inference(program: ExportedProgram, *, allow_batch_stats: bool) -> tuple[str, ...]:
    """Refuse operations that draw, or that normalise with the batch; notes on what was allowed.

    Raises CannotTrace naming module and line.
    """
    constant = constant_nodes(program)
    drawing = [node for node in operations(program) if _draws(node) and node not in constant]
    if drawing:
        raise CannotTrace(_drawing(drawing))
    batch = [node for node in operations(program) if _takes_batch(node) and node not in constant]
    updating = [node for node in batch if _argument(node, "running_mean") is not None]
    if updating:
        raise CannotTrace(
            f"batch norm in train mode: {_named(updating)}. ONNX would have its running statistics "
            "where the model computes with the batch. Call it with training=False."
        )
    if batch and not allow_batch_stats:
        raise CannotTrace(
            f"batch norm without running statistics: {_named(batch)}. It computes with the batch "
            "also in eval mode, so one sample changes another's output. Calibrate statistics for "
            "it, swap it, or pass allow_batch_stats=True (--allow-batch-stats)."
        )
    if not batch:
        return ()
    return (f"computes with the statistics of the batch, as asked for: {_named(batch)}",)


def constant_nodes(program: ExportedProgram) -> set[fx.Node]:
    """Nodes that no user input and no random number reaches."""
    users = set(program.graph_signature.user_inputs)
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        given = node.op == "placeholder" and node.name in users
        if not given and not _draws(node) and all(n in constant for n in node.all_input_nodes):
            constant.add(node)
    return constant


def operations(program: ExportedProgram) -> Iterator[fx.Node]:
    """Every operation, those under `torch.no_grad` or `torch.autocast` included."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from (node for node in module.graph.nodes if node.op == "call_function")


def _draws(node: fx.Node) -> bool:
    """Whether an operation draws random numbers as it is called here: dropout in eval does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = _arguments(node)
    if any(given.get(name) is False for name in _TRAINING):
        return False
    chances = [given[name] for name in _PROBABILITIES if isinstance(given.get(name), (int, float))]
    return not (chances and all(chance == 0 for chance in chances) and _drops(node))


def _drops(node: fx.Node) -> bool:
    return any(word in str(node.target) for word in ("dropout", "attention", "lstm", "gru", "rnn"))


def _takes_batch(node: fx.Node) -> bool:
    given = _arguments(node)
    return "batch_norm" in str(node.target) and given.get("training") is True


def _argument(node: fx.Node, name: str) -> Any:
    return _arguments(node).get(name)


def _arguments(node: fx.Node) -> Mapping[str, Any]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    names = [argument.name for argument in schema.arguments]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _drawing(nodes: list[fx.Node]) -> str:
    first = str(nodes[0].target).partition(".")[2].partition(".")[0]
    told = f"{first} draws random numbers in eval mode: {_named(nodes)}"
    if "dropout" in first:
        return (
            f"{told}. That is dropout that still drops: use nn.Dropout, or pass "
            "training=self.training."
        )
    return f"{told}. Draw them outside and give them as an input, or take them out in eval mode."


def _named(nodes: list[fx.Node]) -> str:
    places = list(dict.fromkeys(where(node) for node in nodes))
    more = f" and {len(places) - _SAID} more" if len(places) > _SAID else ""
    return f"{', '.join(places[:_SAID])}{more}"
