"""Code that does the same to every channel of a token: it picks tokens, or multiplies whole ones.

Such code may run or not without harm to what is scaled along the last axis, before it or behind it.
"""

from __future__ import annotations

import ast
from typing import Literal

from normsurgery.graph.controls import walk_code

Effect = Literal["picks", "multiplies"]

_CASTS = frozenset({"to", "contiguous", "clone", "type_as"})


def effect_on(node: ast.expr, name: str) -> Effect | None:
    """What an expression does to the tokens of the tensor `name`; None where it may do more."""
    match node:
        case ast.Name(same) if same == name:
            return "picks"
        case ast.Subscript(value, ast.Tuple([*_, ast.Slice(None, None, None)])):
            return effect_on(value, name)
        case ast.Subscript(value, ast.Name()):  # a mask, or an index into the first axis
            return effect_on(value, name)
        case ast.Call(ast.Attribute(value, method)) if method in _CASTS:
            return effect_on(value, name)
        case ast.Call(ast.Attribute(_, "take_along_dim"), [value, index, *_]):
            return effect_on(value, name) if _is_per_token(index) else None
        case ast.BinOp(value, ast.Mult(), factor) if _is_per_token(factor):
            return "multiplies" if effect_on(value, name) else None
    return None


def returned(root: ast.AST) -> str | None:
    """The name whose tokens a function returns, if it returns nothing else on any way."""
    values = [node.value for node in walk_code(root) if isinstance(node, ast.Return)]
    names = {part.id for value in values if value for part in [_innermost(value)] if part}
    if len(names) != 1:
        return None
    name = names.pop()
    whole = all(value is not None and effect_on(value, name) is not None for value in values)
    return name if whole else None


def _innermost(node: ast.expr) -> ast.Name | None:
    """The tensor at the root of an expression that may be an effect on it."""
    match node:
        case ast.Name():
            return node
        case ast.Call(ast.Attribute(_, "take_along_dim"), [value, *_]):
            return _innermost(value)
        case ast.Subscript(value) | ast.Call(ast.Attribute(value)) | ast.BinOp(value):
            return _innermost(value)
    return None


def _is_per_token(node: ast.expr) -> bool:
    """Whether the expression has size 1 on the last axis, as `mask[..., None]` has."""
    match node:
        case ast.Subscript(_, ast.Tuple([*_, ast.Constant(None)])):
            return True
        case ast.Call(ast.Attribute(_, "unsqueeze"), [ast.UnaryOp(ast.USub(), ast.Constant(1))]):
            return True
    return False
