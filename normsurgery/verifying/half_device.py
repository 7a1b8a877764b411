"""What a device that computes in half precision would make of a model, seen on a CPU alone.

onnxruntime's CPU provider casts to float32 around every operator that has no half kernel, so that
an fp16 graph agrees there and overflows on a GPU. Here every operation of the traced program is
computed in float64 from what was stored, and its result stored in the type a device stores it in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from normsurgery.errors import UsageError
from normsurgery.inputs import Inputs, as_inputs
from normsurgery.numerics.precision import lifted
from normsurgery.onnxfile.origins import source_line
from normsurgery.verifying.judge import Verdict, judge
from normsurgery.verifying.runners import same_randomness
from normsurgery.verifying.values import ASSERTIONS, SourceValues

if TYPE_CHECKING:
    import onnx

    from normsurgery.onnxfile.reading import OnnxFile

HALF_TYPES = (torch.float16, torch.bfloat16)
_DIGITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}
_SHOWN = 3


@dataclass(frozen=True)
class DeviceEvent:
    """One operation whose result the type cannot hold, though its inputs are held.

    kind: "overflow": infinite or NaN where float64 is finite; "underflow": all zero where it is
        not. node: in the traced program; operator: what it calls. module: path in the model.
    source: "file.py:123 in forward: code". largest: |float64 value| where it is lost (the largest
        of them). count: of how many positions out of `total`.
    """

    kind: Literal["overflow", "underflow"]
    node: str
    operator: str
    module: str
    source: str
    dtype: torch.dtype
    largest: float
    count: int
    total: int

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        info = torch.finfo(self.dtype)
        over = f"overflows {name} (largest {info.max:.5g})"
        under = f"vanishes in {name} (smallest {info.smallest_normal * info.eps:.3g})"
        place = f" of {self.module}" if self.module else ""
        text = (
            f"{self.node} ({self.operator}){place} {over if self.kind == 'overflow' else under}: "
            f"{self.largest:.4g} in float64, at {self.count} of {self.total} positions"
        )
        return f"{text}; {self.source}" if self.source else text


@dataclass(frozen=True)
class HalfDevice:
    """One run of a program as a half-precision device would do it.

    events: in the order of the program. outputs: name -> what it gives, in the program's dtypes.
    verdicts: of these outputs, held against float64 and against the same arithmetic with an
    unlimited range of exponents: a lost value that harms no output is an event, and no failure.
    """

    dtype: torch.dtype
    events: tuple[DeviceEvent, ...]
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)

    @property
    def first(self) -> DeviceEvent | None:
        """The operation to mend: the first that overflows, else the first that vanishes."""
        overflows = [event for event in self.events if event.kind == "overflow"]
        return next(iter(overflows or self.events), None)

    @property
    def harmful(self) -> bool:
        """Whether the narrow range of the type spoils an output."""
        return any(
            verdict.passed is False or any((verdict.nonfinite or {}).values())
            for verdict in self.verdicts.values()
        )

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if not self.events:
            return f"a device that stores every result in {name} loses nothing"
        shown = "; ".join(str(event) for event in self.events[:_SHOWN])
        more = f"; and {len(self.events) - _SHOWN} more" if len(self.events) > _SHOWN else ""
        harm = "spoils the output" if self.harmful else "does no harm to the output"
        return f"on a device that stores every result in {name}, which {harm}: {shown}{more}"


@dataclass(frozen=True)
class Wider:
    """Whether onnxruntime computes in float32 what the graph says in half precision.

    casts: Cast nodes that it put in. half: floating values of the graph in half precision.
    """

    runner: str
    casts: int
    half: int

    @property
    def wider(self) -> bool:
        return self.casts > 0

    def __str__(self) -> str:
        if not self.half:
            return f"the graph computes nothing in half precision ({self.runner})"
        if not self.wider:
            return f"onnxruntime computes in half precision as the graph says ({self.runner})"
        return (
            f"onnxruntime ({self.runner}) put in {self.casts} casts and computes in float32 what "
            f"the graph says in half precision: that it is right here proves nothing about a "
            f"device that computes in half precision"
        )


def overflow_on_device(
    program: ExportedProgram, inputs: Any, dtype: torch.dtype, *, seed: int = 0
) -> HalfDevice:
    """Run a program as a device would that computes in `dtype`: float16 or bfloat16.

    Weights and floating inputs are rounded to `dtype`; types follow torch's rules from there, so
    what the model casts to float32 is stored in float32. Sums inside one operation are exact, as
    devices accumulate them in float32. The program is left as it is.

    Raises UsageError for another dtype, CannotTrace where the program does not take the inputs, and
    NotFloat64 where an operation has no float64 kernel.
    """
    if dtype not in HALF_TYPES:
        raise UsageError(f"a half-precision device computes in float16 or bfloat16, not {dtype}.")
    given = as_inputs(inputs)
    source = _Program(_functional(program), dtype)
    truth = source.float64(given, seed=seed)
    device = source.emulated(given, seed, narrow=True)
    unlimited = source.emulated(given, seed, narrow=False, shadows=device.shadows)
    names = [name for name in source.outputs if name in device.values and name in truth]
    outputs = {name: device.stored(name) for name in names}
    return HalfDevice(
        dtype,
        tuple(_events(source, device, truth)),
        outputs,
        {
            name: judge(value.double(), truth[name], unlimited.values[name], precision=dtype)
            for name, value in outputs.items()
        },
    )


def computes_wider(
    model: OnnxFile | onnx.ModelProto, runner: str = "cpu", *, level: str = "all"
) -> Wider:
    """Read from the graph that onnxruntime makes of it. Raises CannotRun as a Session does."""
    from normsurgery.onnxfile.reading import OnnxFile, floating_values, value_types
    from normsurgery.onnxfile.sessions import optimised

    proto = model.proto if isinstance(model, OnnxFile) else model
    types = value_types(proto)
    half = sum(types[name].dtype in HALF_TYPES for name in floating_values(proto))
    made = optimised(proto, level, runner) if half else proto
    casts = sum(
        node.op_type == "Cast" and node.name.startswith("InsertedPrecisionFreeCast")
        for node in made.graph.node
    )
    return Wider(runner, casts, half)


class _Program(SourceValues):
    """A program; a device rounds its weights to `dtype`, unless it was traced with such."""

    def __init__(self, program: ExportedProgram, dtype: torch.dtype) -> None:
        super().__init__(program)
        held = [t.dtype for t in program.state_dict.values() if isinstance(t, Tensor)]
        self._rounds_to = None if dtype in held else dtype

    def emulated(
        self,
        inputs: Inputs,
        seed: int,
        *,
        narrow: bool,
        shadows: Mapping[fx.Node, Any] | None = None,
    ) -> _Emulation:
        """narrow: the range of exponents is that of the types; else it is float64's.

        shadows: those of another run of the program, whose types are the same.
        """
        leaves = list(self._leaves(inputs, Tensor.clone))
        run = _Emulation(self._graph, self._rounds_to, narrow=narrow)
        run.shadows.update(shadows or {})
        with torch.no_grad(), same_randomness(seed), lifted():
            run.run(*leaves, enable_io_processing=False)
        return run


class _Emulation(fx.Interpreter):
    """Every value in float64, rounded to the type that torch stores it in.

    values, types: of each node that gives a floating tensor.
    """

    def __init__(
        self, graph: fx.GraphModule, rounds_to: torch.dtype | None, *, narrow: bool
    ) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self._rounds_to = rounds_to
        self.values: dict[str, Tensor] = {}
        self.types: dict[str, torch.dtype] = {}
        self._narrow = narrow
        self.shadows: dict[fx.Node, Any] = {}  # what torch would have: shapes and types alone

    def stored(self, name: str) -> Tensor:
        return self.values[name].to(self.types[name])

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and _operator(n).rpartition("::")[2] in ASSERTIONS:
            return None
        result = super().run_node(n)
        if n.op == "output":
            return result
        if n not in self.shadows:
            made = self._traced if n.op == "call_function" else self._given
            self.shadows[n] = made(n, result)
        shadow = self.shadows[n]
        result = self._as_stored(result, shadow)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.values[n.name], self.types[n.name] = result, shadow.dtype
        return result

    def _given(self, n: fx.Node, value: Any) -> Any:
        """A weight or an input, in the type that the program takes or that it is rounded to."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return tree_map(_shadow, value)
        traced = n.meta.get("val")
        dtype = traced.dtype if isinstance(traced, Tensor) else value.dtype
        return _shadow(value, self._rounds_to or dtype)

    def _traced(self, n: fx.Node, result: Any) -> Any:
        """Shapes and types of what torch itself would give for stored inputs."""
        args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), lambda node: self.shadows[node])
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                return tree_map(_shadow, n.target(*args, **kwargs))  # type: ignore[operator]
        except Exception:  # what has no meta kernel depends on values
            return tree_map(_shadow, n.meta.get("val", result))

    def _as_stored(self, result: Any, shadow: Any) -> Any:
        values, structure = tree_flatten(result)
        shadows = tree_leaves(shadow)
        if len(values) != len(shadows):
            return result
        pairs = zip(values, shadows, strict=True)
        return tree_unflatten([self._rounded(v, s) for v, s in pairs], structure)

    def _rounded(self, value: Any, shadow: Any) -> Any:
        if not isinstance(value, Tensor) or not isinstance(shadow, Tensor):
            return value
        if not value.is_floating_point() or shadow.dtype not in _DIGITS:
            return value
        with torch.utils._python_dispatch._disable_current_modes():
            if self._narrow:
                return value.to(shadow.dtype).double()
            return _to_digits(value.double(), _DIGITS[shadow.dtype])


def _shadow(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A tensor of the same shape and type (or of `dtype`) without values."""
    if not isinstance(value, Tensor):
        return value
    with torch.utils._python_dispatch._disable_current_modes():
        return torch.empty(tuple(value.shape), dtype=dtype or value.dtype, device="meta")


def _to_digits(value: Tensor, digits: int) -> Tensor:
    """Rounded to so many binary digits, at any exponent."""
    mantissa, exponent = torch.frexp(value)
    rounded = torch.ldexp(
        torch.round(torch.ldexp(mantissa, torch.tensor(digits))), exponent - digits
    )
    return torch.where(value.isfinite(), rounded, value)


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Without in-place operations, after which a value would not be what its node gave."""
    schemas = (getattr(node.target, "_schema", None) for node in program.graph.nodes)
    if any(schema is not None and schema.is_mutable for schema in schemas):
        functional: ExportedProgram = program.run_decompositions({})
        return functional
    return program


def _events(
    source: _Program, device: _Emulation, truth: Mapping[str, Tensor]
) -> Iterator[DeviceEvent]:
    for node in source.program.graph.nodes:
        if node.name not in device.values or node.name not in truth:
            continue
        if all(_is_sound(device, truth, parent) for parent in node.all_input_nodes):
            weight = source.constants.get(node.name, "")
            yield from _event(
                node, device.values[node.name], truth[node.name], device.types[node.name], weight
            )


def _is_sound(device: _Emulation, truth: Mapping[str, Tensor], node: fx.Node) -> bool:
    """Nothing was lost in this value yet, so that a loss after it is the operation's own."""
    if node.name not in device.values or node.name not in truth:
        return True
    value, exact = device.values[node.name], truth[node.name]
    if value.shape != exact.shape or bool((~value.isfinite() & exact.isfinite()).any()):
        return False
    return not _vanished(value, exact)


def _vanished(value: Tensor, exact: Tensor) -> bool:
    """All of it is zero; single values that vanish are common, and harm nobody."""
    return value.numel() > 0 and bool(((value == 0) & (exact != 0)).all())


def _event(
    node: fx.Node, value: Tensor, exact: Tensor, dtype: torch.dtype, weight: str = ""
) -> Iterator[DeviceEvent]:
    if dtype not in HALF_TYPES or value.shape != exact.shape or value.numel() == 0:
        return
    kind: Literal["overflow", "underflow"] = "overflow"
    lost = ~value.isfinite() & exact.isfinite()
    if not bool(lost.any()):
        kind, lost = "underflow", value == 0
        if not _vanished(value, exact):
            return
    yield DeviceEvent(
        kind,
        node.name,
        _operator(node) if node.op == "call_function" else "a weight" if weight else "an input",
        weight or _module(node),
        source_line(node.meta.get("stack_trace")),
        dtype,
        float(exact[lost].abs().max()),
        int(lost.sum()),
        value.numel(),
    )


def _operator(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name if schema is not None else getattr(node.target, "__name__", node.target))


def _module(node: fx.Node) -> str:
    """Path of the innermost module that the node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]) if paths else ""
