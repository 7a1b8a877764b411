"""What was measured: one Comparison per output, run and runner, and everything left out."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from normsurgery.htmltable import html_table
from normsurgery.verifying.judge import Verdict
from normsurgery.verifying.stages import Blame, Coverage, InnerValue, Stage

Mode = Literal["eval", "train"]


@dataclass(frozen=True)
class Comparison:
    """One quantity of one run: an output, a running statistic, a gradient.

    case: label of the input (see `hard_inputs`); with Evidence.seed it can be made again.
    run: "plain" (under no_grad, no mode and no hook active), "grad" or "backward".
    quantity: `output logits`, `statistic bn.running_mean`, `gradient of fc.weight`; "run" where the
        candidate raised, "outputs" where it returned another number of them.
    where: path of the module that was run on its own; "" is the whole model.
    """

    case: str
    runner: str
    mode: Mode
    run: str
    quantity: str
    verdict: Verdict
    where: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return (
            f"{place}{self.quantity} ({self.case}, {self.mode}, {self.runner}, {self.run}): "
            f"{self.verdict}"
        )


@dataclass(frozen=True)
class LeftOut:
    """Something that was not compared, which is never a pass.

    kind: "not applicable" (the original itself raises or is not finite there) or "not run" (the
        machine has no such runner).
    """

    kind: Literal["not applicable", "not run"]
    case: str
    runner: str
    mode: str
    reason: str
    where: str = ""


@dataclass(frozen=True)
class Drift:
    """How far one output moved where it was promised to move.

    relative: `|changed - original| / |original|` (Euclidean, over the whole output).
    top1: share of samples (positions) whose largest logit is the same; None if it is no classifier.
    """

    case: str
    output: str
    relative: float
    top1: float | None = None

    def __str__(self) -> str:
        agree = "" if self.top1 is None else f", top-1 agrees on {self.top1:.1%}"
        return f"{self.output} ({self.case}): relative change {self.relative:.3g}{agree}"


@dataclass(frozen=True)
class Evidence:
    """All comparisons of two models. `passed` is False where nothing was compared.

    promise: name of the Fidelity that was measured, or "" for a plain `verify`.
    inputs: the `--input` text or a description that repeats the example; `seed` repeats the rest.
    required: runners that must have run.
    stages, inner, coverage, blamed: of an ONNX file; a stage or an inner value that failed is a
        failure as an output is.
    """

    seed: int
    comparisons: tuple[Comparison, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    drifts: tuple[Drift, ...] = ()
    promise: str = ""
    inputs: str = ""
    required: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    inner: tuple[InnerValue, ...] = ()
    coverage: Coverage | None = None
    blamed: Blame | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        """Why this is no pass, one sentence each; empty if it passed."""
        return tuple(self._failures())

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def worst(self) -> Comparison | None:
        """The failed comparison, else the decided one, that would need the largest tolerance."""
        measured = [c for c in self.comparisons if not math.isnan(c.verdict.factor)]
        if not measured:
            return None
        severity = {False: 2, True: 1, None: 0}
        return max(measured, key=lambda c: (severity[c.verdict.passed], c.verdict.factor))

    def count(self, word: str) -> int:
        """Number of comparisons that are "passed", "failed" or "undecided"."""
        return sum(c.verdict.word == word for c in self.comparisons)

    def _failures(self) -> Iterator[str]:
        for comparison in self.comparisons:
            if comparison.verdict.passed is False:
                yield str(comparison)
        yield from (f"stage {s}" for s in self.stages if s.verdict.passed is False)
        yield from (f"value {v}" for v in self.inner if v.verdict.passed is False)
        for runner in self.required:
            if not any(c.runner == runner for c in self.comparisons):
                yield f"runner {runner} was required and did not run"
        yield from self._undecided()
        for drift in self.drifts:
            if not math.isfinite(drift.relative):
                yield f"{drift.output} ({drift.case}) is not finite, and the original's is"
        yield from self._nothing_compared()

    def _nothing_compared(self) -> Iterator[str]:
        if self.drifts:
            return
        seen: set[tuple[str, str]] = {(c.runner, c.mode) for c in self.comparisons}
        for item in self.left_out:
            place = (item.runner, item.mode)
            if item.kind == "not applicable" and not item.where and place not in seen:
                seen.add(place)
                yield f"nothing was compared on {item.runner} in {item.mode} mode: {item.reason}"
        if not any(c.verdict.compared or c.verdict.passed is False for c in self.comparisons):
            yield "nothing was compared"

    @property
    def undecided(self) -> tuple[str, ...]:
        """Quantities that no input decided."""
        return tuple(place for place, known in self._decided().items() if not known)

    def _undecided(self) -> Iterator[str]:
        """An output that no input decided is not known to be right, nor are the gradients if none
        of them is decided. A single one may stay open: where the truth is zero because the loss
        does not depend on it (a bias before a batch norm), native torch gives rounding noise."""
        gradients = self._decided("gradient")
        if gradients and not any(gradients.values()):
            yield "no gradient was decided on any input"
        for place in self.undecided:
            if place not in gradients:
                yield f"{place} was undecided on every input{self._why_undecided(place)}"

    def _why_undecided(self, place: str) -> str:
        reasons = (c.verdict.reason for c in self.comparisons if _place(c) == place)
        reason = next((reason for reason in reasons if reason), "")
        return f": {reason}" if reason else ""

    def _decided(self, prefix: str = "") -> dict[str, bool]:
        decided: dict[str, bool] = {}
        for c in self.comparisons:
            if c.quantity.startswith(prefix):
                place = _place(c)
                empty = c.verdict.compared == 0  # its shape was compared, and that is all there is
                known = c.verdict.passed is not None or c.verdict.holds or empty
                decided[place] = decided.get(place, False) or known
        return decided

    def to_json(self) -> dict[str, Any]:
        """JSON values only: NaN and infinities are written as strings."""
        data = _plain({field.name: getattr(self, field.name) for field in fields(self)})
        assert isinstance(data, dict)
        return {"passed": self.passed, "failures": list(self.failures), **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evidence:
        return cls(
            seed=data["seed"],
            comparisons=tuple(Comparison(**_judged(item)) for item in data["comparisons"]),
            left_out=tuple(LeftOut(**item) for item in data["left_out"]),
            drifts=tuple(
                Drift(**{**item, "relative": float(item["relative"])}) for item in data["drifts"]
            ),
            promise=data["promise"],
            inputs=data["inputs"],
            required=tuple(data["required"]),
            notes=tuple(data["notes"]),
            stages=tuple(Stage(**_judged(item)) for item in data.get("stages", ())),
            inner=tuple(InnerValue(**_judged(item)) for item in data.get("inner", ())),
            coverage=Coverage(**data["coverage"]) if data.get("coverage") else None,
            blamed=_blame(data["blamed"]) if data.get("blamed") else None,
        )

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{'passed' if self.passed else 'FAILED'}: {self._summary()}"
        if self.drifts:
            yield "outputs change; train or calibrate"
            yield from (f"  {drift}" for drift in self.drifts)
        if self.passed and self.worst is not None:
            yield f"  worst: {self.worst}"
        yield from (f"  {failure}" for failure in self.failures)
        yield from (f"  stage {stage}" for stage in self.stages)
        if self.coverage is not None:
            yield f"  {self.coverage}"
        if self.blamed is not None:
            yield f"  {self.blamed}"
        if self.passed and self.undecided:
            yield f"  undecided on every input: {', '.join(self.undecided)}"
        for left in self.left_out:
            place = " ".join(
                part for part in (left.where, left.case, left.mode, left.runner) if part
            )
            yield f"  {left.kind}: {place}: {left.reason}"
        yield from (f"  note: {note}" for note in self.notes)

    def _summary(self) -> str:
        runners = sorted({c.runner for c in self.comparisons})
        cases = {c.case for c in self.comparisons}
        text = f"{len(self.comparisons)} comparisons over {len(cases)} inputs"
        if not self.comparisons and self.drifts:
            text = (
                f"how far outputs move was measured on {len({d.case for d in self.drifts})} inputs"
            )
        if runners:
            text += f" on {', '.join(runners)}"
        counts = {word: self.count(word) for word in ("passed", "failed", "undecided")}
        text += "".join(f", {count} {word}" for word, count in counts.items() if count)
        if self.promise:
            text += f"; promised {self.promise.lower()}"
        return f"{text}; seed {self.seed}"

    def _repr_html_(self) -> str:
        head = "".join(f"<p>{html.escape(line)}</p>" for line in self._lines())
        titles = (
            "where",
            "quantity",
            "input",
            "mode",
            "runner",
            "verdict",
            "error",
            "ulp",
            "allowed",
        )
        return head + html_table(titles, map(_cells, self.comparisons))


def _place(comparison: Comparison) -> str:
    where = f"{comparison.where}: " if comparison.where else ""
    return f"{where}{comparison.quantity} ({comparison.mode}, {comparison.runner})"


def _cells(comparison: Comparison) -> tuple[str, ...]:
    verdict = comparison.verdict
    return (
        comparison.where,
        comparison.quantity,
        comparison.case,
        comparison.mode,
        f"{comparison.runner} ({comparison.run})",
        verdict.word,
        f"{verdict.max_error:.3g}",
        f"{verdict.ulps:.3g}",
        f"{verdict.allowed:.3g}",
    )


_FLOATS = (
    "max_error",
    "ulps",
    "scale",
    "allowed",
    "factor",
    "worst_candidate",
    "worst_reference",
    "median_error",
    "p99_error",
    "row_ulps",
    "snr_db",
    "cosine",
)


def _judged(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of something with a verdict, read from JSON."""
    verdict = dict(data["verdict"])
    for name in _FLOATS:
        verdict[name] = float(verdict.get(name, "nan"))
    if verdict["native_error"] is not None:
        verdict["native_error"] = float(verdict["native_error"])
    if verdict["worst"] is not None:
        verdict["worst"] = tuple(verdict["worst"])
    judged = {**data, "verdict": Verdict(**verdict)}
    if "total_ulps" in judged:
        judged["total_ulps"] = float(judged["total_ulps"])
    return judged


def _blame(data: Mapping[str, Any]) -> Blame:
    read = _judged(data)
    return Blame(**{**read, "inherited": float(read["inherited"])})


def _plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, floats that JSON has no word for to strings."""
    if isinstance(value, (Comparison, LeftOut, Drift, Stage, InnerValue, Coverage, Blame)):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
