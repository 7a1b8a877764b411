"""Guards of torch.export that exclude small sizes only: from which size of an axis on they hold.

A convolution with a stride asks whether its output is one wide, and torch then says that not all
sizes of the axis will do. Nobody wants the sizes for which it is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

from normsurgery.exporting.dynamic import Axes

FARTHEST = 4096  # sizes that a guard is tried on
_SIZE = r"L\['[^']*'\](?:\[[^\]]*\])*\.size\(\)\[\d+\]"
_GUARD = re.compile(
    rf"Not all values of (\w+) = ({_SIZE}) in the specified range.*? satisfy the generated guard "
    r"(.+?)\.?$",
    re.M,
)
_ARITHMETIC = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Constant, ast.Name),
    *(ast.Load, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.USub, ast.And, ast.Or),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
)


def least_sizes(text: str, axes: Axes) -> dict[str, int]:
    """By the name of an axis, the least size from which on every guard in torch's message holds.

    Empty where a guard is about anything else, or excludes larger sizes or the example's own.
    """
    found: dict[str, int] = {}
    for name, size, guard in _GUARD.findall(text):
        example = min((axis.size for axis in axes.axes if axis.name == name), default=0)
        least = _least(guard.replace(size, "n"), example)
        if least is None:
            return {}
        found[name] = max(least, found.get(name, 0))
    return found


def _least(guard: str, example: int) -> int | None:
    holds = _function(guard)
    if holds is None:
        return None
    failing = [size for size in range(1, FARTHEST + 1) if not holds(size)]
    least = failing[-1] + 1 if failing else 1
    return least if least <= example else None


def _function(guard: str) -> Callable[[int], bool] | None:
    """The guard as a function of the size `n`; None where it is more than arithmetic with it."""
    try:
        tree = ast.parse(guard, mode="eval")
    except SyntaxError:
        return None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if names != {"n"} or not all(isinstance(node, _ARITHMETIC) for node in ast.walk(tree)):
        return None
    code = compile(tree, "<guard>", "eval")

    def holds(n: int) -> bool:
        try:
            return bool(eval(code, {"__builtins__": {}}, {"n": n}))
        except ZeroDivisionError:
            return False

    return holds
