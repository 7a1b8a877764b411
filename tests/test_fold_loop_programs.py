"""Random models whose forward is a loop over a list of operations: they fold as if written out.

A forward of this shape runs one line for many modules, so nothing can be told of it from its text.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import campaign
import pytest
import torch
from torch import Tensor, nn

import normsurgery as ns

C = 4
EXACT = 1e-9  # relative, float64 against float64
DRAWN = campaign.seeds(range(100), 300)


@dataclass(frozen=True)
class Operation:
    """`call` module `index` on one value, or `relu`, `add`, `cat` of earlier ones."""

    name: str
    index: int
    reads: tuple[int, ...]


class LoopModel(nn.Module):
    def __init__(self, mods: list[nn.Module], program: list[Operation]) -> None:
        super().__init__()
        self.mods, self.program = nn.ModuleList(mods), program

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for operation in self.program:
            given = [values[number] for number in operation.reads]
            if operation.name == "call":
                values.append(self.mods[operation.index](*given))
            elif operation.name == "add":
                values.append(given[0] + given[1])
            else:
                values.append(torch.relu(given[0]))
        return values[-1]


def drawn(seed: int) -> LoopModel:
    """Some ten operations; convolutions and norms may be called again, values read again."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    mods: list[nn.Module] = []
    program: list[Operation] = []
    for _ in range(generator.randint(5, 12)):
        # Mostly the newest value, so that few of them lead nowhere.
        number = len(program) if generator.random() < 0.8 else generator.randint(0, len(program))
        name = generator.choice(["conv", "bn", "bn", "conv", "relu", "add", "again"])
        if name == "add":
            program.append(Operation("add", -1, (number, generator.randint(0, len(program)))))
        elif name == "again" and mods:
            program.append(Operation("call", generator.randrange(len(mods)), (number,)))
        elif name in ("conv", "bn"):
            mods.append(nn.Conv2d(C, C, 1) if name == "conv" else nn.BatchNorm2d(C))
            program.append(Operation("call", len(mods) - 1, (number,)))
        else:
            program.append(Operation("relu", -1, (number,)))
    model = LoopModel(mods, program).double().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.4, 1.6)
    return model


def plainly_foldable(model: LoopModel) -> list[str]:
    """Norms called once, right behind a convolution called once that nothing else reads."""
    program = model.program
    called = Counter(operation.index for operation in program if operation.name == "call")
    readers = Counter(number for operation in program for number in operation.reads)
    live = {len(program)}
    for place in range(len(program), 0, -1):
        live |= set(program[place - 1].reads) if place in live else set()
    found = []
    for place, operation in enumerate(program, start=1):
        before = program[operation.reads[0] - 1] if operation.reads[0] else None
        if operation.name != "call" or before is None or before.name != "call" or place not in live:
            continue
        norm, layer = model.mods[operation.index], model.mods[before.index]
        once = called[operation.index] == called[before.index] == 1
        kinds = isinstance(norm, nn.BatchNorm2d) and isinstance(layer, nn.Conv2d)
        if kinds and once and readers[operation.reads[0]] == 1:
            found.append(f"mods.{operation.index}")
    return found


@pytest.mark.campaign
@pytest.mark.parametrize("seeds", [DRAWN[i : i + 50] for i in range(0, len(DRAWN), 50)], ids=str)
def test_what_is_plainly_foldable_goes_and_nothing_is_wrong(seeds: range) -> None:
    expected = 0
    for seed in seeds:
        model = drawn(seed)
        plain = plainly_foldable(model)
        x = torch.randn(2, C, 3, 3, dtype=torch.float64)
        if not any(isinstance(module, nn.BatchNorm2d) for module in model.mods):
            continue
        folded, report = ns.fold(model, inputs=(x,), verify=False)
        gone = {step.site.path for step in report.plan.steps if step.to == "identity"}
        assert set(plain) <= gone, f"seed {seed}: {report.plan}"
        for batch in (1, 2, 5):
            other = torch.randn(batch, C, 4, 2, dtype=torch.float64)
            with torch.no_grad():
                wanted, got = model(other), folded(other)
            error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
            assert error < EXACT, f"seed {seed}: {error}"
        again = ns.fold(folded, inputs=(x,), verify=False)[1].plan.steps
        assert not again, f"seed {seed}: a second fold finds {again}"
        expected += len(plain)
    assert expected > 5, "the models hold too few such norms to say anything"
