"""Which tensors an Edit touches, and in which order edits can run so that little is in memory."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from normsurgery.fold.edits import (
    AddIdentity,
    AddKernel,
    AddProduct,
    AddTensor,
    Bake,
    Centre,
    Copy,
    Create,
    Drop,
    Edit,
    Fill,
    Scale,
    Shift,
    Vector,
)

SMALL = 1 << 16  # elements; a tensor of one dimension is small whatever its length


def reads(edit: Edit) -> tuple[str, ...]:
    """The tensors whose values the edit needs, each once; its target's too, where it is changed.

    Create looks at the dtype of `like` alone and Fill at the shape of its target: not at values.
    """
    return tuple(dict.fromkeys(_reads(edit)))


def _reads(edit: Edit) -> tuple[str, ...]:
    match edit:
        case Create() | Fill() | Drop():
            return ()
        case Copy():
            return (edit.source,)
        case Bake():
            return tuple(edit.tensors.values())
        case Centre():
            return (edit.target,)
        case AddKernel() | AddTensor():
            return (edit.target, edit.source)
        case AddProduct():
            return (edit.target, edit.weight, *_of_vector(edit.by))
        case Scale() | Shift() | AddIdentity():
            return (edit.target, *_of_vector(edit.by))


def _of_vector(vector: Vector | None) -> tuple[str, ...]:
    return () if vector is None else tuple(vector.tensors[role] for role in vector.roles)


def writes(edit: Edit) -> tuple[str, ...]:
    """The tensors that are others, or there or gone, after the edit."""
    return (edit.target,)


@dataclass(frozen=True)
class Stage:
    """Edits to run together, in this order, and what has to be in memory for them.

    load: tensors to bring into memory before: large ones, and small ones at their first use.
    store: tensors that now have their last value, or were dropped; let go of them.
    forget: tensors that were only read and are not needed any more.
    """

    edits: tuple[Edit, ...]
    load: tuple[str, ...]
    store: tuple[str, ...]
    forget: tuple[str, ...]


def couplings(edits: Sequence[Edit]) -> list[tuple[list[Edit], set[str]]]:
    """Groups of edits, in order, with all tensors each touches, in the order of their first edit.

    A tensor that is written belongs to one group alone; one that is only read may be in several,
    so that the groups can be run one by one, in any order.
    """
    return [
        (list(stage.edits), {name for edit in stage.edits for name in _touched(edit)})
        for stage in _scheduled(edits, set())
    ]


def stages(
    edits: Sequence[Edit], shapes: Mapping[str, Sequence[int]], *, limit: int = SMALL
) -> list[Stage]:
    """A schedule that has few large tensors in memory at a time, and whose result is `run(edits)`.

    shapes: of the tensors there are. Those of one dimension, and of up to `limit` elements, are
    small: in memory from their first use to their last. A tensor of unknown shape is large.

    The guarantee: two edits of which one writes what the other reads or writes run in the order
    they are given in, so every edit sees the same values as in `run(edits)` and the results are
    the same bits. Every large tensor that is written is loaded in one stage alone, with those that
    edits couple it to: by touching both, or by small tensors in a way that no order of the two
    satisfies. A large tensor that is only read is loaded for every stage that reads it.
    """
    return _scheduled(edits, _small(edits, shapes, limit))


def _scheduled(edits: Sequence[Edit], small: set[str]) -> list[Stage]:
    units = _ordered(edits, _units(edits, small), small)
    return _with_memory([[edits[place] for place in unit] for unit in units], small)


def _touched(edit: Edit) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*writes(edit), *reads(edit))))


def _small(edits: Sequence[Edit], shapes: Mapping[str, Sequence[int]], limit: int) -> set[str]:
    """Names of small tensors, of those that the edits make too."""
    known = dict(shapes)
    for edit in edits:
        if isinstance(edit, Create):
            known.setdefault(edit.target, edit.shape)
        if isinstance(edit, Copy) and edit.source in known:
            known.setdefault(edit.target, known[edit.source])
    return {name for name, shape in known.items() if len(shape) <= 1 or math.prod(shape) <= limit}


def _units(edits: Sequence[Edit], small: set[str]) -> list[list[int]]:
    """Places of edits, those together that touch one large tensor that is written."""
    written = {name for edit in edits for name in writes(edit)} - small
    together = _Together(len(edits))
    first: dict[str, int] = {}
    for place, edit in enumerate(edits):
        for name in written.intersection(_touched(edit)):
            together.join(first.setdefault(name, place), place)
    return together.groups()


class _Together:
    """Disjoint sets of the numbers below `count`."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def join(self, a: int, b: int) -> None:
        first, second = sorted((self._root(a), self._root(b)))
        self._parent[second] = first

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def groups(self) -> list[list[int]]:
        """Each in ascending order, and they by their first number."""
        found: dict[int, list[int]] = {}
        for number in range(len(self._parent)):
            found.setdefault(self._root(number), []).append(number)
        return list(found.values())


def _ordered(edits: Sequence[Edit], units: list[list[int]], small: set[str]) -> Iterator[list[int]]:
    """The units in an order that every conflict over a small tensor allows, the earliest first.

    Units that would each have to come before the other are made one.
    """
    conflicts = list(_conflicts(edits, small))
    together = _Together(len(edits))
    for unit in units:
        for place in unit:
            together.join(unit[0], place)
    while True:
        groups = together.groups()
        sorter = _sorter(groups, conflicts)
        try:
            sorter.prepare()
        except CycleError as error:
            cycle = error.args[1]
            for number in cycle:
                together.join(groups[cycle[0]][0], groups[number][0])
            continue
        return _earliest_first(sorter, groups)


def _conflicts(edits: Sequence[Edit], small: set[str]) -> Iterator[tuple[int, int]]:
    """Pairs of places (earlier, later) of which one writes a small tensor that both touch."""
    writer: dict[str, int] = {}
    readers: defaultdict[str, list[int]] = defaultdict(list)
    for place, edit in enumerate(edits):
        for name in small.intersection(_touched(edit)):
            if name in writer:
                yield writer[name], place
            if name not in writes(edit):
                readers[name].append(place)
                continue
            yield from ((reader, place) for reader in readers.pop(name, ()))
            writer[name] = place


def _sorter(
    groups: list[list[int]], conflicts: Iterable[tuple[int, int]]
) -> TopologicalSorter[int]:
    number = {place: index for index, group in enumerate(groups) for place in group}
    sorter: TopologicalSorter[int] = TopologicalSorter(dict.fromkeys(range(len(groups)), ()))
    for earlier, later in conflicts:
        if number[earlier] != number[later]:
            sorter.add(number[later], number[earlier])
    return sorter


def _earliest_first(sorter: TopologicalSorter[int], groups: list[list[int]]) -> Iterator[list[int]]:
    ready: list[int] = []
    while sorter.is_active():
        for index in sorter.get_ready():
            heapq.heappush(ready, index)
        index = heapq.heappop(ready)
        sorter.done(index)
        yield groups[index]


def _with_memory(ordered: list[list[Edit]], small: set[str]) -> list[Stage]:
    touched = [dict.fromkeys(n for edit in unit for n in _touched(edit)) for unit in ordered]
    written = {name for unit in ordered for edit in unit for name in writes(edit)}
    last = {name: index for index, names in enumerate(touched) for name in names}
    seen: set[str] = set()
    found: list[Stage] = []
    for index, (unit, names) in enumerate(zip(ordered, touched, strict=True)):
        made = set(_made(unit))
        load = [n for n in names if n not in made and not (n in small and n in seen)]
        over = [n for n in names if n not in small or last[n] == index]
        seen.update(names)
        found.append(
            Stage(
                tuple(unit),
                tuple(load),
                tuple(n for n in over if n in written),
                tuple(n for n in over if n not in written),
            )
        )
    return found


def _made(unit: Sequence[Edit]) -> Iterator[str]:
    """What the edits make without its having been there."""
    seen: set[str] = set()
    for edit in unit:
        makes = isinstance(edit, (Create, Copy, Bake)) and edit.target not in reads(edit)
        if makes and edit.target not in seen:
            yield edit.target
        seen.update(_touched(edit))
