"""A structure as Python source, and the model that this source makes."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from textwrap import indent
from types import ModuleType

import torch
from torch import Tensor, nn

from .program import LINEAR_LAYERS, Node, Program

HEADER = """\
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from random_models.modules import Affine, FrozenBatchNorm, HandRMSNorm, OnePlusRMSNorm


def double(module, args, output):
    return output * 2


def look(module, args, output):
    module.seen = True

"""
CONDITIONS = {"batch": "x.shape[0] > 1", "flag": "flag is not None"}


def source(program: Program) -> str:
    """The module that defines the model: `build()` makes it."""
    if program.form == "sequential":
        return f"{HEADER}\n{_build(program, _sequential(program))}"
    parts = [HEADER]
    if program.block:
        parts.append(_block(program))
    parts += [_model(program), _build(program, "Model()")]
    return "\n\n".join(parts)


def _sequential(program: Program) -> str:
    makers = []
    for node in program.nodes:
        name = next(iter(program.layers_of(node)))
        make = program.layers[name].lines[0].split(" = ", 1)[1]
        makers.append(f'("{name}", {make}),')
    return f"nn.Sequential(OrderedDict([\n{indent(chr(10).join(makers), ' ' * 8)}\n    ]))"


def _build(program: Program, make: str) -> str:
    lines = [f"model = {make}"]
    lines += [f"model.{twin} = model.{name}" for twin, name in program.ties.items()]
    lines += [
        f"model.{program.layers[name].path}.register_forward_hook({hook})"
        for name, hook in program.hooks.items()
    ]
    lines.append("model.eval()")
    lines += [
        f"model.{layer.path}.train()"
        for layer in program.layers.values()
        if layer.kind == "batchnorm_train"
    ]
    lines.append("return model")
    return f"def build():\n{indent(chr(10).join(lines), '    ')}\n"


def _block(program: Program) -> str:
    first, last = program.block
    nodes = program.nodes[first:last]
    taken, given = _borders(program)
    return _class("Block", _lines(program, "block"), taken, nodes, given, _extra(program, nodes))


def _borders(program: Program) -> tuple[list[str], list[str]]:
    """The values that the block takes, and those that it gives."""
    first, last = program.block
    made = [node.name for node in program.nodes[first:last]]
    inside = program.nodes[first:last]
    read = {name for node in inside for name in node.inputs}
    if any(node.when == "batch" for node in inside):
        read.add("x")
    taken = sorted(read - set(made))
    later = {name for node in program.nodes[last:] for name in node.inputs} | set(program.outputs)
    return taken, [name for name in made if name in later] or made[-1:]


def _extra(program: Program, nodes: Iterable[Node]) -> list[str]:
    conditions = {node.when for node in nodes}
    return ["flag"] if "flag" in conditions else []


def _model(program: Program) -> str:
    lines = _lines(program, "")
    nodes = program.nodes
    calls: list[Node | str] = list(nodes)
    if program.block:
        first, last = program.block
        taken, given = _borders(program)
        arguments = [*taken, *_extra(program, nodes[first:last])]
        call = f"{', '.join(given)} = self.block({', '.join(arguments)})"
        lines.append("self.block = Block()")
        calls = [*nodes[:first], call, *nodes[last:]]
    return _class("Model", lines, ["x"], calls, list(program.outputs), _extra(program, nodes))


def _lines(program: Program, home: str) -> list[str]:
    return [line for layer in program.layers.values() if layer.home == home for line in layer.lines]


def _class(
    name: str,
    lines: list[str],
    taken: list[str],
    nodes: Iterable[Node | str],
    given: list[str],
    extra: list[str],
) -> str:
    arguments = ["self", *taken, *(f"{e}=None" for e in extra)]
    body = [line for node in nodes for line in _statement(node)]
    body.append(f"return {', '.join(given)}")
    built = indent("\n".join(["super().__init__()", *lines]), " " * 8)
    return (
        f"class {name}(nn.Module):\n"
        f"    def __init__(self):\n{built}\n\n"
        f"    def forward({', '.join(arguments)}):\n{indent(chr(10).join(body), ' ' * 8)}\n"
    )


def _statement(node: Node | str) -> list[str]:
    if isinstance(node, str):
        return [node]
    code = node.code.format(*node.inputs, name=node.name)
    if "{name}" not in node.code:
        code = f"{node.name} = {code}"
    if not node.when:
        return code.split("\n")
    skipped = f"{node.name} = {node.inputs[0]}"
    return [skipped, f"if {CONDITIONS[node.when]}:", *(f"    {line}" for line in code.split("\n"))]


@contextmanager
def built(program: Program) -> Iterator[nn.Module]:
    """The model in its dtype, its tensors random; its source can be read as long as this lasts."""
    name = f"random_model_{program.seed}"
    filename = f"<{name}>"
    text = source(program)
    module = ModuleType(name)
    module.__file__ = filename
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    sys.modules[name] = module
    try:
        exec(compile(text, filename, "exec"), module.__dict__)
        model = module.build()
        randomise(program, model)
        yield model.to(getattr(torch, program.dtype))
    finally:
        del sys.modules[name]
        del linecache.cache[filename]


def randomise(program: Program, model: nn.Module) -> None:
    """Weights of some unit gain; everything else of size 1.3 to 2.5, variances positive."""
    model.double()
    generator = torch.Generator().manual_seed(program.seed)
    tensors = model.state_dict()
    with torch.no_grad():
        for layer in program.layers.values():
            for role in layer.roles:
                tensor = tensors[layer.tensor(role)]
                weighs = layer.kind in LINEAR_LAYERS and role == "weight"
                tensor.copy_(_weight(tensor, generator) if weighs else _far(tensor, generator))
                if role == "running_var":
                    tensor.abs_()


def _weight(tensor: Tensor, generator: torch.Generator) -> Tensor:
    fan_in = max(tensor[0].numel(), 1)
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return drawn / fan_in**0.5


def _far(tensor: Tensor, generator: torch.Generator) -> Tensor:
    sizes = 1.3 + 1.2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    first = int(torch.randint(0, 2, (), generator=generator))
    signs = 1 - 2 * ((torch.arange(tensor.numel()) + first) % 2)  # no neighbours all positive
    return sizes * signs.reshape(tensor.shape)
