"""From a model to an exported program, with dynamic axes, or one sentence that says why not."""

from __future__ import annotations

import linecache
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normsurgery.errors import CannotTrace
from normsurgery.exporting.dynamic import Axes, Dynamic, enlarged, resolve
from normsurgery.exporting.guards import least_sizes
from normsurgery.exporting.quiet import quiet
from normsurgery.inputs import Inputs
from normsurgery.inputs.outputs import flatten_outputs
from normsurgery.randomstate import random_state_kept
from normsurgery.treecopy import tree_copy
from normsurgery.wrapped import has_mode

AXES = "normsurgery.axes"  # in the meta of a traced graph: input -> {axis: name}
_GUARDS = "torch.fx.experimental.symbolic_shapes"
_TAKEN_FOR_GRANTED = ("[guard added]", "set_replacement")
_TORCH, _HERE = str(Path(torch.__file__).parent), str(Path(__file__).parent)
_STANDARD = str(Path(logging.__file__).parent.parent)


def trace(model: nn.Module, inputs: Inputs, dynamic: Dynamic | None = None) -> ExportedProgram:
    """The program of `model` in eval mode, without gradients.

    Traced is a copy of the tree, so the model stays as it is. Its outputs are a dict of tensors by
    the names of `flatten_outputs`: no caches, no None, no numbers. An example that is 1 long along
    a dynamic axis is repeated, since a size of 1 would be taken for a fact.

    Args:
        dynamic: as `export` takes it.

    Raises CannotTrace, saying which axis is fixed by which line, which line branches on data, or
    that the model is TorchScript;
    UsageError or UnknownName for a `dynamic` that does not fit the inputs.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CannotTrace(
            f"{type(model).__name__} is TorchScript, which torch.export does not take. Give the "
            "Python model it was made from."
        )
    working = eval_copy(model)
    working.register_forward_hook(_named_outputs)
    axes = resolve(working, inputs, dynamic)
    given = enlarged(working, inputs, axes)
    with random_state_kept(working), quiet():
        while True:
            try:
                return _exported(working, given, axes)
            except Exception as error:  # what torch raises here has no common base
                bounds = _bounds(str(error), axes)
                if not bounds:
                    raise CannotTrace(_sentence(error, working, given, axes)) from error
                axes = resolve(working, given, dynamic, {**axes.bounds, **bounds})


def _bounds(text: str, axes: Axes) -> dict[str, tuple[int, int | None]]:
    """New bounds of dynamic axes that torch says the model has, such as a table of 512 positions,
    or strides that leave nothing of a small image.

    Empty where it says anything else besides: then the axis cannot be had at all.
    """
    named = "|".join(axes.names)
    found = re.findall(rf"^\s*({named}) = (.+)$", text, re.M) if named else []
    bounds: dict[str, tuple[int, int | None]] = {}
    for name, size in least_sizes(text, axes).items():
        least, most = axes.bounds.get(name, (0, None))
        if size > least:
            bounds[name] = (size, most)
    for name, suggested in found:
        least, most = axes.bounds.get(name, (0, None))
        limits = re.fullmatch(rf"Dim\('{name}'(?:, min=(\d+))?(?:, max=(\d+))?\)", suggested)
        if limits is None or ("specialized" in text):
            return {}
        new = (int(limits[1] or least), int(limits[2]) if limits[2] else most)
        if new == (least, most):
            return {}
        bounds[name] = new
    return bounds


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy of the tree in eval mode, with buffers of its own, that keeps no cache."""
    working = tree_copy(model, clone_buffers=True)
    if has_mode(working):
        working.eval()
    for module in working.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None):
            config.use_cache = False  # type: ignore[union-attr]
    return working


def _named_outputs(module: nn.Module, args: Any, output: Any) -> dict[str, Tensor]:
    return flatten_outputs(output)


def _exported(model: nn.Module, inputs: Inputs, axes: Axes) -> ExportedProgram:
    # torch prints the graph of a program that it gives up on
    with torch.no_grad(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        program = torch.export.export(
            model,
            tuple(inputs.args),
            dict(inputs.kwargs),
            dynamic_shapes=axes.shapes,
            strict=False,
        )
    named: dict[str, dict[int, str]] = {}
    for axis in axes.axes:
        named.setdefault(axis.input, {})[axis.axis] = axis.name
    program.graph_module.meta[AXES] = named
    return program


def _sentence(error: Exception, model: nn.Module, inputs: Inputs, axes: Axes) -> str:
    text = str(error)
    for words in (_fixed_axis, _related_axes, _limited_axis):
        said = words(text, axes, lambda: _lines_that_guard(model, inputs, axes))
        if said:
            return said
    return _untraceable(error, model)


def _fixed_axis(text: str, axes: Axes, lines: Callable[[], list[str]]) -> str:
    """An axis that the code takes for a constant."""
    found = re.findall(
        r"You marked (\w+) as dynamic but your code specialized it to .*\((\d+)\)", text
    )
    if not found:
        return ""
    name, size = found[0]
    return (
        f"the dynamic axis {name} ({_where(axes, name)}) is fixed to {size} by the model"
        f"{_by(lines())}. Leave {name} out of dynamic, or write that line without the number."
    )


def _related_axes(text: str, axes: Axes, lines: Callable[[], list[str]]) -> str:
    """Two axes that the code takes for one."""
    found = re.search(r"The values of (\w+) = \S+ and (\w+) = \S+ must always be equal", text)
    if found is None:
        return ""
    first, second = found.groups()
    return (
        f"the dynamic axes {first} ({_where(axes, first)}) and {second} ({_where(axes, second)}) "
        f"must be equal{_by(lines())}. Give both the name {second}."
    )


def _limited_axis(text: str, axes: Axes, lines: Callable[[], list[str]]) -> str:
    """An axis that the code takes only some sizes of."""
    found = re.search(
        r"Not all values of (\w+) = .* satisfy the generated guard (.*?)\.?$", text, re.M
    )
    if found is None:
        return ""
    name, guard = found.groups()
    guard = re.sub(r"L\['([^']+)'\]\.size\(\)\[(\d+)\]", rf"{name}", guard)
    suggested = re.search(rf"^\s*{name} = (.+)$", text, re.M)
    forms = re.sub(rf"\b_{name}\b", "n", suggested.group(1)) if suggested else ""
    told = f" (sizes of the form {forms})" if forms and "Dim(" not in forms else ""
    return (
        f"the dynamic axis {name} ({_where(axes, name)}) cannot take every size: the model needs "
        f"{guard}{told}{_by(lines())}. Leave {name} out of dynamic."
    )


def _where(axes: Axes, name: str) -> str:
    places = [f"axis {axis.axis} of {axis.input}" for axis in axes.axes if axis.name == name]
    return ", ".join(places[:3]) or "no input"


def _by(lines: list[str]) -> str:
    return f" at {lines[0]}" if lines else ""


def _untraceable(error: Exception, model: nn.Module) -> str:
    text = str(error)
    place = re.findall(r'File "([^"]+)", line (\d+), in (\w+)\n\s+(.+)', text)
    where = ""
    if place:
        file, line, function, code = place[-1]
        where = f" at {file}:{line} in {function}: {code.strip()}"
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return (
            f"{type(model).__name__} cannot be traced: what it does next depends on the values of "
            f"its inputs{where}. Write that with torch.where, or torch.cond."
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return (
        f"{type(model).__name__} cannot be traced ({type(error).__name__}: {first[:300]}){where}. "
        "Check that it runs on the inputs, and that torch.export takes it."
    )


def _lines_that_guard(model: nn.Module, inputs: Inputs, axes: Axes) -> list[str]:
    """Where the code asked for a fact about a size, from a second trace that is listened to."""
    with _listening() as places, suppress(Exception):  # it fails again, in the same way
        _exported(model, inputs, axes)
    return list(dict.fromkeys(places))


@contextmanager
def _listening() -> Iterator[list[str]]:
    """The user's lines that run while torch logs that it took a fact about a size for granted."""
    logger, places = logging.getLogger(_GUARDS), list[str]()

    class Watching(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if any(words in record.getMessage() for words in _TAKEN_FOR_GRANTED):
                place = _running_line()
                if place:
                    places.append(place)

    level, propagate, handlers = logger.level, logger.propagate, logger.handlers
    logger.handlers = [Watching(logging.INFO)]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield places
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def _running_line() -> str:
    """The innermost line outside torch of the forward that is running, else that of a torch.nn."""
    own, inside = "", ""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code is not _exported.__code__:
        frame = frame.f_back
        file = frame.f_code.co_filename
        if not own and _is_users(file):
            own = _spelled(frame)
        if file.startswith(str(Path(_TORCH, "nn", "modules"))) and not inside:
            inside = _spelled(frame) if frame.f_code.co_name == "forward" else ""
    reached = frame.f_code is _exported.__code__
    return (own or inside) if reached else ""


def _is_users(file: str) -> bool:
    if file.startswith((_TORCH, _HERE)) or f"{os.sep}sympy{os.sep}" in file:
        return False
    installed = "site-packages" in file
    return Path(file).is_file() and (installed or not file.startswith(_STANDARD))


def _spelled(frame: FrameType) -> str:
    file, line = frame.f_code.co_filename, frame.f_lineno
    code = linecache.getline(file, line).strip()
    return f"{file}:{line} in {frame.f_code.co_name}" + (f": {code}" if code else "")
