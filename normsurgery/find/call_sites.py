"""Where in the owner's forward a call or a formula stands."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from types import CodeType, FunctionType

from torch import fx, nn

from normsurgery.find.candidates import NotProven
from normsurgery.find.events import Event
from normsurgery.graph import Flow, FrameRecord
from normsurgery.graph.nodes import frames, maker, name_of
from normsurgery.graph.positions import (
    forward_of,
    function_name,
    node_at,
    source_hash,
    syntax_of,
)
from normsurgery.survey import CallSite, Origin, Span


def call_site(
    flow: Flow,
    original: nn.Module,
    owner: nn.Module,
    event: Event,
    output: fx.Node,
    operations: Sequence[fx.Node],
    start: fx.Node,
) -> CallSite:
    """The CallSite of the operations that make `output` from `start` inside `owner`.

    Raises NotProven where no expression of the forward has the output as its value.
    """
    if isinstance(owner, fx.GraphModule):
        return _node_site(owner, output, start)
    frame = _forward_frame(original, owner, event.frames)
    if frame is None or frame.code is None or frame.span is None:
        raise NotProven("it stands outside any forward of a module")
    last = maker(output)
    finish = _in_frame(last, frame.serial) if last is not None else None
    if finish is None or finish.span is None or not _is_value_of(flow, output, finish):
        raise NotProven(
            "it stands inside a function that does more than normalise, outside any forward"
        )
    spans = [_in_frame(node, frame.serial) for node in operations]
    if any(found is None for found in spans):
        raise NotProven("its statements are spread over several forwards")
    function = forward_of(type(original), frame.code)
    if function is None:
        raise NotProven("it stands outside any forward of a module")
    try:
        hashed = source_hash(function)
    except (OSError, TypeError) as error:
        raise NotProven("the source of its forward is not there to be rewritten") from error
    begin = next((f for f in spans if f is not None), finish)
    return CallSite(
        function=function_name(function, type(original)),
        source_hash=hashed,
        output=finish.span,
        input=_origin(start, begin, frame.serial, function),
        region=tuple(dict.fromkeys(f.span for f in spans if f is not None and f.span)),
    )


def by_place(original: nn.Module, owner: nn.Module, events: Sequence[Event]) -> list[list[Event]]:
    """The events by the expression of the owner's forward that runs them.

    A helper that the forward calls at two places stands at both, and each of them is rewritten by
    itself; what a loop runs again stands at one.
    """
    found: dict[Span | None, list[Event]] = {}
    for event in events:
        frame = _forward_frame(original, owner, event.frames)
        found.setdefault(None if frame is None else frame.span, []).append(event)
    return list(found.values())


def require_last_of_its_place(
    flow: Flow, original: nn.Module, owner: nn.Module, event: Event
) -> None:
    """Raises NotProven where a helper does more after the event, in this one of its runs."""
    frame = _forward_frame(original, owner, event.frames)
    if frame is None or event.frames[0].serial == frame.serial:
        return  # no helper: the expression is the norm's own
    if not _is_value_of(flow, event.output, frame):
        raise NotProven("the method that normalises does more in some of its runs")


def _forward_frame(
    original: nn.Module, owner: nn.Module, running: tuple[FrameRecord, ...]
) -> FrameRecord | None:
    """The outermost frame of the innermost run of the owner: what a call of it starts with."""
    found = None
    for frame in running:
        if frame.module is not owner:
            break
        if frame.code is not None and _is_forward(original, frame.code):
            found = frame
    return found


def _is_forward(original: nn.Module, code: CodeType) -> bool:
    """A forward itself, not a decorator's wrapper around it (which keeps its own code name)."""
    return code.co_name == "forward" and forward_of(type(original), code) is not None


def _in_frame(node: fx.Node, serial: int) -> FrameRecord | None:
    return next((frame for frame in frames(node) if frame.serial == serial), None)


def _is_value_of(flow: Flow, output: fx.Node, frame: FrameRecord) -> bool:
    """The output is what the expression gives: nothing later belongs to the same expression."""
    made_by = maker(output)
    for node in flow.after(made_by) if made_by is not None else ():
        found = _in_frame(node, frame.serial)
        if found is not None:
            return found.span != frame.span
    return True


def _origin(value: fx.Node, frame: FrameRecord, serial: int, function: FunctionType) -> Origin:
    names = [name for name, bound in frame.names.items() if bound is value]
    # Two names of one value may be two values in another call: what is written there is meant.
    written = names_at(function, frame.span) if len(names) > 1 else ()
    name = next((n for n in names if n in written), next(iter(names), None))
    made_by = maker(value)
    made_in = _in_frame(made_by, serial) if made_by is not None else None
    span: Span | None = made_in.span if made_in is not None else None
    # Where a named value was made may differ from run to run (`if self.training`).
    return Origin(name, span if name is None else None)


def names_at(function: FunctionType, span: Span | None) -> tuple[str, ...]:
    """The names that the expression at the span reads."""
    found = None if span is None else node_at(syntax_of(function), span)
    names = ast.walk(found) if found is not None else ()
    return tuple(node.id for node in names if isinstance(node, ast.Name))


def _node_site(owner: fx.GraphModule, output: fx.Node, start: fx.Node) -> CallSite:
    node = _node_of(owner, output)
    if node is None:
        raise NotProven("no node of the graph has its output")
    return CallSite("", "", None, Origin(_node_of(owner, start)), (), node)


def _node_of(owner: fx.GraphModule, value: fx.Node) -> str | None:
    """The name of the user's node that made the value."""
    made_by, name = maker(value), name_of(value)
    if made_by is not None:
        return next((f.node for f in frames(made_by) if f.module is owner), None)
    if name is None or value.op != "placeholder":
        return None
    placeholders = [node.name for node in owner.graph.nodes if node.op == "placeholder"]
    place = int(name.removeprefix("input "))
    return placeholders[place] if place < len(placeholders) else None
