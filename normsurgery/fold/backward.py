"""From the input of a norm back to what makes it: the weights that can take up its affine.

`producers(value, affine)` answers with the Landings after which the value is scale * value + shift,
and nothing else in the model sees another number. Each kind of node is one small function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, fx

from normsurgery.fold.channels import NEUTRAL, backwards, forwards, moves, squeezed, varies
from normsurgery.fold.checks import Check
from normsurgery.fold.ground import Affine, Ground, Landing, Refused, Run
from normsurgery.fold.landings import (
    EMBEDDING,
    is_layer,
    on_constant,
    on_output,
    on_rows,
)
from normsurgery.fold.linearity import (
    AVERAGES,
    GATHERS,
    PADDINGS,
    averaged_backwards,
    averages_evenly,
    gathered_axes,
    number_of,
    padded_axes,
    pads_with_values,
    picks,
    why_not,
)
from normsurgery.fold.merged_layers import on_merged_output, on_merged_residual
from normsurgery.fold.norm_landings import on_norm_output
from normsurgery.graph.nodes import (
    argument,
    inputs_of,
    is_constant,
    maker,
    operator,
    outputs_of,
    shape,
)


class Backward:
    """One walk; `changed` are the values that hold other numbers afterwards."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.flow = ground.flow
        self.changed: set[fx.Node] = set()

    def through_run(self, run: Run, channels: Tensor, affine: Affine) -> list[Landing]:
        """The landings after which the norm may go. Raises Refused."""
        return self.producers(run.start, run.nodes, channels, affine)

    def producers(
        self, value: fx.Node, readers: Sequence[fx.Node], channels: Tensor, affine: Affine
    ) -> list[Landing]:
        value, readers = self._before(value, readers)
        node = maker(value)
        if node is None:
            raise Refused(Check.NO_NEIGHBOUR, f"{self.ground.name(value)} is no layer's output")
        self.changed.add(value)
        for merged in (m for m in self.ground.merged if m.output is value):
            self.ground.require_only(value, readers)
            return [on_merged_output(self.ground, merged, channels, affine)]
        absorbed = self._norm(value, channels, affine)
        if absorbed is not None:
            self.ground.require_only(value, readers)
            return [absorbed]
        if moves(node):
            return self._moved(node, value, readers, channels, affine)
        self.ground.require_only(value, readers)
        return self._made(node, value, channels, affine)

    def _before(
        self, value: fx.Node, readers: Sequence[fx.Node]
    ) -> tuple[fx.Node, Sequence[fx.Node]]:
        """In front of the norms that are gone: their ends and starts are one value now."""
        while value in self.ground.gone:
            self.ground.require_only(value, readers)
            self.changed.add(value)
            run = self.ground.ends[value]
            value, readers = run.start, run.nodes
        return value, readers

    def _made(
        self, node: fx.Node, value: fx.Node, channels: Tensor, affine: Affine
    ) -> list[Landing]:
        if is_layer(self.ground, node):
            return [on_output(self.ground, node, channels, affine)]
        if operator(node) == EMBEDDING and is_constant(inputs_of(node)[0]):
            return [on_rows(self.ground, node, channels, affine)]
        step = _STEPS.get(operator(node))
        if step is None:
            name = operator(node).removeprefix("aten::")
            raise Refused(why_not(node), f"{name} in {self.ground.path(node)}")
        return step(self, node, channels, affine)

    def _norm(self, value: fx.Node, channels: Tensor, affine: Affine) -> Landing | None:
        """A norm whose own scale and shift come last takes up more of them."""
        run = self.ground.ends.get(value)
        if run is None or run.end is not value or value in self.ground.gone:
            return None
        return on_norm_output(self.ground, run, channels, affine)

    # --- one kind of node each ------------------------------------------------------------------

    def _moved(
        self,
        node: fx.Node,
        value: fx.Node,
        readers: Sequence[fx.Node],
        channels: Tensor,
        affine: Affine,
    ) -> list[Landing]:
        self.ground.require_only(value, readers)
        found = backwards(node, channels, value)
        if found is None:
            raise Refused(Check.AXIS, f"{self.ground.path(node)} mixes the channels with others")
        source = inputs_of(node)[0]
        # Other parts of the same tensor may be read: they stay as they are.
        parts = [n for n in self.flow.readers(source) if n is node]
        if picks(node) and bool((found == NEUTRAL).any()):
            parts += self._untouched(node, source, found)
        elif len(outputs_of(node)) > 1:
            for other in outputs_of(node):
                if other is not value:
                    self.ground.require_only(other, ())
        return self.producers(source, parts, found, affine)

    def _untouched(self, node: fx.Node, source: fx.Node, channels: Tensor) -> list[fx.Node]:
        """The readers of the source that pick only what stays neutral."""
        found = []
        for reader in self.flow.readers(source):
            if reader is node or not picks(reader):
                continue
            seen = [forwards(reader, channels, output) for output in outputs_of(reader)]
            if all(part is not None and bool((part == NEUTRAL).all()) for part in seen):
                found.append(reader)
        return found

    def _sum(self, node: fx.Node, channels: Tensor, affine: Affine) -> list[Landing]:
        """scale * (a + b) + shift: both are scaled, one of them is shifted."""
        if node.kwargs.get("alpha", 1) != 1 or len(inputs_of(node)) != 2:
            raise Refused(Check.UNKNOWN, f"{self.ground.path(node)} adds a number or a multiple")
        residual = on_merged_residual(self.ground, node, channels, affine)
        if residual is not None:
            self.changed.add(residual[0].output)
            return [residual[1]]
        constants = [v for v in inputs_of(node) if is_constant(v)]
        parts = [v for v in inputs_of(node) if v not in constants]
        if constants:
            first = on_constant(self.ground, node, constants[0], channels, affine)
            rest = self._operand(node, parts[0], channels, affine.without_shift())
            return [first, *rest]
        first_part = self._operand(node, parts[0], channels, affine)
        return first_part + self._operand(node, parts[1], channels, affine.without_shift())

    def _operand(
        self, node: fx.Node, value: fx.Node, channels: Tensor, affine: Affine
    ) -> list[Landing]:
        """One summand, which may have been broadcast."""
        sizes = shape(value)
        own = channels.reshape(channels.shape[channels.dim() - len(sizes) :])
        for axis, size in enumerate(sizes):
            if own.shape[axis] not in (1, size):
                raise Refused(Check.AXIS, f"{self.ground.path(node)} repeats one channel over all")
        if own.numel() != channels.numel():
            raise Refused(Check.AXIS, f"{self.ground.path(node)} repeats one channel over all")
        return self.producers(value, (node,), own, affine)

    def _cat(self, node: fx.Node, channels: Tensor, affine: Affine) -> list[Landing]:
        """Each part takes up what belongs to it."""
        axis = int(argument(node, 1, "dim", 0)) % channels.dim()
        landings: list[Landing] = []
        start = 0
        for part in inputs_of(node):
            size = shape(part)[axis]
            if size == 0:
                continue
            own = channels.narrow(axis, start, size) if varies(channels, axis) else channels
            start += size
            landings += self.producers(part, (node,), squeezed(own), affine)
        return landings

    def _average(self, node: fx.Node, channels: Tensor, affine: Affine) -> list[Landing]:
        source = inputs_of(node)[0]
        found = averaged_backwards(node, channels, shape(source))
        if found is None:
            raise Refused(Check.AXIS, f"{self.ground.path(node)} averages over the channels")
        if affine.shift is not None and not averages_evenly(node):
            raise Refused(
                Check.ZERO_PADDING, f"{self.ground.path(node)} averages zeros in at the border"
            )
        return self.producers(source, (node,), found, affine)

    def _padded(self, node: fx.Node, channels: Tensor, affine: Affine) -> list[Landing]:
        axes = padded_axes(node, channels.dim())
        if affine.shift is not None and axes and not pads_with_values(node):
            raise Refused(Check.ZERO_PADDING, f"{self.ground.path(node)} pads with a constant")
        if any(varies(channels, axis) for axis in axes):
            raise Refused(Check.AXIS, f"{self.ground.path(node)} pads the channels")
        return self.producers(inputs_of(node)[0], (node,), channels, affine)

    def _gathered(self, node: fx.Node, channels: Tensor, affine: Affine) -> list[Landing]:
        axes = gathered_axes(node)
        if axes is None or any(varies(channels, axis) for axis in axes):
            raise Refused(Check.AXIS, f"{self.ground.path(node)} gathers channels")
        return self.producers(inputs_of(node)[0], (node,), channels, affine)

    def _times(self, node: fx.Node, channels: Tensor, affine: Affine) -> list[Landing]:
        if len(inputs_of(node)) > 1:
            return self._scaled(node, channels, affine)
        number = number_of(node)
        if not number:
            raise Refused(Check.NON_LINEAR, f"{self.ground.path(node)} multiplies by {number}")
        return self.producers(inputs_of(node)[0], (node,), channels, affine.over(number))

    def _scaled(self, node: fx.Node, channels: Tensor, affine: Affine) -> list[Landing]:
        """A learned scale in between: it takes up the scale, and hands no shift on."""
        weights = [v for v in inputs_of(node) if is_constant(v)]
        if operator(node) != "aten::mul" or len(weights) != 1:
            raise Refused(Check.NON_LINEAR, f"a product in {self.ground.path(node)}")
        (x,) = (v for v in inputs_of(node) if v not in weights)
        if affine.shift is not None:
            raise Refused(Check.UNKNOWN, f"{self.ground.path(node)} multiplies with a weight")
        if affine.scale is None:
            return self.producers(x, (node,), channels, affine)
        return [on_constant(self.ground, node, weights[0], channels, affine)]


Step = Callable[[Backward, fx.Node, Tensor, Affine], list[Landing]]
_STEPS: dict[str, Step] = {
    "aten::add": Backward._sum,
    "aten::cat": Backward._cat,
    "aten::mul": Backward._times,
    "aten::div": Backward._times,
    "aten::neg": Backward._times,
    **dict.fromkeys(AVERAGES, Backward._average),
    **dict.fromkeys(PADDINGS, Backward._padded),
    **dict.fromkeys(GATHERS, Backward._gathered),
}
