"""How the tensors of a new norm come from those of the old one: found by running the conversion.

Two runs on different random tensors tell it: what equals an old tensor in both has moved (perhaps
with a constant added, where one norm scales by `weight` and the other by `1 + weight`); what is the
same in both although the inputs differ was created; anything else was computed from old values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from normsurgery.rewriting.source import build
from normsurgery.spec import Conversion, Source
from normsurgery.treecopy import tree_copy

OFFSETS = (0.0, 1.0, -1.0)
SEEDS = (1, 2)


@dataclass(frozen=True)
class Moved:
    """A new tensor is the old one of `role`, plus `offset`."""

    role: str
    offset: float = 0.0


@dataclass(frozen=True)
class Relation:
    """New local tensor name -> how it is made; `created` are constants, `computed` are not."""

    moved: Mapping[str, Moved]
    created: frozenset[str] = frozenset()
    computed: frozenset[str] = frozenset()


def relation_of_norms(
    conversion: Conversion,
    source: Source,
    locals_: Mapping[str, str],
    options: Mapping[str, object],
    init: str,
) -> Relation:
    """The relation for a norm, by two runs in float64 on the CPU on random values.

    `locals_`: role -> name in `source.module`, where there is one.
    """
    olds = [_randomised(source, locals_, seed) for seed in SEEDS]
    news = [tensors_in(build(conversion, old, options, init)) for old in olds]
    moved: dict[str, Moved] = {}
    created: set[str] = set()
    computed: set[str] = set()
    for name in news[0]:
        pair = [new[name] for new in news]
        found = _moved_from(pair, olds)
        if found is not None:
            moved[name] = found
        elif torch.equal(*pair):
            created.add(name)
        else:
            computed.add(name)
    return Relation(moved, frozenset(created), frozenset(computed))


def relation_of_layers(old: nn.Module, new: nn.Module) -> Relation:
    """The relation for a layer or weight, whose conversion keeps its tensors and their values.

    Told by value, and on the meta device, where there are none, by name and shape.
    """
    olds = tensors_in(old)
    moved: dict[str, Moved] = {}
    for name, tensor in tensors_in(new).items():
        origin = next((o for o, held in olds.items() if _same_tensor(o, held, name, tensor)), None)
        if origin is not None:
            moved[name] = Moved(origin)
    return Relation(moved, frozenset(tensors_in(new)) - frozenset(moved))


def tensors_in(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each alias once."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _same_tensor(old_name: str, old: Tensor, new_name: str, new: Tensor) -> bool:
    if old.shape != new.shape or old_name.split(".")[-1] not in new_name.split("."):
        return False
    return old.is_meta or new.is_meta or torch.equal(old, new)


def _moved_from(pair: list[Tensor], olds: list[Source]) -> Moved | None:
    for role in olds[0].tensors:
        origins = [old.tensors[role] for old in olds]
        if any(new.shape != old.shape for new, old in zip(pair, origins, strict=True)):
            continue
        for offset in OFFSETS:
            shifted = (old if offset == 0.0 else old + offset for old in origins)
            if all(torch.equal(new, old) for new, old in zip(pair, shifted, strict=True)):
                return Moved(role, offset)
    return None


def _randomised(source: Source, locals_: Mapping[str, str], seed: int) -> Source:
    generator = torch.Generator().manual_seed(seed)
    tensors = {role: _random_like(tensor, generator) for role, tensor in source.tensors.items()}
    module = None if source.module is None else _filled(source.module, locals_, tensors)
    cpu = torch.device("cpu")
    return replace(source, tensors=tensors, module=module, dtype=torch.float64, device=cpu)


def _filled(
    module: nn.Module, locals_: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A float64 copy of `module` on the CPU that holds `tensors`, for a build that copies it."""
    copied = tree_copy(module, clone=True).to_empty(device="cpu").double()
    own = tensors_in(copied)
    for tensor in own.values():
        tensor.detach().zero_()
    for role, tensor in tensors.items():
        if locals_.get(role) in own:
            own[locals_[role]].detach().copy_(tensor)
    return copied


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.is_floating_point():
        # Positive, so that a variance is one.
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    return torch.randint(3, 1000, tensor.shape, generator=generator, dtype=tensor.dtype)
