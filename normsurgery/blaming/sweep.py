"""One pass over a graph in which every node reads the reference's own values.

A wrong node spoils everything after it, so that comparing two runs tells little. Here the value of
a node, once it is known which value of the reference it stands for, is replaced by that one before
the next node reads it: what is wrong then is wrong by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from normsurgery.blaming.reference import TRACED, Reference
from normsurgery.blaming.views import Values, View
from normsurgery.errors import NormsurgeryError
from normsurgery.onnxfile.reading import origin
from normsurgery.verifying.alignment import ValueIndex

Bond = Literal["same", "equal", "apart"]


@dataclass
class Sweep:
    """What stands for what.

    pairs: value of the graph -> value of the reference. bonds: how that is known: "same", the same
        operation on the same values; "equal", another operation or unknown, with the same result;
        "apart", by its name or its place, with another result: a suspect.
    made: for each case, what the nodes made of the reference's values. corrected: the same with the
        reference's values instead, where there are such; what the next node read.
    """

    made: list[Values]
    corrected: list[Values]
    pairs: dict[str, str] = field(default_factory=dict)
    bonds: dict[str, Bond] = field(default_factory=dict)

    def apart(self) -> list[str]:
        return [name for name, bond in self.bonds.items() if bond == "apart"]

    def close(self) -> list[str]:
        return [name for name, bond in self.bonds.items() if bond == "equal"]


def sweep(graph: View, reference: Reference, fed: Sequence[Values]) -> Sweep:
    """Go through `graph` on the inputs of every case of `reference`."""
    return _Walk(graph, reference, fed).result()


class _Walk:
    def __init__(self, graph: View, reference: Reference, fed: Sequence[Values]) -> None:
        self.graph, self.reference = graph, reference
        self.index = ValueIndex(reference.cases)
        self.numbers = reference.numbers()
        start = [{**graph.constants, **given} for given in fed]
        self.found = Sweep([dict(values) for values in start], start)
        self.taken: set[str] = set()
        for name, other in zip(graph.inputs, _in_order(graph, reference), strict=False):
            self._bind(name, other, "same")

    def result(self) -> Sweep:
        for position in range(len(self.graph.nodes)):
            self._visit(position)
        return self.found

    def _visit(self, position: int) -> None:
        node = self.graph.nodes[position]
        for made, corrected in zip(self.found.made, self.found.corrected, strict=True):
            try:
                values = self.graph.run_node(position, corrected)
            except (NormsurgeryError, KeyError):
                continue
            made.update(values)
            corrected.update(values)
        twin = self._twin(position)
        for place, name in enumerate(node.output):
            if not name:
                continue
            if twin is not None and place < len(twin):
                self._bind(name, twin[place], "same")
                continue
            equal = self._equal(name)
            if equal is not None:
                self._bind(name, equal, "equal")
                continue
            other = self._by_place(position, place)
            if other is not None:
                self._bind(name, other, "apart")

    def _bind(self, name: str, other: str, bond: Bond) -> None:
        self.found.pairs[name], self.found.bonds[name] = other, bond
        if bond != "equal" or name == other:
            self.taken.add(other)
        for values, truth in zip(self.found.corrected, self.reference.cases, strict=True):
            values[name] = truth[other]

    def _twin(self, position: int) -> list[str] | None:
        """Outputs of the node of the reference that is the very same operation."""
        key = self._key(position)
        nodes = self.reference.by_key.get(key, []) if key is not None else []
        if not nodes or self.reference.graph is None:
            return None
        outputs = [list(self.reference.graph.nodes[index].output) for index in nodes]
        mine = list(self.graph.nodes[position].output)
        return next((names for names in outputs if names[:1] == mine[:1]), outputs[0])

    def _key(self, position: int) -> object | None:
        read: list[object] = []
        for name in self.graph.reads(position):
            if name in self.graph.constants:
                read.append(self.graph.digest(name))
            elif not name:
                read.append("")
            elif name in self.found.pairs:
                pair = self.found.pairs[name]
                read.append(self.numbers.get(pair, pair))
            else:
                return None
        return self.reference.key(self.graph, position, read)

    def _equal(self, name: str) -> str | None:
        """The value of the reference that has the same values in every case."""
        values = [made.get(name) for made in self.found.made]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        own = self.graph.dtype(name) or torch.float32
        found = self.index.find(known, name)
        return found if found is not None else self.index.find(known, name, own)

    def _by_place(self, position: int, place: int) -> str | None:
        """What the value should be, by what its node reads, by its operator, by its name."""
        name = self.graph.nodes[position].output[place]
        scored = {
            other: self._likeness(position, name, other)
            for other in self._candidates(position, place)
            if other not in self.taken and self._could_be(name, other, position)
        }
        best = max(scored, key=lambda other: scored[other], default="")
        return best if best and scored[best] > 1.0 else None

    def _candidates(self, position: int, place: int) -> Iterator[str]:
        node = self.graph.nodes[position]
        name = node.output[place]
        yield from (name, f"{TRACED}{name}")
        if place == 0 and self._is_last_of_its_origin(position):
            yield f"{TRACED}{origin(node).fx_node}"
        other = self.reference.graph
        for index in self.reference.by_operator.get(node.op_type, ()) if other else ():
            assert other is not None
            if place < len(other.nodes[index].output):
                yield other.nodes[index].output[place]

    def _likeness(self, position: int, name: str, other: str) -> float:
        """Above 1 where a value can only be meant to be `other`.

        One for the same operator, up to one for what both nodes read, and for the same name as much
        as names have been found to mean; where the reference is a traced program, names are all.
        """
        producer = self.reference.producer(other)
        named = other.removeprefix(TRACED) in (name, origin(self.graph.nodes[position]).fx_node)
        if producer is None:
            return 2.0 if named else 0.0
        graph = self.reference.graph
        assert graph is not None
        mine = set(_telling(self.graph, self.graph.reads(position), self.found.pairs))
        theirs = _telling(graph, graph.reads(graph.producer[other]), None)
        read = sum(n in mine for n in theirs) / max(1, len(theirs), len(mine))
        if not read and not self._is_of_shape(name, other):
            return 0.0
        alike = float(producer.op_type == self.graph.nodes[position].op_type)
        return alike + read + (2.0 * self._trust() - 0.5 if other == name else 0.0)

    def _trust(self) -> float:
        """The share of values known to be the same that go by the same name."""
        known = [name for name, bond in self.found.bonds.items() if bond == "same"]
        computed = [name for name in known if name in self.graph.producer]
        kept = sum(self.found.pairs[name] == name for name in computed)
        return kept / len(computed) if computed else 1.0

    def _is_last_of_its_origin(self, position: int) -> bool:
        mine = origin(self.graph.nodes[position]).fx_node
        later = self.graph.nodes[position + 1 :]
        return bool(mine) and all(origin(node).fx_node != mine for node in later)

    def _could_be(self, name: str, other: str, position: int) -> bool:
        """The same operator, or at least the same shape."""
        if any(other not in case for case in self.reference.cases):
            return False
        producer = self.reference.producer(other)
        if producer is not None and producer.op_type == self.graph.nodes[position].op_type:
            return True
        return self._is_of_shape(name, other)

    def _is_of_shape(self, name: str, other: str) -> bool:
        return all(
            name in made and made[name].shape == case[other].shape
            for made, case in zip(self.found.made, self.reference.cases, strict=True)
        )


def _telling(graph: View, names: Sequence[str], pairs: Mapping[str, str] | None) -> list[object]:
    """What a node reads, as the reference has it; of constants those that are no single number."""
    found: list[object] = []
    for name in names:
        if name in graph.constants:
            found += [graph.digest(name)] if graph.constants[name].numel() > 1 else []
        elif name:
            found.append(name if pairs is None else pairs.get(name, "?"))
    return found


def _in_order(graph: View, reference: Reference) -> list[str]:
    """The reference's inputs, in the order of the graph's: by name, else by position."""
    known = reference.inputs
    if set(known) == set(graph.inputs):
        return graph.inputs
    return list(known)
