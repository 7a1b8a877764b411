"""Will a float64 run fit? And if not, which parts of the model will."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normsurgery.inputs import Inputs
from normsurgery.treecopy import tensors_of, tree_copy
from normsurgery.verifying.runners import fresh, same_randomness, set_mode

FLOAT64_BYTES = 8


def float64_weight_bytes(model: nn.Module) -> int:
    """Peak size of the weights while a float64 copy is made: the clone and its float64 form."""
    return sum(t.numel() * (t.element_size() + FLOAT64_BYTES) for t in tensors_of(model))


def float64_activation_bytes(model: nn.Module, inputs: Inputs) -> int:
    """The outputs of all leaf modules of one run, as float64: more than a run holds at once.

    Raises whatever the model raises on `inputs`.
    """
    copied = tree_copy(model, clone=True)
    set_mode(copied, "eval")
    elements = 0

    def count(module: nn.Module, args: object, output: object) -> None:
        nonlocal elements
        elements += sum(leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

    for module in copied.modules():
        if not any(module.children()):
            module.register_forward_hook(count)
    with same_randomness(0), torch.no_grad():
        fresh(inputs).call(copied)
    return elements * FLOAT64_BYTES


def available_bytes() -> int:
    """Memory that a process can still take: the machine's, or what its control group leaves."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return min([free, *_control_group_room()])


def _control_group_room() -> Iterator[int]:
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        yield int(limit.read_text()) - int(used.read_text())


def is_called(module: nn.Module) -> bool:
    """False for pure containers (ModuleList, ModuleDict), which have no forward."""
    return type(module).forward is not nn.Module.forward


def parts_that_fit(model: nn.Module, budget: int) -> tuple[list[str], list[str]]:
    """Paths of the largest modules whose float64 weights fit into `budget` bytes, in tree order,
    and paths of modules too large for it that have no children to go down to."""
    fitting: list[str] = []
    too_large: list[str] = []
    seen: set[int] = set()

    def descend(module: nn.Module, path: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if is_called(module) and float64_weight_bytes(module) <= budget:
            fitting.append(path)
        elif any(module.children()):
            for name, child in module.named_children():
                descend(child, f"{path}.{name}" if path else name)
        else:
            too_large.append(path)

    descend(model, "")
    return fitting, too_large
