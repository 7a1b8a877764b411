"""fold_checkpoint(): plan on the meta device, stream the shards, prove, put in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normsurgery import __version__
from normsurgery.artefacts.checkpoints import CONFIG_KEY, RECORD, load_checkpoint
from normsurgery.errors import (
    CannotRead,
    CannotTrace,
    NormsurgeryError,
    PromiseBroken,
    UsageError,
)
from normsurgery.fold.checkpoint.evaluating import Evaluation, refuse_created
from normsurgery.fold.checkpoint.keys import read_names
from normsurgery.fold.checkpoint.layout import Layout, read_layout, read_object
from normsurgery.fold.checkpoint.neutral import edits_of, without_neutral
from normsurgery.fold.checkpoint.others import write_others, write_record
from normsurgery.fold.checkpoint.proving import prove
from normsurgery.fold.checkpoint.reading import same_bytes
from normsurgery.fold.checkpoint.resuming import (
    Workplace,
    cleared_on_refusal,
    require_place,
    require_space,
    task_of,
    workplace,
)
from normsurgery.fold.checkpoint.streaming import OutputShard, planned_outputs, write_shard
from normsurgery.fold.ground import Choices
from normsurgery.fold.untied_flags import TIED
from normsurgery.inputs import Inputs, as_inputs, infer, parse
from normsurgery.plan import Plan, versions
from normsurgery.report import Report
from normsurgery.surgery.keymap import KeyMap
from normsurgery.verify import Evidence
from normsurgery.verify.compare import one_line
from normsurgery.verify.runners import same_randomness

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def fold_checkpoint(
    directory: str | Path,
    out: str | Path,
    *,
    kind: str | None = None,
    only: Sequence[str | int] = (),
    exclude: Sequence[str | int] = (),
    choices: Choices | None = None,
    calls: Sequence[Any] = (),
    plan: Plan | None = None,
    inputs: Any = None,
    drop: bool = False,
    force: bool = False,
    verify: bool = True,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Fold the norms of a transformers checkpoint into a checkpoint that the stock class loads.

    The model is built on the meta device and planned there; then the shards are streamed through
    the Edits, one tensor at a time, into the same layout. The source is only read. A killed run
    leaves `OUT.partial`, and the same call takes it up; OUT appears whole, after the proof.

    Args:
        kind, only, exclude, choices, calls, inputs: as of `plan_fold`; classes are always kept. A
            tied tensor is made two (`choices.untie`) by adding the second to the last shard.
        plan: Steps with Edits made before, instead of planning.
        drop: leave out the tensors of folded norms, which are neutral. Who loads the result must
            know that they are.
        force: replace OUT if it is a checkpoint, and begin anew what another run left.
        verify: prove the result layer by layer before it is put in place.

    Returns the report. Where nothing can be folded nothing is written, and `report.notes` say so.

    Raises CannotRead where the checkpoint is broken, not plain weights, or holds NaN or Inf where
    an Edit reads; UsageError for OUT, for too little space, and where a result does not fit into
    its dtype; PromiseBroken where the proof fails: OUT is then not there.
    """
    source, target = Path(directory), Path(os.path.abspath(out))
    layout = _readable(source)
    require_place(source, target, force)
    model = _planning_model(source)
    given = _inputs(model, inputs, seed)
    names = read_names(model, layout)
    if plan is None:
        plan = _planned(model, given, kind, only, exclude, choices, calls)
        plan = without_neutral(plan, layout, names)
    evaluation = Evaluation(edits_of(plan), names, layout.entries)
    if not evaluation.edits:
        note = f"nothing can be folded, so {target} was not written"
        return Report("fold", plan, KeyMap(plan), None, versions(), (note,))
    _check(layout, evaluation)
    untied = _separated(model, evaluation) if evaluation.copied else ()
    outputs = planned_outputs(layout.shards, evaluation, drop, untied)
    options = {"drop": drop, "version": __version__}
    with workplace(target, task_of(layout, evaluation.edits, options), force) as place:
        require_space(target, _missing_bytes(layout, outputs, place))
        evidence = None
        with cleared_on_refusal(place):
            _write(outputs, evaluation, place, progress)
            write_others(layout, outputs, evaluation, place)
            if verify:
                evidence = _proven(layout, place, evaluation, outputs, given, plan, seed, progress)
        left_out = evaluation.left_out(drop)
        notes = tuple(_notes(layout, evaluation, left_out))
        report = Report("fold", plan, KeyMap(plan, dropped=left_out), evidence, versions(), notes)
        write_record(layout, place, report)
        place.publish()
    return report


def plan_checkpoint(
    directory: str | Path,
    *,
    kind: str | None = None,
    only: Sequence[str | int] = (),
    exclude: Sequence[str | int] = (),
    choices: Choices | None = None,
    calls: Sequence[Any] = (),
    inputs: Any = None,
    seed: int = 0,
) -> Plan:
    """What `fold_checkpoint` would do: from headers, the meta model and the norms' own tensors."""
    layout = _readable(Path(directory))
    model = _planning_model(Path(directory))
    given = _inputs(model, inputs, seed)
    plan = _planned(model, given, kind, only, exclude, choices, calls)
    return without_neutral(plan, layout, read_names(model, layout))


def _planned(
    model: nn.Module,
    inputs: Inputs,
    kind: str | None,
    only: Sequence[str | int],
    exclude: Sequence[str | int],
    choices: Choices | None,
    calls: Sequence[Any],
) -> Plan:
    from normsurgery.fold.planning import plan_fold

    kept = replace(choices or Choices(), keep_classes=True)
    on_meta = inputs.to(device="meta")
    return plan_fold(
        model, on_meta, kind=kind, only=only, exclude=exclude, choices=kept, calls=calls
    )


def _meta_model(source: Path) -> nn.Module:
    """The architecture in config.json, without weights; no code of the checkpoint is run."""
    model = load_checkpoint(source, meta=True).model
    assert isinstance(model, nn.Module)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = True  # without a cache, masks are made by looking at values
    return model


def _planning_model(source: Path) -> nn.Module:
    """As `_meta_model`, in a type in which it runs without values."""
    model = _meta_model(source)
    if any(parameter.dim() == 3 for parameter in model.parameters()):
        model.to(torch.bfloat16)  # the only type that stacked experts run in on the meta device
    return model


def _inputs(model: nn.Module, inputs: Any, seed: int) -> Inputs:
    """Inputs with values: those given, or those that the model without weights accepts."""
    if inputs is not None:
        return as_inputs(inputs)
    with same_randomness(seed):
        return parse(infer(model).spelling)


def _readable(source: Path) -> Layout:
    """The layout of a checkpoint that can be folded. Raises CannotRead and UsageError."""
    layout = read_layout(source)
    _refuse_swapped(layout)
    return layout


def _refuse_swapped(layout: Layout) -> None:
    """Swaps that are made again on load change the very model that the files describe."""
    record = layout.directory / RECORD
    swaps = read_object(record).get("plan") if record.is_file() else None
    if swaps or layout.config.get(CONFIG_KEY):
        raise UsageError(
            f"{layout.directory}: holds a model whose norms were swapped, so it is not the one "
            "that config.json names. Load it with normsurgery.load and fold it in memory."
        )


def _check(layout: Layout, evaluation: Evaluation) -> None:
    """What must hold before anything is written."""
    refuse_created(evaluation.edits)
    unknown = sorted(evaluation.touched - set(evaluation.names.aliases))
    if unknown:
        raise UsageError(
            f"the plan names {unknown[0]}, which the model that config.json describes does not "
            "have. Make the plan again."
        )
    for name in sorted(evaluation.touched):
        tied = evaluation.names.aliases[name]
        if name != tied and name not in evaluation.copied:
            raise UsageError(
                f"the plan changes {name} alone, which is tied to {tied}. Make the plan again."
            )
    for name, copies in evaluation.names.copies.items():
        first = evaluation.entries[evaluation.names.pieces[name][0].key]
        for alias, key in copies:
            if not same_bytes(first, evaluation.entries[key]):
                raise CannotRead(
                    f"{layout.directory}: {alias} and {name} are tied by config.json, and the "
                    f"files hold different values for them. Set {TIED} to false in config.json."
                )


def _separated(model: Any, evaluation: Evaluation) -> tuple[str, ...]:
    """Names that are tensors of their own once the configuration ties nothing.

    One flag rules all ties of a model: a tensor that loses its tie with the others must be written
    too. Raises UsageError where the class ties whatever its configuration says.
    """
    config = deepcopy(model.config)
    for part in (config, config.get_text_config()):
        setattr(part, TIED, False)
    with torch.device("meta"):
        state = type(model)(config).state_dict(keep_vars=True)
    aliases = evaluation.names.aliases
    separate = tuple(name for name in state if state[name] is not state[aliases[name]])
    for name in evaluation.copied:
        if name not in separate:
            raise UsageError(
                f"{name}: {type(model).__name__} ties it to {aliases[name]} whatever its "
                "configuration says. Fold without --untie."
            )
    return separate


def _notes(layout: Layout, evaluation: Evaluation, left_out: tuple[str, ...]) -> Iterator[str]:
    yield from layout.notes
    unknown = evaluation.names.unknown
    if unknown:
        count, first = len(unknown), ", ".join(unknown[:5])
        yield f"{count} tensors that the model does not know were copied as they are ({first})"
    for name, tied in evaluation.copied.items():
        entry = evaluation.entries[evaluation.pieces(name)[0].key]
        yield f"{name} is untied from {tied}: {entry.nbytes} bytes more, in memory too"
    if left_out:
        yield f"{len(left_out)} neutral tensors of norms were left out"


def _missing_bytes(layout: Layout, outputs: tuple[OutputShard, ...], place: Workplace) -> int:
    """What is still to be written, headers included."""
    shards = sum(s.nbytes + s.source.header_bytes for s in outputs if not place.has(s.name))
    return shards + sum((layout.directory / path).stat().st_size for path in layout.others)


def _write(
    outputs: tuple[OutputShard, ...], evaluation: Evaluation, place: Workplace, progress: Progress
) -> None:
    total = sum(shard.nbytes for shard in outputs)
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress("write", done, total)

    for shard in outputs:
        if place.has(shard.name):
            add(shard.nbytes)
            continue
        write_shard(place.files / shard.name, shard, evaluation, add)
        place.note(shard.name)


def _proven(
    layout: Layout,
    place: Workplace,
    evaluation: Evaluation,
    outputs: tuple[OutputShard, ...],
    inputs: Inputs,
    plan: Plan,
    seed: int,
    progress: Progress,
) -> Evidence:
    """The evidence. Raises PromiseBroken where it is none."""
    written = read_layout(place.files)
    try:
        evidence = prove(
            _meta_model(layout.directory),
            _meta_model(place.files),
            evaluation,
            [output for shard in outputs for output in shard.outputs],
            written.entries,
            inputs,
            changes=[path for step in plan.steps for path in step.changes],
            seed=seed,
            described=" ".join(inputs.spelling),
            progress=lambda done, total: progress("verify", done, total),
        )
    except NormsurgeryError:
        raise
    except Exception as error:  # the model's own code, on parameters that are read when needed
        raise CannotTrace(
            f"{layout.directory}: cannot be proven, since its model does not run on parameters "
            f"that are read block by block ({one_line(error)}). Fold the loaded model instead, or "
            "prove the result by other means (verify=False)."
        ) from error
    if not evidence.passed:
        raise PromiseBroken(
            f"{layout.directory}: the folded checkpoint does not compute what it did: "
            f"{evidence.failures[0]}. {place.out} was not written. Please report this."
        )
    return evidence
