"""Where something stands in the source of a function: hashes, spans, and the syntax at a span.

Spans come from the bytecode (`co_positions`), the syntax tree from the source file. Both count
columns in bytes of UTF-8 as they stand in the file; lines are counted from the function's first
line, which for a decorated function is the line of its first decorator.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache, cached_property, partial
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

from normsurgery.survey import Span

Position = tuple[int, int, int, int]


def source_of(function: FunctionType) -> str:
    """The lines of the function as they stand in its file. Raises OSError where there are none."""
    return "".join(inspect.getsourcelines(function.__code__)[0])


def source_hash(function: FunctionType) -> str:
    """sha256 of the function's dedented source. Raises OSError where it has no source."""
    return hashlib.sha256(textwrap.dedent(source_of(function)).encode()).hexdigest()


def function_name(function: FunctionType | CodeType, owner_class: type) -> str:
    """`package.module:Class.forward` for a function, or for its code, that runs in `owner_class`.

    An inherited forward is named after the class that defines it.
    """
    if isinstance(function, FunctionType):
        return f"{function.__module__}:{function.__code__.co_qualname}"
    found = forward_of(owner_class, function)
    module = found.__module__ if found is not None else owner_class.__module__
    return f"{module}:{function.co_qualname}"


def forwards(owner_class: type) -> Iterator[FunctionType]:
    """Every function that a call of `forward` may run: of each base, through every wrapper."""
    for base in owner_class.__mro__:
        forward = vars(base).get("forward")
        if forward is not None:
            yield from functions_within(forward)


def forward_of(owner_class: type, code: CodeType) -> FunctionType | None:
    """The function behind `owner_class.forward`, wrapped or inherited, that has this code."""
    return next((f for f in forwards(owner_class) if f.__code__ is code), None)


def functions_within(value: Any) -> Iterator[FunctionType]:
    """The function itself and every function that its wrappers hold, outermost first."""
    seen: set[int] = set()
    queue = [value]
    while queue:
        current = queue.pop(0)
        if isinstance(current, MethodType):
            current = current.__func__
        if not isinstance(current, FunctionType) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        queue.extend(held_by(current))


def functions_of(value: Any) -> Iterator[FunctionType]:
    """The functions of an attribute of a class: a method, a property, what a decorator holds."""
    if isinstance(value, property):
        for accessor in (value.fget, value.fset, value.fdel):
            yield from functions_within(accessor)
    elif isinstance(value, cached_property):
        yield from functions_within(value.func)
    elif isinstance(value, partial):
        yield from functions_of(value.func)
    elif isinstance(value, (staticmethod, classmethod)):
        yield from functions_within(value.__func__)
    else:
        yield from functions_within(value)


def held_by(function: FunctionType) -> list[Any]:
    """What a wrapper function holds: its `__wrapped__` and the contents of its closure cells."""
    held = [vars(function)["__wrapped__"]] if "__wrapped__" in vars(function) else []
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # an empty cell: the name is not bound yet
            continue
    return held


@cache
def _positions_of(code: CodeType) -> tuple[tuple[int | None, ...], ...]:
    return tuple(code.co_positions())


def span_of(frame: FrameType) -> Span | None:
    """The expression that `frame` is evaluating right now, or None if the bytecode does not say."""
    code = frame.f_code
    position = _positions_of(code)[frame.f_lasti // 2]
    if None in position:
        return None
    line, end_line, column, end_column = (value or 0 for value in position)
    first = code.co_firstlineno
    return Span(line - first, column, end_line - first, end_column)


def syntax_of(function: FunctionType) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """The syntax tree of the function, with lines counted as in a Span (its first line is 0).

    Raises OSError where the function has no source, and SyntaxError where its source is not a
    function definition (a lambda).
    """
    source = source_of(function)
    indented = source[:1].isspace()
    # An indented definition is parsed inside a block, so that columns stay those of the file.
    tree = ast.parse("if 1:\n" + source if indented else source)
    body = tree.body[0].body if isinstance(tree.body[0], ast.If) and indented else tree.body
    definition = body[0]
    if not isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)):
        raise SyntaxError(f"{function.__qualname__} is not a function definition")
    ast.increment_lineno(definition, -2 if indented else -1)
    return definition


def node_at(tree: ast.AST, span: Span) -> ast.expr | ast.AugAssign | None:
    """The expression (or augmented assignment) that a span from bytecode speaks of.

    A method call that spreads over several lines starts, for the bytecode, at the method's name.
    """
    wanted = (span.line, span.column, span.end_line, span.end_column)
    for node in ast.walk(tree):
        if not isinstance(node, (ast.expr, ast.AugAssign)) or wanted not in _positions(node):
            continue
        if isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
            continue  # a place to write to, not a value
        return node
    return None


def _position(node: ast.expr | ast.AugAssign) -> Position:
    return node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0


def _positions(node: ast.expr | ast.AugAssign) -> tuple[Position, ...]:
    whole = _position(node)
    attribute = node.func if isinstance(node, ast.Call) else node
    if not isinstance(attribute, ast.Attribute) or attribute.end_lineno is None:
        return (whole,)
    name = len(attribute.attr.encode())
    return whole, (attribute.end_lineno, (attribute.end_col_offset or 0) - name, *whole[2:])
