"""Two models, held to be the same, at least one of them an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch.export import ExportedProgram

from normsurgery.errors import CannotRun
from normsurgery.inputs import Inputs
from normsurgery.onnxfile.reading import weight_bytes
from normsurgery.verifying import steadiness
from normsurgery.verifying.axes import Axis
from normsurgery.verifying.compare import Results, one_line
from normsurgery.verifying.comparing import Comparing, Options, axes_of, cases_of, prepared
from normsurgery.verifying.conversion import conversion
from normsurgery.verifying.device import HALF, Emulation
from normsurgery.verifying.elsewhere import record
from normsurgery.verifying.evidence import Comparison, Evidence, LeftOut
from normsurgery.verifying.inside import Inside
from normsurgery.verifying.interior import inside_of, program_of
from normsurgery.verifying.judge import Verdict
from normsurgery.verifying.memory import available_bytes, float64_weight_bytes
from normsurgery.verifying.promise import describe
from normsurgery.verifying.sources import (
    OnnxCandidate,
    OnnxSource,
    TorchSource,
)
from normsurgery.verifying.stages import Stage
from normsurgery.verifying.staging import Form, Stages
from normsurgery.verifying.trials import Trial, hold

if TYPE_CHECKING:
    from normsurgery.verifying.sides import Loaded


def verify_graph(
    a: Loaded,
    b: Loaded,
    inputs: Inputs | None,
    options: Options,
    *,
    forms: Sequence[Form] = (),
    program: ExportedProgram | None = None,
) -> Evidence:
    """Judge `b` against `a`; one of them is an ONNX graph.

    forms: what stood between the two (an exported program, a raw graph), each a stage of its own.
    program: the traced source, whose inner values the graph's are compared with.

    Raises UsageError where the inputs do not fit the graph, CannotRun where no runner that is there
    can run it.
    """
    comparing = prepared(a, b, inputs, options)
    comparing.forms, comparing.program = tuple(forms), program
    if isinstance(a, ExportedProgram):
        comparing.traced = a  # whose axes may be fixed
    return _answered(comparing)


def _answered(this: Comparing) -> Evidence:
    seed = this.options.seed
    runners = tuple(_runnable(this, tuple(_present(this))))
    axes = axes_of(this)
    unaffordable = _unaffordable(this)
    if not unaffordable:
        this.results += _unsteady(this, axes, runners)
    stages = Stages(this.candidate, this.forms, runners, truth=not unaffordable)
    emulation = None if unaffordable else _emulation(this, runners)
    cases = cases_of(this, axes)
    for case in cases:
        trial = Trial(this.source, case, seed, this.precision, unaffordable)
        for runner in runners:
            this.results += hold(trial, this.candidate, runner)
            this.notes += _without_native(trial, runner)
        stages.add(trial)
        if emulation is not None:
            found, notes = emulation.judged(trial)
            this.results += found
            this.notes += notes
    inside = Inside((), None) if unaffordable else inside_of(this, runners, cases)
    if this.options.save is not None:
        run = record(
            this.source, this.candidate, cases, runners, seed=seed, precision=this.precision
        )
        run.save(this.options.save)
    return Evidence(
        seed=seed,
        comparisons=tuple(r for r in this.results if isinstance(r, Comparison)),
        left_out=tuple(r for r in this.results if isinstance(r, LeftOut)),
        inputs=describe(this.example.inputs),
        required=tuple(this.options.require_runner),
        notes=tuple(dict.fromkeys([*this.notes, *stages.notes])),
        stages=(*_conversion(this, unaffordable), *stages.finished()),
        inner=inside.values,
        coverage=inside.coverage,
    )


def _conversion(this: Comparing, unaffordable: str) -> Iterator[Stage]:
    """The rounding of the source's weights, where there was one and it can be judged."""
    if this.master is not None and isinstance(this.source, TorchSource) and not unaffordable:
        yield conversion(this.master, this.source, this.example.inputs, this.options.seed)


def _emulation(this: Comparing, runners: Sequence[str]) -> Emulation | None:
    """Of a graph in half precision; None for others."""
    if this.precision not in HALF or not isinstance(this.candidate, OnnxCandidate):
        return None
    program = None if isinstance(this.source, OnnxSource) else program_of(this)
    assert this.precision is not None
    emulation = Emulation(this.candidate.file, this.source.order, this.precision, program)
    for runner in runners:
        this.notes += emulation.notes(runner)
    return emulation


def _present(this: Comparing) -> Iterator[str]:
    """The runners that this machine has; the others are said not to have run."""
    for runner in this.options.runners:
        reason = this.candidate.missing(runner)
        if reason:
            this.results.append(LeftOut("not run", "", runner, "", reason))
        else:
            yield runner


def _runnable(this: Comparing, runners: Sequence[str]) -> Iterator[str]:
    """The runners that have a kernel for every operator; the others fail.

    Raises CannotRun where none of them has.
    """
    if not isinstance(this.candidate, OnnxCandidate):
        yield from runners
        return
    errors: dict[str, CannotRun] = {}
    for runner in runners:
        try:
            this.candidate.session(runner)
        except CannotRun as error:
            errors[runner] = error
    if errors and len(errors) == len(runners):
        raise next(iter(errors.values()))
    for runner, reason in errors.items():
        verdict = Verdict(False, f"cannot be run: {reason}")
        label = this.example.label
        this.results.append(Comparison(label, runner, "eval", "plain", "run", verdict))
    yield from (runner for runner in runners if runner not in errors)


def _unsteady(this: Comparing, axes: Sequence[Axis], runners: Sequence[str]) -> Results:
    """What must hold before a comparison means anything."""
    seed, case = this.options.seed, this.example
    found = steadiness.draws_random_numbers(this.source, case, seed)
    for axis in axes[:1]:
        if axis.is_batch and not found:
            more, notes = steadiness.depends_on_its_batch(
                this.source, case, axis, seed, allowed=this.options.allow_batch_stats
            )
            found += more
            this.notes += notes
    for runner in runners:
        found += steadiness.runs_differ(this.candidate, case, runner, seed)
    return found


def _unaffordable(this: Comparing) -> str:
    room = available_bytes() if this.options.memory is None else this.options.memory
    if isinstance(this.source, TorchSource):
        needed = float64_weight_bytes(this.source.module)
    else:
        needed = 3 * weight_bytes(this.graph.proto)
    if needed <= room:
        return ""
    return (
        f"a float64 run needs {needed / 2**30:.3g} GiB and {room / 2**30:.3g} GiB are free; verify "
        "on a machine with more memory"
    )


def _without_native(trial: Trial, runner: str) -> list[str]:
    native = trial.native(runner)
    if not isinstance(native, Exception) or isinstance(trial.truth, Exception):
        return []
    return [
        f"torch cannot run the original in its own type ({one_line(native)}): outputs are held to "
        "the float64 truth alone"
    ]
