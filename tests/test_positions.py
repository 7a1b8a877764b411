"""Positions of running frames in the source, which are how a site is found again."""

from __future__ import annotations

import ast
import sys

from models.owner_sites import inner_forward
from models.owners import IfTraining, doubled, x
from torch import nn

from normsurgery.flow import positions


def probe(value, spans_seen):
    spans_seen.append(positions.span_of(sys._getframe(1)))
    return value


def test_positions_of_running_frames():
    """Columns off by the indent, or lines off by a decorator, point at another expression."""
    seen: list = []

    class Probed(nn.Module):
        @doubled
        def forward(self, x):
            text = "éé"
            y = probe(x, seen)
            y = probe(
                y + len(text),
                seen,
            )
            return y.add(1).mul(probe(y, seen))

    Probed()(x())
    function = inner_forward(Probed)
    tree = positions.syntax_of(function)
    found = [ast.unparse(positions.node_at(tree, span)) for span in seen]
    assert found == ["probe(x, seen)", "probe(y + len(text), seen)", "probe(y, seen)"]


def test_method_chain_over_lines_is_found():
    """The bytecode starts such a call at the method's name, the syntax at its receiver."""
    seen: list = []

    class Watched:
        def __init__(self, value):
            self.value = value

        def again(self, value):
            seen.append(positions.span_of(sys._getframe(1)))
            return self

    class Chained(nn.Module):
        def forward(self, x):
            return (
                Watched(x)
                .again(1)
                .again(
                    2,
                )
            )

    Chained()(x())
    tree = positions.syntax_of(Chained.forward)
    found = [ast.unparse(positions.node_at(tree, span)) for span in seen]
    assert found == ["Watched(x).again(1)", "Watched(x).again(1).again(2)"]


def test_function_name_is_of_the_defining_class():
    """An inherited forward has the source of its base."""

    class Child(IfTraining):
        pass

    name = positions.function_name(Child.forward, Child)
    assert name == f"{IfTraining.__module__}:IfTraining.forward"
    assert positions.function_name(Child.forward.__code__, Child) == name
