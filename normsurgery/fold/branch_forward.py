"""A forward that adds parallel branches, rewritten to call the one layer they are merged into.

The expression, or the loop, that makes the sum becomes a call of the new layer; what only served
the branches goes. Conditions on the owner's own settings are decided where they choose between
ways of running branches that are no longer there.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from normsurgery.errors import CannotRewrite
from normsurgery.graph.positions import node_at
from normsurgery.surgery.attribute_chains import Definition, self_name_of
from normsurgery.surgery.owner.edit import Target, edit
from normsurgery.surgery.owner.functions import rewrapped
from normsurgery.surgery.owner.install import original_class
from normsurgery.surgery.owner.rewriting import Placement, Rewriting, check_distinct
from normsurgery.surgery.owner.source import _compiled, _syntax, located
from normsurgery.surgery.owner.still_read import still_read

PURE_CALLS = frozenset({"bool", "enumerate", "getattr", "hasattr", "int", "isinstance", "len"})
PURE_CALLS |= {"list", "range", "reversed", "tuple", "zip"}
LOOPS = (ast.For, ast.While, ast.AsyncFor)
Static = bool | None  # None: not known before the forward runs


def merged_forward(
    owner: nn.Module, placements: Sequence[Placement], gone: Collection[str]
) -> Rewriting:
    """The owner's forward with each placement's sum replaced by a call of its module.

    gone: local names of the tensors that the branches had. Raises CannotRewrite where the forward
    cannot be rewritten, or where it still reads one of them afterwards.
    """
    check_distinct(placements)
    outer, inner = located(owner, placements[0])
    definition = _syntax(inner)
    self_name = self_name_of(definition)
    if self_name is None:
        raise CannotRewrite("its forward takes no self")
    region = {
        node
        for placement in placements
        for span in (*placement.call.region, placement.call.output)
        if span is not None and (node := node_at(definition, span)) is not None
    }
    branches = {name.partition(".")[0] for name in gone}
    _Decided(owner, self_name, branches).visit(definition)
    forward = _Forward(definition, self_name, region)
    rest = [placement for placement in placements if not forward.replace_loop(placement)]
    if rest:
        edit(definition, [Target(placement.name, placement.call) for placement in rest])
    definition.decorator_list = []
    for placement in placements:
        forward.sweep(placement.name)
    ast.fix_missing_locations(definition)
    read = still_read(original_class(owner), definition, inner, tuple(gone))
    still = next((name for name, where in read.items() if where == "forward"), None)
    if still is not None:
        raise CannotRewrite(
            f"its forward also reads {still.partition('.')[0]} where the trace did not run or "
            "outside the sum"
        )
    function = _compiled(definition, inner)
    return Rewriting(forward=rewrapped(outer, inner, function, {}))


@dataclass(frozen=True)
class _Forward:
    """A syntax tree being edited; `region` are the nodes that compute the branches."""

    definition: Definition
    self_name: str
    region: Collection[ast.AST]

    def replace_loop(self, placement: Placement) -> bool:
        """Where the sum is made in a loop, replace the outermost one; False where it is not."""
        output = placement.call.output
        node = node_at(self.definition, output) if output is not None else None
        around = self._blocks_to(node) if node is not None else []
        place = next((p for p in around if isinstance(p.statement, LOOPS)), None)
        if place is None:
            return False
        name = placement.call.input.name
        target = _bound_by(around[-1].statement)
        if name is None or target is None or name in _stored(place.statement):
            raise CannotRewrite(
                f"the loop on line {place.statement.lineno} adds up values that have no name"
            )
        if not self._is_dead(place.statement, set()):
            raise CannotRewrite(
                f"the loop on line {place.statement.lineno} does more than add up branches"
            )
        argument = ast.Name(name, ast.Load())
        call = ast.Call(self._attribute(placement.name), [argument], [])
        made = ast.Assign([ast.Name(target, ast.Store())], call)
        place.block[place.index] = ast.copy_location(made, place.statement)
        return True

    def _attribute(self, name: str) -> ast.Attribute:
        return ast.Attribute(ast.Name(self.self_name, ast.Load()), name, ast.Load())

    def sweep(self, name: str) -> None:
        """Take out what only served the branches, before the call of the module `name`."""
        call = next(
            node
            for node in ast.walk(self.definition)
            if isinstance(node, ast.Attribute)
            and node.attr == name
            and isinstance(node.value, ast.Name)
            and node.value.id == self.self_name
        )
        places = self._blocks_to(call)
        if any(isinstance(place.statement, LOOPS) for place in places):
            return
        live: set[str] = set()
        for depth, place in enumerate(places):
            after = place.block[place.index + 1 :]
            live = set().union(*map(_loaded, after)) | (live if depth else set())
            for outer in places[:depth]:
                live = live.union(*map(_loaded, outer.block[outer.index + 1 :]))
            self._sweep_before(place, live)

    def _sweep_before(self, place: _Place, live: set[str]) -> None:
        """Remove the dead statements in front of one; `live` are the names read after it."""
        last = place.block[place.index]
        live = (live - _killed(last)) | _loaded(last)
        for statement in reversed(place.block[: place.index]):
            if self._is_dead(statement, live):
                place.block.remove(statement)
            else:
                live = (live - _killed(statement)) | _loaded(statement)

    def _is_dead(self, statement: ast.stmt, live: Collection[str]) -> bool:
        """It only binds names that nobody reads later, to values that cost nothing to leave out."""
        if isinstance(statement, ast.Pass):
            return True
        if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            bound = _targets(statement)
            value = statement.value
            return bound is not None and not bound & set(live) and self._is_pure(value)
        if isinstance(statement, (ast.If, ast.For)):
            head = statement.test if isinstance(statement, ast.If) else statement.iter
            inside = [*statement.body, *statement.orelse]
            loop_names = _stored(statement.target) if isinstance(statement, ast.For) else set()
            free = not loop_names & set(live) and self._is_pure(head)
            return free and all(self._is_dead(inner, live) for inner in inside)
        return False

    def _is_pure(self, value: ast.AST | None) -> bool:
        """Only branches are run in it, and nothing is changed."""
        if value is None or isinstance(value, ast.Lambda):
            return True
        if isinstance(value, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)):
            return False
        if isinstance(value, ast.Call) and value not in self.region:
            known = isinstance(value.func, ast.Name) and value.func.id in PURE_CALLS
            if not known:
                return False
        return all(self._is_pure(child) for child in ast.iter_child_nodes(value))

    def _blocks_to(self, node: ast.AST) -> list[_Place]:
        """The statements around a node, outermost first, each with the block it stands in."""
        parents = {
            child: parent
            for parent in ast.walk(self.definition)
            for child in ast.iter_child_nodes(parent)
        }
        found: list[_Place] = []
        while node is not self.definition:
            parent = parents[node]
            if isinstance(node, ast.stmt):
                found.insert(0, _place(parent, node))
            node = parent
        return found


@dataclass(frozen=True)
class _Place:
    """A statement and the block it stands in."""

    block: list[ast.stmt]
    statement: ast.stmt

    @property
    def index(self) -> int:
        return self.block.index(self.statement)


def _place(parent: ast.AST, statement: ast.stmt) -> _Place:
    for _, value in ast.iter_fields(parent):
        if isinstance(value, list) and any(item is statement for item in value):
            return _Place(value, statement)
    raise CannotRewrite(f"line {statement.lineno} stands in no block")


class _Decided(ast.NodeTransformer):
    """Every `if` on the owner's settings of which an arm runs a branch: the arm that is taken."""

    def __init__(self, owner: nn.Module, self_name: str, branches: Collection[str]) -> None:
        self.owner, self.self_name, self.branches = owner, self_name, branches

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if not any(self._mentions(part) for part in (node.test, *node.body, *node.orelse)):
            return node
        taken = self._truth(node.test)
        if taken is None:
            return node
        return (node.body if taken else node.orelse) or ast.copy_location(ast.Pass(), node)

    def _mentions(self, tree: ast.AST) -> bool:
        return any(
            isinstance(node, ast.Attribute)
            and node.attr in self.branches
            and isinstance(node.value, ast.Name)
            and node.value.id == self.self_name
            for node in ast.walk(tree)
        )

    def _truth(self, test: ast.expr) -> Static:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._truth(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.Compare):
            return self._is_none(test)
        if isinstance(test, ast.Attribute):
            found = self._value(test)
            return bool(found) if isinstance(found, (nn.Module, bool, type(None))) else None
        return None

    def _is_none(self, test: ast.Compare) -> Static:
        against = test.comparators[0]
        if not isinstance(against, ast.Constant) or against.value is not None:
            return None
        found = self._value(test.left)
        if found is _UNKNOWN or not isinstance(test.ops[0], (ast.Is, ast.IsNot)):
            return None
        return (found is None) is isinstance(test.ops[0], ast.Is)

    def _value(self, node: ast.expr) -> Any:
        """What `self.<name>` holds; the mode may change. A branch may be gone already, on a model
        whose rewrite is made again."""
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            return _UNKNOWN
        if node.value.id != self.self_name or node.attr == "training":
            return _UNKNOWN
        gone = nn.Identity() if node.attr in self.branches else _UNKNOWN
        return getattr(self.owner, node.attr, gone)


_UNKNOWN = object()


def _loaded(tree: ast.AST) -> set[str]:
    return {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store)
    } | {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)
    }


def _stored(tree: ast.AST) -> set[str]:
    return {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _targets(statement: ast.Assign | ast.AnnAssign | ast.AugAssign) -> set[str] | None:
    """The names it binds, or None if it also writes to something else."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return set(names) if len(names) == len(targets) else None


def _killed(statement: ast.stmt) -> set[str]:
    """The names that surely hold another value after the statement."""
    return _targets(statement) or set() if isinstance(statement, ast.Assign) else set()


def _bound_by(statement: ast.stmt) -> str | None:
    """The one name that an assignment binds."""
    if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        return None
    names = _targets(statement)
    return next(iter(names)) if names is not None and len(names) == 1 else None
