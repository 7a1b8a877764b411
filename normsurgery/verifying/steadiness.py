"""Is the original a function of its input, sample by sample? Asked before anything is compared.

A model that draws random numbers, or whose output for one sample depends on the others of its
batch, may agree with a wrong export on every input that is tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normsurgery.inputs import Inputs
from normsurgery.numerics.precision import float64_copy, lifted
from normsurgery.verifying.axes import Axis, cut, resized
from normsurgery.verifying.compare import one_line
from normsurgery.verifying.evidence import Comparison, LeftOut
from normsurgery.verifying.hard_inputs import Case
from normsurgery.verifying.judge import Verdict, judge
from normsurgery.verifying.runners import fresh, same_randomness, set_mode, use_plain_experts
from normsurgery.verifying.sources import Candidate, Source, Tensors, TorchSource

PARTS = 2  # samples in each of the two parts of a batch: batch statistics refuse a single one
Results = list[Comparison | LeftOut]
Call = tuple[str, list[Tensor], list[Tensor]]  # path and class, tensors in, tensors out


def draws_random_numbers(source: Source, case: Case, seed: int) -> Results:
    """A failed Comparison where another seed gives another result; else nothing."""
    try:
        first, second = source.truth(case.inputs, seed), source.truth(case.inputs, seed + 1)
    except Exception:  # that there is no truth is said where outputs are compared
        return []
    differs = _first_difference(first, second)
    if differs is None:
        return []
    name, verdict = differs
    reason = f"the original draws random numbers: another seed gives another {name}"
    culprit = _random_module(source, case.inputs, seed)
    return [_failed(case, "randomness", f"{reason}{culprit}", verdict)]


def depends_on_its_batch(
    source: Source, case: Case, axis: Axis, seed: int, *, allowed: bool = False
) -> tuple[Results, tuple[str, ...]]:
    """Runs a batch of four whole and in halves, in float64; a failed Comparison where that differs.

    allowed: only say so, in the notes that are returned beside.
    """
    whole = resized(case.inputs, axis, 2 * PARTS)
    if whole is None:
        return [], (
            "whether a sample depends on its batch was not asked: the inputs are too large",
        )
    parts = [cut(whole, axis, start, start + PARTS) for start in (0, PARTS)]
    try:
        together = source.truth(whole, seed)
        apart = [source.truth(part, seed) for part in parts]
    except Exception as error:  # a model may refuse a batch size in any way
        return [], (f"whether a sample depends on its batch is not known: {one_line(error)}",)
    differs = _first_difference(together, _joined(apart, together))
    if differs is None:
        return [], ()
    name, verdict = differs
    reason = (
        f"{name} depends on its batch: the same samples give other values beside other samples"
        f"{_batch_module(source, whole, parts[0], seed)}"
    )
    if allowed:
        return [], (reason,)
    return [_failed(case, "batch dependence", reason, verdict)], ()


def runs_differ(candidate: Candidate, case: Case, runner: str, seed: int) -> Results:
    """A failed Comparison where the candidate gives another result when it is run again."""
    try:
        first = candidate.run(case.inputs, seed, runner)
        second = candidate.run(case.inputs, seed + 1, runner)
    except Exception:  # that it does not run is said where outputs are compared
        return []
    exact = {name: t.double() if t.is_floating_point() else t for name, t in first.items()}
    differs = _first_difference(exact, second)
    if differs is None:
        return []
    name, verdict = differs
    reason = (
        f"{name} is another each time it is run: the graph draws random numbers (a Dropout that "
        "was exported in train mode does)"
    )
    return [_failed(case, "two runs", reason, verdict, runner)]


def _failed(
    case: Case, quantity: str, reason: str, verdict: Verdict, runner: str = "float64"
) -> Comparison:
    told = Verdict(
        passed=False,
        reason=reason,
        compared=verdict.compared,
        max_error=verdict.max_error,
        ulps=verdict.ulps,
        scale=verdict.scale,
        allowed=verdict.allowed,
        factor=verdict.factor,
        worst=verdict.worst,
        worst_candidate=verdict.worst_candidate,
        worst_reference=verdict.worst_reference,
    )
    return Comparison(case.label, runner, "eval", "plain", quantity, told)


def _first_difference(one: Tensors, two: Tensors) -> tuple[str, Verdict] | None:
    """The first output that the two runs do not agree on."""
    for name, value in one.items():
        if name in two and value.numel():
            verdict = judge(two[name], value)
            if verdict.passed is False:
                return f"output {name}", verdict
    return None


def _joined(parts: Sequence[Tensors], together: Tensors) -> Tensors:
    """The outputs of the parts put together, where their first axis is the batch."""
    joined = {}
    for name, value in together.items():
        pieces = [part[name] for part in parts if name in part]
        sizes = [piece.shape[0] if piece.dim() else -1 for piece in pieces]
        if sizes == [PARTS, PARTS] and torch.cat(pieces).shape == value.shape:
            joined[name] = torch.cat(pieces)
    return joined


def _random_module(source: Source, inputs: Inputs, seed: int) -> str:
    if not isinstance(source, TorchSource):
        return ""
    first = _calls(source.module, inputs, seed)
    return _named(_culprit(first, _calls(source.module, inputs, seed + 1)))


def _batch_module(source: Source, whole: Inputs, part: Inputs, seed: int) -> str:
    if not isinstance(source, TorchSource):
        return ""
    together = [
        (path, _first_half(given), _first_half(made))
        for path, given, made in _calls(source.module, whole, seed)
    ]
    return _named(_culprit(together, _calls(source.module, part, seed)))


def _first_half(tensors: list[Tensor]) -> list[Tensor]:
    return [t[:PARTS] if t.dim() and t.shape[0] == 2 * PARTS else t for t in tensors]


def _named(module: str) -> str:
    return f" (first in {module})" if module else ""


def _culprit(first: Sequence[Call], second: Sequence[Call]) -> str:
    """The innermost module that, given the same, makes something else; calls end inside first."""
    for (path, given, made), (other, also_given, also_made) in zip(first, second, strict=False):
        if path != other:
            return ""
        if _agree(given, also_given) and not _agree(made, also_made):
            return path
    return ""


def _agree(one: list[Tensor], two: list[Tensor]) -> bool:
    if len(one) != len(two):
        return False
    pairs = zip(one, two, strict=True)
    return all(a.shape == b.shape and judge(b, a).passed is not False for a, b in pairs)


def _calls(module: nn.Module, inputs: Inputs, seed: int) -> list[Call]:
    """What every module of a float64 run was given and made, in the order in which they end."""
    clone = float64_copy(module).cpu()
    use_plain_experts(clone)
    set_mode(clone, "eval")
    made: list[Call] = []

    def hook(place: str) -> Any:
        def note(
            _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object
        ) -> None:
            made.append((place, list(_tensors((args, kwargs))), list(_tensors(output))))

        return note

    for path, child in clone.named_modules():
        place = f"{path or 'the model itself'}, a {type(child).__name__}"
        child.register_forward_hook(hook(place), with_kwargs=True)
    with same_randomness(seed), torch.no_grad(), lifted():
        fresh(inputs.to(dtype=torch.float64)).call(clone)
    return made


def _tensors(value: object) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf.detach().clone()
