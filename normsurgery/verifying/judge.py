"""What "equal" means: the one place with tolerances.

A result in low precision is right if it is no farther from the float64 truth than native torch in
the same precision is. Fixed tolerances cannot say that: they pass real faults where a model is well
conditioned and fail correct models where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normsurgery.verifying.differences import (
    first_set_difference,
    index_at,
    metrics,
    nonfinite_sets,
    ulp,
)

NATIVE_FACTOR = 4  # times the error of native torch
FREE_ULPS = 8  # plus so many ulp of max|reference|
POOR_ULPS = 100  # a native run farther off than this says nothing about anybody else
FLOAT64_RELATIVE = 1e-10  # a float64 result has no more exact truth: two formulas agree to this


@dataclass(frozen=True)
class Verdict:
    """One tensor, judged.

    passed: True, False, or None: UNDECIDED, the native run itself is too far from the truth.
    max_error: largest |candidate - reference| where both are finite; `ulps` is the same in units in
        the last place (of the type the model computes in) of `scale`, which is max|reference|.
    allowed: the largest `max_error` that passes. It is also what `factor` counts in: the smallest
        multiple of `allowed` that would pass (at most 1 where `passed`).
    worst: index of the largest error, or of the first value that is finite, NaN, +Inf or -Inf on
        one side only; `worst_candidate` and `worst_reference` are the two values there.
    nonfinite: how many positions differ, by set: "nan", "+inf", "-inf".
    same_bits: the candidate is bitwise what native torch computed.
    median_error, p99_error: quantiles of |candidate - reference| where both are finite.
    row_ulps: the largest error in ulp of the largest |reference| of its own row (last dimension).
    snr_db: 10 log10 of sum(reference^2) / sum(error^2), in dB. cosine: of the two as vectors.
    """

    passed: bool | None
    reason: str
    compared: int = 0
    max_error: float = math.nan
    ulps: float = math.nan
    scale: float = math.nan
    allowed: float = math.nan
    factor: float = math.inf
    native_error: float | None = None
    worst: tuple[int, ...] | None = None
    worst_candidate: float = math.nan
    worst_reference: float = math.nan
    nonfinite: Mapping[str, int] | None = None
    same_bits: bool = False
    median_error: float = math.nan
    p99_error: float = math.nan
    row_ulps: float = math.nan
    snr_db: float = math.nan
    cosine: float = math.nan

    @property
    def word(self) -> str:
        return {True: "passed", False: "failed", None: "undecided"}[self.passed]

    @property
    def holds(self) -> bool:
        """Passed, or undecided about the truth but bit for bit what the original computes."""
        return self.passed is True or (self.passed is None and self.same_bits)

    def __str__(self) -> str:
        if math.isnan(self.max_error):
            return f"{self.word}: {self.reason}"
        text = (
            f"{self.word}: error {self.max_error:.3g} ({self.ulps:.3g} ulp), allowed "
            f"{self.allowed:.3g}, smallest factor that passes {self.factor:.3g}"
        )
        if self.worst is not None:
            values = f"{self.worst_candidate:.9g}, reference {self.worst_reference:.9g}"
            text += f"; worst at {list(self.worst)}: {values}"
        return f"{text}; {self.reason}" if self.reason else text


def judge(
    candidate: Tensor,
    reference: Tensor,
    native: Tensor | None = None,
    rounded: Tensor | None = None,
    precision: torch.dtype | None = None,
    shaken: Tensor | None = None,
) -> Verdict:
    """Is `candidate` as close to the float64 `reference` as `native` torch is?

    Args:
        candidate: any shape, any dtype; the result under test.
        reference: same shape, float64 (complex128; any integer dtype where candidate is one).
        native: same shape and dtype as candidate: what torch computes by the original formula in
            that dtype. None: nothing but rounding is allowed.
        rounded: the reference again, its inputs and weights moved by one rounding of float32. What
            that alone moves, no float32 algorithm can be blamed for, and native torch may be spared
            it by luck: the mean of a constant row may come out exact in one order of summation.
        precision: the type the model computes in, if that is coarser than what the result was cast
            to: a bf16 language model may well return float32 logits. An ulp is counted in it.
        shaken: the reference again, every step of it moved by rounding (`shaking`): what a correct
            computation in that type may be off. Where native torch is far off only because of that
            (its error is within what shaken allows), the input is ill-conditioned and native is
            not poor: it is decided, with shaken in place of rounded. Where there is a native run,
            it counts only if one of the two is off by more than 100 ulp.

    A constant that fills a mask (-1e9, or the least number there is) is exact, and the rest is not
    measured by it.

    Passes iff the sets of NaN, +Inf and -Inf are the same and
    `max|candidate - reference| <= 4 max|native - reference| + 8 ulp(max|reference|)`, with rounded
    (or shaken) in place of native where it is farther off. UNDECIDED where the error of native (or
    of rounded, while the candidate is finite where the reference is) is not finite or above 100 ulp
    and shaken does not explain it, or where what shaken allows is as large as the reference itself.
    A float64 candidate passes at 1e-10 of max|reference|. Integers and booleans must equal the
    reference's or the native value at each position; where they do not, and native, rounded or
    shaken differs from the reference at a fourth as many positions, it is UNDECIDED. A different
    shape or dtype fails; shapes are never broadcast.
    """
    fault = _structural_fault(candidate, reference, native)
    if fault:
        return Verdict(False, fault)
    if candidate.numel() == 0:
        return Verdict(None, "empty: nothing was compared")
    candidate, reference = _plain(candidate), _plain(reference)
    native = None if native is None else _plain(native)
    rounded = None if rounded is None else _plain(rounded)
    shaken = None if shaken is None else _plain(shaken)
    if not candidate.is_floating_point():
        return _judge_exact(candidate, reference, native, (rounded, shaken))
    dtype = coarsest([candidate.dtype, *([] if precision is None else [precision])])
    return _judge_floating(candidate, reference, native, rounded, dtype, shaken)


def unchanged(candidate: Tensor, native: Tensor) -> Verdict | None:
    """The verdict where the candidate is bit for bit what the original computes, else None.

    It needs no float64 truth: the errors it tells are against the original.
    """
    if candidate.numel() == 0 or not same_bits(candidate, native):
        return None
    return Verdict(
        passed=True,
        reason="bit for bit what the original computes",
        compared=candidate.numel(),
        max_error=0.0,
        ulps=0.0,
        allowed=0.0,
        factor=0.0,
        same_bits=True,
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit that counts: NaN equals NaN, -0.0 is not 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = _plain(a), _plain(b)
    if not a.is_floating_point():
        return torch.equal(a, b)
    same = (a == b) & (torch.signbit(a) == torch.signbit(b))
    return bool((same | (a.isnan() & b.isnan())).all())


def coarsest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The floating type with the fewest digits. Raises ValueError if there is none."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _structural_fault(candidate: Tensor, reference: Tensor, native: Tensor | None) -> str:
    if candidate.shape != reference.shape:
        return f"shape {tuple(candidate.shape)} instead of {tuple(reference.shape)}"
    if native is not None and native.shape != candidate.shape:
        return f"shape {tuple(candidate.shape)} instead of {tuple(native.shape)}"
    if native is not None and native.dtype != candidate.dtype:
        return f"dtype {candidate.dtype} instead of {native.dtype}"
    kinds = [_kind(tensor) for tensor in (candidate, reference)]
    if kinds[0] != kinds[1]:
        return f"dtype {candidate.dtype} where the reference has {reference.dtype}"
    if kinds[1] != "integer" and reference.dtype not in (torch.float64, torch.complex128):
        return f"the reference is {reference.dtype}, not float64"
    return ""


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else "integer"


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _judge_exact(
    candidate: Tensor,
    reference: Tensor,
    native: Tensor | None,
    moved: Sequence[Tensor | None],
) -> Verdict:
    """Integers and booleans: equal, or what rounding decides (the largest of two that are close).

    moved: the reference with rounding, once or at every step.
    """
    wrong = candidate != reference
    if native is not None:
        wrong &= candidate != native
    open_to = [side != reference for side in (native, *moved) if side is not None]
    unsteady = max((int(differs.sum()) for differs in open_to), default=0)
    bits = native is not None and torch.equal(candidate, native)
    difference = (candidate.double() - reference.double()).abs() * wrong
    error = float(difference.max())
    count = int(wrong.sum())
    passed = True if count == 0 else None if count <= NATIVE_FACTOR * unsteady else False
    worst = None if passed else index_at(int(wrong.flatten().int().argmax()), wrong.shape)
    return Verdict(
        passed=passed,
        reason=_why_integers_differ(count, wrong.numel(), unsteady if passed is None else 0),
        compared=candidate.numel(),
        max_error=error,
        ulps=error,
        scale=float(reference.double().abs().max()),
        allowed=0.0,
        factor=0.0 if passed else math.inf,
        worst=worst,
        worst_candidate=math.nan if worst is None else float(candidate[worst]),
        worst_reference=math.nan if worst is None else float(reference[worst]),
        same_bits=bits,
    )


def _why_integers_differ(count: int, total: int, unsteady: int) -> str:
    if count == 0:
        return ""
    differ = f"{count} of {total} integers differ"
    return f"ill-conditioned: {differ}, rounding alone changes {unsteady}" if unsteady else differ


def _judge_floating(
    candidate: Tensor,
    reference: Tensor,
    native: Tensor | None,
    rounded: Tensor | None,
    dtype: torch.dtype,
    shaken: Tensor | None,
) -> Verdict:
    bits = native is not None and same_bits(candidate, native)
    finite = reference.isfinite()
    computed = _without_fills(candidate, reference, native, dtype)
    scale = _largest(reference, computed)
    unit = ulp(scale, dtype)
    native_error = None if native is None else _error(native, reference, computed)
    spared = 0.0 if rounded is None else _error(rounded, reference, computed)
    spread = math.inf if shaken is None else _error(shaken, reference, computed)
    # Below that it would excuse a one-pass variance where a centred one is well conditioned.
    telling = native_error is None or _is_poor(native_error, unit) or _is_poor(spread, unit)
    explained = telling and _explains(spread, native_error or 0.0, unit)
    if explained:
        spared = max(spared, spread)
    allowed = _allowed(dtype, scale, unit, native_error or 0.0, spared)
    sets = nonfinite_sets(candidate, reference)
    differing = first_set_difference(candidate, reference) if any(sets.values()) else None
    difference = torch.where(
        finite & candidate.isfinite(), (candidate.double() - reference).abs(), 0.0
    )
    error = float(difference.max())
    worst = differing
    if worst is None:
        worst = index_at(int(difference.flatten().argmax()), difference.shape)
    facts: dict[str, Any] = {
        "compared": candidate.numel(),
        "max_error": error,
        "ulps": error / unit,
        "scale": scale,
        "allowed": allowed,
        "factor": math.inf if differing is not None else error / allowed,
        "native_error": native_error,
        "worst": worst,
        "worst_candidate": float(candidate[worst]),
        "worst_reference": float(reference[worst]),
        "nonfinite": sets,
        "same_bits": bits,
        **metrics(candidate, reference, difference, dtype),
    }
    if dtype is not torch.float64 and not explained and _is_poor(native_error or 0.0, unit):
        reason = f"native torch itself is {(native_error or 0.0) / unit:.3g} ulp off"
        return Verdict(None, f"reference poor, device risk: {reason}", **facts)
    if differing is not None:
        counts = ", ".join(f"{count} {name}" for name, count in sets.items() if count)
        return Verdict(False, f"not finite on one side only: {counts}", **facts)
    if explained and allowed >= scale > 0 and error <= allowed:
        return Verdict(None, "ill-conditioned: rounding alone moves the truth by its size", **facts)
    if dtype is not torch.float64 and not explained and _is_poor(spared, unit):
        reason = f"one rounding of the input moves the truth by {spared / unit:.3g} ulp"
        return Verdict(None, f"ill-conditioned: {reason}", **facts)
    return Verdict(error <= allowed, "", **facts)


def _allowed(
    dtype: torch.dtype, scale: float, unit: float, native_error: float, spared: float
) -> float:
    rounding = FREE_ULPS * unit
    if dtype is torch.float64:
        # A float64 model may have float32 casts written into it: then native torch has them too.
        return max(FLOAT64_RELATIVE * scale, NATIVE_FACTOR * native_error + rounding)
    return NATIVE_FACTOR * max(native_error, spared) + rounding


def _explains(spread: float, native_error: float, unit: float) -> bool:
    """Whether rounding alone is enough for the error of native torch."""
    return math.isfinite(spread) and native_error <= NATIVE_FACTOR * spread + FREE_ULPS * unit


def _is_poor(error: float, unit: float) -> bool:
    return not error <= POOR_ULPS * unit


def _error(values: Tensor, reference: Tensor, computed: Tensor) -> float:
    """Largest error of what is computed; infinite where the sets of NaN, +Inf and -Inf differ."""
    if any(nonfinite_sets(values, reference).values()):
        return math.inf
    return _largest(values.double() - reference, computed)


def _largest(values: Tensor, where: Tensor) -> float:
    return float(torch.where(where, values.abs(), 0.0).max())


def _without_fills(
    candidate: Tensor, reference: Tensor, native: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Where the reference is finite and computed: without the constants that fill a mask.

    A fill is the largest value, stands at several places, is exact on every side, and is so much
    larger than all others that its ulps would excuse an error of these that is called poor.
    """
    kept = reference.isfinite()
    while True:
        largest = _largest(reference, kept)
        filled = kept & (reference.abs() == largest)
        rest = kept & ~filled
        if largest == 0 or int(filled.sum()) < 2 or not bool(rest.any()):
            return kept
        if FREE_ULPS * ulp(largest, dtype) <= POOR_ULPS * ulp(_largest(reference, rest), dtype):
            return kept
        sides = (candidate,) if native is None else (candidate, native)
        if any(bool((filled & (side != reference)).any()) for side in sides):
            return kept
        kept = rest
