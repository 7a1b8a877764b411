"""What may be a norm, grouped by the code that runs it, and the attempt to prove it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from normsurgery.errors import NormsurgeryError
from normsurgery.finding.events import Event, parameter_name
from normsurgery.finding.proof import Proof, prove

_LARGEST_EPS = 0.1


class NotProven(NormsurgeryError):
    """A candidate that no registered norm explains, with the reason."""


def small_numbers(operations: Sequence[fx.Node], module: nn.Module | None) -> tuple[float, ...]:
    """Numbers in the code or on the module that an eps could be, most likely first."""
    found: list[float] = []
    for leaf in tree_leaves([(node.args, node.kwargs) for node in operations]):
        if isinstance(leaf, float) and 0.0 < leaf <= _LARGEST_EPS:
            found.append(leaf)
    for value in vars(module).values() if module is not None else ():
        if isinstance(value, float) and 0.0 < value <= _LARGEST_EPS:
            found.append(value)
    return tuple(dict.fromkeys([*found, 0.0]))


def tried(
    run: Callable[[Tensor, Mapping[str, Tensor], bool], Tensor],
    size: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    eps: tuple[float, ...],
    modes: tuple[bool, ...] = (False, True),
    first: str | None = None,
    further: Mapping[str, Tensor] | None = None,
) -> Proof | None:
    """The proof; None too where the code does not run on what it is given."""
    try:
        return prove(run, size, tensors, eps, modes=modes, first=first, further=further)
    except Exception:  # the user's code, run on inputs it was not written for, may raise anything
        return None


def named_tensors(event: Event) -> dict[str, str]:
    """Role -> name for a call of a known function. Raises NotProven for a computed argument."""
    found = {}
    for role, value in (event.tensors or {}).items():
        name = parameter_name(value)
        if name is None:
            raise NotProven(f"its {role} is computed in the forward, not a parameter or buffer")
        found[role] = name
    return found


def groups(events: Sequence[Event]) -> Iterator[list[Event]]:
    """Events that are the same code in the same module: one norm that ran several times."""
    found: dict[Any, list[Event]] = {}
    for event in events:
        frame = event.frames[0] if event.frames else None
        key = (id(frame.module), frame.code, frame.span, frame.node) if frame else id(event)
        found.setdefault(key, []).append(event)
    yield from found.values()
