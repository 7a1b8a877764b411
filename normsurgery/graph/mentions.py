"""What a stretch of code that did not run would use: modules, parameters, and computed values.

Names stand for what they were bound to when the run passed the stretch by; attributes are followed
on the very objects, without running any code of theirs; methods are followed into their source.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from normsurgery.graph.controls import Syntax, syntax_of_code, walk_code
from normsurgery.graph.executed import Bound, Names, is_model_code
from normsurgery.graph.fixed import METADATA, MISSING, Facts, Known, attribute
from normsurgery.graph.positions import functions_within, held_by
from normsurgery.graph.tokenwise import Effect, effect_on, returned

_SAYS_ONLY = frozenset({"logger", "logging", "warnings", "log", "print"})
_ASKS_ONLY = frozenset({"isinstance", "hasattr", "type", "id", "callable", "len", "issubclass"})
# The same product of the same arguments: which of them is called is a question of the machine.
_GROUPED = frozenset(
    {
        "torch.nn.functional.grouped_mm",
        "torch._grouped_mm",
        "torch.ops.transformers.grouped_mm_fallback",
    }
)


@dataclass(frozen=True, eq=False)
class Use:
    """Something that code would do, and with what: modules by their id, values by their number.

    effect: on the tokens of the values, where that is all that is done with them.
    """

    where: ast.AST
    what: str
    modules: frozenset[int] = frozenset()
    values: frozenset[int] = frozenset()
    effect: Effect | None = None


@dataclass(eq=False)
class Scan:
    """Looks through code that did not run. `by_tensor` are a tensor's values by its id.

    `also_run` are calls (by their `wording`) that the code that ran instead makes as well.
    """

    facts: Facts
    names: Names
    by_tensor: Mapping[int, frozenset[int]]
    also_run: frozenset[str] = frozenset()
    followed: set[tuple[int, int]] = field(default_factory=set)

    def block(self, nodes: Iterable[ast.AST]) -> Iterator[Use]:
        """Every use in statements that would run one after the other.

        Nothing where they would raise: what raises gives no output.
        """
        statements = list(nodes)
        if self.raises(statements):
            return
        for node in statements:
            yield from self._uses(node)
            if isinstance(node, (ast.Return, ast.Continue, ast.Break)):
                return

    def picked(self, node: ast.AST) -> Iterator[Use]:
        """The modules that an index or a name chosen at run time picks one of."""
        holder = node.value if isinstance(node, ast.Subscript) else None
        if isinstance(node, ast.Call):
            holder = node.args[0]
        text = f"picks one of `{_text(holder or node)}`"
        if isinstance(holder, (ast.List, ast.Tuple, ast.Dict)):
            yield from (replace(use, what=text) for use in self._children(holder))
            return
        if isinstance(holder, ast.Name) and self._bound(holder).many:
            yield Use(node, text, values=self._bound(holder).values)
        held = self._held(holder) if holder is not None else None
        if held is not None and not isinstance(held, Tensor):
            yield self._use(node, text, held)

    def handed_on(self, nodes: Iterable[ast.AST]) -> Iterator[Use]:
        """What code that ran gives another name to, or returns, without computing anything."""
        for part in nodes:
            if isinstance(part, ast.expr):
                yield from self._escapes(part)
            for node in walk_code(part):
                if isinstance(node, (ast.Assign, ast.Return)) and node.value is not None:
                    yield from self._escapes(node.value)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    for argument in node.args if node.func.attr == "append" else ():
                        yield from self._escapes(argument)

    def _escapes(self, node: ast.expr) -> Iterator[Use]:
        match node:
            case ast.Tuple(parts) | ast.List(parts) | ast.Dict(_, parts):
                for part in parts:
                    yield from self._escapes(part)
            case ast.Name() | ast.Attribute():
                held = self._held(node)
                found = held if isinstance(held, (nn.Module, FunctionType, MethodType)) else None
                use = self._use(node, f"hands on `{_text(node)}` only under a condition", found)
                yield replace(use, values=self._bound(node).values)

    def raises(self, nodes: list[ast.AST]) -> bool:
        """Whether the statements always end in an exception, such as a missing attribute's."""
        for node in nodes:
            if isinstance(node, ast.Raise):
                return True
            if isinstance(node, ast.If):
                truth = self.facts.truth(node.test)
                yes, no = self.raises([*node.body]), self.raises([*node.orelse])
                if (yes and truth) or (no and truth is False) or (yes and no):
                    return True
            elif isinstance(node, (ast.Assign, ast.Expr)) and self._reads_missing(node.value):
                return True
            if isinstance(node, (ast.Return, ast.Continue, ast.Break)):
                return False
        return False

    def _reads_missing(self, node: ast.expr) -> bool:
        """Whether the expression calls a module that its owner does not have."""
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            return False
        base = self._held(node.func.value)
        return isinstance(base, nn.Module) and attribute(base, node.func.attr) is MISSING

    def _uses(self, node: ast.AST) -> Iterator[Use]:
        if isinstance(node, ast.expr):
            return self._of_expression(node)
        return self._of_statement(node)

    def _of_statement(self, node: ast.AST) -> Iterator[Use]:
        match node:
            case ast.Assert() | ast.Raise() | ast.Import() | ast.ImportFrom() | ast.Pass():
                return
            case ast.If(test, body, orelse):
                yield from self._arms(test, body, orelse)
            case ast.Assign([ast.Name(name)], value):
                if not self._is_recast(name, value):
                    yield from self._with_effect(node, value, name)
            case ast.Return(ast.expr() as value):
                yield from self._with_effect(node, value, returned(self.facts.syntax.root))
            case ast.Expr(ast.Call() as call):
                yield from self._statement_call(call)
            case ast.withitem(ast.Call() as call, None):
                yield from self._arguments(call, whole=False)
            case _:
                yield from self._children(node)

    def _of_expression(self, node: ast.expr) -> Iterator[Use]:
        match node:
            case ast.IfExp(test, body, orelse):
                yield from self._arms(test, [body], [orelse])
            case ast.Compare(_, [ast.Is() | ast.IsNot()], _):
                return
            case ast.Subscript(ast.Name(name), index, ast.Store()) if self._fields(name):
                yield from self._uses(index)
            case ast.Call(ast.Name("getattr"), [held, ast.Constant(str(name)), *rest]):
                yield from self._uses(ast.copy_location(_attribute_node(held, name), node))
                for default in rest:
                    yield from self._uses(default)
            case ast.Call():
                yield from self._call(node)
            case ast.Attribute():
                yield from self._attribute(node)
            case ast.Name(name, context):
                yield from self._name(node, name, isinstance(context, ast.Load))
            case _:
                yield from self._children(node)

    def _children(self, node: ast.AST) -> Iterator[Use]:
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                yield from self.block(value)
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, ast.AST):
                        yield from self._uses(item)
            elif isinstance(value, ast.AST):
                yield from self._uses(value)

    def _is_recast(self, name: str, value: ast.expr) -> bool:
        """`outputs = outputs.to_tuple()`: a container in another form."""
        match value:
            case ast.Call(ast.Attribute(ast.Name(same)), [], []):
                return name == same and bool(self._fields(name))
        return False

    def _with_effect(self, node: ast.AST, value: ast.expr, name: str | None) -> Iterator[Use]:
        effect = effect_on(value, name) if name is not None else None
        for use in self._children(node):
            same = isinstance(use.where, ast.Name) and use.where.id == name
            yield replace(use, effect=effect) if same else use

    def _arms(
        self, test: ast.expr, body: Iterable[ast.AST], orelse: Iterable[ast.AST]
    ) -> Iterator[Use]:
        yield from self._uses(test)
        truth = self.facts.truth(test)
        if truth is not False:
            yield from self.block(body)
        if truth is not True:
            yield from self.block(orelse)

    def _statement_call(self, call: ast.Call) -> Iterator[Use]:
        """A call whose result is dropped: a message, or something done to what it is given."""
        root = call.func
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id in _SAYS_ONLY:
            return
        whole = isinstance(call.func, ast.Attribute)
        yield from self._call(call) if whole else self._arguments(call, whole=False)

    def _call(self, call: ast.Call) -> Iterator[Use]:
        function = call.func
        asks = isinstance(function, ast.Name) and function.id in _ASKS_ONLY
        if asks or wording(call) in self.also_run:
            return
        found = self._called(call)
        if found is None:
            yield from self._uses(function)
            yield from self._arguments(call, whole=not self._looks_up(function))
            return
        yield from self._follow(call, *found)
        yield from self._arguments(call, whole=False)

    def _looks_up(self, function: ast.expr) -> bool:
        """Whether a method of a mapping is called, for which a module is no more than a key."""
        return isinstance(function, ast.Attribute) and isinstance(
            self._held(function.value), Mapping
        )

    def _arguments(self, call: ast.Call, whole: bool) -> Iterator[Use]:
        """Uses in the arguments; a module given whole counts only if `whole`."""
        for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
            bare = isinstance(argument, ast.Name) and isinstance(self._held(argument), nn.Module)
            if whole or not bare:
                yield from self._uses(argument)

    def _called(self, call: ast.Call) -> tuple[FunctionType, Any] | None:
        """The function that a call runs and its first argument, if that has a module in it."""
        function = call.func
        if isinstance(function, ast.Attribute):
            if _is_super(function.value):
                return self._super(function.attr)
            base = self._held(function.value)
            found = attribute(base, function.attr) if isinstance(base, nn.Module) else None
            return (found, base) if isinstance(found, FunctionType) else None
        if not call.args:
            return None
        held, first = self._held(function), self._held(call.args[0])
        plain = isinstance(held, FunctionType) and isinstance(first, nn.Module)
        return (held, first) if plain else None

    def _super(self, name: str) -> tuple[FunctionType, Any] | None:
        owner = next((b.held for b in self.names.values() if isinstance(b.held, nn.Module)), None)
        bases = type(owner).__mro__
        defining = [
            number
            for number, base in enumerate(bases)
            for value in vars(base).values()
            if any(f.__code__ is self.facts.syntax.code for f in functions_within(value))
        ]
        for base in bases[defining[0] + 1 :] if defining else ():
            if name in vars(base):
                found = vars(base)[name]
                return (found, owner) if isinstance(found, FunctionType) else None
        return None

    def _follow(self, where: ast.AST, function: FunctionType, first: Any) -> Iterator[Use]:
        """Uses in a method or helper that was not called here, reported where it is called."""
        key = (id(function.__code__), id(first))
        if key in self.followed:
            return
        self.followed.add(key)
        inner = inspect.unwrap(function)
        names = inner.__code__.co_varnames
        known = is_model_code(inner.__code__.co_filename)
        syntax = syntax_of_code(inner.__code__) if known else None
        if syntax is None or not names:
            yield self._use(where, f"reads `{_text(where)}`", first)
            return
        scan = Scan(
            _facts_of(syntax, inner, names[0], first, self.facts.stored),
            {names[0]: Bound(held=first)},
            self.by_tensor,
            followed=self.followed,
        )
        for use in scan.block(_body(syntax.root)):
            what = f"calls {inner.__qualname__}, which {use.what}"
            yield Use(where, what, use.modules, use.values)

    def _attribute(self, node: ast.Attribute) -> Iterator[Use]:
        if node.attr in METADATA:
            if not isinstance(node.value, (ast.Name, ast.Attribute)):
                yield from self._uses(node.value)
            return
        base = self._held(node.value)
        if isinstance(node.value, ast.Name) and node.attr in self._fields(node.value.id):
            values = self._fields(node.value.id)[node.attr]
            yield Use(node, f"reads `{_text(node)}`, a value in between", values=values)
            return
        if not isinstance(base, nn.Module):
            yield from self._uses(node.value)
            return
        found = attribute(base, node.attr)
        if isinstance(found, property) and isinstance(found.fget, FunctionType):
            yield from self._follow(node, found.fget, base)
        elif isinstance(found, FunctionType):
            yield from self._follow(node, found, base)
        else:
            yield self._use(node, f"reads `{_text(node)}`", found)

    def _name(self, node: ast.AST, name: str, reads: bool) -> Iterator[Use]:
        bound = self.names.get(name, Bound())
        if bound.values:
            what = f"{'reads' if reads else 'sets'} `{name}`, which holds a value in between"
            yield Use(node, what, values=bound.values)
        if reads:
            yield self._use(node, f"reads `{name}`", bound.held)

    def _use(self, node: ast.AST, what: str, held: Any) -> Use:
        parts = list(_parts(held, 3))
        values = (self.by_tensor.get(id(part)) for part in parts if isinstance(part, Tensor))
        modules = frozenset(id(part) for part in parts if isinstance(part, nn.Module))
        return Use(node, what, modules, frozenset().union(*(v for v in values if v)))

    def _bound(self, node: ast.expr) -> Bound:
        return self.names.get(node.id, Bound()) if isinstance(node, ast.Name) else Bound()

    def _fields(self, name: str) -> Mapping[str, frozenset[int]]:
        return self.names.get(name, Bound()).fields

    def _held(self, node: ast.expr) -> Any:
        """The object an expression of names and attributes stands for; None if it is not seen."""
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.names[node.id].held
        if isinstance(node, ast.Name):
            status = self.facts.status(node)
            return status.value if isinstance(status, Known) else None
        if isinstance(node, ast.Attribute):
            base = self._held(node.value)
            found = attribute(base, node.attr) if isinstance(base, nn.Module) else MISSING
            return None if found is MISSING else found
        return None


def wording(call: ast.Call) -> str:
    """How a call is written, whichever name a product has that goes by several."""
    if is_product(call):
        call = ast.Call(ast.Name("grouped_mm", ast.Load()), call.args, call.keywords)
    return ast.dump(call)


def is_product(call: ast.Call) -> bool:
    """Whether a product is called that goes by several names."""
    return isinstance(call.func, ast.Attribute) and ast.unparse(call.func) in _GROUPED


def _parts(held: Any, depth: int) -> Iterator[Any]:
    """The modules and tensors in an object: a method's own, a function's cells, a container's."""
    if isinstance(held, (nn.Module, Tensor)):
        yield held
    elif isinstance(held, MethodType):
        yield from _parts(held.__self__, depth)
    elif depth and isinstance(held, (list, tuple, dict)):
        for item in held.values() if isinstance(held, dict) else held:
            yield from _parts(item, depth - 1)
    elif depth and isinstance(held, FunctionType):
        for item in held_by(held):
            yield from _parts(item, depth - 1)


def _facts_of(
    syntax: Syntax, function: FunctionType, name: str, first: Any, stored: frozenset[str]
) -> Facts:
    names = {name: Bound(held=first)}
    return Facts(syntax, function.__globals__, names, {name: Known(first)}, stored)


def _attribute_node(held: ast.expr, name: str) -> ast.Attribute:
    return ast.Attribute(held, name, ast.Load())


def _is_super(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    )


def _body(root: ast.AST) -> list[ast.AST]:
    body = getattr(root, "body", [root])
    return body if isinstance(body, list) else [body]


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else text[:57] + "..."


def place_of(syntax: Syntax, node: ast.AST) -> str:
    """`Block.forward line 41 of modeling.py`."""
    line = getattr(node, "lineno", None) or syntax.code.co_firstlineno
    return f"{syntax.code.co_qualname} line {line} of {Path(syntax.code.co_filename).name}"
