"""A source on one input, and candidates held against it there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from normsurgery.verifying.compare import Results, one_line
from normsurgery.verifying.evidence import Comparison, LeftOut
from normsurgery.verifying.hard_inputs import Case
from normsurgery.verifying.judge import Verdict, judge, same_bits
from normsurgery.verifying.sources import Candidate, Source, Tensors


@dataclass
class Trial:
    """The runs of the source on one case: made when they are first asked for, and kept.

    precision: the coarsest type that the graph computes in. unaffordable: why no float64 run may be
    made, or "".
    """

    source: Source
    case: Case
    seed: int
    precision: torch.dtype | None = None
    unaffordable: str = ""
    _natives: dict[str, Tensors | Exception] = field(default_factory=dict, repr=False)

    @cached_property
    def truth(self) -> Tensors | Exception:
        """The outputs in float64, or why there are none."""
        if self.unaffordable:
            return MemoryError(self.unaffordable)
        try:
            return self.source.truth(self.case.inputs, self.seed)
        except Exception as error:  # a model may refuse an input in any way
            return error

    @cached_property
    def moved(self) -> Tensors | Exception:
        """The truth with inputs and weights moved by one rounding, or why there is none."""
        try:
            return self.source.moved(self.case.inputs, self.seed)
        except Exception as error:  # as for the truth
            return error

    @cached_property
    def shaken(self) -> Tensors | Exception:
        """The same, and what every operation gives moved too, or why there is none."""
        try:
            return self.source.shaken(self.case.inputs, self.seed)
        except Exception as error:  # as for the truth
            return error

    def native(self, runner: str) -> Tensors | Exception:
        """What the source computes in its own type, or why it does not."""
        if runner not in self._natives:
            try:
                self._natives[runner] = self.source.native(self.case.inputs, self.seed, runner)
            except Exception as error:  # a kernel may be missing, or the input refused
                self._natives[runner] = error
        return self._natives[runner]

    def refusal(self, runner: str) -> str:
        """Why nothing can be compared here: the source itself does not take the input."""
        native = self.native(runner)
        if isinstance(native, Exception) and isinstance(self.truth, Exception):
            return f"the original raises {one_line(native)}"
        return ""


def hold(trial: Trial, candidate: Candidate, runner: str, *, where: str = "") -> Results:
    """Every output of `candidate` on the trial's case, judged.

    LeftOut where the source itself does not take the input, whatever the candidate does with it.
    """
    case = trial.case
    refusal = trial.refusal(runner)
    if refusal:
        return [LeftOut("not applicable", case.label, runner, "eval", refusal, where)]
    try:
        found = candidate.run(case.inputs, trial.seed, runner)
    except Exception as error:  # whatever it is, the source does not raise it
        verdict = Verdict(False, f"raises {one_line(error)}, the original does not")
        return [Comparison(case.label, runner, "eval", "plain", "run", verdict, where)]
    return compared(trial, found, runner, where=where)


def compared(trial: Trial, found: Tensors, runner: str, *, where: str = "") -> Results:
    """The outputs that a candidate gave, judged: paired by name, else by position."""
    return [
        Comparison(trial.case.label, runner, "eval", "plain", quantity, verdict, where)
        for quantity, verdict in _judged(trial, found, runner)
    ]


def worst_of(comparisons: Iterable[Comparison | LeftOut]) -> Verdict:
    """The verdict that would need the largest tolerance; failed ones first."""
    return most_telling([c.verdict for c in comparisons if isinstance(c, Comparison)])


def most_telling(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several verdicts the failed one, else the decided one, nearest to failing."""
    if not verdicts:
        return Verdict(None, "nothing was compared")
    severity = {False: 2, True: 1, None: 0}
    return max(verdicts, key=lambda v: (severity[v.passed], v.factor == v.factor and v.factor))


def pairs(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> list[tuple[str, str]] | str:
    """Names of the source -> names of the candidate, or why they cannot be paired."""
    old, new = list(expected), list(found)
    if len(old) != len(new):
        return (
            f"{len(new)} outputs ({', '.join(new) or 'none'}), the original has "
            f"{len(old)} ({', '.join(old) or 'none'})"
        )
    return list(zip(old, old if set(old) == set(new) else new, strict=True))


def _judged(trial: Trial, found: Tensors, runner: str) -> Iterator[tuple[str, Verdict]]:
    native, truth = trial.native(runner), trial.truth
    expected = truth if isinstance(native, Exception) else native
    assert not isinstance(expected, Exception)  # or the trial were refused
    paired = pairs(expected, found)
    if isinstance(paired, str):
        yield "outputs", Verdict(False, paired)
        return
    for old, new in paired:
        own = None if isinstance(native, Exception) else native[old]
        yield f"output {old}", _verdict(trial, found[new], old, own)


def _verdict(trial: Trial, value: Tensor, name: str, native: Tensor | None) -> Verdict:
    truth = trial.truth
    if isinstance(truth, Exception):
        assert native is not None
        reason = f"no float64 reference: {one_line(truth)}"
        return Verdict(None, reason, compared=value.numel(), same_bits=same_bits(value, native))
    if value.dtype is torch.float64 and trial.precision is not torch.float64:
        native = None  # a float64 run of a graph is held to the truth alone
    verdict = judge(value, truth[name], native, precision=trial.precision)
    if verdict.passed is True or verdict.compared == 0:
        return verdict  # another shape or type: no rounding does that
    return _with_conditioning(trial, value, name, native, verdict)


def _with_conditioning(
    trial: Trial, value: Tensor, name: str, native: Tensor | None, verdict: Verdict
) -> Verdict:
    """Judged again, what rounding alone moves the truth by being known.

    One rounding of inputs and weights first; where that does not tell, every step is moved.
    """
    assert not isinstance(trial.truth, Exception)
    exact, precision = trial.truth[name], trial.precision
    if verdict.passed is False and not isinstance(trial.moved, Exception):
        verdict = judge(value, exact, native, trial.moved[name], precision)
    no_kernel = native is None and value.dtype is torch.float64  # that could have rounded anything
    if verdict.passed is True or no_kernel or isinstance(trial.shaken, Exception):
        return verdict
    return judge(value, exact, native, None, precision, trial.shaken[name])
