"""Where the code of a function may go one way or another, and which instructions tell that it did.

A Control is one place that decides: a test of `if`, `while`, a ternary or a boolean operator, the
next element of a loop, an exception, a match. Its arms are what runs or does not run by it. The
instructions that open a Control or enter an arm are found by source position, so that a tracer
needs to look at nothing else.
"""

from __future__ import annotations

import ast
import dis
import linecache
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import Literal

Kind = Literal["branch", "loop", "handlers", "pick"]
Exit = ast.Return | ast.Break | ast.Continue

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_ROOTS = {
    "<lambda>": ast.Lambda,
    "<listcomp>": ast.ListComp,
    "<setcomp>": ast.SetComp,
    "<dictcomp>": ast.DictComp,
    "<genexpr>": ast.GeneratorExp,
}


@dataclass(frozen=True, eq=False)
class Control:
    """`tests` decide which of `arms` runs; an empty last arm is "nothing of it runs".

    A "pick" has no arms: its one test is an index into modules or the name of an attribute.
    """

    index: int
    kind: Kind
    node: ast.AST
    tests: tuple[ast.expr, ...]
    arms: tuple[tuple[ast.AST, ...], ...]


@dataclass(frozen=True)
class Action:
    """What an instruction tells: a control is reached, one of its arms entered, or all are left."""

    what: Literal["open", "enter", "again", "leave"]
    control: int
    arm: int = 0
    exit: Exit | None = None


@dataclass(eq=False)
class Syntax:
    """The syntax of one code object. `actions` are by bytecode offset."""

    code: CodeType
    root: ast.AST
    controls: list[Control] = field(default_factory=list)
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)
    actions: dict[int, list[Action]] = field(default_factory=dict)
    spans: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    _around: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    _calls: dict[int, ast.Call | None] = field(default_factory=dict)

    def around(self, offset: int) -> tuple[tuple[int, int], ...]:
        """(control, arm) of every arm that the instruction stands in, outermost first.

        An arm of -1: the instruction stands behind a control that may have left the function.
        """
        if offset not in self._around:
            self._around[offset] = tuple(self._controls_around(offset))
        return self._around[offset]

    def _controls_around(self, offset: int) -> Iterator[tuple[int, int]]:
        span = self.spans.get(offset)
        if span is None:
            return
        for control in self.controls:
            for arm, nodes in enumerate(control.arms):
                if any(_within(span, node) for node in nodes):
                    yield control.index, arm
            if isinstance(control.node, ast.stmt) and self._may_cut_off(control, span):
                yield control.index, -1

    def _may_cut_off(self, control: Control, span: tuple[int, int, int, int]) -> bool:
        """Whether an exit in the control's arms can keep the span from running.

        Either the span stands behind the control, or in a loop around both that the exit ends.
        """
        for leaving in self._exits(control):
            until = self.root if isinstance(leaving, ast.Return) else self.loop_of(leaving)
            behind = _position(control.node)[2:] <= span[:2]
            ends_rounds = not isinstance(leaving, ast.Continue) and self._share_loop(control, span)
            if _within(span, until) and (behind or ends_rounds):
                return True
        return False

    def _share_loop(self, control: Control, span: tuple[int, int, int, int]) -> bool:
        loop = self.loop_of(control.node)
        while loop is not self.root and not _within(span, loop):
            loop = self.loop_of(loop)
        return loop is not self.root and not _within(span, control.node)

    def _exits(self, control: Control) -> Iterator[Exit]:
        """The exits in the arms of a control that leave more than the control itself."""
        inside = set(walk_code(control.node))
        for part in (part for arm in control.arms for part in arm):
            for node in walk_code(part):
                if isinstance(node, ast.Return):
                    yield node
                if isinstance(node, (ast.Break, ast.Continue)) and self.loop_of(node) not in inside:
                    yield node

    def loop_of(self, node: ast.AST) -> ast.AST:
        """The loop that a break or continue belongs to; the root for anything outside a loop."""
        while node is not self.root:
            node = self.parents[node]
            if isinstance(node, _LOOPS):
                return node
        return node

    def continuation(self, statement: ast.AST, until: ast.AST) -> list[ast.AST]:
        """What stands behind the statement, outwards to `until` (a loop, or the whole function)."""
        found: list[ast.AST] = []
        while statement is not until:
            parent = self.parents[statement]
            for block in _blocks(parent):
                if statement in block:
                    found.extend(block[block.index(statement) + 1 :])
            if isinstance(parent, _LOOPS) and parent is not until:
                found.extend((*parent.body, *parent.orelse))
            statement = parent
        return found

    def call_at(self, offset: int) -> ast.Call | None:
        """The call that the instruction makes."""
        if offset not in self._calls:
            span = self.spans.get(offset)
            calls = (node for node in walk_code(self.root) if isinstance(node, ast.Call))
            found = next((call for call in calls if span in _call_positions(call)), None)
            self._calls[offset] = found
        return self._calls[offset]


def walk_code(root: ast.AST) -> Iterator[ast.AST]:
    """The nodes of the root, without the bodies of the functions defined in it."""
    yield root
    queue = list(ast.iter_child_nodes(root))
    while queue:
        node = queue.pop(0)
        yield node
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            queue.extend(ast.iter_child_nodes(node))


def _blocks(node: ast.AST) -> Iterator[list[ast.AST]]:
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        block = getattr(node, name, None)
        if isinstance(block, list):
            yield block


@cache
def _definitions(filename: str) -> dict[tuple[str, int], list[ast.AST]]:
    """Every node that a code object may come from, by the code's name and first line."""
    lines = linecache.getlines(filename)
    if not lines:
        return {}
    try:
        tree = ast.parse("".join(lines))
    except (SyntaxError, ValueError):
        return {}
    found: dict[tuple[str, int], list[ast.AST]] = {}
    names = {kind: name for name, kind in _ROOTS.items()}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            found.setdefault((node.name, first), []).append(node)
        elif type(node) in names:
            assert isinstance(node, ast.expr)
            found.setdefault((names[type(node)], node.lineno), []).append(node)
    return found


@cache
def syntax_of_code(code: CodeType) -> Syntax | None:
    """The syntax of a code object, or None where it has no source or the source is another's."""
    spans = _spans(code)
    candidates = _definitions(code.co_filename).get((code.co_name, code.co_firstlineno), [])
    fitting = [node for node in candidates if all(_within(s, node) for s in spans.values())]
    if not fitting:
        return None
    root = min(fitting, key=lambda node: _size(node))
    syntax = Syntax(code, root, spans=spans)
    for node in ast.walk(root):
        for child in ast.iter_child_nodes(node):
            syntax.parents[child] = node
    for node in walk_code(root):
        for kind, tests, arms in _controls_of(node):
            syntax.controls.append(Control(len(syntax.controls), kind, node, tests, arms))
    _add_actions(syntax)
    return syntax


def _spans(code: CodeType) -> dict[int, tuple[int, int, int, int]]:
    spans = {}
    for unit, (line, end_line, column, end_column) in enumerate(code.co_positions()):
        if line and end_line and column is not None and end_column is not None and end_column:
            spans[2 * unit] = (line, column, end_line, end_column)
    return spans


_Found = tuple[Kind, tuple[ast.expr, ...], tuple[tuple[ast.AST, ...], ...]]


def _controls_of(node: ast.AST) -> Iterator[_Found]:
    match node:
        case ast.If(test, body, orelse):
            yield "branch", (test,), (tuple(body), tuple(orelse))
        case ast.While(test, body, orelse) | ast.For(_, test, body, orelse):
            yield "loop", (test,), (tuple(body), tuple(orelse))
        case ast.Try(body, [_, *_] as handlers):
            yield "handlers", (), (tuple(body), *(tuple(handler.body) for handler in handlers))
        case ast.Match(subject, cases):
            guards = [case.guard for case in cases if case.guard is not None]
            yield "branch", (subject, *guards), tuple(tuple(case.body) for case in cases)
        case ast.expr():
            yield from _controls_of_expression(node)


def _controls_of_expression(node: ast.expr) -> Iterator[_Found]:
    match node:
        case ast.IfExp(test, body, orelse):
            yield "branch", (test,), ((body,), (orelse,))
        case ast.BoolOp(_, values):
            for position, value in enumerate(values[:-1]):
                yield "branch", (value,), (tuple(values[position + 1 :]), ())
        case ast.Subscript(_, index, ast.Load()) | ast.Call(ast.Name("getattr"), [_, index, *_]):
            if not isinstance(index, ast.Constant):
                yield "pick", (index,), ()
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            yield from _controls_of_comprehension(node)


def _controls_of_comprehension(
    node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp,
) -> Iterator[_Found]:
    elements = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
    for position, generator in enumerate(node.generators):
        inner: list[ast.AST] = [*elements]
        for other in node.generators[position + 1 :]:
            inner.extend((other.iter, *other.ifs))
        yield "loop", (generator.iter,), ((*generator.ifs, *inner), ())
        for number, test in enumerate(generator.ifs):
            yield "branch", (test,), ((*generator.ifs[number + 1 :], *inner), ())


def _add_actions(syntax: Syntax) -> None:
    instructions = [(item.offset, item.opcode) for item in dis.get_instructions(syntax.code)]
    runs = _Runs(syntax.spans, instructions)

    def add(offsets: Iterator[int], action: Action) -> None:
        for offset in offsets:
            syntax.actions.setdefault(offset, []).append(action)

    for control in syntax.controls:
        add(_opening(control, runs), Action("open", control.index))
        for arm, nodes in enumerate(control.arms):
            add(_entering(control, arm, nodes, runs), Action("enter", control.index, arm))
        if isinstance(control.node, ast.Try):
            for statement in _statements(control.node.body):
                add(runs.starts((statement,)), Action("again", control.index))
    for node in walk_code(syntax.root):
        if isinstance(node, (ast.Return, ast.Break, ast.Continue)):
            _add_exit(syntax, node, runs)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield from (node for node in walk_code(statement) if isinstance(node, ast.stmt))


def _add_exit(syntax: Syntax, node: Exit, runs: _Runs) -> None:
    until = syntax.root if isinstance(node, ast.Return) else syntax.loop_of(node)
    inside = set(walk_code(until))
    for control in syntax.controls:
        holds = any(node in set(walk_code(part)) for arm in control.arms for part in arm)
        if holds and control.node in inside and control.node is not until:
            for offset in runs.starts((node,)):
                action = Action("leave", control.index, exit=node)
                syntax.actions.setdefault(offset, []).append(action)


def _opening(control: Control, runs: _Runs) -> Iterator[int]:
    node = control.node
    if isinstance(node, ast.Try):
        return runs.starts(tuple(node.body))
    if control.kind == "loop" and not isinstance(node, ast.While):
        return (runs.before(offset) for offset in runs.starts((_target(control),)))
    return runs.starts(control.tests[:1])


def _entering(control: Control, arm: int, nodes: tuple[ast.AST, ...], runs: _Runs) -> Iterator[int]:
    if control.kind == "loop" and arm == 0 and not isinstance(control.node, ast.While):
        return runs.starts((_target(control),))
    return runs.starts(nodes)


def _target(control: Control) -> ast.expr:
    if isinstance(control.node, (ast.For, ast.AsyncFor)):
        return control.node.target
    assert isinstance(control.node, _COMPREHENSIONS)
    return next(g.target for g in control.node.generators if g.iter is control.tests[0])


class _Runs:
    """Stretches of instructions that belong to a node."""

    def __init__(
        self, spans: dict[int, tuple[int, int, int, int]], instructions: list[tuple[int, int]]
    ) -> None:
        self.spans = spans
        self.instructions = instructions

    def starts(self, nodes: tuple[ast.AST, ...]) -> Iterator[int]:
        """The first instruction of every stretch; a conditional jump in a node does not end one."""
        inside = False
        for offset, opcode in self.instructions:
            span = self.spans.get(offset)
            if span is None or (inside and opcode in _JUMPS):
                continue
            belongs = any(_within(span, node) for node in nodes)
            if belongs and not inside:
                yield offset
            inside = belongs

    def before(self, offset: int) -> int:
        return max(other for other, _ in self.instructions if other < offset)


_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs)) - {dis.opmap.get("FOR_ITER", -1)}


def _position(node: ast.AST) -> tuple[int, int, int, int]:
    if isinstance(node, ast.match_case):
        return (*_position(node.pattern)[:2], *_position(node.body[-1])[2:])
    start, column = getattr(node, "lineno", 0), getattr(node, "col_offset", 0)
    for decorator in getattr(node, "decorator_list", ()):
        start, column = min((start, column), (decorator.lineno, 0))
    return start, column, getattr(node, "end_lineno", 0), getattr(node, "end_col_offset", 0)


def _size(node: ast.AST) -> tuple[int, int]:
    start, column, end, end_column = _position(node)
    return end - start, end_column - column


def _within(span: tuple[int, int, int, int], node: ast.AST) -> bool:
    start, column, end, end_column = _position(node)
    return (start, column) <= span[:2] and span[2:] <= (end, end_column)


def _call_positions(node: ast.Call) -> tuple[tuple[int, int, int, int], ...]:
    whole = _position(node)
    if not isinstance(node.func, ast.Attribute):
        return (whole,)
    # A method call over several lines starts, for the bytecode, at the method's name.
    end, column = node.func.end_lineno or 0, node.func.end_col_offset or 0
    return whole, (end, column - len(node.func.attr.encode()), *whole[2:])
