"""Measuring what a plan promised."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normsurgery.errors import CannotTrace
from normsurgery.inputs import Inputs
from normsurgery.plans import Plan
from normsurgery.spec import Fidelity
from normsurgery.verifying.compare import Pair, Results, Truth, compare_case, one_line, run_both
from normsurgery.verifying.evidence import Comparison, Drift, Evidence, LeftOut, Mode
from normsurgery.verifying.hard_inputs import Case, hard_inputs
from normsurgery.verifying.parts import compare_parts
from normsurgery.verifying.runners import Run, run_native

# Few, since every swap pays for them; `verify` runs all.
MEASURED_ON = ("example", "random", "mean 1000", "tiny variance", "random ids", "batch 2")
DRIFT_ON = ("example", "random", "random ids")


def measure(
    original: nn.Module,
    changed: nn.Module,
    plan: Plan,
    inputs: Inputs,
    *,
    names: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Evidence:
    """Measure what `plan` promises of `changed`, which was made from `original` by it.

    The model as a whole is held to the least promise of the plan; a module whose steps promise more
    is held to that, on the inputs it gets inside the original.

    - IDENTICAL: outputs, statistics, and gradients of inputs and shared parameters, in both modes
    - FORWARD: outputs and statistics, in both modes
    - EVAL: outputs in eval mode
    - RETRAIN: nothing can be held; how far the outputs move is measured, as `drifts`

    What is bit for bit the same needs no reference; all else is judged against float64.

    Args:
        names: original -> new name of parameters and buffers, where they differ.

    Raises CannotTrace if the original does not run on `inputs`.
    """
    pair = Pair(original, changed, names or {})
    cases = [c for c in hard_inputs(inputs, model=original, seed=seed) if c.label in MEASURED_ON]
    _check_runs(original, cases[0], seed)
    results: Results = []
    drifts: list[Drift] = []
    if plan.fidelity is Fidelity.RETRAIN:
        vocabulary = _embedding_sizes(original)
        for case in (case for case in cases if case.label in DRIFT_ON):
            ran = run_both(pair, Truth(original, case, "eval", seed, "plain"), "cpu")
            if isinstance(ran, tuple):
                drifts += _drifts(case.label, *ran, vocabulary)
            else:
                results.append(ran)
    else:
        results += _held_to(plan.fidelity, pair, cases, seed)
    for path, promise in sorted(_stronger_promises(plan).items()):
        results += _part_held_to(promise, pair, path, cases[0], seed)
    return Evidence(
        seed=seed,
        comparisons=tuple(r for r in results if isinstance(r, Comparison)),
        left_out=tuple(r for r in results if isinstance(r, LeftOut)),
        drifts=tuple(drifts),
        promise=plan.fidelity.name,
        inputs=describe(inputs),
    )


def describe(inputs: Inputs) -> str:
    """The `--input` texts that repeat the inputs, or else types and shapes."""
    if inputs.spelling:
        return " ".join(f"--input {text}" for text in inputs.spelling)
    leaves = [
        leaf for leaf in tree_leaves((inputs.args, inputs.kwargs)) if isinstance(leaf, Tensor)
    ]
    return ", ".join(
        f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" for leaf in leaves
    )


def modes_of(promise: Fidelity) -> tuple[Mode, ...]:
    """The modes in which outputs must be the same."""
    return ("eval", "train") if promise >= Fidelity.FORWARD else ("eval",)


def _held_to(promise: Fidelity, pair: Pair, cases: Iterable[Case], seed: int) -> Results:
    return [
        result
        for mode in modes_of(promise)
        for case in cases
        for result in compare_case(
            pair,
            case,
            runners=("cpu",),
            mode=mode,
            seed=seed,
            gradients=promise is Fidelity.IDENTICAL,
            always_truth=False,
        )
    ]


def _part_held_to(promise: Fidelity, pair: Pair, path: str, case: Case, seed: int) -> Results:
    return [
        result
        for mode in modes_of(promise)
        for result in compare_parts(
            pair,
            [path],
            case,
            mode=mode,
            seed=seed,
            gradients=promise is Fidelity.IDENTICAL,
            always_truth=False,
        )
    ]


def _stronger_promises(plan: Plan) -> dict[str, Fidelity]:
    """Path of each module that promises more than the plan -> the least promise at or below it."""
    paths = {step.site.path for step in plan.steps}
    promised = {
        path: min(s.fidelity for s in plan.steps if _is_within(s.site.path, path)) for path in paths
    }
    return {path: least for path, least in promised.items() if least > plan.fidelity}


def _is_within(path: str, parent: str) -> bool:
    return path == parent or not parent or path.startswith(f"{parent}.")


def _check_runs(original: nn.Module, example: Case, seed: int) -> None:
    try:
        run_native(original, example.inputs, "eval", seed=seed)
    except Exception as error:  # a model may fail in any way
        raise CannotTrace(
            f"{type(original).__name__} does not run on the inputs {describe(example.inputs)}: "
            f"{one_line(error).rstrip('.')}. Give inputs that it takes."
        ) from error


def _embedding_sizes(model: nn.Module) -> set[int]:
    return {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}


def _drifts(case: str, old: Run, new: Run, vocabulary: set[int]) -> Iterator[Drift]:
    for name, before in old.outputs.items():
        after = new.outputs.get(name)
        if after is None or after.shape != before.shape:
            yield Drift(case, name, math.inf)
        elif before.is_floating_point() and before.numel():
            logits = _is_logits(name, before, len(old.outputs), vocabulary)
            top1 = _top1(before, after) if logits else None
            yield Drift(case, name, relative_change(before, after), top1)


def relative_change(before: Tensor, after: Tensor) -> float:
    """`|after - before| / |before|` in float64; infinite where `after` is not finite.

    1.0 where `before` is zero and `after` is not.
    """
    if not bool(after.isfinite().all()):
        return math.inf
    change = float((after.double() - before.double()).norm())
    if change == 0.0:
        return 0.0
    return change / float((before if bool(before.any()) else after).double().norm())


def _is_logits(name: str, output: Tensor, outputs: int, vocabulary: set[int]) -> bool:
    """Scores over classes along the last dimension: one row per sample, or one per token."""
    if output.dim() < 2 or output.shape[-1] < 2:
        return False
    if name == "logits":
        return output.dim() <= 3
    if output.dim() == 3:
        return output.shape[-1] in vocabulary
    return outputs == 1 and output.dim() == 2


def _top1(before: Tensor, after: Tensor) -> float:
    same = before.argmax(-1) == after.argmax(-1)
    return float(torch.mean(same.double()))
