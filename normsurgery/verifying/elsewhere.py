"""Computed on one machine, judged on another: a CPU alone tells whether a GPU was right."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normsurgery.errors import CannotRead
from normsurgery.plans import versions
from normsurgery.verifying.compare import Results, one_line
from normsurgery.verifying.evidence import Comparison, Evidence, LeftOut
from normsurgery.verifying.hard_inputs import Case
from normsurgery.verifying.judge import Verdict
from normsurgery.verifying.memory import available_bytes, float64_weight_bytes
from normsurgery.verifying.promise import describe
from normsurgery.verifying.saved import SavedCase, SavedRun
from normsurgery.verifying.sources import Candidate, OnnxSource, Source, TorchSource, torch_source
from normsurgery.verifying.trials import Trial, compared

if TYPE_CHECKING:
    from normsurgery.verifying.sides import Loaded


def record(
    source: Source,
    candidate: Candidate,
    cases: Iterable[Case],
    runners: Sequence[str],
    *,
    seed: int,
    precision: torch.dtype | None = None,
) -> SavedRun:
    """Run the candidate, and the original in its own type, on every case and runner; keep it all.

    precision: the coarsest type that the candidate computes in. A run that raises is kept as what
    it raised.
    """
    torch_side = source if isinstance(source, TorchSource) else None
    return SavedRun(
        cases=tuple(_recorded(source, candidate, case, runners, seed) for case in cases),
        seed=seed,
        runners=tuple(runners),
        precision=precision,
        rounded_to=torch_side.rounded_to if torch_side is not None else None,
        everything=torch_side.everything if torch_side is not None else False,
        candidate=_described(
            getattr(candidate, "file", None) or getattr(candidate, "module", None)
        ),
        original=_described(torch_side.module if torch_side else getattr(source, "file", None)),
        devices={runner: _device(runner) for runner in runners},
        versions=versions(),
    )


def verify_saved(
    a: Loaded,
    path: str | Path,
    *,
    require_runner: Sequence[str] = (),
    memory: int | None = None,
) -> Evidence:
    """Judge a saved run against `a`, whose float64 truth is computed here, on the saved inputs.

    What the candidate gave, and what the original gave in its own type on the same device, come
    from the file. Where `a` is not the original that it was recorded with, bit for bit, the latter
    says nothing about `a` and is not used. Raises CannotRead where it is no saved run.
    """
    run = SavedRun.load(path)
    if not run.cases:
        raise CannotRead(f"{path}: the saved run has no cases. Record it again with --save.")
    source = _source(a, run)
    same = digest(_model_of(source)) == run.original.get("sha256", "")
    unaffordable = _unaffordable(a, memory)
    results: Results = []
    for saved in run.cases:
        missing: Exception = RuntimeError("it was not run where this was recorded")
        natives: dict[str, Mapping[str, Tensor] | Exception] = {
            runner: saved.native.get(runner, missing) if same else missing for runner in run.runners
        }
        case = Case(saved.label, saved.inputs)
        trial = Trial(source, case, run.seed, run.precision, unaffordable, natives)
        for runner in run.runners:
            results += _judged(trial, saved, runner)
    return Evidence(
        seed=run.seed,
        comparisons=tuple(r for r in results if isinstance(r, Comparison)),
        left_out=tuple(r for r in results if isinstance(r, LeftOut)),
        inputs=describe(run.cases[0].inputs),
        required=tuple(require_runner),
        notes=tuple(_notes(run, path, same=same)),
    )


def digest(model: object) -> str:
    """SHA-256 of a model: names, types and bits of its weights, and the nodes of a graph; ""."""
    from normsurgery.onnxfile.feeding import as_array

    found = hashlib.sha256()
    if isinstance(model, ExportedProgram):
        model = model.module()
    if isinstance(model, nn.Module):
        for name, tensor in sorted(model.state_dict().items()):
            if isinstance(tensor, Tensor):
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
                found.update(as_array(tensor).tobytes())
        return found.hexdigest()
    proto = getattr(model, "proto", None)
    if proto is None:
        return ""
    for part in (*proto.graph.node, *proto.graph.initializer, *proto.functions):
        found.update(part.SerializeToString(deterministic=True))
    return found.hexdigest()


def _recorded(
    source: Source, candidate: Candidate, case: Case, runners: Sequence[str], seed: int
) -> SavedCase:
    outputs: dict[str, Mapping[str, Tensor]] = {}
    native: dict[str, Mapping[str, Tensor]] = {}
    failed: dict[str, str] = {}
    for runner in runners:
        try:
            native[runner] = source.native(case.inputs, seed, runner)
        except Exception:  # a kernel may be missing, or the input refused; then there is no native
            native.pop(runner, None)
        try:
            outputs[runner] = candidate.run(case.inputs, seed, runner)
        except Exception as error:  # whatever it is, it is kept for the judge
            failed[runner] = one_line(error)
    return SavedCase(case.label, case.inputs, outputs, native, failed)


def _judged(trial: Trial, saved: SavedCase, runner: str) -> Results:
    label = saved.label
    if trial.refusal(runner) and isinstance(trial.truth, Exception):
        reason = f"the original raises {one_line(trial.truth)}"
        return [LeftOut("not applicable", label, runner, "eval", reason)]
    if runner in saved.failed:
        verdict = Verdict(False, f"raises {saved.failed[runner]}, the original does not")
        return [Comparison(label, runner, "eval", "plain", "run", verdict)]
    if runner not in saved.outputs:
        return [LeftOut("not run", label, runner, "eval", "the file has no outputs of it")]
    return [_unbacked(item) for item in compared(trial, saved.outputs[runner], runner)]


def _unbacked(item: Comparison | LeftOut) -> Comparison | LeftOut:
    """Undecided is no pass, though the bits are those of the saved original: nobody here can tell
    that it was this original which was run there."""
    if isinstance(item, LeftOut) or item.verdict.passed is not None:
        return item
    return replace(item, verdict=replace(item.verdict, same_bits=False))


def _source(a: Loaded, run: SavedRun) -> Source:
    if not isinstance(a, (nn.Module, ExportedProgram)):
        return OnnxSource(a)
    source = torch_source(a, run.rounded_to or run.precision)
    return replace(source, everything=run.everything)


def _unaffordable(a: Loaded, memory: int | None) -> str:
    if not isinstance(a, nn.Module):
        return ""
    room = available_bytes() if memory is None else memory
    needed = float64_weight_bytes(a)
    if needed <= room:
        return ""
    return (
        f"a float64 run needs {needed / 2**30:.3g} GiB and {room / 2**30:.3g} GiB are free; verify "
        "on a machine with more memory"
    )


def _notes(run: SavedRun, path: str | Path, *, same: bool) -> Iterator[str]:
    places = ", ".join(f"{runner} ({run.devices.get(runner) or '?'})" for runner in run.runners)
    there = ", ".join(f"{name} {text}" for name, text in run.versions.items())
    yield (
        f"{run.candidate.get('name') or 'the candidate'} was run elsewhere and saved in "
        f"{Path(path).name}: on {places or 'no runner'}; {there}"
    )
    if not same:
        yield (
            "the original is not the one it was recorded with there (its weights differ): the "
            "outputs are held to its float64 truth alone"
        )


def _model_of(side: object) -> Any:
    """The module or the ONNX file of a source or a candidate."""
    return getattr(side, "module", None) or getattr(side, "file", None)


def _described(model: Any) -> dict[str, str]:
    if model is None:
        return {}
    path = getattr(model, "path", "")
    return {"name": Path(path).name if path else type(model).__name__, "sha256": digest(model)}


def _device(runner: str) -> str:
    if runner == "cpu":
        return platform.processor() or platform.machine()
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
