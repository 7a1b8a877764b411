"""Sites written down by hand (an expression's text and what it normalises), and their rewriting.

No site comes from `find`, so that a mistake there cannot hide one of the rewriting.
"""

from __future__ import annotations

import ast
import copy
import inspect

import pytest
import torch
from models.owners import CALL, FORMULA, ONE, C, IfTraining
from torch import Tensor, nn

from normsurgery import spec
from normsurgery.errors import CannotRewrite
from normsurgery.graph import positions
from normsurgery.spec import Source
from normsurgery.surgery.owner import OwnerCall, Placement, rewrite_owner
from normsurgery.survey import CallSite, Origin, Site, Span


def inner_forward(cls: type) -> object:
    """The function that holds the body of `cls.forward`, behind its decorators."""
    return [f for f in positions.functions_within(cls.forward) if f.__code__.co_name == "forward"][
        -1
    ]


def spans(function, text: str):
    """Spans of all expressions (or augmented assignments) that read as `text`."""
    tree = positions.syntax_of(function)
    wanted = ast.unparse(ast.parse(text))
    return [
        Span(node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)
        for node in ast.walk(tree)
        if isinstance(node, (ast.expr, ast.AugAssign))
        and isinstance(getattr(node, "ctx", ast.Load()), ast.Load)
        and ast.unparse(node) == wanted
    ]


def site(
    owner: nn.Module,
    output: str,
    *,
    name: str | None = None,
    origin: str | None = None,
    kind: str = "layernorm",
    parameters: dict[str, str] | None = None,
    region: tuple[str, ...] = (),
    function=None,
    which: int = 0,
    shape: tuple[int, ...] = (2, 5, C),
    **settings,
) -> Site:
    function = function or inner_forward(type(owner))
    if parameters is None:
        parameters = {role: role for role in ("weight", "bias") if hasattr(owner, role)}
    defaults = {"eps": 1e-5, "channel_axis": -1, "features": C}
    if kind == "layernorm":
        defaults["normalized_shape"] = [C]
    origin_span = spans(function, origin)[0] if origin else None
    return Site(
        index=0,
        kind=kind,
        paths=("",),
        form="call",
        class_name=type(owner).__name__,
        parameters=parameters,
        settings={**defaults, **settings},
        shape=shape,
        call=CallSite(
            function=positions.function_name(function, type(owner)),
            source_hash=positions.source_hash(function),
            output=spans(function, output)[which],
            input=Origin(name, origin_span),
            region=tuple(span for text in (output, *region) for span in spans(function, text)),
        ),
    )


def converted(owner: nn.Module, found: Site, to: str | None = None) -> nn.Module:
    tensors = {
        role: dict(owner.named_parameters()).get(name, dict(owner.named_buffers()).get(name))
        for role, name in found.parameters.items()
    }
    source = Source(
        kind=found.kind,
        where="",
        settings=found.settings,
        tensors=tensors,
        shape=found.shape,
        training=owner.training,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    conversion = spec.get(to or found.kind).conversion(found.kind)
    assert conversion is not None
    return conversion.build(source)


def unsettled(owner: nn.Module) -> nn.Module:
    """Parameters and statistics away from 0 and 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in (*owner.parameters(), *owner.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return owner


def same(a, b) -> None:
    """Bit for bit the same values in the same structure."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    elif hasattr(a, "__dataclass_fields__"):
        for field in a.__dataclass_fields__:
            same(getattr(a, field), getattr(b, field))
    else:
        assert a == b


def swap_to_itself(owner: nn.Module, sites: list[Site], calls: list[OwnerCall]) -> nn.Module:
    """A rewritten copy that is then checked, in fp32 and bit for bit, in both modes."""
    swapped = copy.deepcopy(owner)
    placements = [
        Placement(found, f"norm_{i}", converted(swapped, found)) for i, found in enumerate(sites)
    ]
    rewrite_owner(swapped, placements, calls)
    # What is a norm by its class is none any more: torch's tools would look for its statistics.
    is_norm = isinstance(owner, nn.modules.batchnorm._NormBase)
    assert (
        isinstance(swapped, nn.modules.batchnorm._NormBase if is_norm else type(owner)) != is_norm
    )
    assert type(swapped).__name__ == type(owner).__name__
    for training in (False, True):
        for call in calls:
            old, new = copy.deepcopy(owner).train(training), copy.deepcopy(swapped).train(training)
            torch.manual_seed(3)
            expected = old(*copy.deepcopy(call.args), **copy.deepcopy(dict(call.kwargs)))
            state = torch.get_rng_state()
            torch.manual_seed(3)
            got = new(*copy.deepcopy(call.args), **copy.deepcopy(dict(call.kwargs)))
            same(expected, got)
            assert torch.equal(state, torch.get_rng_state())
    return swapped


def formula_site(owner):
    return site(
        owner,
        FORMULA,
        name="h",
        region=(
            "h.mean(-1, keepdim=True)",
            "h - mean",
            "(h - mean).pow(2)",
            "(h - mean).pow(2).mean(-1, keepdim=True)",
            "torch.sqrt(var + 1e-5)",
        ),
    )


def source_of_forward(owner) -> str:
    return inspect.getsource(type(owner).forward)


def close_to(a: Tensor, b: Tensor) -> None:
    """In float64, to the criterion for formulas."""
    assert float((a - b).detach().abs().max()) <= 1e-10 * float(a.detach().abs().max())


def refusal(owner, found, calls=ONE) -> str:
    before = (type(owner), dict(vars(owner)), {k: v.clone() for k, v in owner.state_dict().items()})
    placement = Placement(found, "norm_0", nn.Identity())
    with pytest.raises(CannotRewrite) as raised:
        rewrite_owner(owner, [placement], calls)
    assert type(owner) is before[0]
    assert vars(owner) == before[1]
    same(list(owner.state_dict().values()), list(before[2].values()))
    return raised.value.reason


def rewritten(cls=IfTraining, output=CALL, **origin):
    owner = unsettled(cls())
    found = site(owner, output, **(origin or {"name": "h"}))
    return owner, found, swap_to_itself(owner, [found], ONE)
