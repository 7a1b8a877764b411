"""export(): a model as an ONNX file that is proven to compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from torch import nn
from torch.export import ExportedProgram

from normsurgery import __version__
from normsurgery.edits.casting import NAMES
from normsurgery.errors import CannotRun, NormsurgeryError, PromiseBroken
from normsurgery.exporting import opsets
from normsurgery.exporting.annotating import annotate_model, plan_hash
from normsurgery.exporting.decompositions import as_written
from normsurgery.exporting.dynamic import Dynamic
from normsurgery.exporting.eps import find_eps
from normsurgery.exporting.facts import EpsFact, OnnxFacts
from normsurgery.exporting.half import wanted_dtype
from normsurgery.exporting.preparing import Asked, Prepared, prepared
from normsurgery.exporting.quiet import quiet
from normsurgery.exporting.refusals import require_stateless
from normsurgery.exporting.tracing import eval_copy
from normsurgery.exporting.translating import Translation, axis_names, translate
from normsurgery.exporting.writing import Draft, check_target, data_path, wants_external_data
from normsurgery.inputs import as_inputs
from normsurgery.onnxfile.reading import OnnxFile, check, norm_operators, read
from normsurgery.onnxfile.sessions import Session, missing_provider
from normsurgery.plans import versions
from normsurgery.report import Report
from normsurgery.verifying.evidence import Evidence
from normsurgery.verifying.exported import verify_export
from normsurgery.verifying.runners import fresh, runner_names


def export(
    model: nn.Module | ExportedProgram,
    path: str | Path | None = None,
    inputs: Any = None,
    *,
    dynamic: Dynamic | None = None,
    opset: int | None = None,
    dtype: str | None = None,
    fold: bool = True,
    allow_batch_stats: bool = False,
    verify: bool = True,
    on: str | Sequence[str] = ("cpu",),
    require_runner: str | Sequence[str] = (),
    hard: bool = True,
    seed: int = 0,
    external_data: bool | None = None,
    force: bool = False,
) -> Report:
    """Write `model` as ONNX, and prove that the file computes what the model computes.

    Exported is a copy in eval mode; the model, its mode, its hooks and all random states stay as
    they are.

    Args:
        model: a module, an fx.GraphModule or an ExportedProgram.
        path: of the file; the model's class in lower case and `.onnx` where left out. The report is
            saved beside it as `<path>.report.json`.
        inputs: a tuple of positional or a dict of keyword arguments, or Inputs; inferred if None.
        dynamic: `{0: "batch"}` for every tensor input, or `{"input_ids": {0: "batch", 1:
            "sequence"}}` by input. Axes of one name are always equally long.
        opset: 18 to 24; chosen by what the model needs where left out.
        dtype: "fp16" or "bf16" to export the weights, each rounded once, in that type.
        fold: first take out the norms that can be folded into their neighbours exactly.
        allow_batch_stats: export batch norms without running statistics as they are.
        verify: run the file and hold it against the model in float64: see `normsurgery.verify`,
            which also says what `on`, `require_runner`, `hard` and `seed` mean.
        external_data: weights in one file beside, `<path>.data`; where left out, above 2 GB only.
        force: replace existing files, and write `path` also where verification fails.

    Returns the report: `plan` is the fold's, `evidence` what was measured, `onnx` what was written.
    A file that failed its verification is kept as `<stem>.failed.onnx`, not under its own name.

    Raises UsageError for an option, a dtype, an opset or a path that cannot be; CannotTrace where
    the model draws random numbers, keeps state from call to call, normalises with the batch, or
    cannot be traced; CannotRun where a runner of `on` cannot load the file; PromiseBroken where an
    eps of the traced model is not in the file. Nothing is written then.
    """
    opsets.check_opset(opset)
    asked = Asked(wanted_dtype(dtype), fold, allow_batch_stats)
    on, require_runner = runner_names(on), runner_names(require_runner)
    missing = {runner: missing_provider(runner) for runner in (*on, *require_runner)}
    target = Path(path) if path is not None else Path(_default_name(model))
    check_target(target, force=force)
    if inputs is not None:
        inputs = fresh(as_inputs(inputs))  # a model may work in place on what it is given
    ready = prepared(model, inputs, dynamic, asked)
    unwritten = _unwritten_state(ready)
    number, reason = opsets.choose_opset(ready.program, opset)
    translation = translate(ready.program, number)
    written = translation.optimised
    _require_valid(translation, number, [runner for runner in on if not missing[runner]])
    eps = _require_eps(ready.program, written)
    _annotate(written, ready, number)
    external = wants_external_data(written, external_data)
    with Draft(target) as draft:
        draft.write(written, external=external)
        file = read(draft.file)
        evidence = None
        if verify:
            options = _Options(on, require_runner, hard, seed)
            evidence = _verified(ready, translation, file, asked, options)
        notes = (*ready.notes, *unwritten)
        passed = evidence is None or evidence.passed
        final = target if passed or force else target.with_name(f"{target.stem}.failed.onnx")
        report = Report(
            verb="export",
            plan=ready.plan,
            keymap=ready.keymap,
            evidence=evidence,
            versions=_versions(),
            notes=notes if passed else (*notes, _kept_as(final, target)),
            onnx=_facts(file, final, reason, external, ready, eps),
        )
        draft.write_report(report.to_json())
        draft.publish(final)
    return report


@dataclass(frozen=True)
class _Options:
    on: tuple[str, ...]
    require_runner: tuple[str, ...]
    hard: bool
    seed: int


def _unwritten_state(ready: Prepared) -> tuple[str, ...]:
    """Notes on tensors that the model writes and the file does not.

    Raises CannotTrace where its outputs depend on them.
    """
    original = ready.original
    module = original.module() if isinstance(original, ExportedProgram) else original
    try:
        return require_stateless(eval_copy(module), ready.inputs)
    except NormsurgeryError:
        raise
    except Exception:  # that a program does not run on these inputs is said where it is verified
        return ()


def _default_name(model: object) -> str:
    name = "model" if isinstance(model, ExportedProgram) else type(model).__name__.lower()
    return f"{name}.onnx"


def _require_valid(translation: Translation, opset: int, runners: Sequence[str]) -> None:
    """Types that the opset allows, the checker, and every runner loads the graph."""
    opsets.require_allowed(translation.optimised, opset)
    check(translation.raw)
    check(translation.optimised)
    for runner in dict.fromkeys(runners):
        try:
            Session(translation.optimised, runner=runner)
        except CannotRun as error:
            raise CannotRun(
                f"{error} To write the file for another runner, leave {runner} out of on (--on)."
            ) from error


def _require_eps(program: ExportedProgram, written: onnx.ModelProto) -> tuple[EpsFact, ...]:
    eps = find_eps(program, written)
    lost = [fact for fact in eps if not fact.found]
    if lost:
        told = ", ".join(f"{fact.eps:g} of {fact.site}" for fact in lost[:5])
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise PromiseBroken(
            f"{len(lost)} of {len(eps)} eps of the traced model are not in the ONNX graph: {told}"
            f"{more}. A row of zeros would give NaN there. Nothing was written; please report it."
        )
    return eps


def _annotate(written: onnx.ModelProto, ready: Prepared, opset: int) -> None:
    annotate_model(
        written,
        {
            "version": __version__,
            "source": ready.plan.model,
            "opset": opset,
            "dtype": NAMES.get(ready.dtype, str(ready.dtype)),
            "dynamic": sorted(set(axis_names(ready.program).values())),
            "plan": plan_hash(ready.plan),
            "inputs": [value.name for value in written.graph.input],
        },
    )


def _verified(
    ready: Prepared,
    translation: Translation,
    file: OnnxFile,
    asked: Asked,
    options: _Options,
) -> Evidence:
    with quiet():
        return verify_export(
            ready.original,
            ready.inputs,
            file,
            program=ready.program,
            raw=translation.raw,
            optimised=translation.optimised,
            on=options.on,
            require_runner=options.require_runner,
            hard=options.hard,
            allow_batch_stats=asked.allow_batch_stats,
            seed=options.seed,
        )


def _kept_as(final: Path, target: Path) -> str:
    if final == target:
        return "the file failed its verification and was written because of force"
    return (
        f"the file failed its verification: it is {final.name}, and {target.name} was not written"
    )


def _versions() -> dict[str, str]:
    import onnxruntime
    import onnxscript

    return {
        **versions(),
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _facts(
    file: OnnxFile,
    final: Path,
    reason: str,
    external: bool,
    ready: Prepared,
    eps: tuple[EpsFact, ...],
) -> OnnxFacts:
    data = data_path(Path(file.path))
    size = Path(file.path).stat().st_size + (data.stat().st_size if data.exists() else 0)
    return OnnxFacts(
        path=str(final),
        opset=file.opset,
        opset_reason=reason,
        dtype=str(ready.dtype).removeprefix("torch."),
        nodes=len(file.proto.graph.node),
        bytes=size,
        inputs={port.name: str(port) for port in file.inputs},
        outputs={port.name: str(port) for port in file.outputs},
        operators=norm_operators(file.proto),
        external_data=data_path(final).name if external else "",
        switched=ready.switched,
        norms=as_written(ready.norms, file.opset, ready.dtype),
        eps=eps,
    )


__all__ = ["export"]
