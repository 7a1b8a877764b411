"""What a plain look at names tells of code that no measured call ran.

Lines of a forward, or of what it calls on `self`, that ran in no measured call and that name the
very module or tensor that a fold edits refuse that fold. What decides that a norm runs at all, an
attribute or another norm beside it that never ran, is said.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import CodeType, FunctionType

from torch import Tensor, fx, nn

from normsurgery.fold.checks import Check
from normsurgery.fold.ground import Ground, Landing, Refused, Run
from normsurgery.graph import Flow, FrameRecord
from normsurgery.graph.nodes import frames, inputs_of, is_constant, operator
from normsurgery.graph.positions import forward_of, functions_of, syntax_of
from normsurgery.surgery.attribute_chains import Chain, aliases_in, chains_at, self_name_of
from normsurgery.surgery.references import HARMLESS_OF_TENSOR, child_named

_READS = frozenset({"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::item"})


@dataclass(frozen=True)
class Mention:
    """An expression on a line that no measured call ran; line: as in the file."""

    owner: str
    function: str
    expression: str
    line: int

    def __str__(self) -> str:
        where = f"{self.owner or 'the model itself'} names {self.expression} on line {self.line}"
        return f"{where} of {self.function}, which no measured call ran"


class UnrunCode:
    """Of one model, as all its measured calls went through it."""

    def __init__(self, grounds: Sequence[Ground]) -> None:
        self.example = grounds[0]
        self.recordings = [ground.located.recording for ground in grounds]

    def require_unnamed(self, names: Iterable[str]) -> None:
        """No line that no call ran names one of these tensors, or its module. Raises Refused."""
        for name in names:
            path, _, last = name.rpartition(".")
            module = self.example.model.get_submodule(path)
            for key in ((id(module), last), (id(module), None)):
                if key in self._mentions:
                    raise Refused(Check.UNRUN, str(self._mentions[key]))

    @cached_property
    def _ran(self) -> dict[CodeType, set[int]]:
        found: dict[CodeType, set[int]] = {}
        for recording in self.recordings:
            for code, lines in recording.lines.items():
                found.setdefault(code, set()).update(lines)
        return found

    @cached_property
    def _mentions(self) -> dict[tuple[int, str | None], Mention]:
        """By module, and the name of its tensor where only that is named."""
        model = self.example.model
        found: dict[tuple[int, str | None], Mention] = {}
        for path, owner in model.named_modules():
            if isinstance(owner, fx.GraphModule):  # all of a graph runs, node by node
                continue
            for function in _reached(owner, self._ran):
                ran = self._ran.get(function.__code__, set())
                without = _lines_that_raise(owner, function)
                for line, chain in _named_on(function):
                    if line in ran or line in without:
                        continue
                    mention = Mention(path, function.__qualname__, "self." + ".".join(chain), line)
                    for key in _meant(owner, chain):
                        found.setdefault(key, mention)
        return found

    # --- what decides that a norm runs ------------------------------------------------------------

    def chosen_by(self, runs: Sequence[Run], landings: Sequence[Landing]) -> tuple[str, ...]:
        """Notes on what decides that the norm runs together with what takes it up.

        Raises Refused where that is a number that the forward reads from data.
        """
        notes: dict[str, None] = {}
        for run in runs:
            notes |= dict.fromkeys(self._beside(run))
            for landing in landings:
                notes |= dict.fromkeys(self._conditions(run, landing))
        return tuple(notes)

    def _beside(self, run: Run) -> Iterator[str]:
        """Norms of the same container or owner that no measured call ran."""
        site, survey = run.site, self.example.located.survey
        parent = site.path.rpartition(".")[0]
        for other in survey:
            same = other.kind == site.kind and other.path.rpartition(".")[0] == parent
            if other.form != "module" or site.form != "module" or not same or other is site:
                continue
            features = other.settings.get("features") == site.settings.get("features")
            if features and not self._runs(other.index):
                yield (
                    f"{other.path} beside it ran in no measured call: where it runs in its place, "
                    f"what was folded is that of {site.path}"
                )

    def _runs(self, index: int) -> bool:
        return bool(self.example.runs[index])

    def _conditions(self, run: Run, landing: Landing) -> Iterator[str]:
        """The `if`s of one forward around the norm alone, or around what takes it up alone."""
        first = frames(run.nodes[0]) if run.nodes else ()
        second = frames(landing.nodes[0])
        shared = next((pair for pair in _shared(first, second)), None)
        if shared is None:
            return
        function = _function_of(shared[0])
        if function is None:
            return
        for test in _tests_around(function, *(frame.span.line for frame in shared if frame.span)):
            self._require_no_data(shared[0], test)
            attribute = _attribute_in(test)
            name = run.site.path.rpartition(".")[2]
            if attribute is not None and attribute not in (name, "training"):
                line = function.__code__.co_firstlineno + test.lineno
                yield (
                    f"whether it runs is decided by `if {ast.unparse(test)}` on line {line} of "
                    f"{function.__qualname__}: the fold holds while that stays as it is"
                )

    def _require_no_data(self, frame: FrameRecord, test: ast.expr) -> None:
        recording = self.example.located.recording
        for node in reads_data(recording):
            spans = (
                f.span for f in frames(node) if f.serial == frame.serial and f.span is not None
            )
            last = test.end_lineno or test.lineno
            if any(test.lineno <= span.line <= last for span in spans):
                raise Refused(Check.DATA_DEPENDENT, f"`if {ast.unparse(test)}` decides what runs")


def reads_data(flow: Flow) -> tuple[fx.Node, ...]:
    """Operations that make a Python number of a tensor that depends on the inputs."""
    return tuple(
        node
        for node in flow.operations
        if operator(node) in _READS and not all(map(is_constant, inputs_of(node)))
    )


# --- names ----------------------------------------------------------------------------------------


def _reached(owner: nn.Module, ran: Mapping[CodeType, set[int]]) -> Iterator[FunctionType]:
    """The owner's forward, and the methods and properties that it names, however far.

    Of what stands behind one name, overridden or wrapped by a decorator, what ran counts, or where
    nothing did, what would run first.
    """
    seen: set[str] = set()
    queue = ["forward"]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in _behind(owner, name, ran):
            yield function
            queue += [chain[0] for _, chain in _named_in(function)]


def _behind(
    owner: nn.Module, name: str, ran: Mapping[CodeType, set[int]]
) -> Sequence[FunctionType]:
    held = [vars(base)[name] for base in type(owner).__mro__ if name in vars(base)]
    if name in vars(owner):
        held.insert(0, vars(owner)[name])
    functions = [f for value in held for f in functions_of(value)]
    chosen = [f for f in functions if f.__code__ in ran] or list(
        functions_of(next(iter(held), None))
    )
    return [f for f in chosen if not (f.__module__ or "").startswith("torch.")]


def _named_on(function: FunctionType) -> list[tuple[int, Chain]]:
    """(line in the file, chain) of what a function names from `self` and computes with."""
    first = function.__code__.co_firstlineno
    return [(first + line, chain) for line, chain in _named_in(function)]


@cache
def _syntax(function: FunctionType) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    try:
        return syntax_of(function)
    except (OSError, TypeError, SyntaxError):  # no source: nothing can be read from it
        return None


@cache
def _named_in(function: FunctionType) -> list[tuple[int, Chain]]:
    definition = _syntax(function)
    if definition is None:
        return []
    self_name = self_name_of(definition)
    if self_name is None:
        return []
    aliases = aliases_in(definition, self_name)
    harmless = {id(inner) for node in ast.walk(definition) for inner in _without_effect(node)}
    parts = {
        id(node.value)
        for node in ast.walk(definition)
        if isinstance(node, (ast.Attribute, ast.Subscript))
    }
    return [
        (node.lineno, chain)
        for node in ast.walk(definition)
        if isinstance(node, ast.expr) and id(node) not in harmless and id(node) not in parts
        for chain in chains_at(node, aliases)
        if chain and HARMLESS_OF_TENSOR.isdisjoint(chain)
    ]


def _lines_that_raise(owner: nn.Module, function: FunctionType) -> set[int]:
    """The lines behind `if not hasattr(self, name): raise`, of an owner that has no such thing."""
    first = function.__code__.co_firstlineno
    found: set[int] = set()
    for node in ast.walk(_syntax(function) or ast.Module([], [])):
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if not isinstance(block, list):
                continue
            for place, statement in enumerate(block):
                if _raises_for(owner, statement):
                    found.update(first + line for line in _lines(block[place + 1 :]))
    return found


def _raises_for(owner: nn.Module, statement: ast.stmt) -> bool:
    match statement:
        case ast.If(
            ast.UnaryOp(ast.Not(), ast.Call(ast.Name("hasattr"), [_, ast.Constant(str(name))])),
            [ast.Raise()],
        ):
            return not hasattr(owner, name)
    return False


def _without_effect(node: ast.AST) -> Iterator[ast.AST]:
    """What ends in an exception gives no output, and what trains does not run in eval mode."""
    if isinstance(node, ast.Raise):
        yield from ast.walk(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) == "self.training":
        for statement in node.body:
            yield from ast.walk(statement)


def _meant(owner: nn.Module, chain: Chain) -> Iterator[tuple[int, str | None]]:
    """The modules that a chain ends at, or the tensor of a module."""
    modules = [owner]
    for place, name in enumerate(chain):
        further = [found for module in modules for found in child_named(module, name)]
        if not further:
            for module in modules:
                if isinstance(getattr(module, name, None), Tensor):
                    yield id(module), name
                elif place:
                    yield id(module), None
            return
        modules = further
    for module in modules:
        yield id(module), None


# --- conditions -----------------------------------------------------------------------------------


def _shared(
    first: Sequence[FrameRecord], second: Sequence[FrameRecord]
) -> Iterator[tuple[FrameRecord, FrameRecord]]:
    """The frames of one activation that both ran in, innermost first."""
    for frame in first:
        other = next((f for f in second if f.serial == frame.serial), None)
        if other is not None:
            yield frame, other


def _function_of(frame: FrameRecord) -> FunctionType | None:
    return None if frame.code is None else forward_of(type(frame.module), frame.code)


def _tests_around(function: FunctionType, first: int, second: int) -> Iterator[ast.expr]:
    """The tests of the `if`s that stand around one of two lines and not around the other."""
    definition = _syntax(function)
    for node in ast.walk(definition) if definition is not None else ():
        if isinstance(node, ast.If):
            arms = [_lines(node.body), _lines(node.orelse)]
            if [first in arm for arm in arms] != [second in arm for arm in arms]:
                yield node.test


def _lines(block: Sequence[ast.stmt]) -> range:
    if not block:
        return range(0)
    return range(block[0].lineno, (block[-1].end_lineno or block[-1].lineno) + 1)


def _attribute_in(test: ast.expr) -> str | None:
    """The first attribute of `self` that a test asks about."""
    found = (
        node.attr
        for node in ast.walk(test)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )
    return next(found, None)
