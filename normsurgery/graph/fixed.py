"""Which expressions of a function cannot change from one call of the model to the next.

An expression is Known (its value is seen), FIXED (made of what cannot change: settings of a module,
globals, literals) or VARIES (it reads an argument, a tensor, or anything made of those).
"""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from normsurgery.graph.controls import Syntax, walk_code
from normsurgery.graph.executed import Names


@dataclass(frozen=True)
class Known:
    value: Any


class Fixed(Enum):
    FIXED = "fixed"
    VARIES = "varies"


Status = Known | Fixed
FIXED, VARIES = Fixed.FIXED, Fixed.VARIES
MISSING = object()

# What says how a tensor is kept and not what is in it.
METADATA = frozenset(
    {
        "shape",
        "dtype",
        "device",
        "ndim",
        "is_cuda",
        "layout",
        "is_meta",
        "itemsize",
        "requires_grad",
        "size",
        "dim",
        "numel",
        "is_floating_point",
        "stride",
        "element_size",
        "get_device",
    }
)
_RANDOM = ("rand", "bernoulli", "multinomial", "dropout", "normal", "uniform", "choice", "shuffle")
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, group: item in group,
    ast.NotIn: lambda item, group: item not in group,
}
_PLAIN = (bool, int, float, str, bytes, type(None), tuple, list, dict, set, frozenset)


def attribute(holder: Any, name: str) -> Any:
    """What `holder.name` is, without running any code of the holder's; MISSING where there is none.

    A property, a method or another descriptor is given as it stands in the class.
    """
    if isinstance(holder, ModuleType):
        return vars(holder).get(name, MISSING)
    if isinstance(holder, nn.Module):
        for group in (holder._parameters, holder._buffers, holder._modules, vars(holder)):
            if name in group:
                return group[name]
    return inspect.getattr_static(holder, name, MISSING)


@dataclass(frozen=True)
class Guard:
    """A test that something stands under, and the truth it must have for that to run.

    wanted: None where the test is not one of `if`, and its truth alone does not tell.
    """

    test: ast.expr
    wanted: bool | None


@dataclass(eq=False)
class Facts:
    """What is fixed in one activation of a function.

    `parameters` are the arguments that are not VARIES; `stored` the names of attributes that some
    forward sets, which therefore change while the model runs. `outer` speaks of the function that
    this one is defined in, where it is a comprehension, a lambda or an inner function.
    """

    syntax: Syntax
    module_globals: Mapping[str, Any]
    names: Names
    parameters: Mapping[str, Status]
    stored: frozenset[str]
    outer: Facts | None = None
    _varying: set[str] = field(default_factory=set)
    _assigned: dict[str, list[tuple[ast.expr | None, tuple[Guard, ...]]]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        for name, value, guards in _assignments(self.syntax):
            self._assigned.setdefault(name, []).append((value, guards))
        code = self.syntax.code
        count = code.co_argcount + code.co_kwonlyargcount
        starred = bool(code.co_flags & inspect.CO_VARARGS) + bool(
            code.co_flags & inspect.CO_VARKEYWORDS
        )
        arguments = code.co_varnames[: count + starred]
        self._varying.update(name for name in arguments if name not in self.parameters)
        while self._forget():
            continue
        while self._spread():
            continue

    def _forget(self) -> bool:
        """Leave out the assignments that never run. True if there were any."""
        live = {
            name: [item for item in assigned if not any(map(self._never, item[1]))]
            for name, assigned in self._assigned.items()
        }
        changed = live != self._assigned
        self._assigned = {name: assigned for name, assigned in live.items() if assigned}
        return changed

    def _never(self, guard: Guard) -> bool:
        truth = self.truth(guard.test)
        return None not in (truth, guard.wanted) and truth is not guard.wanted

    def _holds_module(self, name: str) -> bool:
        return name in self.names and isinstance(self.names[name].held, nn.Module)

    def _spread(self) -> bool:
        """Mark the names that are assigned from what varies. True if any was not marked yet."""
        before = len(self._varying)
        for name, assigned in self._assigned.items():
            if name in self._varying:
                continue
            for value, guards in assigned:
                varies = value is not None and self.status(value) is VARIES
                if varies or any(self.varies(guard.test) for guard in guards):
                    self._varying.add(name)
        return len(self._varying) > before

    def varies(self, test: ast.expr) -> bool:
        """Whether a test may come out one way for some inputs and the other way for others."""
        return self.truth(test) is None and self.status(test) is VARIES

    def truth(self, expression: ast.expr) -> bool | None:
        """Whether the expression is always true or always false; None if that is not known."""
        if isinstance(expression, ast.BoolOp):
            decides = isinstance(expression.op, ast.Or)
            truths = [self.truth(value) for value in expression.values]
            undecided = None if None in truths else not decides
            return decides if decides in truths else undecided
        status = self.status(expression)
        plain = isinstance(status, Known) and isinstance(status.value, _PLAIN)
        return bool(status.value) if plain and isinstance(status, Known) else None

    def status(self, node: ast.expr) -> Status:
        method = _STATUS.get(type(node))
        if method is not None:
            return method(self, node)
        return self._joined(ast.iter_child_nodes(node))

    def _joined(self, nodes: Iterator[ast.AST]) -> Status:
        """FIXED if every expression among the nodes is: for tuples, sums, slices, text."""
        for node in nodes:
            if isinstance(node, ast.comprehension):
                inner: Status = self._joined(ast.iter_child_nodes(node))
            elif isinstance(node, ast.expr):
                inner = self.status(node)
            else:
                continue
            if inner is VARIES or (isinstance(inner, Known) and isinstance(inner.value, Tensor)):
                return VARIES
        return FIXED

    def _name(self, node: Any) -> Status:
        name = node.id
        if name in self._varying:
            return VARIES
        code = self.syntax.code
        if name in self.parameters and name not in self._assigned:
            return self.parameters[name]
        if name in self._assigned:
            return self._local(name)
        if name not in code.co_names and not hasattr(builtins, name):
            return self.outer.status(node) if self.outer else self._free(name)
        if name in self.module_globals:
            return Known(self.module_globals[name])
        return Known(getattr(builtins, name)) if hasattr(builtins, name) else FIXED

    def _free(self, name: str) -> Status:
        """A name of the function around, which did not run: it was bound before the model was."""
        if self._holds_module(name):
            return Known(self.names[name].held)
        return FIXED if name in self.syntax.code.co_freevars else VARIES

    def _local(self, name: str) -> Status:
        if self._holds_module(name):
            return Known(self.names[name].held)
        assigned = self._assigned[name]
        once = len(assigned) == 1 and name not in self.parameters and not assigned[0][1]
        value = assigned[0][0]
        reads_itself = value is not None and any(
            isinstance(part, ast.Name) and part.id in self._assigned for part in ast.walk(value)
        )
        return self.status(value) if once and value is not None and not reads_itself else FIXED

    def _attribute(self, node: Any) -> Status:
        base = self.status(node.value)
        if base is VARIES or (node.attr in self.stored and node.attr not in METADATA):
            return VARIES
        if not isinstance(base, Known):
            return FIXED
        if isinstance(base.value, Tensor):
            return FIXED if node.attr in METADATA else VARIES
        found = attribute(base.value, node.attr)
        if found is MISSING or isinstance(found, property) or hasattr(found, "__get__"):
            return FIXED
        return Known(found)

    def _compare(self, node: Any) -> Status:
        operands = [self.status(part) for part in (node.left, *node.comparators)]
        if VARIES in operands:
            return VARIES
        values = [item.value for item in operands if isinstance(item, Known)]
        identity = all(isinstance(kind, (ast.Is, ast.IsNot)) for kind in node.ops)
        if not identity and any(isinstance(value, Tensor) for value in values):
            return VARIES
        plain = identity or all(isinstance(value, _PLAIN) for value in values)
        if len(node.ops) > 1 or len(values) < 2 or not plain:
            return FIXED
        try:
            return Known(bool(_COMPARE[type(node.ops[0])](*values)))
        except TypeError:
            return FIXED

    def _bool(self, node: Any) -> Status:
        """The first operand that decides, if all before it are known not to."""
        decides = isinstance(node.op, ast.Or)
        for value in node.values:
            truth = self.truth(value)
            if truth is None:
                return self._joined(iter(node.values))
            if truth is decides:
                return self.status(value)
        return self.status(node.values[-1])

    def _not(self, node: Any) -> Status:
        truth = self.truth(node.operand) if isinstance(node.op, ast.Not) else None
        return Known(not truth) if truth is not None else self._joined(iter((node.operand,)))

    def _ternary(self, node: Any) -> Status:
        truth = self.truth(node.test)
        if truth is not None:
            return self.status(node.body if truth else node.orelse)
        return self._joined(iter((node.test, node.body, node.orelse)))

    def _call(self, node: Any) -> Status:
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        function = self.status(node.func)
        if function is VARIES or any(self.status(argument) is VARIES for argument in arguments):
            return VARIES
        known = function.value if isinstance(function, Known) else None
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if isinstance(known, nn.Module) or any(word in name for word in _RANDOM):
            return VARIES
        if known in (hasattr, getattr, isinstance):
            return self._asked(known, [self.status(argument) for argument in arguments])
        tensors = (isinstance(s, Known) and isinstance(s.value, Tensor) for s in self._each(node))
        return VARIES if any(tensors) else FIXED

    def _each(self, node: ast.Call) -> Iterator[Status]:
        return (self.status(argument) for argument in node.args)

    def _asked(self, function: Any, arguments: list[Status]) -> Status:
        """`hasattr`, `getattr` and `isinstance` of something known."""
        if not all(isinstance(item, Known) for item in arguments[:2]) or len(arguments) < 2:
            return FIXED
        holder, second = (item.value for item in arguments[:2] if isinstance(item, Known))
        if function is isinstance:
            classes = second if isinstance(second, tuple) else (second,)
            return (
                Known(isinstance(holder, second)) if all(map(inspect.isclass, classes)) else FIXED
            )
        found = attribute(holder, second)
        if function is hasattr:
            dynamic = found is MISSING and not isinstance(holder, nn.Module)
            return FIXED if dynamic else Known(found is not MISSING)
        if second in self.stored:
            return VARIES
        if found is MISSING:
            return arguments[2] if len(arguments) > 2 and isinstance(holder, nn.Module) else FIXED
        return FIXED if hasattr(found, "__get__") else Known(found)


_STATUS: dict[type[ast.expr], Callable[[Facts, Any], Status]] = {
    ast.Constant: lambda facts, node: Known(node.value),
    ast.Name: Facts._name,
    ast.Attribute: Facts._attribute,
    ast.Compare: Facts._compare,
    ast.BoolOp: Facts._bool,
    ast.UnaryOp: Facts._not,
    ast.IfExp: Facts._ternary,
    ast.Call: Facts._call,
    ast.NamedExpr: lambda facts, node: facts.status(node.value),
    ast.Lambda: lambda facts, node: FIXED,
    ast.Await: lambda facts, node: VARIES,
    ast.Yield: lambda facts, node: VARIES,
    ast.YieldFrom: lambda facts, node: VARIES,
}

_Assigned = tuple[str, ast.expr | None, tuple[Guard, ...]]


@lru_cache(maxsize=1024)
def _assignments(syntax: Syntax) -> tuple[_Assigned, ...]:
    return tuple(_assigned(syntax))


def _assigned(syntax: Syntax) -> Iterator[_Assigned]:
    """(name, what it is assigned from, the tests it stands under) for every local of a function."""
    for node in walk_code(syntax.root):
        for target, value in _bindings(node):
            guards = tuple(_guards(syntax, node))
            for name, part in _pairs(target, value):
                yield name, part, guards


def _bindings(node: ast.AST) -> Iterator[tuple[ast.AST, ast.expr | None]]:
    """(target, value) of everything that binds a name; None for a value that is always the same."""
    match node:
        case ast.Assign(targets, value):
            yield from ((target, value) for target in targets)
        case ast.AnnAssign(target, _, ast.expr() as value) | ast.NamedExpr(target, value):
            yield target, value
        case ast.AugAssign(target, _, value) | ast.withitem(value, ast.expr() as target):
            yield target, _made_of(value)
        case ast.For(target, iterable) | ast.comprehension(target, iterable):
            yield target, _made_of(iterable)
        case ast.ExceptHandler(_, str(name)) | ast.FunctionDef(name) | ast.ClassDef(name):
            yield _stored(name), None
        case ast.Import(names) | ast.ImportFrom(_, names):
            yield from ((_stored((n.asname or n.name).split(".")[0]), None) for n in names)
        case ast.Match(subject, cases):
            patterns = (part for case in cases for part in ast.walk(case.pattern))
            captured = (getattr(p, "name", None) or getattr(p, "rest", None) for p in patterns)
            yield from ((_stored(name), _made_of(subject)) for name in captured if name)


def _made_of(value: ast.expr) -> ast.expr:
    """What is as fixed as the value, but is not the value itself: an item or a sum of it."""
    return ast.Set([value])


def _stored(name: str) -> ast.Name:
    return ast.Name(name, ast.Store())


def _pairs(target: ast.AST, value: ast.expr | None) -> Iterator[tuple[str, ast.expr | None]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Starred):
        yield from _pairs(target.value, None if value is None else _made_of(value))
    elif isinstance(target, (ast.Tuple, ast.List)):
        parts = value.elts if isinstance(value, (ast.Tuple, ast.List)) else None
        matched = parts is not None and len(parts) == len(target.elts)
        item_of = None if value is None else _made_of(value)
        for index, item in enumerate(target.elts):
            yield from _pairs(item, parts[index] if matched and parts else item_of)


def _guards(syntax: Syntax, node: ast.AST) -> Iterator[Guard]:
    """The tests that decide whether the node runs."""
    while node is not syntax.root and node in syntax.parents:
        parent = syntax.parents[node]
        for control in syntax.controls:
            arms = (number for number, arm in enumerate(control.arms) if node in arm)
            if control.node is parent and (arm := next(arms, None)) is not None:
                wanted = arm == 0 if isinstance(parent, ast.If) else None
                yield from (Guard(test, wanted) for test in control.tests)
        node = parent
