"""Facts about one recorded run, worked out once: what did not run, and under which conditions.

`graph.branches` asks these questions; here they are answered, activation by activation.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType

from torch import nn

from normsurgery.graph.controls import Control, Syntax, walk_code
from normsurgery.graph.executed import Activation, Executed, Place, Visit
from normsurgery.graph.fixed import VARIES, Facts, Known, Status
from normsurgery.graph.mentions import Scan, Use, is_product, place_of, wording
from normsurgery.graph.recording import Op, Recording
from normsurgery.graph.tokenwise import Effect


@dataclass(frozen=True)
class Condition:
    """One way taken at a control that inputs decide: by which activation, and which time.

    arm: the number of the arm that ran; -1 where the control did not leave the function or loop.
    """

    activation: int
    control: int
    arm: int
    number: int
    text: str = field(compare=False)


Said = tuple[str, Effect | None]


class Untaken:
    """All facts about a recording, found once and looked up by module and value."""

    def __init__(self, recording: Recording, executed: Executed) -> None:
        self.recording = recording
        self.executed = executed
        self._facts: dict[int, Facts] = {}
        self._varying: dict[tuple[int, int], bool] = {}

    @cached_property
    def stored(self) -> frozenset[str]:
        """The names of attributes that the code of the model sets while it runs.

        What an object sets on itself while it is made was not there before: it counts for nothing.
        """
        codes = {(a.syntax.root, _made_here(a)) for a in self.executed.activations if a.syntax}
        return frozenset(
            node.attr
            for root, made in codes
            for node in walk_code(root)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and not (isinstance(node.value, ast.Name) and node.value.id == made)
        )

    @cached_property
    def by_tensor(self) -> Mapping[int, frozenset[int]]:
        found: dict[int, frozenset[int]] = {}
        for number, value in enumerate(self.recording.values):
            found[id(value.tensor)] = found.get(id(value.tensor), frozenset()) | {number}
        return found

    @cached_property
    def uses(self) -> tuple[dict[int, list[Said]], dict[int, list[Said]]]:
        """Sentences and effects by the id of a module, and by the number of a value."""
        by_module: dict[int, list[Said]] = {}
        by_value: dict[int, list[Said]] = {}
        for activation in self.executed.activations:
            for use, sentence in self._in(activation):
                for module in use.modules:
                    by_module.setdefault(module, []).append((sentence, use.effect))
                for value in use.values:
                    by_value.setdefault(value, []).append((sentence, use.effect))
        return by_module, by_value

    def found(self, modules: Collection[nn.Module], values: frozenset[int]) -> Iterator[Said]:
        by_module, by_value = self.uses
        for module in self._around(modules, values):
            yield from by_module.get(module, ())
        for value in sorted(values):
            yield from by_value.get(value, ())

    @cached_property
    def _by_path(self) -> dict[str, int]:
        return {path: module for module, paths in self.recording.paths.items() for path in paths}

    def _around(self, modules: Collection[nn.Module], values: frozenset[int]) -> dict[int, None]:
        """The ids of the modules, of those that hold the values, and of all around them."""
        paths = [path for module in modules for path in self.recording.paths.get(id(module), ())]
        names = (
            self.recording.values[v].name for v in values if self.recording.values[v].op is None
        )
        held = [name.rpartition(".")[0] for name in names if name is not None]
        found: dict[int, None] = {}
        for path in (*paths, *(path for path in held if path in self._by_path)):
            parts = path.split(".") if path else []
            for length in range(len(parts), -1, -1):
                found[self._by_path[".".join(parts[:length])]] = None
        return found

    def facts(self, activation: Activation) -> Facts:
        if activation.serial not in self._facts:
            assert activation.syntax is not None
            self._facts[activation.serial] = Facts(
                activation.syntax,
                activation.module_globals,
                activation.names,
                self._parameters(activation),
                self.stored,
                self._outer(activation),
            )
        return self._facts[activation.serial]

    def _outer(self, activation: Activation) -> Facts | None:
        """Of the function around an inner function: one that is running, or the last that did."""
        caller = activation.caller
        while caller is not None and activation.code not in caller.code.co_consts:
            caller = caller.caller
        if caller is None and activation.code.co_freevars:
            caller = self._defined_in.get(activation.code)
        return None if caller is None or caller is activation else self.facts(caller)

    @cached_property
    def _defined_in(self) -> dict[CodeType, Activation]:
        return {
            code: activation
            for activation in self.executed.activations
            for code in activation.code.co_consts
            if isinstance(code, CodeType)
        }

    def _parameters(self, activation: Activation) -> dict[str, Status]:
        """The arguments that are fixed: the module itself, and what a fixed call gives."""
        code = activation.code
        names = code.co_varnames[: code.co_argcount]
        first = activation.names.get(names[0]) if names else None
        held = first.held if first is not None else None
        known: dict[str, Status] = {}
        caller = activation.caller
        call = None
        if activation.direct and caller is not None and caller.syntax is not None:
            call = caller.syntax.call_at(activation.caller_offset)
        if call is not None and caller is not None and _is_plain(call):
            known = self._passed(activation, call, self.facts(caller), isinstance(held, nn.Module))
        if isinstance(held, nn.Module):
            known[names[0]] = Known(held)
        return known

    def _passed(
        self, activation: Activation, call: ast.Call, facts: Facts, bound: bool
    ) -> dict[str, Status]:
        code = activation.code
        whole = bool(call.args) and isinstance(call.args[0], ast.Name) and call.args[0].id == "self"
        names = code.co_varnames[: code.co_argcount][1 if bound and not whole else 0 :]
        given: dict[str, ast.expr] = dict(zip(names, call.args, strict=False))
        given.update((keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg)
        statuses = {name: facts.status(value) for name, value in given.items()}
        for name, value in _defaults(activation.syntax):
            statuses.setdefault(name, Known(value.value))
        return {name: status for name, status in statuses.items() if status is not VARIES}

    def varies(self, activation: Activation, control: Control) -> bool:
        key = (activation.serial, control.index)
        if key not in self._varying:
            self._varying[key] = control.kind == "handlers" or any(
                self._varies(self.facts(activation), control, test) for test in control.tests
            )
        return self._varying[key]

    def _varies(self, facts: Facts, control: Control, test: ast.expr) -> bool:
        """Of a branch only the truth of the test matters, of anything else its value."""
        whole = control.kind != "branch" or isinstance(control.node, ast.Match)
        return facts.status(test) is VARIES if whole else facts.varies(test)

    def _in(self, activation: Activation) -> Iterator[tuple[Use, str]]:
        """What one activation did not do."""
        syntax = activation.syntax
        if activation.in_container:
            return
        if syntax is None:
            yield from self._unknown(activation)
            return
        for visit in activation.visits:
            control = syntax.controls[visit.control]
            if not self.varies(activation, control):
                continue
            yield from self._of_visit(activation, syntax, visit)

    def _of_visit(
        self, activation: Activation, syntax: Syntax, visit: Visit
    ) -> Iterator[tuple[Use, str]]:
        control = syntax.controls[visit.control]
        also_run = _calls_in_both(syntax, control, visit)
        scan = Scan(self.facts(activation), visit.names, self.by_tensor, also_run)
        for nodes in _not_run(syntax, control, visit):
            for use in scan.block(nodes):
                yield use, f"{place_of(syntax, use.where)} (not run here) {use.what}"
        chosen = list(scan.picked(control.node)) if control.kind == "pick" else []
        for arm in visit.entered if control.kind == "branch" else ():
            if not _others_raise(scan, control, arm):
                chosen.extend(scan.handed_on(control.arms[arm]))
        for use in chosen:
            yield use, f"{place_of(syntax, use.where)} {use.what}"

    def _unknown(self, activation: Activation) -> Iterator[tuple[Use, str]]:
        code = activation.code
        for name, bound in activation.names.items():
            modules = frozenset({id(bound.held)} if isinstance(bound.held, nn.Module) else ())
            sentence = f"{code.co_qualname}, which has no source to read, is given `{name}`"
            yield Use(ast.Pass(), sentence, modules, bound.values), sentence

    def conditions(self, op: Op) -> frozenset[Condition]:
        found = set()
        for place in self.executed.places[op.index]:
            syntax = place.activation.syntax
            for number, arm, visit in place.around:
                assert syntax is not None
                control = syntax.controls[number]
                if self.varies(place.activation, control) and self._matters(place, control, arm):
                    text = _condition_text(syntax, control)
                    found.add(Condition(place.activation.serial, number, arm, visit, text))
        return frozenset(found)

    def _matters(self, place: Place, control: Control, arm: int) -> bool:
        """Whether going another way at the control gives an output without what runs here."""
        if arm == -1:
            return True
        scan = Scan(self.facts(place.activation), place.activation.names, self.by_tensor)
        if _others_raise(scan, control, arm):
            return False
        assert place.activation.syntax is not None
        syntax = place.activation.syntax
        call = syntax.call_at(place.offset)
        others = _others(control, arm)
        if call is not None and _is_settled_product(syntax, call) and _returns(control.arms[arm]):
            others = [(*nodes, *syntax.continuation(control.node, syntax.root)) for nodes in others]
        return call is None or not all(_repeats(nodes, call) for nodes in others)


def _made_here(activation: Activation) -> str | None:
    """The name of the object that an activation makes: `self` in an `__init__`, of no module."""
    code = activation.code
    if code.co_name != "__init__" or not code.co_argcount:
        return None
    first = code.co_varnames[0]
    bound = activation.names.get(first)
    return None if bound is not None and isinstance(bound.held, nn.Module) else first


def _others(control: Control, arm: int) -> list[tuple[ast.AST, ...]]:
    return [nodes for number, nodes in enumerate(control.arms) if number != arm]


def _others_raise(scan: Scan, control: Control, arm: int) -> bool:
    return all(nodes and scan.raises(list(nodes)) for nodes in _others(control, arm))


def _returns(nodes: Sequence[ast.AST]) -> bool:
    """Whether what stands behind these statements may run in their place."""
    return any(isinstance(node, ast.Return) for part in nodes for node in walk_code(part))


def _is_plain(call: ast.Call) -> bool:
    """Whether every argument is written out, with neither `*args` nor `**kwargs`."""
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    return not starred and all(keyword.arg is not None for keyword in call.keywords)


def _defaults(syntax: Syntax | None) -> Iterator[tuple[str, ast.Constant]]:
    arguments = getattr(syntax.root, "args", None) if syntax is not None else None
    if not isinstance(arguments, ast.arguments):
        return
    positional = [*arguments.posonlyargs, *arguments.args]
    last = positional[len(positional) - len(arguments.defaults) :]
    pairs = (
        *zip(last, arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    )
    yield from ((name.arg, value) for name, value in pairs if isinstance(value, ast.Constant))


def _not_run(syntax: Syntax, control: Control, visit: Visit) -> Iterator[list[ast.AST]]:
    """The stretches of code that would have run, had the control gone another way that time."""
    for arm, nodes in enumerate(control.arms):
        if nodes and arm not in visit.entered:
            yield list(nodes)
            yield from _behind_loops(syntax, nodes)
    node = control.node
    if visit.exit is not None:
        until = syntax.root if isinstance(visit.exit, ast.Return) else syntax.loop_of(visit.exit)
        yield syntax.continuation(node, until)
    elif control.kind == "loop" and 0 in visit.entered and isinstance(node, ast.stmt):
        yield syntax.continuation(node, syntax.root)


def _behind_loops(syntax: Syntax, nodes: Sequence[ast.AST]) -> Iterator[list[ast.AST]]:
    """Where a break or continue that did not run would have led to."""
    for node in (inner for part in nodes for inner in walk_code(part)):
        if isinstance(node, (ast.Break, ast.Continue)):
            loop = syntax.loop_of(node)
            again = [*getattr(loop, "body", ())] if isinstance(node, ast.Continue) else []
            yield [*again, *syntax.continuation(loop, syntax.root)]


def _calls_in_both(syntax: Syntax, control: Control, visit: Visit) -> frozenset[str]:
    """Calls that ran and count as made in every arm: of the whole module, as wrappers of a forward
    write them, and of products that go by several names."""
    ran = (node for arm in visit.entered for node in control.arms[arm])
    calls = (call for node in ran for call in walk_code(node) if isinstance(call, ast.Call))
    return frozenset(
        wording(call)
        for call in calls
        if any(isinstance(part, ast.Starred) for part in call.args)
        or _is_settled_product(syntax, call)
    )


def _is_settled_product(syntax: Syntax, call: ast.Call) -> bool:
    """Whether it is a product that goes by several names, of names that are never assigned to."""
    names = [node for node in walk_code(syntax.root) if isinstance(node, ast.Name)]
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    read = {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
    return is_product(call) and stored.isdisjoint(read)


def _repeats(nodes: Sequence[ast.AST], call: ast.Call) -> bool:
    """Whether the same call is written in these statements too, under no further condition."""
    wanted = wording(call)
    plain = (
        node for node in nodes if isinstance(node, (ast.Assign, ast.Return, ast.Expr, ast.With))
    )
    for node in plain:
        for part in walk_code(node):
            if isinstance(part, ast.Call) and wording(part) == wanted:
                return True
    return False


def _condition_text(syntax: Syntax, control: Control) -> str:
    head = control.tests[0] if control.tests else control.node
    return f"{place_of(syntax, control.node)} ({' '.join(ast.unparse(head).split())[:60]})"
