"""Which forwards a trace can stand for exactly, judged from their source.

A trace keeps what it saw: a Python value that is read becomes a constant, a context manager or an
assignment to an attribute leaves no node. So only a forward is traced that cannot do such things:
assignments to local names, `if` on the mode or on an argument's arm, calls of children, of torch
functions that see proxies, and of tensor methods. Everything else is left to the source way.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Collection
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import get_testing_overrides

from normsurgery.errors import CannotRewrite

STATEMENTS = (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr, ast.If, ast.Pass)
EXPRESSIONS = (
    ast.Attribute,
    ast.BinOp,
    ast.BoolOp,
    ast.Call,
    ast.Compare,
    ast.Constant,
    ast.Dict,
    ast.IfExp,
    ast.List,
    ast.Name,
    ast.Slice,
    ast.Subscript,
    ast.Tuple,
    ast.UnaryOp,
)
CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)


def check_plain(
    definition: ast.FunctionDef | ast.AsyncFunctionDef,
    function: FunctionType,
    owner: nn.Module,
    norm: Collection[ast.AST],
) -> None:
    """Raise CannotRewrite at the first thing that a trace of `function` might get wrong.

    `norm` are the nodes that belong to the norms to be replaced alone: what they read goes too.
    """
    if isinstance(definition, ast.AsyncFunctionDef) or inspect.isgeneratorfunction(function):
        raise CannotRewrite("a trace cannot stand for a coroutine or a generator")
    arguments = definition.args
    if arguments.vararg or arguments.kwarg:
        raise CannotRewrite("a trace cannot stand for *args or **kwargs")
    _Check(definition, function, owner, norm).run()


class _Check(ast.NodeVisitor):
    def __init__(
        self,
        definition: ast.FunctionDef | ast.AsyncFunctionDef,
        function: FunctionType,
        owner: nn.Module,
        norm: Collection[ast.AST],
    ) -> None:
        self.definition, self.function, self.owner = definition, function, owner
        self.norm = set(norm)
        arguments = definition.args
        listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        self.arguments = {argument.arg for argument in listed}
        self.self_name = listed[0].arg
        self.stored = {
            node.id
            for node in ast.walk(definition)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }

    def run(self) -> None:
        for statement in self.definition.body:
            self.visit(statement)

    def visit(self, node: ast.AST) -> None:
        if node in self.norm and isinstance(node, ast.expr):
            return
        if isinstance(node, ast.stmt) and not isinstance(node, STATEMENTS):
            raise self._refusal(node, type(node).__name__)
        if isinstance(node, ast.expr) and not isinstance(node, EXPRESSIONS):
            raise self._refusal(node, type(node).__name__)
        super().visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._local(target)
        self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._local(node.target)
        if node.value is not None:
            self.visit(node.value)

    def visit_Compare(self, node: ast.Compare) -> None:
        by_identity = any(isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)) for op in node.ops)
        left = node.left.id if isinstance(node.left, ast.Name) else ""
        if by_identity and (left not in self.arguments or left in self.stored):
            raise self._refusal(node, "a comparison by identity")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if any(keyword.arg is None for keyword in node.keywords):
            raise self._refusal(node, "**")
        self._callee(node)
        for value in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.visit(value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = _chain(node)
        if chain is None:
            self.visit(node.value)
        elif chain[0] == self.self_name:
            self._own(node, chain[1:])
        elif not self._is_local(chain[0]):
            self._global(node, chain)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id == self.self_name:
            raise self._refusal(node, "self itself")
        if not self._is_local(node.id):
            self._global(node, (node.id,))

    def _callee(self, node: ast.Call) -> None:
        chain = _chain(node.func)
        if chain is None:  # a method of a computed value
            self.visit(node.func)
        elif chain[0] == self.self_name:
            self._own_call(node, chain[1:])
        elif not self._is_local(chain[0]):
            self._torch_call(node, self._resolved(node, chain))

    def _own_call(self, node: ast.Call, path: tuple[str, ...]) -> None:
        """A call of a child, or of a tensor's method (`self.weight.view(-1)`)."""
        if self._is_child(".".join(path)):
            return
        self._own(node, path[:-1])

    def _torch_call(self, node: ast.Call, function: Any) -> None:
        if function not in get_testing_overrides():
            raise self._refusal(node, "a call that a trace does not see")
        reads = {n.id for value in node.args for n in ast.walk(value) if isinstance(n, ast.Name)}
        if not any(self._is_local(name) or name == self.self_name for name in reads):
            raise self._refusal(node, "a call that reads no value of the forward")

    def _own(self, node: ast.expr, path: tuple[str, ...]) -> None:
        if path == ("training",):
            return
        tensors = {*dict(self.owner.named_parameters(remove_duplicate=False))}
        tensors |= {*dict(self.owner.named_buffers(remove_duplicate=False))}
        if not any(".".join(path[:end]) in tensors for end in range(1, len(path) + 1)):
            raise self._refusal(node, f"self.{'.'.join(path)}, a value that may change")

    def _global(self, node: ast.expr, chain: tuple[str, ...]) -> None:
        if not isinstance(self._resolved(node, chain), CONSTANTS):
            raise self._refusal(node, f"{'.'.join(chain)}, a value that may change")

    def _resolved(self, node: ast.expr, chain: tuple[str, ...]) -> Any:
        if chain[0] in self.function.__code__.co_freevars:
            raise self._refusal(node, f"{chain[0]}, a name of an enclosing function")
        missing = object()
        value = self.function.__globals__.get(chain[0], getattr(builtins, chain[0], missing))
        for name in chain[1:]:
            if not isinstance(value, ModuleType):
                raise self._refusal(node, f"{'.'.join(chain)}, an attribute")
            value = getattr(value, name, missing)
        return value

    def _local(self, target: ast.expr) -> None:
        parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        if not all(isinstance(part, ast.Name) for part in parts):
            raise self._refusal(target, "an assignment to something other than a local name")

    def _is_local(self, name: str) -> bool:
        return name != self.self_name and (name in self.arguments or name in self.stored)

    def _is_child(self, path: str) -> bool:
        return path in dict(self.owner.named_modules(remove_duplicate=False)) and bool(path)

    def _refusal(self, node: ast.stmt | ast.expr, what: str) -> CannotRewrite:
        return CannotRewrite(f"a trace cannot stand for {what} (line {node.lineno} of forward)")


def _chain(node: ast.expr) -> tuple[str, ...] | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return (node.id, *parts) if isinstance(node, ast.Name) else None
