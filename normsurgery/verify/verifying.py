"""verify(): two models, held to be the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normsurgery.errors import CannotRead, CannotTrace, UnknownName, UsageError
from normsurgery.inputs import Inputs, as_inputs, infer
from normsurgery.treecopy import tensors_of
from normsurgery.verify.compare import Pair, Results, compare_case, one_line
from normsurgery.verify.evidence import Comparison, Evidence, LeftOut, Mode
from normsurgery.verify.hard_inputs import Case, hard_inputs
from normsurgery.verify.memory import (
    available_bytes,
    float64_activation_bytes,
    float64_weight_bytes,
    parts_that_fit,
)
from normsurgery.verify.parts import compare_parts
from normsurgery.verify.promise import describe, relative_change
from normsurgery.verify.runners import missing_runner, run_native

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    Model = nn.Module | ExportedProgram | str | Path

MODES: tuple[Mode, ...] = ("eval", "train")


def verify(
    a: Model,
    b: Model,
    inputs: Any = None,
    *,
    on: Sequence[str] = ("cpu",),
    require_runner: Sequence[str] = (),
    modes: Sequence[str] = ("eval",),
    gradients: bool = False,
    hard: bool = True,
    seed: int = 0,
    memory: int | None = None,
) -> Evidence:
    """Does `b` compute what `a` computes, as well as `a` itself can in its precision?

    The truth is `a`, run in float64 with exactly its rounded weights. On the example and on hard
    inputs, every output (running statistic in train mode, gradient if asked for) of `b` may be four
    times as far from it as that of `a`, plus 8 ulp of the largest value: `judge`. Neither model nor
    the global random state is changed.

    Args:
        a, b: modules, fx.GraphModules, ExportedPrograms, or paths of files that hold one.
        inputs: a tuple of positional arguments, a dict of keyword arguments, or `Inputs`; inferred
            from `a` where left out.
        on: runners, of "cpu" and "cuda". One that this machine lacks is reported as not run.
        require_runner: runners without which this is no pass.
        modes: "eval", "train", or both. Both models draw the same random numbers.
        gradients: judge gradients of inputs and of parameters that both have by the same name.
        hard: False leaves it at the example.
        memory: bytes a float64 run may take; what is free on this machine where left out. A model
            that needs more is verified module by module, and the evidence says so.

    Raises UsageError where both sides are one file or share weights, or a mode is unknown;
    UnknownName for a runner; CannotRead where a side cannot be loaded or has no weights (meta);
    CannotTrace where `a` does not run on the inputs.
    """
    wanted_modes = _checked_modes(modes)
    wanted_runners = tuple(dict.fromkeys((*on, *require_runner)))
    missing = {runner: missing_runner(runner) for runner in wanted_runners}
    _refuse_same_file(a, b)
    a, b = _loaded(a, b), _loaded(b, a)
    original, changed = _module(a), _module(b)
    _refuse_shared_storage(original, changed)
    given = infer(a) if inputs is None else as_inputs(inputs)
    example = Case("example", given)
    needed = float64_weight_bytes(original) + _activation_bytes(original, given)
    room = available_bytes() if memory is None else memory
    runners = tuple(runner for runner in wanted_runners if not missing[runner])
    pair = Pair(original, changed)
    notes: list[str] = []
    results: Results = [
        LeftOut("not run", "", runner, "", reason) for runner, reason in missing.items() if reason
    ]
    vary = not (_has_fixed_batch(a) or _has_fixed_batch(b))
    cases: tuple[Case, ...] = (example,)
    if hard:
        cases = hard_inputs(given, model=original, vary_batch=vary, seed=seed)
    for mode in wanted_modes:
        if needed > room:
            results += _by_module(pair, example, mode, runners, seed, gradients, room, notes)
            continue
        for case in cases:
            results += compare_case(
                pair, case, runners=runners, mode=mode, seed=seed, gradients=gradients
            )
    return Evidence(
        seed=seed,
        comparisons=tuple(r for r in results if isinstance(r, Comparison)),
        left_out=tuple(r for r in results if isinstance(r, LeftOut)),
        inputs=describe(given),
        required=tuple(require_runner),
        notes=tuple(notes),
    )


def _by_module(
    pair: Pair,
    example: Case,
    mode: Mode,
    runners: tuple[str, ...],
    seed: int,
    gradients: bool,
    room: int,
    notes: list[str],
) -> Results:
    fitting, too_large = parts_that_fit(pair.original, room)
    missing = [path for path in fitting if not _has_module(pair.changed, path)]
    paths = [path for path in fitting if path not in missing]
    notes.append(
        f"{mode}: a float64 run of the whole model does not fit into {room / 2**30:.3g} GiB; "
        f"{len(paths)} modules were verified one by one, on the example only. What the model "
        f"computes between them was not compared{_whole_drift(pair, example, mode, seed)}"
    )
    if too_large:
        notes.append(f"too large for float64 on their own: {', '.join(too_large)}")
    results: Results = [
        LeftOut("not run", example.label, "", mode, "the other model has no such module", path)
        for path in missing
    ]
    return results + compare_parts(
        pair, paths, example, mode=mode, seed=seed, runners=runners, gradients=gradients
    )


def _whole_drift(pair: Pair, example: Case, mode: Mode, seed: int) -> str:
    """How far the outputs of the whole models are apart in their own precision: not judged."""
    old = run_native(pair.original, example.inputs, mode, seed=seed).outputs
    new = run_native(pair.changed, example.inputs, mode, seed=seed).outputs
    apart = [
        f"{name} by {relative_change(old[name], new[name]):.3g}"
        for name in old
        if name in new and new[name].shape == old[name].shape
    ]
    return f"; relative to the whole outputs they differ: {', '.join(apart)}" if apart else ""


def _has_module(model: nn.Module, path: str) -> bool:
    return path in dict(model.named_modules(remove_duplicate=False))


def _activation_bytes(model: nn.Module, inputs: Inputs) -> int:
    try:
        return float64_activation_bytes(model, inputs)
    except Exception as error:  # a model may fail in any way
        raise CannotTrace(
            f"{type(model).__name__} does not run on the inputs {describe(inputs)}: "
            f"{one_line(error)}. Give inputs that it takes."
        ) from error


def _checked_modes(modes: Iterable[str]) -> tuple[Mode, ...]:
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    for mode in modes:
        if mode not in MODES:
            raise UnknownName("mode", mode, MODES)
    return tuple(mode for mode in MODES if mode in modes)


def _loaded(model: Model, other: Model | None = None) -> nn.Module | ExportedProgram:
    """The model of a path. Weights alone are those of the factory that the other side names."""
    if not isinstance(model, (str, Path)):
        return model
    from normsurgery.artefacts import load

    if str(model).endswith(".safetensors") and isinstance(other, str) and ":" in other:
        return load(other, weights=model).model
    return load(model).model


def _has_fixed_batch(model: nn.Module | ExportedProgram) -> bool:
    """An exported program accepts another batch only if its inputs were exported with a dynamic
    first dimension."""
    if not isinstance(model, torch.export.ExportedProgram):
        return False
    wanted = set(model.graph_signature.user_inputs)
    values = (node.meta.get("val") for node in model.graph.nodes if node.name in wanted)
    return any(
        isinstance(value, Tensor) and value.dim() > 0 and isinstance(value.shape[0], int)
        for value in values
    )


def _module(model: nn.Module | ExportedProgram) -> nn.Module:
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"verify compares modules, exported programs and files, not {type(model).__name__}."
        )
    if any(tensor.is_meta for tensor in tensors_of(model)):
        raise CannotRead(
            f"{type(model).__name__} has tensors on the meta device, which have no values. "
            "Load its weights first."
        )
    return model


def _refuse_same_file(a: Model, b: Model) -> None:
    if not isinstance(a, (str, Path)) or not isinstance(b, (str, Path)):
        return
    first, second = Path(a), Path(b)
    if str(a) == str(b) or (first.exists() and second.exists() and first.samefile(second)):
        raise UsageError(
            f"both sides are {a}: comparing a file with itself proves nothing. Give two files."
        )


def _refuse_shared_storage(a: nn.Module, b: nn.Module) -> None:
    if a is b:
        raise UsageError(
            "both sides are the same object, so nothing would be proven. Compare with the "
            "original, loaded once more."
        )
    storages = {t.untyped_storage().data_ptr() for t in tensors_of(a)} - {0}
    for name, tensor in [*b.named_parameters(), *b.named_buffers()]:
        if tensor.untyped_storage().data_ptr() in storages:
            raise UsageError(
                f"both sides share the storage of {name}: what changes one changes the other, so "
                "nothing would be proven. Compare with the original, loaded once more."
            )
