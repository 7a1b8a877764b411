"""verify(): two models, held to be the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from normsurgery.errors import NormsurgeryError, UnknownName, UsageError
from normsurgery.inputs import Inputs, as_inputs, infer
from normsurgery.verifying import sides
from normsurgery.verifying.compare import Pair
from normsurgery.verifying.evidence import Evidence, LeftOut, Mode
from normsurgery.verifying.hard_inputs import Case, hard_inputs
from normsurgery.verifying.modules import verify_modules
from normsurgery.verifying.numbers import with_numbers
from normsurgery.verifying.runners import (
    missing_runner,
    runner_names,
)
from normsurgery.verifying.stages import Blame

if TYPE_CHECKING:
    from normsurgery.verifying.sides import Loaded, Model

MODES: tuple[Mode, ...] = ("eval", "train")


def verify(
    a: Model,
    b: Model,
    inputs: Any = None,
    *,
    on: str | Sequence[str] = ("cpu",),
    require_runner: str | Sequence[str] = (),
    modes: str | Sequence[str] = ("eval",),
    gradients: bool = False,
    hard: bool = True,
    intermediates: bool = True,
    blame: bool = False,
    seed: int = 0,
    memory: int | None = None,
    save: str | Path | None = None,
) -> Evidence:
    """Does `b` compute what `a` computes, as well as `a` itself can in its precision?

    The truth is `a`, run in float64 with exactly its rounded weights. On the example and on hard
    inputs, every output (running statistic in train mode, gradient if asked for) of `b` may be four
    times as far from it as that of `a`, plus 8 ulp of the largest value: `judge`. Neither model nor
    the global random state is changed.

    Where a side is ONNX, both are eval-mode functions. The truth is `a` with its weights rounded to
    the type the graph computes in, where that is coarser; what this rounding alone destroys is a
    failure of its own. A source that draws random numbers, a sample whose output depends on the
    others of its batch, and a graph that gives two results for one input are failures. The graph is
    judged by its meaning (in float64) and at every optimisation level of onnxruntime, on every
    runner; its dynamic axes vary; NaN and infinities must stand where those of the truth stand.

    Args:
        a, b: modules, fx.GraphModules, ExportedPrograms, ONNX models, or paths of files that hold
            one (`.pt`, `.pt2`, `.onnx`, a checkpoint directory) or `package.module:factory`. `b`
            may be a file of runs that `save` wrote, maybe on another machine.
        inputs: a tuple of positional arguments, a dict of keyword arguments, or `Inputs`; inferred
            from `a` where left out.
        on: runners, of "cpu", "cuda" and "tensorrt" (also as one string, "cpu,cuda"): torch for a
            torch model, onnxruntime for an ONNX model. One that this machine lacks is reported as
            not run.
        require_runner: runners without which this is no pass.
        modes: "eval", "train", or both. Both models draw the same random numbers.
        gradients: judge gradients of inputs and of parameters that both have by the same name.
        hard: False leaves it at the example.
        intermediates: judge every floating value inside an ONNX graph too, on the example.
        blame: where it fails, name the first operation of the ONNX graph that diverges.
        seed: of the hard inputs and of every random number; the evidence states it.
        memory: bytes a float64 run may take; what is free on this machine where left out. A model
            that needs more is verified module by module, and the evidence says so.
        save: write what `b` computes to this `.safetensors` file, to be judged elsewhere.

    What an output holds besides tensors: numbers and booleans are judged where both sides are torch
    models; everything else is named in the notes.

    Raises UsageError where both sides are one file or share weights, a mode is unknown, an ONNX
    model is asked for train mode or gradients, inputs do not fit it, or `a` holds TorchScript and
    is to be compared with a torch model; UnknownName for a runner;
    CannotRead where a side cannot be loaded or has no weights (meta); CannotTrace where `a` does
    not run on the inputs.
    """
    wanted_modes = _checked_modes(modes)
    on, require_runner = runner_names(on), runner_names(require_runner)
    given = None if inputs is None else as_inputs(inputs)
    sides.refuse_same_file(a, b)
    if sides.is_saved_run(b, a):
        from normsurgery.verifying.elsewhere import verify_saved

        return verify_saved(sides.loaded(a), str(b), require_runner=require_runner, memory=memory)
    first, second = sides.loaded(a, b), sides.loaded(b, a)
    if sides.is_onnx(first) or sides.is_onnx(second):
        _refuse_training(wanted_modes, gradients)
        from normsurgery.verifying.comparing import Options
        from normsurgery.verifying.graphs import verify_graph

        options = Options(on, require_runner, hard, intermediates, seed, memory, save=save)
        evidence = verify_graph(first, second, given, options)
    else:
        evidence = _torch_models(
            first,
            second,
            given,
            wanted_modes,
            on,
            require_runner,
            gradients,
            hard,
            seed,
            memory,
            save,
        )
    if blame and not evidence.passed:
        evidence = _blamed(evidence, first, second, given, seed, hard)
    return evidence


def _torch_models(
    a: Loaded,
    b: Loaded,
    given: Inputs | None,
    modes: Sequence[Mode],
    on: Sequence[str],
    require_runner: Sequence[str],
    gradients: bool,
    hard: bool,
    seed: int,
    memory: int | None,
    save: str | Path | None,
) -> Evidence:
    wanted = tuple(dict.fromkeys((*on, *require_runner)))
    missing = {runner: missing_runner(runner) for runner in wanted}
    pair = Pair(sides.as_module(a), sides.as_module(b))
    _refuse_script(pair.original)
    sides.refuse_shared_storage(pair.original, pair.changed)
    given = infer(a) if given is None else given  # type: ignore[arg-type]
    cases: tuple[Case, ...] = (Case("example", given),)
    if hard:
        vary = not (sides.has_fixed_batch(a) or sides.has_fixed_batch(b))
        cases = hard_inputs(given, model=pair.original, vary_batch=vary, seed=seed)
    runners = tuple(runner for runner in wanted if not missing[runner])
    evidence = verify_modules(
        pair,
        cases,
        modes=modes,
        runners=runners,
        gradients=gradients,
        seed=seed,
        memory=memory,
    )
    evidence = with_numbers(evidence, pair, cases, modes, runners[:1], memory)
    if save is not None:
        _save(save, a, pair, cases, runners, seed)
    absent = tuple(LeftOut("not run", "", r, "", reason) for r, reason in missing.items() if reason)
    return replace(evidence, left_out=(*absent, *evidence.left_out), required=tuple(require_runner))


def _refuse_script(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"{path or 'the first model'} is TorchScript, which takes no hooks, and verify "
                "measures the first model with hooks. Give the Python model it was made from as "
                "the first, and this one as the second."
            )


def _save(
    path: str | Path,
    a: Loaded,
    pair: Pair,
    cases: Sequence[Case],
    runners: tuple[str, ...],
    seed: int,
) -> None:
    from normsurgery.verifying.elsewhere import record
    from normsurgery.verifying.sources import TorchCandidate, torch_source

    source = torch_source(a, None)  # type: ignore[arg-type]
    record(source, TorchCandidate(pair.changed), cases, runners, seed=seed).save(path)


def _refuse_training(modes: Sequence[Mode], gradients: bool) -> None:
    if "train" in modes:
        raise UsageError(
            "an ONNX model has no train mode: what it computes is compared in eval mode. Leave "
            "modes at 'eval', or compare the torch models."
        )
    if gradients:
        raise UsageError(
            "an ONNX model has no gradients. Leave gradients out, or compare the torch models."
        )


def _checked_modes(modes: Iterable[str]) -> tuple[Mode, ...]:
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    for mode in modes:
        if mode not in MODES:
            raise UnknownName("mode", mode, MODES)
    return tuple(mode for mode in MODES if mode in modes)


def _blamed(
    evidence: Evidence, a: Loaded, b: Loaded, given: Inputs | None, seed: int, hard: bool
) -> Evidence:
    """With the first operation that diverges. Swaps and folds are blamed by `blame(plan)`."""
    if not sides.is_onnx(b):
        return evidence
    from normsurgery.blaming import blame

    try:
        found = blame(a, b, given, seed=seed, hard=hard)
    except NormsurgeryError as error:
        return replace(evidence, notes=(*evidence.notes, f"nothing could be blamed: {error}"))
    return replace(evidence, blamed=found if isinstance(found, Blame) else None)
