"""Two torch models, held to be the same: outputs, statistics, gradients, in both modes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from normsurgery.errors import CannotTrace
from normsurgery.inputs import Inputs
from normsurgery.verifying.compare import Pair, Results, compare_case, one_line
from normsurgery.verifying.evidence import Comparison, Evidence, LeftOut, Mode
from normsurgery.verifying.hard_inputs import Case
from normsurgery.verifying.memory import (
    available_bytes,
    float64_activation_bytes,
    float64_weight_bytes,
    parts_that_fit,
)
from normsurgery.verifying.parts import compare_parts
from normsurgery.verifying.promise import describe, relative_change
from normsurgery.verifying.runners import run_native


def verify_modules(
    pair: Pair,
    cases: Sequence[Case],
    *,
    modes: Sequence[Mode],
    runners: tuple[str, ...],
    gradients: bool,
    seed: int,
    memory: int | None,
) -> Evidence:
    """Judge `pair` on all cases (the example first), or module by module where it is too large.

    Raises CannotTrace where the original does not run on the example.
    """
    example = cases[0]
    needed = float64_bytes(pair.original, example.inputs)
    room = available_bytes() if memory is None else memory
    notes: list[str] = []
    results: Results = []
    for mode in modes:
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
        inputs=describe(example.inputs),
        notes=tuple(notes),
    )


def float64_bytes(model: nn.Module, inputs: Inputs) -> int:
    """What a float64 run takes at most. Raises CannotTrace where the model does not run."""
    try:
        return float64_weight_bytes(model) + float64_activation_bytes(model, inputs)
    except Exception as error:  # a model may fail in any way
        raise CannotTrace(
            f"{type(model).__name__} does not run on the inputs {describe(inputs)}: "
            f"{one_line(error)}. Give inputs that it takes."
        ) from error


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
