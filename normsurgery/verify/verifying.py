"""verify(): two models, held to be the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normsurgery.errors import NormsurgeryError, UnknownName, UsageError
from normsurgery.inputs import Inputs, as_inputs, infer
from normsurgery.inputs.outputs import flatten_numbers, neither
from normsurgery.verify import sides
from normsurgery.verify.compare import Pair, one_line
from normsurgery.verify.evidence import Comparison, Evidence, LeftOut, Mode
from normsurgery.verify.hard_inputs import Case, hard_inputs
from normsurgery.verify.judge import Verdict, judge, unchanged
from normsurgery.verify.memory import available_bytes
from normsurgery.verify.modules import float64_bytes, verify_modules
from normsurgery.verify.runners import (
    FLOAT32_ROUNDING,
    missing_runner,
    run_float64,
    run_native,
    runner_names,
)
from normsurgery.verify.stages import Blame

if TYPE_CHECKING:
    from normsurgery.verify.sides import Loaded, Model

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
        from normsurgery.verify.elsewhere import verify_saved

        return verify_saved(sides.loaded(a), str(b), require_runner=require_runner, memory=memory)
    first, second = sides.loaded(a, b), sides.loaded(b, a)
    if sides.is_onnx(first) or sides.is_onnx(second):
        _refuse_training(wanted_modes, gradients)
        from normsurgery.verify.comparing import Options
        from normsurgery.verify.graphs import verify_graph

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
    evidence = _with_the_rest(evidence, pair, cases, modes, runners[:1], memory)
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


def _with_the_rest(
    evidence: Evidence,
    pair: Pair,
    cases: Sequence[Case],
    modes: Sequence[Mode],
    runners: Sequence[str],
    memory: int | None,
) -> Evidence:
    """With what the outputs hold besides tensors: numbers judged, the rest named in a note."""
    comparisons: list[Comparison] = []
    others: dict[str, None] = {}

    def numbers(output: Any) -> dict[str, Tensor]:
        others.update(dict.fromkeys(neither(output)))
        return flatten_numbers(output)

    def ran(model: nn.Module, case: Case, mode: Mode, runner: str) -> Mapping[str, Tensor]:
        seed = evidence.seed
        run = run_native(model, case.inputs, mode, seed=seed, device=runner, flatten=numbers)
        return run.outputs

    for runner, mode in product(runners, modes):
        for case in cases:
            try:
                old, new = (ran(m, case, mode, runner) for m in (pair.original, pair.changed))
            except Exception:  # that a model does not run is said where its tensors are compared
                continue
            if not old and not new:
                break  # a model without numbers is not run again
            for name, verdict in _judged_numbers(old, new, pair, case, mode, evidence.seed, memory):
                comparisons.append(Comparison(case.label, runner, mode, "plain", name, verdict))
    told = f"not compared, being neither tensors nor numbers: {'; '.join(others)}"
    return replace(
        evidence,
        comparisons=(*evidence.comparisons, *comparisons),
        notes=(*evidence.notes, told) if others else evidence.notes,
    )


def _judged_numbers(
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    pair: Pair,
    case: Case,
    mode: Mode,
    seed: int,
    memory: int | None,
) -> Iterator[tuple[str, Verdict]]:
    if old.keys() != new.keys():
        places = [", ".join(side) or "nowhere" for side in (new, old)]
        yield (
            "outputs",
            Verdict(False, "numbers at {}, the original has them at {}".format(*places)),
        )
        return

    def truth(rounding: float = 0.0) -> Mapping[str, Tensor]:
        return run_float64(
            pair.original, case.inputs, mode, seed=seed, rounding=rounding, flatten=flatten_numbers
        ).outputs

    for name, value in old.items():
        # 3 and 3.0 are one number
        found = value if bool(new[name] == value) else new[name]
        verdict = unchanged(found, value)
        if verdict is None:
            verdict = _judged_number(found, value, name, pair.original, case, truth, memory)
        yield f"output {name}", verdict


def _judged_number(
    new: Tensor,
    old: Tensor,
    name: str,
    original: nn.Module,
    case: Case,
    truth: Callable[..., Mapping[str, Tensor]],
    memory: int | None,
) -> Verdict:
    room = available_bytes() if memory is None else memory
    try:
        if float64_bytes(original, case.inputs) > room:
            return Verdict(None, "no float64 reference: it does not fit", compared=1)
        verdict = judge(new, truth()[name], old)
        if verdict.passed is False:
            verdict = judge(new, truth()[name], old, truth(FLOAT32_ROUNDING)[name])
    except Exception as error:  # any operation may lack float64
        return Verdict(None, f"no float64 reference: {one_line(error)}", compared=1)
    return verdict


def _save(
    path: str | Path,
    a: Loaded,
    pair: Pair,
    cases: Sequence[Case],
    runners: tuple[str, ...],
    seed: int,
) -> None:
    from normsurgery.verify.elsewhere import record
    from normsurgery.verify.sources import TorchCandidate, torch_source

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
    from normsurgery.verify.blaming import blame

    try:
        found = blame(a, b, given, seed=seed, hard=hard)
    except NormsurgeryError as error:
        return replace(evidence, notes=(*evidence.notes, f"nothing could be blamed: {error}"))
    return replace(evidence, blamed=found if isinstance(found, Blame) else None)
