"""What is not exported, and why: a model that trains, draws or remembers, or has no values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from normsurgery.errors import CannotRead, CannotTrace
from normsurgery.exporting.places import where
from normsurgery.inputs import Inputs
from normsurgery.inputs.outputs import flatten_outputs
from normsurgery.randomstate import random_state_kept
from normsurgery.treecopy import tree_copy
from normsurgery.verifying.judge import judge, same_bits
from normsurgery.verifying.runners import fresh

_SAID = 4  # as many places are named in one sentence
_PROBABILITIES = ("p", "dropout_p", "dropout", "probability")
_CONTROL_FLOW = ("cond", "while_loop")
_UNPROVEN = "A run on the inputs shows one of the ways only, so the file could not be proven."
_WHERE = "Write it with torch.where, which computes both."
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
    """Run the model from two random states; raise CannotTrace where that shows.

    A number that Python or numpy draws leaves no operation in a trace: it would be frozen.
    """
    first, other = (_outputs(tree_copy(model, clone=True), inputs, seed) for seed in (0, 1))
    name = _first_difference(first, other)
    if name:
        raise CannotTrace(
            f"{type(model).__name__} draws random numbers in eval mode: with another seed its "
            f"output {name} is another. A trace would freeze one draw. Take the randomness out "
            "of the eval forward, or give the random values as an input."
        )


def require_stateless(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Notes on tensors of its own that a call changes though no output tells.

    Raises CannotTrace where a second call on the same inputs gives another output, since an ONNX
    graph keeps nothing from call to call. What a call fills in once, or writes back as it was, is
    no state.
    """
    called = tree_copy(model, clone=True)
    before = {name: tensor.detach().clone() for name, tensor in _own_tensors(called)}
    first = _outputs(called, inputs, seed=0)
    after = dict(_own_tensors(called))
    written = [name for name, old in before.items() if not _unwritten(after.get(name), old)]
    differs = _first_difference(first, _outputs(called, inputs, seed=0))
    if differs:
        state = f"writes {_listed(written)}" if written else "keeps what is no tensor"
        raise CannotTrace(
            f"{type(model).__name__} {state} in its eval forward, so that a second call on the "
            f"same inputs gives another result ({differs}); an ONNX graph keeps nothing from call "
            "to call. Pass that state as an input and return the new one, or leave it alone in "
            "eval mode."
        )
    if not written:
        return ()
    return (f"the eval forward also writes {_listed(written)}; the file does not",)


def _outputs(model: nn.Module, inputs: Inputs, seed: int) -> dict[str, Tensor]:
    """Of a model that may draw, and may work in place on its inputs. Raises CannotTrace for one
    that calls torch.cond."""
    with random_state_kept(model), torch.no_grad(), _no_cond(type(model).__name__):
        _seed(seed)
        outputs = flatten_outputs(fresh(inputs).call(model))
        return {name: tensor.clone() for name, tensor in outputs.items()}  # one may be a buffer


@contextmanager
def _no_cond(name: str) -> Iterator[None]:
    """Inside, torch.cond is refused: it runs a compiler, which no recording of operations takes
    (and torch would compile none of its branches again in this process)."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise CannotTrace(f"{name} branches with torch.cond. {_UNPROVEN} {_WHERE}")

    with patch.object(torch, "cond", refuse):
        yield


def _first_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> str:
    return next((name for name in first if not _same(second.get(name), first[name])), "")


def _own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and tensors that are plain attributes, by name."""
    for path, module in model.named_modules():
        held = {**module._parameters, **module._buffers, **vars(module)}
        for name, value in held.items():
            if isinstance(value, Tensor):
                yield f"{path}.{name}" if path else name, value


def _unwritten(new: Tensor | None, old: Tensor) -> bool:
    if new is None or new.shape != old.shape or new.dtype != old.dtype:
        return False
    try:
        return same_bits(new, old)
    except (NotImplementedError, RuntimeError):  # 8-bit floats, sparse: storage that nobody writes
        return True


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SAID} more" if len(names) > _SAID else ""
    return f"{', '.join(names[:_SAID])}{more}"


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
    """Refuse operations that draw, that branch, or that normalise with the batch; notes on what was
    allowed.

    Raises CannotTrace naming module and line.
    """
    branching = [node for node in operations(program) if _branches(node)]
    if branching:
        raise CannotTrace(
            f"control flow on values ({branching[0].target}): {_named(branching)}. {_UNPROVEN} "
            f"{_WHERE}"
        )
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


def _branches(node: fx.Node) -> bool:
    operator = isinstance(node.target, torch._ops.HigherOrderOperator)
    return operator and str(node.target) in _CONTROL_FLOW


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
    return _listed(list(dict.fromkeys(where(node) for node in nodes)))
