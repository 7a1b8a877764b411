"""Taking out statements that only served an expression which is no longer there."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

from normsurgery.rewriting.attribute_chains import Chain, Definition, chains_at

ASSIGNMENTS = (ast.Assign, ast.AnnAssign)
# Calls that compute a value and do nothing else.
PURE_BUILTINS = frozenset({"bool", "float", "int", "isinstance", "len", "list", "tuple"})
PURE_METHODS = frozenset(
    {"bfloat16", "dim", "double", "float", "half", "numel", "size", "to", "type", "type_as"}
)
SEES_ALL_NAMES = frozenset({"eval", "exec", "locals", "vars"})
IMPURE = (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)


def prune(
    definition: Definition,
    self_name: str,
    dropped: Collection[str],
    region: Collection[ast.AST],
    moved: Collection[Chain],
) -> None:
    """Remove, until nothing is left to remove:

    - an assignment to names of which none is read any more, if at least one of them was read only
      by what went (`dropped`, and then by what is removed here) and its value has no effect;
    - an update in place (`h *= w`) of such a name, where nobody reads it later;
    - a statement that updates one of the `moved` tensors of `self` and does nothing else;
    - a branch that has become empty and whose condition has no effect.
    """
    called = {n.id for n in ast.walk(definition) if isinstance(n, ast.Name)}
    if called & SEES_ALL_NAMES:
        return
    pure = _Purity(region)
    names = set(dropped)
    while (found := _removable(definition, self_name, names, pure, moved)) is not None:
        block, statement = found
        names |= _loaded(statement)
        block.remove(statement)
        if not block and _must_not_be_empty(definition, block):
            block.append(ast.Pass())


class _Purity:
    """Whether evaluating an expression has no effect; the operations of the old norm have none."""

    def __init__(self, region: Collection[ast.AST]) -> None:
        self.region = set(region)

    def of(self, value: ast.AST | None) -> bool:
        if value is None or isinstance(value, ast.Lambda):
            return True
        if isinstance(value, IMPURE) or (isinstance(value, ast.Call) and not self._call(value)):
            return False
        return all(self.of(child) for child in ast.iter_child_nodes(value))

    def _call(self, call: ast.Call) -> bool:
        if call in self.region:
            return True
        if isinstance(call.func, ast.Name):
            return call.func.id in PURE_BUILTINS
        return isinstance(call.func, ast.Attribute) and call.func.attr in PURE_METHODS


def _removable(
    definition: Definition,
    self_name: str,
    names: set[str],
    pure: _Purity,
    moved: Collection[Chain],
) -> tuple[list[ast.stmt], ast.stmt] | None:
    for block in _blocks(definition):
        for statement in block:
            if (
                _is_dead(definition, statement, names, pure)
                or _updates(statement, self_name, moved, pure)
                or _is_empty(statement, pure)
            ):
                return block, statement
    return None


def _is_dead(definition: Definition, statement: ast.stmt, names: set[str], pure: _Purity) -> bool:
    if isinstance(statement, ast.AugAssign):
        return _is_dead_in_place(definition, statement, names) and pure.of(statement.value)
    if not isinstance(statement, ASSIGNMENTS) or not pure.of(statement.value):
        return False
    bound = _bound(statement)
    if bound is None or not bound & names:
        return False
    inside = set(ast.walk(statement))
    return not any(node.id in bound for node in _reads(definition) if node not in inside)


def _is_dead_in_place(definition: Definition, statement: ast.AugAssign, names: set[str]) -> bool:
    """`h *= w` where nobody reads `h` later. Who else holds that tensor, only the proof can see."""
    target = statement.target
    arguments = {node.arg for node in ast.walk(definition.args) if isinstance(node, ast.arg)}
    if not isinstance(target, ast.Name) or target.id not in names - arguments:
        return False
    loops = [n for n in ast.walk(definition) if isinstance(n, (ast.For, ast.While, ast.AsyncFor))]
    if any(statement in ast.walk(loop) for loop in loops):
        return False
    return not any(
        node.id == target.id and node.lineno > statement.lineno for node in _reads(definition)
    )


def _reads(tree: ast.AST) -> Iterator[ast.Name]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
            yield node


def _updates(statement: ast.stmt, self_name: str, moved: Collection[Chain], pure: _Purity) -> bool:
    """`self.n.add_(1)`, `self.n += 1`, `self.n = self.n + 1` for a tensor that has moved."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        call = statement.value
        if not isinstance(call.func, ast.Attribute) or not call.func.attr.endswith("_"):
            return False
        rest = [*call.args, *(keyword.value for keyword in call.keywords)]
        return _is_one_of(call.func.value, self_name, moved) and all(map(pure.of, rest))
    if isinstance(statement, ast.AugAssign):
        return _is_one_of(statement.target, self_name, moved) and pure.of(statement.value)
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        return _is_one_of(statement.targets[0], self_name, moved) and pure.of(statement.value)
    return False


def _is_empty(statement: ast.stmt, pure: _Purity) -> bool:
    if not isinstance(statement, ast.If) or not pure.of(statement.test):
        return False
    return all(isinstance(inner, ast.Pass) for inner in [*statement.body, *statement.orelse])


def _bound(statement: ast.stmt) -> set[str] | None:
    """The names an assignment binds, or None if it also writes to something else."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    names: set[str] = set()
    for target in targets:
        parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        if not all(isinstance(part, ast.Name) for part in parts):
            return None
        names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return names


def _loaded(tree: ast.AST) -> set[str]:
    return {node.id for node in _reads(tree)}


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                yield value


def _must_not_be_empty(definition: Definition, block: list[ast.stmt]) -> bool:
    return any(getattr(node, "body", None) is block for node in ast.walk(definition))


def _is_one_of(node: ast.AST, self_name: str, moved: Collection[Chain]) -> bool:
    return any(chain in moved for chain in chains_at(node, {self_name: frozenset({()})}))
