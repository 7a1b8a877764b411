"""blame(): given two models, the first operation that diverges; given a plan, its step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from normsurgery.blaming.steps import StepsBlame, blame_steps
from normsurgery.errors import UsageError
from normsurgery.inputs import Inputs, as_inputs
from normsurgery.plans import Plan
from normsurgery.verifying import sides
from normsurgery.verifying.stages import Blame

if TYPE_CHECKING:
    from torch import nn

    from normsurgery.verifying.sides import Model


@overload
def blame(
    a: nn.Module, b: Plan, inputs: Any = None, *, seed: int = 0, hard: bool = True
) -> StepsBlame | None: ...


@overload
def blame(
    a: Model, b: Model, inputs: Any = None, *, seed: int = 0, hard: bool = True
) -> Blame | None: ...


def blame(
    a: Any, b: Any, inputs: Any = None, *, seed: int = 0, hard: bool = True
) -> Blame | StepsBlame | None:
    """Name the first operation at which `b` leaves `a`; None if nothing diverges.

    The graph of `b` is gone through in float64, every node fed with the values that the source has
    there: what is wrong then is wrong by itself, and its node is named. Where the graph says what
    the source says, onnxruntime's kernels are put to the same test.

    Args:
        a: the source, which is right: a module, an ExportedProgram, an ONNX model, or a path of a
            file that holds one (or `package.module:factory`).
        b: the ONNX model, or its path. Or a Plan for the module `a`: then the steps that broke a
            promise are named (see StepsBlame).
        inputs: as `verify` takes them.
        hard: False leaves it at the example.

    Neither is changed. Raises UsageError where `b` is no ONNX model, CannotRead and CannotTrace as
    `verify` does.
    """
    given = None if inputs is None else as_inputs(inputs)
    if isinstance(b, Plan):
        return blame_steps(a, b, given)
    if not sides.is_onnx(b):
        kind = str(b) if isinstance(b, (str, Path)) else type(b).__name__
        raise UsageError(
            f"blame finds a node of an ONNX graph, and {kind} is none. Export it first, or give "
            "the plan of the swap or fold."
        )
    sides.refuse_same_file(a, b)
    first, second = _source(a, b), sides.loaded(b, a)
    return _of_graph(first, second, given, seed, hard)


def _of_graph(a: Any, b: Any, given: Inputs | None, seed: int, hard: bool) -> Blame | None:
    from normsurgery.blaming.finding import find_fault
    from normsurgery.blaming.setting import set_up
    from normsurgery.verifying.comparing import Options, axes_of, cases_of, prepared

    comparing = prepared(a, b, given, Options(hard=hard, seed=seed))
    cases = cases_of(comparing, axes_of(comparing))
    return find_fault(set_up(comparing, cases, a, seed))


_MOST_KEPT = 2**28  # bytes of a file whose model is kept for the next call
_kept: dict[tuple[str, int, int], Any] = {}


def _source(model: Any, other: Any) -> Any:
    """The source, loaded. The last small torch file is kept: many graphs may be held against it,
    and its export, which costs most, belongs to the object."""
    path = Path(model) if isinstance(model, (str, Path)) else None
    if path is None or path.suffix == ".onnx" or not path.is_file():
        return sides.loaded(model, other)
    facts = path.stat()
    key = (str(path.resolve()), facts.st_mtime_ns, facts.st_size)
    if key not in _kept:
        _kept.clear()
        found = sides.loaded(model, other)
        if facts.st_size > _MOST_KEPT:
            return found
        _kept[key] = found
    return _kept[key]
