"""A model made ready for translation: an eval copy, folded, cast, its norms canonical, traced."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils._sympy.numbers import int_oo

from normsurgery.edits.casting import NAMES
from normsurgery.errors import CannotTrace, NormsurgeryError, UsageError
from normsurgery.exporting.canonical import canonicalised
from normsurgery.exporting.dynamic import Axes, Dynamic, enlarged, named_axes, resolve
from normsurgery.exporting.facts import Canonical
from normsurgery.exporting.half import cast_copy, own_dtype
from normsurgery.exporting.quiet import quiet
from normsurgery.exporting.refusals import require_inference, require_steady, require_values
from normsurgery.exporting.tracing import AXES, eval_copy, trace
from normsurgery.exporting.translating import axis_names
from normsurgery.inputs import Inputs, as_inputs, infer
from normsurgery.plans import Plan, versions
from normsurgery.randomstate import random_state_kept
from normsurgery.rewriting.keymap import KeyMap
from normsurgery.wrapped import has_mode, unwrapped


@dataclass(frozen=True)
class Asked:
    """What becomes of the model. dtype: None leaves it in its own."""

    dtype: torch.dtype | None
    fold: bool
    allow_batch_stats: bool


@dataclass(frozen=True)
class Prepared:
    """What is translated, and what it was made from.

    original: the user's model. inputs: of one call of it. program, dtype: what is exported.
    """

    original: nn.Module | ExportedProgram
    program: ExportedProgram
    inputs: Inputs
    dtype: torch.dtype
    plan: Plan
    keymap: KeyMap
    switched: tuple[str, ...] = ()
    norms: tuple[Canonical, ...] = ()
    notes: tuple[str, ...] = ()


def prepared(
    model: nn.Module | ExportedProgram, inputs: Any, dynamic: Dynamic | None, asked: Asked
) -> Prepared:
    """The traced program of a copy of `model`, as `export` makes it, with the same arguments."""
    if isinstance(model, ExportedProgram):
        return _prepared_program(model, inputs, dynamic, asked)
    inner, notes = unwrapped(model)
    notes += require_values(inner)
    given = infer(inner) if inputs is None else as_inputs(inputs)
    switched = _training(inner)
    with random_state_kept(inner):
        working = eval_copy(inner)
        axes = resolve(working, given, dynamic)
        example, given = given, enlarged(working, given, axes)
        _require_running(working, example, given, axes)
        plan, keymap = _nothing_done(type(inner).__name__)
        if asked.fold:
            working, plan, keymap, said = _folded(working, given)
            notes += said
        dtype = own_dtype(working)
        if asked.dtype not in (None, dtype):
            assert asked.dtype is not None
            dtype = asked.dtype
            working, said = cast_copy(working, dtype)
            notes += said
        typed = given.to(dtype=dtype) if asked.dtype is not None else given
        made, norms = canonicalised(eval_copy(working), typed)
        program = trace(made, typed, dynamic)
        notes += require_inference(program, allow_batch_stats=asked.allow_batch_stats)
        notes += _bounded(program)
    return Prepared(inner, program, given, dtype, plan, keymap, switched, norms, notes)


def _prepared_program(
    model: ExportedProgram, inputs: Any, dynamic: Dynamic | None, asked: Asked
) -> Prepared:
    given = infer(model) if inputs is None else as_inputs(inputs)
    module = model.module()
    notes = require_values(module)
    dtype = own_dtype(module)
    if asked.dtype not in (None, dtype):
        raise UsageError(
            f"the exported program computes in {NAMES.get(dtype, dtype)}, and its graph cannot be "
            "cast: constants and casts in it say their type. Cast the module, and export that."
        )
    plan, keymap = _nothing_done(type(module).__name__)
    program: ExportedProgram = model
    named = named_axes(model, dynamic)
    if asked.fold:
        program, plan, keymap, said = _folded(model, given)
        notes += said
    program = _tensors_only(program)
    program.graph_module.meta[AXES] = named
    notes += require_inference(program, allow_batch_stats=asked.allow_batch_stats)
    return Prepared(model, program, given, dtype, plan, keymap, (), (), notes)


def _tensors_only(program: ExportedProgram) -> ExportedProgram:
    """The program with None for every number that it returns: torch's exporter knows none."""
    returned = program.graph.output_node().args[0]
    assert isinstance(returned, (tuple, list))
    specs = program.graph_signature.output_specs
    numbers = [
        index
        for index, value in enumerate(returned)
        if specs[index].kind is OutputKind.USER_OUTPUT and value is not None and not _tensor(value)
    ]
    if not numbers:
        return program
    with quiet():
        program = copy.deepcopy(program)
    output = program.graph.output_node()
    values = list(output.args[0])
    for index in numbers:
        values[index] = None
    output.args = (tuple(values),)
    for index in numbers:
        nothing = ConstantArgument(name="", value=None)
        program.graph_signature.output_specs[index].arg = nothing
    return program


def _tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def _require_running(model: nn.Module, example: Inputs, given: Inputs, axes: Axes) -> None:
    """Raise CannotTrace where the model draws random numbers, does not run on its example, or not
    on `given`, which is the example made larger."""
    try:
        require_steady(model, given)
        return
    except NormsurgeryError:
        raise
    except Exception as error:  # a model may fail in any way
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        why, name = f"{type(error).__name__}: {first}", type(model).__name__
    if given is example or not _runs(model, example):
        raise CannotTrace(f"{name} does not run on its inputs ({why}). Give inputs that it takes.")
    grown = [axis for axis in axes.axes if axis.size == 1]
    told = ", ".join(f"axis {axis.axis} of {axis.input} ({axis.name})" for axis in grown)
    raise CannotTrace(
        f"{name} does not run with {told} at size 2: {why}. Leave that axis out of dynamic."
    )


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    try:
        with torch.no_grad():
            inputs.call(eval_copy(model))
    except Exception:  # a model may fail in any way
        return False
    return True


def _training(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that are in train mode; "" is the model itself."""
    if not has_mode(model):
        return ()
    return tuple(path for path, module in model.named_modules() if module.training)


def _bounded(program: ExportedProgram) -> tuple[str, ...]:
    """What sizes the dynamic axes may have, where the model does not take every one."""
    names = axis_names(program)
    notes = []
    for symbol, limits in program.range_constraints.items():
        name, least, most = names.get(str(symbol)), limits.lower, limits.upper
        if name and most.is_finite and most != int_oo:
            notes.append(f"{name} is {most} at most: the model holds tables of that length")
        if name and least > 1:
            notes.append(f"{name} is {least} at least")
    return tuple(notes)


def _nothing_done(name: str) -> tuple[Plan, KeyMap]:
    plan = Plan(model=name, steps=(), versions=versions())
    return plan, KeyMap(plan)


def _folded(model: Any, inputs: Inputs) -> tuple[Any, Plan, KeyMap, tuple[str, ...]]:
    """The model folded; as it is, with a note, where a fold is not possible at all."""
    from normsurgery.folding.folding import fold

    try:
        with quiet():
            folded, report = fold(model, inputs=inputs, eval=True, verify=False)
    except NormsurgeryError as error:
        name = type(model).__name__
        return model, *_nothing_done(name), (f"not folded: {error}",)
    return folded, report.plan, report.keymap, tuple(f"fold: {note}" for note in report.notes)
