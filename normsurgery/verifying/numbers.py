"""Numbers that a model returns beside tensors, judged; what is neither is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from torch import Tensor, nn

from normsurgery.inputs.outputs import flatten_numbers, neither
from normsurgery.verifying.compare import Pair, one_line
from normsurgery.verifying.evidence import Comparison, Evidence, Mode
from normsurgery.verifying.hard_inputs import Case
from normsurgery.verifying.judge import Verdict, judge, unchanged
from normsurgery.verifying.memory import available_bytes
from normsurgery.verifying.modules import float64_bytes
from normsurgery.verifying.runners import FLOAT32_ROUNDING, run_float64, run_native


def with_numbers(
    evidence: Evidence,
    pair: Pair,
    cases: Sequence[Case],
    modes: Sequence[Mode],
    runners: Sequence[str],
    memory: int | None,
) -> Evidence:
    """With what the outputs hold besides tensors: numbers judged, the rest named in a note."""
    comparisons: list[Comparison] = []
    others: dict[str, None] = {}

    def numbers(output: Any) -> dict[str, Tensor]:
        others.update(dict.fromkeys(neither(output)))
        return flatten_numbers(output)

    def ran(model: nn.Module, case: Case, mode: Mode, runner: str) -> Mapping[str, Tensor]:
        seed = evidence.seed
        run = run_native(model, case.inputs, mode, seed=seed, device=runner, flatten=numbers)
        return run.outputs

    for runner, mode in product(runners, modes):
        for case in cases:
            try:
                old, new = (ran(m, case, mode, runner) for m in (pair.original, pair.changed))
            except Exception:  # that a model does not run is said where its tensors are compared
                continue
            if not old and not new:
                break  # a model without numbers is not run again
            for name, verdict in _judged_numbers(old, new, pair, case, mode, evidence.seed, memory):
                comparisons.append(Comparison(case.label, runner, mode, "plain", name, verdict))
    told = f"not compared, being neither tensors nor numbers: {'; '.join(others)}"
    return replace(
        evidence,
        comparisons=(*evidence.comparisons, *comparisons),
        notes=(*evidence.notes, told) if others else evidence.notes,
    )


def _judged_numbers(
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    pair: Pair,
    case: Case,
    mode: Mode,
    seed: int,
    memory: int | None,
) -> Iterator[tuple[str, Verdict]]:
    if old.keys() != new.keys():
        places = [", ".join(side) or "nowhere" for side in (new, old)]
        yield (
            "outputs",
            Verdict(False, "numbers at {}, the original has them at {}".format(*places)),
        )
        return

    def truth(rounding: float = 0.0) -> Mapping[str, Tensor]:
        return run_float64(
            pair.original, case.inputs, mode, seed=seed, rounding=rounding, flatten=flatten_numbers
        ).outputs

    for name, value in old.items():
        # 3 and 3.0 are one number
        found = value if bool(new[name] == value) else new[name]
        verdict = unchanged(found, value)
        if verdict is None:
            verdict = _judged_number(found, value, name, pair.original, case, truth, memory)
        yield f"output {name}", verdict


def _judged_number(
    new: Tensor,
    old: Tensor,
    name: str,
    original: nn.Module,
    case: Case,
    truth: Callable[..., Mapping[str, Tensor]],
    memory: int | None,
) -> Verdict:
    room = available_bytes() if memory is None else memory
    try:
        if float64_bytes(original, case.inputs) > room:
            return Verdict(None, "no float64 reference: it does not fit", compared=1)
        verdict = judge(new, truth()[name], old)
        if verdict.passed is False:
            verdict = judge(new, truth()[name], old, truth(FLOAT32_ROUNDING)[name])
    except Exception as error:  # any operation may lack float64
        return Verdict(None, f"no float64 reference: {one_line(error)}", compared=1)
    return verdict
