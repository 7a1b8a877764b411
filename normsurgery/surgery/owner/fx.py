"""The fx way: a forward that a trace can stand for exactly, traced once per mode and arm.

The owner's children are leaves. An arm is one choice of None or given for every argument that is
None by default, and of True or False for every argument that is a bool by default; all of them are
traced, whether a recorded call uses them or not. In each graph the norm's node becomes a call of
the new module; the new forward picks the graph by `self.training` and its arguments.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, FunctionType
from typing import Any

from torch import fx, nn

from normsurgery.errors import CannotRewrite
from normsurgery.graph.positions import node_at, span_of, syntax_of
from normsurgery.surgery.owner.graphs import drop_updates, erase, mutates
from normsurgery.surgery.owner.install import original_class
from normsurgery.surgery.owner.plain import check_plain
from normsurgery.surgery.owner.prune import Definition
from normsurgery.surgery.owner.reads import readers
from normsurgery.surgery.owner.rewriting import Placement, Rewriting, check_distinct, tensor_names
from normsurgery.surgery.owner.source import dressed, located
from normsurgery.survey import Span
from normsurgery.treecopy import tree_copy

GIVEN = "given"
MOST_ARMS = 16
Arm = Mapping[str, Any]  # argument -> None, True, False, or GIVEN
_numbers = itertools.count()


@dataclass(frozen=True)
class _Traced:
    training: bool
    arm: Arm
    graph: fx.Graph


def rewriting(owner: nn.Module, placements: Sequence[Placement]) -> Rewriting:
    """The owner's forward as graphs with every placement's node replaced. Raises CannotRewrite."""
    check_distinct(placements)
    outer, inner = located(owner, placements[0])
    if outer is not inner:
        raise CannotRewrite("a trace cannot stand for a decorator")
    definition = syntax_of(inner)
    check_plain(definition, inner, owner, _only_of_norms(definition, placements))
    traced = [
        _trace(owner, inner, arm, training, placements)
        for arm in _arms(inner)
        for training in (False, True)
    ]
    names = list(
        dict.fromkeys(name for p in placements for name in tensor_names(owner, p).values())
    )
    for one in traced:
        drop_updates(one.graph, names)
    read = _still_read(owner, inner, traced, names)
    return Rewriting(
        way="fx",
        forward=_forward(definition, inner, traced),
        moved=tuple(name for name in names if name not in read),
        kept=read,
    )


def _only_of_norms(definition: Definition, placements: Sequence[Placement]) -> set[ast.AST]:
    """The nodes that belong to a norm's output expression and not to the value it normalises."""
    nodes: set[ast.AST] = set()
    for placement in placements:
        spans = {placement.call.output, *placement.call.region} - {None}
        origin = placement.call.input.span
        kept = node_at(definition, origin) if origin is not None else None
        inside = set(ast.walk(kept)) if kept is not None else set()
        for span in spans:
            found = node_at(definition, span) if span is not None else None
            around = set(ast.walk(found)) if found is not None else set()
            nodes |= around - inside if kept is None or kept not in around else set()
    return nodes


def _arms(function: FunctionType) -> list[Arm]:
    choices: dict[str, tuple[Any, ...]] = {}
    for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
        if parameter.default is None:
            choices[name] = (None, GIVEN)
        elif isinstance(parameter.default, bool):
            choices[name] = (False, True)
        else:
            choices[name] = (GIVEN,)
    values = itertools.product(*choices.values())
    arms: list[Arm] = [dict(zip(choices, chosen, strict=True)) for chosen in values]
    if len(arms) > MOST_ARMS:
        raise CannotRewrite(f"its optional arguments make {len(arms)} arms to trace")
    return arms


class _Tracer(fx.Tracer):
    """Traces with every child as a leaf; knows for each node the expression it stands for, and for
    each norm the value that its input's name had when the norm began."""

    proxy_buffer_attributes = True

    def __init__(self, function: FunctionType, placements: Sequence[Placement]) -> None:
        super().__init__()
        self.function, self.placements = function, placements
        self.spans: dict[fx.Node, Span] = {}
        self.inputs: dict[str, fx.Node] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frame = self._frame()
        span = span_of(frame) if frame is not None else None
        if frame is not None and span is not None:
            self.spans[node] = span
            for placement in self.placements:
                self._note_input(placement, span, frame)
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            raise CannotRewrite("a trace would keep a tensor as a constant")
        return node

    def _note_input(self, placement: Placement, span: Span, frame: FrameType) -> None:
        call = placement.call
        name = call.input.name
        if name is None or placement.name in self.inputs:
            return
        value = frame.f_locals.get(name)
        if span in (call.output, *call.region) and isinstance(value, fx.Proxy):
            self.inputs[placement.name] = value.node

    def _frame(self) -> FrameType | None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code is not self.function.__code__:
            frame = frame.f_back
        return frame


def _trace(
    owner: nn.Module,
    function: FunctionType,
    arm: Arm,
    training: bool,
    placements: Sequence[Placement],
) -> _Traced:
    copied = tree_copy(owner)
    copied.training = training
    copied.__class__ = type("Traced", (type(owner),), {"forward": _one_arm(function, arm)})
    tracer = _Tracer(function, placements)
    try:
        graph = tracer.trace(copied)
    except CannotRewrite:
        raise
    except Exception as error:  # a trace may fail with anything the user's code raises on proxies
        raise CannotRewrite(f"it cannot be traced ({type(error).__name__})") from error
    for placement in placements:
        _replace(tracer, graph, placement)
    return _Traced(training, arm, graph)


def _one_arm(function: FunctionType, arm: Arm) -> Callable[..., Any]:
    """`function` with only the arguments that are given in this arm, in order."""
    given = [name for name, value in arm.items() if value is GIVEN]
    kinds = inspect.signature(function).parameters
    passed = [
        (name if value is GIVEN else repr(value))
        if kinds[name].kind is inspect.Parameter.POSITIONAL_ONLY
        else f"{name}={name if value is GIVEN else repr(value)}"
        for name, value in arm.items()
    ]
    text = f"def forward({', '.join(['self', *given])}):\n"
    text += f"    return traced_forward({', '.join(['self', *passed])})\n"
    return _defined(text, "forward", {"traced_forward": function})


def _replace(tracer: _Tracer, graph: fx.Graph, placement: Placement) -> None:
    call = placement.call
    outputs = [node for node, span in tracer.spans.items() if span == call.output]
    if not outputs:
        return  # this mode or arm does not run the norm
    if len(outputs) > 1:
        raise CannotRewrite("several operations stand at the norm's expression")
    output = outputs[0]
    value = _input_of(tracer, placement, output)
    if any(mutates(node) for node in _between(tracer, graph, placement, output)):
        raise CannotRewrite("a trace does not show what its norm does in place")
    with graph.inserting_before(output):
        new = graph.call_module(placement.name, (value,))
    output.replace_all_uses_with(new)
    erase(output, keep=value)


def _between(
    tracer: _Tracer, graph: fx.Graph, placement: Placement, output: fx.Node
) -> Iterator[fx.Node]:
    """From the norm's first operation up to its output."""
    began = False
    for node in graph.nodes:
        began = began or tracer.spans.get(node) in placement.call.region
        if node is output:
            return
        if began:
            yield node


def _input_of(tracer: _Tracer, placement: Placement, output: fx.Node) -> fx.Node:
    named = tracer.inputs.get(placement.name)
    if named is not None:
        return named
    made_at = placement.call.input.span
    found = [node for node, span in tracer.spans.items() if span == made_at]
    if len(found) != 1:
        raise CannotRewrite("the trace does not show which value the norm normalises")
    return found[0]


def _still_read(
    owner: nn.Module, function: FunctionType, traced: Sequence[_Traced], names: Sequence[str]
) -> dict[str, str]:
    nothing = ast.parse("def forward(self): pass").body[0]
    read = {
        name: f"{where} reads it"
        for name, where in readers(original_class(owner), nothing, function, names).items()
    }
    for one in traced:
        for node in one.graph.nodes:
            if node.op == "get_attr" and node.target in names:
                read[str(node.target)] = "forward reads it"
    return read


def _forward(
    definition: Definition, original: FunctionType, traced: Sequence[_Traced]
) -> FunctionType:
    """A function with the original's signature that calls the graph of the mode and the arm."""
    self_name = [*definition.args.posonlyargs, *definition.args.args][0].arg
    graphs: dict[str, Any] = {}
    lines = [f"def {definition.name}({_bare_signature(definition)}):"]
    for number, one in enumerate(traced):
        name = f"graph_{number}"
        code = one.graph.python_code(root_module="self")
        graphs[name] = _defined(code.src, "forward", dict(code.globals))
        given = [argument for argument, value in one.arm.items() if value is GIVEN]
        conditions = " and ".join(_conditions(self_name, one, original))
        lines.append(f"    if {conditions}:")
        lines.append(f"        return {name}({', '.join([self_name, *given])})")
    function = _defined("\n".join(lines) + "\n", definition.name, graphs)
    function.__defaults__ = original.__defaults__
    return dressed(function, original)


def _conditions(self_name: str, one: _Traced, function: FunctionType) -> Iterator[str]:
    yield f"{self_name}.training" if one.training else f"not {self_name}.training"
    for name, value in one.arm.items():
        if isinstance(value, bool):
            yield name if value else f"not {name}"
        elif inspect.signature(function).parameters[name].default is None:
            yield f"{name} is None" if value is None else f"{name} is not None"


def _bare_signature(definition: Definition) -> str:
    """The arguments without annotations; every default is None, to be set on the function."""
    arguments = definition.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [
        None if default is None else ast.Constant(None) for default in arguments.kw_defaults
    ]
    return ast.unparse(arguments)


def _defined(text: str, name: str, namespace: dict[str, Any]) -> FunctionType:
    """The function that `text` defines, with its source where tracebacks look for it."""
    filename = f"<normsurgery graph {next(_numbers)}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    exec(compile(text, filename, "exec", dont_inherit=True), namespace)
    function = namespace[name]
    assert isinstance(function, FunctionType)
    return function
