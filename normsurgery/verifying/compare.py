"""Two models on one input, run the same way, every result judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from normsurgery.verifying.evidence import Comparison, LeftOut, Mode
from normsurgery.verifying.hard_inputs import Case
from normsurgery.verifying.judge import Verdict, coarsest, judge, same_bits, unchanged
from normsurgery.verifying.runners import (
    FLOAT32_ROUNDING,
    Recording,
    Run,
    run_float64,
    run_native,
)

Results = list[Comparison | LeftOut]


@dataclass(frozen=True)
class Pair:
    """The original, what it became, and what its parameters and buffers are called there.

    names: original name -> new name; a name that is not in it is unchanged.
    where: path of the two within the models they come from; "" if they are the whole models.
    """

    original: nn.Module
    changed: nn.Module
    names: Mapping[str, str] = field(default_factory=dict)
    where: str = ""

    def submodules(self, path: str) -> Pair:
        """The pair at `path` in both. Raises AttributeError if one has nothing there."""
        prefix = f"{path}." if path else ""
        names = {
            old.removeprefix(prefix): new.removeprefix(prefix)
            for old, new in self.names.items()
            if old.startswith(prefix) and new.startswith(prefix)
        }
        return Pair(
            self.original.get_submodule(path), self.changed.get_submodule(path), names, path
        )


@dataclass
class Truth:
    """The float64 run of the original, made when it is first asked for."""

    model: nn.Module
    case: Case
    mode: Mode
    seed: int
    recording: Recording

    @cached_property
    def run(self) -> Run | str:
        """The run, or why there is none."""
        return self._made(rounded=False)

    @cached_property
    def rounded(self) -> Run | str:
        """The run with inputs and weights moved by one rounding, or why there is none."""
        return self._made(rounded=True)

    @cached_property
    def shaken(self) -> Run | str:
        """The same, and what every operation gives moved too, or why there is none."""
        return self._made(rounded=True, shaking=True)

    def _made(self, rounded: bool, shaking: bool = False) -> Run | str:
        try:
            return run_float64(
                self.model,
                self.case.inputs,
                self.mode,
                seed=self.seed,
                recording=self.recording,
                rounding=FLOAT32_ROUNDING if rounded else 0.0,
                shaking=shaking,
            )
        except Exception as error:  # any operation may lack float64
            return f"no float64 reference: {one_line(error)}"


def compare_case(
    pair: Pair,
    case: Case,
    *,
    runners: Sequence[str],
    mode: Mode,
    seed: int,
    gradients: bool = False,
    always_truth: bool = True,
) -> Results:
    """Run both models plainly and with gradients recorded, on each runner; judge what they give.

    gradients: also judge the gradients. always_truth: use the float64 reference even where both
    models give the same bits.
    """
    truth = Truth(pair.original, case, mode, seed, "backward" if gradients else "plain")
    recordings: tuple[Recording, ...] = ("plain", "backward" if gradients else "grad")
    results: Results = []
    for runner in runners:
        for recording in recordings:
            found = _compare_run(pair, truth, runner, recording, always_truth)
            results += found
            if any(isinstance(item, LeftOut) for item in found):
                break
    return results


def _compare_run(
    pair: Pair, truth: Truth, runner: str, recording: Recording, always_truth: bool
) -> Results:
    case, mode = truth.case, truth.mode
    ran = run_both(pair, truth, runner, recording)
    if isinstance(ran, (LeftOut, Comparison)):
        return [ran]
    return [
        Comparison(case.label, runner, mode, recording, quantity, verdict, pair.where)
        for quantity, verdict in _judged(pair, *ran, truth, always_truth)
    ]


def run_both(
    pair: Pair, truth: Truth, runner: str, recording: Recording = "plain"
) -> tuple[Run, Run] | LeftOut | Comparison:
    """The runs of the original and of the changed model.

    LeftOut where the original raises, or is not finite where its truth is; a failed Comparison
    where only the changed model raises.
    """
    case, mode = truth.case, truth.mode

    def ran(model: nn.Module) -> Run:
        return run_native(
            model, case.inputs, mode, seed=truth.seed, device=runner, recording=recording
        )

    def left_out(reason: str) -> LeftOut:
        return LeftOut("not applicable", case.label, runner, mode, reason, pair.where)

    try:
        native = ran(pair.original)
    except Exception as error:  # a model may refuse an input in any way
        return left_out(f"the original raises {one_line(error)}")
    if not native.is_finite() and not _is_meant(native, truth.run):
        return left_out("the original itself is not finite")
    try:
        return native, ran(pair.changed)
    except Exception as error:  # the same, but here it is a fault
        verdict = Verdict(False, f"raises {one_line(error)}, the original does not")
        return Comparison(case.label, runner, mode, recording, "run", verdict, pair.where)


def _is_meant(native: Run, truth: Run | str) -> bool:
    """Whether what is not finite is so in float64 too, and some of it is: a mask of -inf."""
    if isinstance(truth, str) or native.outputs.keys() != truth.outputs.keys():
        return False
    pairs = [(t, truth.outputs[name]) for name, t in native.outputs.items()]
    floating = [(a, b) for a, b in pairs if a.is_floating_point() and a.shape == b.shape]
    known = all(same_bits(_signs(a), _signs(b)) for a, b in floating)
    return known and any(bool(a.isfinite().any()) for a, _ in floating)


def _signs(values: Tensor) -> Tensor:
    """NaN and the infinities; zero for all that is finite."""
    return torch.where(values.isfinite(), 0.0, values.float())


Judge = Callable[[Tensor, Tensor, str, str], Verdict]  # new, old, field of Run, original name


def _judged(
    pair: Pair, native: Run, changed: Run, truth: Truth, always_truth: bool
) -> Iterator[tuple[str, Verdict]]:
    precision = _precision(pair.original)

    def verdict(new: Tensor, old: Tensor, what: str, name: str) -> Verdict:
        same = None if always_truth else unchanged(new, old)
        if same is not None:
            return same
        reference = truth.run
        if isinstance(reference, str):
            return Verdict(None, reference, compared=new.numel(), same_bits=same_bits(new, old))
        exact: Tensor = getattr(reference, what)[name]
        result = judge(new, exact, old, precision=precision)
        if result.passed is False and not isinstance(truth.rounded, str):
            result = judge(new, exact, old, getattr(truth.rounded, what)[name], precision)
        told = result.passed is True or result.holds or result.compared == 0
        if told or what == "gradients" or isinstance(truth.shaken, str):
            return result
        return judge(new, exact, old, None, precision, getattr(truth.shaken, what)[name])

    yield from _judged_outputs(native, changed, verdict)
    if truth.mode == "train":
        yield from _judged_statistics(pair, native, changed, verdict)
    if native.gradients:
        yield from _judged_gradients(pair, native, changed, verdict)


def _precision(model: nn.Module) -> torch.dtype | None:
    """The coarsest type that a model holds weights in; 8-bit types are storage, not arithmetic."""
    dtypes = {
        tensor.dtype
        for tensor in model.parameters()
        if tensor.is_floating_point() and tensor.element_size() > 1
    }
    return coarsest(list(dtypes)) if dtypes else None


def _judged_outputs(native: Run, changed: Run, verdict: Judge) -> Iterator[tuple[str, Verdict]]:
    """By name where the names agree, else by position."""
    old_names, new_names = list(native.outputs), list(changed.outputs)
    if len(old_names) != len(new_names):
        reason = f"{len(new_names)} outputs ({_listed(new_names)}), the original has "
        yield "outputs", Verdict(False, f"{reason}{len(old_names)} ({_listed(old_names)})")
        return
    if set(old_names) == set(new_names):
        new_names = old_names
    for old, new in zip(old_names, new_names, strict=True):
        yield f"output {old}", verdict(changed.outputs[new], native.outputs[old], "outputs", old)


def _judged_statistics(
    pair: Pair, native: Run, changed: Run, verdict: Judge
) -> Iterator[tuple[str, Verdict]]:
    """Buffers that both have and that the run changed in either."""
    before = dict(pair.original.named_buffers(remove_duplicate=False))
    before_new = dict(pair.changed.named_buffers(remove_duplicate=False))
    for old, value in native.statistics.items():
        new = pair.names.get(old, old)
        if new not in changed.statistics:
            continue
        found = _reshaped(changed.statistics[new], value)
        idle = torch.equal(value, before[old].detach().cpu())
        idle &= torch.equal(changed.statistics[new], before_new[new].detach().cpu())
        if not idle:
            yield f"statistic {old}", verdict(found, value, "statistics", old)


def _judged_gradients(
    pair: Pair, native: Run, changed: Run, verdict: Judge
) -> Iterator[tuple[str, Verdict]]:
    """Gradients of the inputs, and of the parameters that both have."""
    for old, value in native.gradients.items():
        new = pair.names.get(old, old)
        if new in changed.gradients:
            found = _reshaped(changed.gradients[new], value)
            yield f"gradient of {old}", verdict(found, value, "gradients", old)
        elif old.startswith("input "):
            yield f"gradient of {old}", Verdict(False, "the changed model has none")


def _reshaped(new: Tensor, old: Tensor) -> Tensor:
    """A parameter may be carried in another shape: (C,) for (C, 1, 1)."""
    return new.reshape(old.shape) if new.numel() == old.numel() else new


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def one_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
