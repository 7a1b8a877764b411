"""Does the folded checkpoint compute what the original does? Layer by layer, in little memory.

Both are run forward in float64 with parameters that are read block by block. Each layer gets random
activations of the true shape in the place of what the layers before gave, so that errors do not
add up and no layer is spared, beside the masks and positions that the model itself made. The
original's values come from its files; the folded ones are the exact results of the Edits, and each
is compared with what was written: that must be the exact value, cast once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.errors import PromiseBroken
from normsurgery.fold.checkpoint.evaluating import Box, Evaluation
from normsurgery.fold.checkpoint.fetching import Original, Stored
from normsurgery.fold.checkpoint.layout import Entry
from normsurgery.fold.checkpoint.lazy import Lazy, Source
from normsurgery.fold.checkpoint.streaming import Output
from normsurgery.fold.edits import Centre
from normsurgery.inputs import Inputs, flatten_outputs
from normsurgery.precision import lifted
from normsurgery.spec import Fidelity
from normsurgery.verify.evidence import Comparison, Evidence
from normsurgery.verify.judge import Verdict, judge
from normsurgery.verify.runners import same_randomness, use_plain_experts

CASE = "random activations, layer by layer"


def prove(
    original: nn.Module,
    changed: nn.Module,
    evaluation: Evaluation,
    outputs: Iterable[Output],
    written: Mapping[str, Entry],
    inputs: Inputs,
    *,
    changes: Collection[str] = (),
    seed: int = 0,
    described: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evidence:
    """Run the original and the folded checkpoint, and judge every layer and every output.

    original, changed: the two models on the meta device; they get parameters that are read from
        files. outputs, written: what was to be written, and the tensors of the result by key. What
        no layer read (rows of an embedding, experts that got no token) is compared afterwards.
    changes: the modules that give other numbers by design: a layer among them is judged by what
        reads it.
    progress: layers done, of how many.

    Raises whatever the model raises on `inputs`.
    """
    _require_untied(changed, evaluation)
    centred = any(isinstance(edit, Centre) for edit in evaluation.edits)
    stored = Stored(evaluation, written)
    total = 2 * len(layers(original))
    done = iter(range(1, total + 1))

    def step() -> None:
        progress(next(done, total), total)

    truth = _run(original, evaluation, Original(evaluation), inputs, seed, centred, step)
    found = _run(changed, evaluation, stored, inputs, seed, centred, step)
    stored.compare_rest(outputs)
    comparisons = [
        Comparison(CASE, "cpu", "eval", "plain", quantity, verdict, where)
        for where, quantity, verdict in _judged(truth, found)
        if where not in changes
    ]
    comparisons += [
        Comparison(CASE, "cpu", "eval", "plain", f"values of {name}", verdict)
        for name, verdict in stored.wrong.items()
    ]
    return Evidence(
        seed,
        tuple(comparisons),
        promise=Fidelity.EVAL.name,
        inputs=described,
        notes=(
            f"{len(truth)} quantities in float64, one layer at a time on random activations; "
            "all values were read back, and are the exact ones, cast once",
        ),
    )


def _require_untied(changed: nn.Module, evaluation: Evaluation) -> None:
    """Raises PromiseBroken where the result's own configuration ties what became two tensors."""
    state = changed.state_dict(keep_vars=True)
    for name, tied in evaluation.copied.items():
        if state[name] is state[tied]:
            raise PromiseBroken(
                f"{name}: the config.json that was written still ties it to {tied}. Fold without "
                "--untie, and please report this."
            )


def _judged(
    original: Mapping[tuple[str, str], Tensor], changed: Mapping[tuple[str, str], Tensor]
) -> Iterator[tuple[str, str, Verdict]]:
    for place, truth in original.items():
        found = changed.get(place)
        if found is None:
            yield *place, Verdict(False, "the folded model does not give it")
        else:
            yield *place, judge(found, truth)


def _run(
    model: nn.Module,
    evaluation: Evaluation,
    fetch: Original | Stored,
    inputs: Inputs,
    seed: int,
    centred: bool,
    progress: Callable[[], None],
) -> dict[tuple[str, str], Tensor]:
    """One forward in float64: what each layer gave (where, quantity), and the model's outputs."""
    _fill(model, evaluation, fetch)
    use_plain_experts(model)
    found: dict[tuple[str, str], Tensor] = {}
    for place, path in enumerate(layers(model)):
        _hook(model.get_submodule(path), path, seed + place, centred, found, progress)
    with same_randomness(seed), torch.no_grad(), lifted():
        exact = inputs.to(dtype=torch.float64)
        outputs = flatten_outputs(exact.call(model.eval()))
    found |= {("", f"output {name}"): tensor for name, tensor in outputs.items()}
    return found


def layers(model: nn.Module) -> list[str]:
    """Paths of the outermost repeated blocks: the elements of each list of modules of one class."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{p}.") for p in found):
            continue
        classes = {type(child) for child in module}
        if len(classes) == 1 and type(module[0]).forward is not nn.Module.forward:
            found += [f"{path}.{name}" for name, _ in module.named_children()]
    return found


def _hook(
    layer: nn.Module,
    path: str,
    seed: int,
    centred: bool,
    found: dict[tuple[str, str], Tensor],
    progress: Callable[[], None],
) -> None:
    calls = 0
    generator = torch.Generator().manual_seed(seed)

    def before(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return _with_random(args, kwargs, generator, centred)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal calls
        progress()
        calls += 1
        again = f" (call {calls})" if calls > 1 else ""
        for name, tensor in flatten_outputs(output).items():
            value = _centred(tensor) if centred and tensor.is_floating_point() else tensor
            found[path, f"output {name}{again}"] = value.detach().clone()

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after)


def _with_random(
    args: Any, kwargs: Any, generator: torch.Generator, centred: bool
) -> tuple[Any, Any]:
    """The call with its first floating tensor, which is the activations, random."""
    args, kwargs = list(args), dict(kwargs)
    holder: Any
    key: Any
    for holder, key in [*((args, k) for k in range(len(args))), *((kwargs, k) for k in kwargs)]:
        value = holder[key]
        if isinstance(value, Tensor) and value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            holder[key] = _centred(drawn) if centred else drawn
            break
    return tuple(args), kwargs


def _centred(tensor: Tensor) -> Tensor:
    return tensor - tensor.mean(-1, keepdim=True)


def _fill(model: Any, evaluation: Evaluation, fetch: Original | Stored) -> None:
    """Give a model on the meta device its parameters, read when needed, and its buffers."""
    _compute_buffers(model)
    copied = evaluation.copied if isinstance(fetch, Stored) else {}
    lazy: dict[str, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        own = name if name in copied else evaluation.names.aliases[name]
        if own not in lazy:
            source = Source(
                tuple(parameter.shape),
                torch.float64,
                lambda box, own=own: fetch(own, box),  # type: ignore[misc]
                fetch.kept(own),
            )
            lazy[own] = nn.Parameter(Lazy.of(source), requires_grad=False)
        _set(model, name, lazy[own])
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if name in evaluation.names.aliases:
            shape = tuple(buffer.shape)
            value = fetch(evaluation.names.aliases[name], Box((0,) * len(shape), shape))
            _set(model, name, value)


def _compute_buffers(model: Any) -> None:
    """Buffers that no checkpoint holds are computed by the model's own initialisation, which
    leaves alone what is marked as initialised."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        _set(model, name, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    held = module._parameters if attribute in module._parameters else module._buffers
    held[attribute] = value  # type: ignore[assignment]
