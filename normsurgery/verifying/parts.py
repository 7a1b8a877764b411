"""Modules of a model on their own, on the inputs they get inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from normsurgery.errors import CannotRead
from normsurgery.inputs import Inputs
from normsurgery.treecopy import tree_copy
from normsurgery.verifying.compare import Pair, Results, compare_case, one_line
from normsurgery.verifying.evidence import LeftOut, Mode
from normsurgery.verifying.hard_inputs import Case
from normsurgery.verifying.runners import fresh, same_randomness, set_mode


def first_calls(
    model: nn.Module,
    paths: Iterable[str],
    inputs: Inputs,
    mode: Mode,
    seed: int,
    visit: Callable[[str, Inputs], None],
) -> frozenset[str]:
    """Run a clone of `model`; at the first call of each module in `paths`, visit it with a clone of
    its inputs. Returns the paths that were called. Raises whatever the model raises.

    Visiting during the run holds the inputs of one module at a time in memory.
    """
    clone = tree_copy(model, clone=True)
    set_mode(clone, mode)
    called: set[str] = set()

    def hook(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if path not in called:
                called.add(path)
                visit(path, fresh(Inputs(args, kwargs)))

        return note

    for path in paths:
        clone.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True)
    with same_randomness(seed), torch.no_grad():
        fresh(inputs).call(clone)
    return frozenset(called)


def compare_parts(
    pair: Pair,
    paths: Iterable[str],
    case: Case,
    *,
    mode: Mode,
    seed: int,
    runners: tuple[str, ...] = ("cpu",),
    gradients: bool = False,
    always_truth: bool = True,
) -> Results:
    """Compare the modules at `paths` of both models, each on what the original's gets in `case`."""
    wanted = tuple(paths)
    results: Results = []

    def visit(path: str, inputs: Inputs) -> None:
        results.extend(
            compare_case(
                pair.submodules(path),
                Case(case.label, inputs),
                runners=runners,
                mode=mode,
                seed=seed,
                gradients=gradients,
                always_truth=always_truth,
            )
        )

    try:
        called = first_calls(pair.original, wanted, case.inputs, mode, seed, visit)
        reason = "the run does not call this module"
    except CannotRead:
        raise
    except Exception as error:  # a model may refuse an input in any way
        called = frozenset(r.where for r in results)
        reason = f"the original raises {one_line(error)}"
    for path in wanted:
        if path not in called:
            results.append(LeftOut("not applicable", case.label, "", mode, reason, path))
    return results
