"""A scale and a shift into convolutions that pad with zeros: the padding is written out first.

The convolutions would pad zeros behind the norm. With the norm gone, its place pads what the norm
turned into zero, and the convolutions pad nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from normsurgery.flow.nodes import argument, arguments, module_of, operator, outputs_of, shape
from normsurgery.flow.operators import CONVOLUTION
from normsurgery.folding.channel_pad import CONVOLUTIONS
from normsurgery.folding.checks import Check
from normsurgery.folding.ground import (
    Affine,
    Ground,
    Landing,
    MergedLayer,
    Refused,
    is_torch_layer,
)
from normsurgery.folding.landings import on_input
from normsurgery.folding.layers import layer
from normsurgery.folding.merged_layers import on_merged_input

PADDING, TRANSPOSED = 4, 6  # places among the arguments of a convolution
PAD = "aten::constant_pad_nd"  # what `padding="same"` runs for a kernel of even size


@dataclass(frozen=True)
class Padded:
    """Convolutions that read one value and pad it with zeros, all by the same amounts.

    landings: as if they did not pad. amounts: as F.pad takes them. paths: of the convolutions.
    changed: the values that hold other numbers afterwards. elements: how many are padded.
    """

    landings: tuple[Landing, ...]
    amounts: tuple[int, ...]
    paths: tuple[str, ...]
    changed: frozenset[fx.Node]
    elements: int


def padded_readers(ground: Ground, value: fx.Node, channels: Tensor, affine: Affine) -> Padded:
    """Everything that reads the value. Raises Refused; NO_NEIGHBOUR where nothing pads it."""
    readers = _readers(ground, value)
    if not any(any(reader.amounts) for reader in readers if reader.is_convolution):
        raise Refused(Check.NO_NEIGHBOUR, "no convolution that pads reads its output")
    if value in ground.flow.returned:
        raise Refused(Check.RETURNED, ground.name(value))
    if value in ground.flow.kept:
        raise Refused(Check.OUTPUT_USED, f"{ground.name(value)} is kept in an attribute")
    changed = frozenset({value, *(v for reader in readers for v in reader.between)})
    if not changed.isdisjoint(ground.flow.measured):
        where = f"the size of {ground.name(value)} is read, which an explicit padding changes"
        raise Refused(Check.ZERO_PADDING, where)
    amounts = _common(ground, readers)
    found = [_landing(ground, value, reader, channels, affine) for reader in readers]
    return Padded(
        tuple(landing for landing, _ in found),
        amounts,
        tuple(dict.fromkeys(path for _, path in found)),
        changed,
        _elements(shape(value), amounts),
    )


@dataclass(frozen=True)
class _Reader:
    """A node that reads the value; `convolution` is it, or what follows its own padding.

    between: the value that the padding gives, where it is a node of its own. merged: the layer that
    parallel branches have become, instead of a convolution; `node` is one of theirs.
    """

    node: fx.Node
    convolution: fx.Node | None
    amounts: tuple[int, ...]
    between: tuple[fx.Node, ...] = ()
    merged: MergedLayer | None = None

    @property
    def is_convolution(self) -> bool:
        return self.convolution is not None or self.merged is not None

    @classmethod
    def of(cls, ground: Ground, value: fx.Node, node: fx.Node) -> _Reader:
        if operator(node) == CONVOLUTION:
            return cls(node, node, _amounts(node, len(shape(value)) - 2))
        if operator(node) != PAD:
            return cls(node, None, ())
        (padded,) = outputs_of(node)
        after = ground.flow.readers(padded)
        own = (
            len(after) == 1
            and operator(after[0]) == CONVOLUTION
            and module_of(after[0]) is module_of(node)
        )
        if not own or argument(node, 2, "value", 0):
            return cls(node, None, ())
        sizes = tuple(int(size) for size in arguments(node)[1])
        rest = _amounts(after[0], len(shape(value)) - 2)
        sizes += (0,) * (len(rest) - len(sizes))
        both = tuple(a + b for a, b in zip(sizes, rest, strict=True))
        return cls(node, after[0], both, (padded,))


def _readers(ground: Ground, value: fx.Node) -> list[_Reader]:
    merged = [found for found in ground.merged if found.source is value]
    inside = {node for found in merged for node in found.nodes}
    outside = [node for node in ground.flow.readers(value) if node not in inside]
    return [
        *(_Reader.of(ground, value, node) for node in outside),
        *(_Reader(m.nodes[-1], None, _as_given(m.padding), merged=m) for m in merged),
    ]


def _amounts(node: fx.Node, dimensions: int) -> tuple[int, ...]:
    """What a convolution pads, as F.pad takes it."""
    given = [int(size) for size in arguments(node)[PADDING]]
    return _as_given(given * (dimensions // len(given)))


def _as_given(padding: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in reversed(padding) for _ in range(2))


def _common(ground: Ground, readers: Sequence[_Reader]) -> tuple[int, ...]:
    """What all readers pad. Raises Refused."""
    for reader in readers:
        if not reader.is_convolution:
            name = operator(reader.node).removeprefix("aten::")
            raise Refused(
                Check.ZERO_PADDING,
                f"{name} in {ground.path(reader.node)} reads its output too, and would see an "
                "explicit padding",
            )
    first = next(reader for reader in readers if any(reader.amounts))
    for reader in readers:
        if reader.amounts != first.amounts:
            raise Refused(
                Check.ZERO_PADDING,
                f"{ground.path(first.node)} and {ground.path(reader.node)} pad its output by "
                "different amounts",
            )
    return first.amounts


def _landing(
    ground: Ground, value: fx.Node, reader: _Reader, channels: Tensor, affine: Affine
) -> tuple[Landing, str]:
    """On the convolution as if it did not pad, and the path of its module. Raises Refused."""
    if reader.merged is not None:
        unpadded = replace(reader.merged, padding=())
        return on_merged_input(ground, unpadded, channels, affine), unpadded.path
    node, path = _required(ground, value, reader)
    return on_input(ground, node, channels, affine, pads=False), path


def _required(ground: Ground, value: fx.Node, reader: _Reader) -> tuple[fx.Node, str]:
    """The convolution and the path of its module, which can do without padding. Raises Refused."""
    node = reader.convolution
    assert node is not None
    where = ground.path(node)
    found = layer(ground, node)
    if found.input not in (value, *reader.between):
        raise Refused(Check.UNKNOWN, f"{where} multiplies with it")
    if arguments(node)[TRANSPOSED]:
        raise Refused(Check.ZERO_PADDING, f"{where} is transposed: its padding takes away")
    module = ground.child_of(node, found.weight)
    plain = isinstance(module, CONVOLUTIONS) and is_torch_layer(module)
    if not plain or getattr(module, "padding_mode", "") != "zeros":
        raise Refused(
            Check.ZERO_PADDING, f"{where} is no module of torch's, whose padding is known"
        )
    assert module is not None
    return node, ground.flow.path(module)


def _elements(sizes: Sequence[int], amounts: Sequence[int]) -> int:
    before = after = 1
    for place, size in enumerate(reversed(sizes)):
        around = sum(amounts[2 * place : 2 * place + 2])
        before, after = before * size, after * (size + around)
    return after - before
