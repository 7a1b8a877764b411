"""Where an expression stands in a forward after others of its expressions were rewritten."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import FunctionType

from normsurgery.graph.positions import node_at, source_hash, span_at, syntax_of
from normsurgery.surgery.attribute_chains import Definition
from normsurgery.survey import CallSite, Origin, Span

Places = Mapping[Span, ast.AST | None]


def places_of(definition: Definition, calls: Sequence[CallSite]) -> Places:
    """The nodes that the calls speak of, before any of the tree is edited."""
    return {span: node_at(definition, span) for call in calls for span in _spans(call)}


def followed(
    calls: Sequence[CallSite], places: Places, definition: Definition, function: FunctionType
) -> dict[CallSite, CallSite]:
    """The calls as they stand in `function`, which was compiled from the edited `definition`.

    Those of which a part went with the edit are not there.
    """
    if not calls:
        return {}
    made = syntax_of(function)
    if ast.dump(definition) != ast.dump(made):  # its source does not spell every tree exactly
        return {}
    pairs = zip(ast.walk(definition), ast.walk(made), strict=True)
    now = {id(old): new for old, new in pairs if isinstance(new, (ast.expr, ast.stmt))}
    spans = {span: span_at(now[id(node)]) for span, node in places.items() if id(node) in now}
    hashed = source_hash(function)
    return {
        call: _moved(call, spans, hashed)
        for call in calls
        if all(span in spans for span in _spans(call))
    }


def _spans(call: CallSite) -> set[Span]:
    return {s for s in (call.output, call.input.span, *call.region) if s is not None}


def _moved(call: CallSite, spans: Mapping[Span, Span], hashed: str) -> CallSite:
    given = call.input.span
    return replace(
        call,
        source_hash=hashed,
        output=None if call.output is None else spans[call.output],
        input=Origin(call.input.name, None if given is None else spans[given]),
        region=tuple(spans[span] for span in call.region),
    )
