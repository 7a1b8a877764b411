"""One forward, edited in its source at the norm's expression, compiled as what it was.

The new code runs in the function's own globals with its own defaults and closure cells, so that
`super()`, names of the module and captured values stay what they were. Decorators are not run
again: each wrapper function around the old forward is copied with the old function replaced by the
new one in the closure cell or `__wrapped__` that holds it.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import itertools
import linecache
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType

from torch import nn

from normsurgery.errors import CannotRewrite
from normsurgery.graph.positions import functions_within, source_hash, syntax_of
from normsurgery.surgery.attribute_chains import Definition
from normsurgery.surgery.owner.edit import Target, edit
from normsurgery.surgery.owner.functions import dressed, rewrapped
from normsurgery.surgery.owner.install import original_class
from normsurgery.surgery.owner.rewriting import Placement, Rewriting, check_distinct, tensor_names
from normsurgery.surgery.owner.still_read import still_read

FUTURES = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
_numbers = itertools.count()


def rewriting(owner: nn.Module, placements: Sequence[Placement]) -> Rewriting:
    """The owner's forward with every placement's expression replaced. Raises CannotRewrite."""
    check_distinct(placements)
    outer, inner = located(owner, placements[0])
    definition = _syntax(inner)
    names = [tensor_names(owner, placement) for placement in placements]
    edit(
        definition,
        [
            Target(placement.name, placement.call, tuple(own.values()))
            for placement, own in zip(placements, names, strict=True)
        ],
    )
    function = _compiled(definition, inner)
    tensors = list(dict.fromkeys(name for own in names for name in own.values()))
    read = still_read(original_class(owner), definition, inner, tensors)
    return Rewriting(
        forward=rewrapped(outer, inner, function, {}),
        moved=tuple(name for name in tensors if name not in read),
        kept={name: f"{where} reads it" for name, where in read.items()},
    )


def located(owner: nn.Module, placement: Placement) -> tuple[FunctionType, FunctionType]:
    """The forward of the owner's class, and the function in it that the site's positions are in.

    Raises CannotRewrite where it is not there, or is there with another source than the site's.
    """
    wanted = placement.call.function
    outer = inspect.getattr_static(type(owner), "forward", None)
    if not isinstance(outer, FunctionType):
        raise CannotRewrite(f"its forward is a {type(outer).__name__}, not a function")
    for function in functions_within(outer):
        if f"{function.__module__}:{function.__code__.co_qualname}" != wanted:
            continue
        found = _hash(function)
        if found != placement.call.source_hash:
            raise CannotRewrite(
                f"{wanted} has another source than when it was planned: its hash is {found[:12]}, "
                f"the plan says {placement.call.source_hash[:12]}"
            )
        return outer, function
    raise CannotRewrite(
        f"{wanted} is not the forward that {type(owner).__name__} runs: "
        "it is reached through super() or from a function outside any forward"
    )


def _hash(function: FunctionType) -> str:
    try:
        return source_hash(function)
    except OSError as error:
        raise CannotRewrite(f"{function.__qualname__} has no source") from error


def _syntax(function: FunctionType) -> Definition:
    try:
        return syntax_of(function)
    except (OSError, SyntaxError) as error:
        raise CannotRewrite(f"the source of {function.__qualname__} cannot be read") from error


def _compiled(definition: Definition, original: FunctionType) -> FunctionType:
    code = _code(definition, original)
    cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    if missing := [name for name in code.co_freevars if name not in cells]:
        raise CannotRewrite(f"its new forward would need {missing[0]!r} from outside")
    function = FunctionType(
        code,
        original.__globals__,
        original.__name__,
        original.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    return dressed(function, original)


def _code(definition: Definition, original: FunctionType) -> CodeType:
    """Compile the definition in a class (for `__class__` and private names) in a function (for the
    free names), and take its code out; nothing is executed."""
    text = ast.unparse(definition) + "\n"
    filename = f"<normsurgery {original.__qualname__} {next(_numbers)}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    body = ast.parse(text).body
    owner = original.__code__.co_qualname.rpartition(".")[0].rpartition(".")[2]
    if owner and owner != "<locals>":
        body = _inside(f"class {owner}: pass", body)
    free = [name for name in original.__code__.co_freevars if name != "__class__"]
    body = _inside(f"def outside({', '.join(free)}): pass", body)
    tree = ast.fix_missing_locations(ast.Module(body, []))
    flags = original.__code__.co_flags & FUTURES
    module = compile(tree, filename, "exec", flags=flags, dont_inherit=True)
    code = next(found for found in _codes(module) if found.co_name == definition.name)
    return code.replace(co_qualname=original.__code__.co_qualname)


def _inside(header: str, body: list[ast.stmt]) -> list[ast.stmt]:
    around = ast.parse(header).body[0]
    assert isinstance(around, (ast.ClassDef, ast.FunctionDef))
    around.body = body
    return [around]


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)
