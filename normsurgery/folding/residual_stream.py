"""The mean of a residual stream, folded away: pre-LayerNorms become RMSNorms.

A LayerNorm subtracts the mean of what it reads. Where everything that writes to the stream writes
with mean zero already, there is nothing to subtract: it is an RMSNorm. Weights, embeddings and
biases that write are centred over the channels; what reads the stream must be LayerNorms alone,
to which a mean makes no difference, or sums that stay in the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from normsurgery.edits.types import Centre, Edit
from normsurgery.flow.nodes import (
    argument,
    inputs_of,
    is_constant,
    maker,
    name_of,
    operator,
    outputs_of,
    shape,
)
from normsurgery.flow.operators import Kind, kind_of
from normsurgery.folding.channels import (
    NEUTRAL,
    along_axis,
    varies,
    vector,
)
from normsurgery.folding.checks import Check
from normsurgery.folding.crossings import Crossing, moves, rearranged, whole_before
from normsurgery.folding.ground import Ground, Landing, Refused, Run
from normsurgery.folding.landings import bias_of, tensors_of_layer
from normsurgery.folding.layers import is_layer, layer
from normsurgery.folding.merged_layers import on_merged_mean
from normsurgery.spec import get
from normsurgery.survey import Site


@dataclass
class Stream:
    """Values that are sums of one another, what writes to them, and the norms that read them."""

    values: dict[fx.Node, Tensor] = field(default_factory=dict)
    landings: list[Landing] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @property
    def sites(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(run.site.index for run in self.runs))


def is_candidate(site: Site) -> bool:
    """A norm over the last axis alone that would be another one if the mean were zero."""
    sizes = site.settings.get("normalized_shape", ())
    return site.attach == "norm" and bool(get(site.kind).without_mean) and len(sizes) == 1


def stream_of(ground: Ground, site: Site) -> Stream:
    """The stream that the norm reads. Raises Refused where it cannot be centred."""
    walk = _Walk(ground)
    for run in ground.runs[site.index]:
        walk.reach(run.start, along_axis(shape(run.start), -1))
    walk.explore()
    return walk.stream


class _Walk:
    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.flow = ground.flow
        self.stream = Stream()
        self.queue: list[fx.Node] = []

    def reach(self, value: fx.Node, channels: Tensor) -> None:
        """The value belongs to the stream, with its channels so."""
        known = self.stream.values.get(value)
        if known is not None:
            if known.shape != channels.shape or not bool((known == channels).all()):
                self._refuse(Check.AXIS, "its channels run in two orders")
            return
        if bool((channels == NEUTRAL).any()):
            self._refuse(Check.AXIS, "only a part of its channels is normalised")
        self.stream.values[value] = channels
        self.queue.append(value)

    def explore(self) -> None:
        while self.queue:
            value = self.queue.pop()
            channels = self.stream.values[value]
            self._made_by(value, channels)
            self._read_by(value, channels)

    def _refuse(self, check: Check, why: str) -> None:
        raise Refused(
            Check.RESIDUAL, f"{why} ({check.value})" if check is not Check.RESIDUAL else why
        )

    # --- what writes ----------------------------------------------------------------------------

    def _made_by(self, value: fx.Node, channels: Tensor) -> None:
        node = maker(value)
        if node is None:
            raise Refused(Check.RESIDUAL, f"{self.ground.name(value)} writes to it")
        run = self.ground.ends.get(value)
        merged = next((m for m in self.ground.merged if m.output is value), None)
        if merged is not None:  # the branches in it are no more
            self._write(node, on_merged_mean(self.ground, merged, channels))
        elif run is not None:
            self._written_by_norm(run, value)
        elif is_layer(self.ground, node):
            self._write(node, self._layer(node, channels))
        elif kind_of(node) is Kind.TABLE:
            operand = self.ground.weight(inputs_of(node)[0], node)
            self._write(node, Landing((node,), (operand,), (Centre(operand.name, 1),)))
        elif (found := rearranged(node)) is not None:
            self._rearranged(found, node, value, channels)
        else:
            self._combined(node, channels)

    def _written_by_norm(self, run: Run, value: fx.Node) -> None:
        if value in self.ground.gone:
            self.reach(self.ground.gone[value], self.stream.values[value])
            return
        if get(run.site.kind).without_mean and not {"weight", "bias"} & set(run.site.parameters):
            return  # it gives mean zero
        raise Refused(
            Check.RESIDUAL,
            f"{run.site.label} writes to it: after a norm (post-norm) its mean is not zero, and "
            "centring the norm's weight does not make it so",
        )

    def _layer(self, node: fx.Node, channels: Tensor) -> Landing:
        found = layer(self.ground, node)
        if vector(channels, found.channel_axis) is None or found.groups > 1:
            raise Refused(Check.RESIDUAL, f"{self.ground.path(node)} writes along another axis")
        edits: list[Edit] = [Centre(found.weight.name, found.out)]
        name, _ = bias_of(self.ground, found, wanted=False)
        edits += [] if name is None else [Centre(name, 0)]
        return Landing((node,), tensors_of_layer(found), tuple(edits))

    def _write(self, node: fx.Node, landing: Landing) -> None:
        if landing not in self.stream.landings:
            self.stream.landings.append(landing)

    def _constant(self, node: fx.Node, value: fx.Node, channels: Tensor) -> None:
        """A named tensor that is added or put beside: position embeddings, a class token."""
        reader = node
        while (made_by := maker(value)) is not None and moves(made_by):
            # Of a table that is sliced, the rows that are not read are centred as well.
            found, across = whole_before(made_by, channels), rearranged(made_by)
            if found is None and across is not None:
                found = across.before(channels, value)
            if found is None:
                break
            value, channels = inputs_of(made_by)[0], found
        place = vector_axis(channels)
        table = made_by is not None and kind_of(made_by) is Kind.TABLE
        if made_by is not None and table and place == channels.dim() - 1:
            value, place = inputs_of(made_by)[0], 1
        if maker(value) is not None or name_of(value) is None or place is None:
            raise Refused(
                Check.RESIDUAL, f"a computed constant in {self.ground.path(reader)} writes to it"
            )
        operand = self.ground.weight(value, reader)
        self._write(reader, Landing((reader,), (operand,), (Centre(operand.name, place),)))

    def _rearranged(self, found: Crossing, node: fx.Node, value: fx.Node, channels: Tensor) -> None:
        if is_constant(found.source):
            self._constant(node, value, channels)
            return
        own = found.before(channels, value)
        if own is None or vector_axis(own) is None:
            self._refuse(Check.AXIS, f"{self.ground.path(node)} mixes its channels")
            return
        self.reach(found.source, own)

    def _combined(self, node: fx.Node, channels: Tensor) -> None:
        if operator(node) in ("aten::add", "aten::cat"):
            self._parts(node, channels)
        elif operator(node) in ("aten::mul", "aten::div"):
            self._weighed(node, channels)
        else:
            name = operator(node).removeprefix("aten::")
            raise Refused(Check.RESIDUAL, f"{name} in {self.ground.path(node)} writes to it")

    def _parts(self, node: fx.Node, channels: Tensor) -> None:
        """Summands, or what stands beside one another along another axis."""
        axis = int(argument(node, 1, "dim", 0)) if operator(node) == "aten::cat" else None
        numbers = operator(node) == "aten::add" and len(inputs_of(node)) < 2
        if numbers or (axis is not None and varies(channels, axis)):
            raise Refused(
                Check.RESIDUAL,
                f"{operator(node).removeprefix('aten::')} in {self.ground.path(node)}",
            )
        for part in inputs_of(node):
            own = _broadcast(channels, shape(part))
            if own is None:
                raise Refused(Check.RESIDUAL, f"{self.ground.path(node)} adds one number to all")
            if is_constant(part):
                self._constant(node, part, own)
            else:
                self.reach(part, own)

    def _weighed(self, node: fx.Node, channels: Tensor) -> None:
        """Times a number, or a mask that is the same for all channels: mean zero stays so."""
        (axis,) = (a for a, size in enumerate(channels.shape) if size != 1)
        data = [v for v in inputs_of(node) if _runs_along(shape(v), channels, axis)]
        if len(data) != 1 or data[0] is not inputs_of(node)[0] or is_constant(data[0]):
            raise Refused(Check.RESIDUAL, f"a product in {self.ground.path(node)} writes to it")
        self.reach(data[0], channels)

    # --- what reads -----------------------------------------------------------------------------

    def _read_by(self, value: fx.Node, channels: Tensor) -> None:
        if value in self.flow.returned or value in self.flow.kept:
            raise Refused(Check.RESIDUAL, f"{self.ground.name(value)} is returned by the model")
        norms = [run for run in self._norms(value) if self._removes_mean(run, channels)]
        inside = {node for run in norms for node in run.nodes}
        self.stream.runs += norms
        for run in self.ground.gone_from(value):
            inside.update(run.nodes)
            self.reach(run.end, channels)
        for node in self.flow.readers(value):
            if node not in inside:
                self._stays_inside(node, value, channels)

    def _norms(self, value: fx.Node) -> Iterable[Run]:
        return (r for runs in self.ground.runs.values() for r in runs if r.start is value)

    def _removes_mean(self, run: Run, channels: Tensor) -> bool:
        last = channels.dim() - 1
        return is_candidate(run.site) and varies(channels, last)

    def _stays_inside(self, node: fx.Node, value: fx.Node, channels: Tensor) -> None:
        """A reader that hands the value on within the stream."""
        found = rearranged(node)
        if found is not None and found.source is value:
            for output in outputs_of(node):
                own = found.after(channels, output)
                if own is None:
                    self._refuse(Check.AXIS, f"{self.ground.path(node)} mixes its channels")
                    return
                self.reach(output, own)
            return
        inside = operator(node) in ("aten::add", "aten::cat", "aten::mul", "aten::div")
        if not inside or len(outputs_of(node)) != 1 or is_layer(self.ground, node):
            raise Refused(
                Check.RESIDUAL, f"{self.ground.path(node)} reads it, to which its mean matters"
            )
        # What it makes is in the stream, and asks for all that it is made of.
        self.reach(outputs_of(node)[0], _spread(channels, shape(outputs_of(node)[0])))


def vector_axis(channels: Tensor) -> int | None:
    """The one axis along which the channels run."""
    places = [place for place, size in enumerate(channels.shape) if size != 1]
    return places[0] if len(places) == 1 else None


def _broadcast(channels: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """The channels of an operand of this shape, which was broadcast."""
    cut = channels.dim() - len(sizes)
    if cut < 0 or any(size != 1 for size in channels.shape[:cut]):
        return None
    own = channels.reshape(channels.shape[cut:])
    fits = all(size in (1, full) for size, full in zip(own.shape, sizes, strict=True))
    return own if fits else None


def _spread(channels: Tensor, sizes: Sequence[int]) -> Tensor:
    return channels.reshape([1] * (len(sizes) - channels.dim()) + list(channels.shape))


def _runs_along(sizes: Sequence[int], channels: Tensor, axis: int) -> bool:
    place = axis - channels.dim() + len(sizes)
    return place >= 0 and sizes[place] == channels.shape[axis]
