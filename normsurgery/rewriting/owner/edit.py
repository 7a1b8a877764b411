"""Editing the syntax tree of one forward: each norm's expression becomes `self.<name>(<input>)`.

Then what only fed the old norm is taken out: assignments whose names nobody reads any more and
whose value is free of effects, and statements that update a moved tensor by hand.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from normsurgery.errors import CannotRewrite
from normsurgery.flow.positions import node_at
from normsurgery.rewriting.attribute_chains import Definition, self_name_of
from normsurgery.rewriting.names import fresh_name
from normsurgery.rewriting.owner.prune import prune
from normsurgery.survey import CallSite

Output = ast.expr | ast.AugAssign
NOWHERE = ast.Pass(lineno=-1, col_offset=0, end_lineno=-1, end_col_offset=0)
SCOPES = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)


@dataclass(frozen=True)
class Target:
    """One norm to put in: under which attribute, in place of which call, and its old tensors."""

    name: str
    call: CallSite
    tensors: tuple[str, ...] = ()


def edit(definition: Definition, targets: Sequence[Target]) -> None:
    """Edit a tree from `syntax_of` in place. Raises CannotRewrite."""
    self_name = self_name_of(definition)
    if self_name is None:
        raise CannotRewrite("its forward takes no self")
    definition.decorator_list = []
    places = [_Place(definition, target) for target in targets]
    if len({id(place.output) for place in places}) < len(places):
        raise CannotRewrite("one expression in its forward computes several norms")
    inputs = [place.input() for place in places]
    replaced = {
        id(place.output): (place, value) for place, value in zip(places, inputs, strict=True)
    }
    dropped = _dropped(places, inputs)
    spans = {span for target in targets for span in target.call.region}
    region = [node for span in spans if (node := node_at(definition, span)) is not None]
    _Replace(self_name, replaced).visit(definition)
    prune(
        definition,
        self_name,
        dropped,
        region,
        {tuple(name.split(".")) for target in targets for name in target.tensors},
    )


class _Place:
    """Where one norm stands in the tree, before anything is changed."""

    def __init__(self, definition: Definition, target: Target) -> None:
        self.definition, self.target = definition, target
        self.parents = {
            child: node for node in ast.walk(definition) for child in ast.iter_child_nodes(node)
        }
        span = target.call.output
        output = node_at(definition, span) if span is not None else None
        if output is None:
            raise CannotRewrite("no expression of its forward has the norm's output as its value")
        self.output: Output = output
        if any(isinstance(node, SCOPES) for node in self._above(output)):
            raise CannotRewrite(
                f"line {output.lineno} stands in a function, lambda or comprehension inside forward"
            )

    def input(self) -> ast.expr:
        """The expression to hand to the new norm."""
        origin = self.target.call.input
        node = node_at(self.definition, origin.span) if origin.span is not None else None
        made = node if isinstance(node, ast.expr) and node is not self.output else None
        if made is not None and self.output in self._above(made):
            return made
        if origin.name is not None:
            return self._by_name(origin.name)
        if made is not None:
            return self._captured(made)
        argument = _first_argument(self.output)
        if argument is None:
            raise CannotRewrite(
                f"the value that line {self.output.lineno} normalises has no name or expression"
            )
        return argument

    def _by_name(self, name: str) -> ast.expr:
        """The name itself, or a name kept for its value where that may change under the norm."""
        statements = self._statements_of_norm()
        rebound = any(_binds(statement, name) for statement in statements)
        mutated = any(_mutates(statement) for statement in statements)
        if not rebound and not mutated:
            return ast.copy_location(ast.Name(name, ast.Load()), self.output)
        first = statements[0]
        if self._block(first)[0] not in [*self._above(self.output), self.definition]:
            raise CannotRewrite(f"its norm begins in a branch, on line {first.lineno}")
        kept = _fresh_name(self.definition)
        value: ast.expr = ast.Name(name, ast.Load())
        if mutated:
            value = ast.Call(ast.Attribute(value, "clone", ast.Load()), [], [])
        block = self._block(first)[1]
        keeping = ast.Assign([ast.Name(kept, ast.Store())], value)
        block.insert(block.index(first), _nowhere(keeping))
        return ast.Name(kept, ast.Load())

    def _captured(self, node: ast.expr) -> ast.expr:
        """A name for a value that was made earlier and has none."""
        around = [*self._above(self.output), self.definition]
        always = self._block(self._statement(node))[0] in around
        scopes = any(isinstance(above, SCOPES) for above in self._above(node))
        mutated = any(_mutates(statement) for statement in self._statements_of_norm())
        if scopes or mutated or not always:
            raise CannotRewrite(f"the value normalised, from line {node.lineno}, may have changed")
        kept = _fresh_name(self.definition)
        _Wrap(node, kept).visit(self.definition)
        return ast.Name(kept, ast.Load())

    def _statements_of_norm(self) -> list[ast.stmt]:
        """From the statement of the norm's first expression up to the one before its output."""
        statements = [n for n in _in_order(self.definition) if n is not self.definition]
        last = statements.index(self._statement(self.output))
        firsts = [
            statements.index(self._statement(node))
            for span in self.target.call.region
            if (node := node_at(self.definition, span)) is not None
        ]
        return statements[min([*firsts, last]) : last]

    def _above(self, node: ast.AST) -> list[ast.AST]:
        found = []
        while (above := self.parents.get(node)) is not None and above is not self.definition:
            found.append(above)
            node = above
        return found

    def _statement(self, node: ast.AST) -> ast.stmt:
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def _block(self, statement: ast.stmt) -> tuple[ast.AST, list[ast.stmt]]:
        parent = self.parents[statement]
        for _, value in ast.iter_fields(parent):
            if isinstance(value, list) and any(item is statement for item in value):
                return parent, value
        raise CannotRewrite(f"line {statement.lineno} stands in no block")


class _Replace(ast.NodeTransformer):
    def __init__(self, self_name: str, places: dict[int, tuple[_Place, ast.expr]]) -> None:
        self.self_name, self.places = self_name, places

    def visit(self, node: ast.AST) -> ast.AST:
        found = self.places.get(id(node))
        if found is None:
            return super().generic_visit(node)
        place, value = found
        norm = ast.Attribute(ast.Name(self.self_name, ast.Load()), place.target.name, ast.Load())
        call = ast.copy_location(ast.Call(norm, [self._inner(value)], []), node)
        if isinstance(node, ast.AugAssign):
            return ast.copy_location(ast.Assign([node.target], call), node)
        return call

    def _inner(self, value: ast.expr) -> ast.expr:
        visited = self.visit(value)
        assert isinstance(visited, ast.expr)
        return visited


class _Wrap(ast.NodeTransformer):
    def __init__(self, wanted: ast.expr, name: str) -> None:
        self.wanted, self.name = wanted, name

    def visit(self, node: ast.AST) -> ast.AST:
        if node is not self.wanted:
            return super().generic_visit(node)
        name = ast.copy_location(ast.Name(self.name, ast.Store()), NOWHERE)
        return ast.copy_location(ast.NamedExpr(name, self.wanted), NOWHERE)


def _nowhere(tree: ast.stmt) -> ast.stmt:
    """The new nodes with a position that no span of the original source names."""
    for node in ast.walk(tree):
        ast.copy_location(node, NOWHERE)
    return tree


def _first_argument(output: Output) -> ast.expr | None:
    if not isinstance(output, ast.Call):
        return None
    if output.args and not isinstance(output.args[0], ast.Starred):
        return output.args[0]
    return next((k.value for k in output.keywords if k.arg == "input"), None)


def _dropped(places: Sequence[_Place], inputs: Sequence[ast.expr]) -> set[str]:
    """Names that the old expressions read and that may be read by nobody after the edit."""
    return {
        node.id
        for place in places
        for node in ast.walk(place.output)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    } - {node.id for value in inputs for node in ast.walk(value) if isinstance(node, ast.Name)}


def _in_order(definition: Definition) -> list[ast.stmt]:
    statements = [node for node in ast.walk(definition) if isinstance(node, ast.stmt)]
    return sorted(statements, key=lambda node: (node.lineno, node.col_offset))


def _binds(statement: ast.stmt, name: str) -> bool:
    return any(
        isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load)
        for node in ast.walk(statement)
    )


def _mutates(statement: ast.stmt) -> bool:
    """Whether a statement may change a tensor in place: `x -= m`, `x[...] = m`, `x.sub_(m)`."""
    for node in ast.walk(statement):
        if isinstance(node, ast.AugAssign):
            return True
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            return True
        if isinstance(node, ast.Call) and _in_place(node):
            return True
    return False


def _in_place(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    written = any(keyword.arg in ("out", "inplace") for keyword in call.keywords)
    return written or (name.endswith("_") and not name.endswith("__"))


def _fresh_name(definition: Definition) -> str:
    used = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
    used |= {node.arg for node in ast.walk(definition) if isinstance(node, ast.arg)}
    return fresh_name("normalised", used)
