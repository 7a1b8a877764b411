"""From the input of a norm back to what makes it: the weights that can take up its affine.

`producers(value, affine)` answers with the Landings after which the value is scale * value + shift,
and nothing else in the model sees another number. Each kind of node is one small function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, fx

from normsurgery.flow.nodes import (
    inputs_of,
    is_constant,
    maker,
    operator,
    outputs_of,
    shape,
)
from normsurgery.flow.operators import Kind, kind_of
from normsurgery.folding.channels import NEUTRAL
from normsurgery.folding.checks import Check
from normsurgery.folding.crossings import (
    Crossing,
    crossing,
    crossings,
    picks,
    require_shift_crosses,
    why_not,
)
from normsurgery.folding.ground import Affine, Ground, Landing, Refused, Run
from normsurgery.folding.landings import on_constant, on_output, on_rows
from normsurgery.folding.layers import is_layer
from normsurgery.folding.merged_layers import on_merged_output, on_merged_residual
from normsurgery.folding.norm_landings import on_norm_output


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
        if kind_of(node) is Kind.TABLE and is_constant(inputs_of(node)[0]):
            return [on_rows(self.ground, node, channels, affine)]
        across = crossings(node)
        if across:
            return [
                landing
                for found in across
                for landing in self._crossed(found, node, value, channels, affine)
            ]
        step = _STEPS.get(kind_of(node))
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

    def _crossed(
        self, found: Crossing, node: fx.Node, value: fx.Node, channels: Tensor, affine: Affine
    ) -> list[Landing]:
        own = found.before(channels, value)
        if own is None:
            raise Refused(Check.AXIS, f"{self.ground.path(node)} {found.mixes}")
        require_shift_crosses(self.ground, found, node, affine)
        # Other parts of the same tensor may be read: they stay as they are.
        parts = [node]
        if picks(node) and bool((own == NEUTRAL).any()):
            parts += self._untouched(node, found.source, own)
        else:
            for other in outputs_of(node):
                if other is not value:
                    self.ground.require_only(other, ())
        return self.producers(found.source, parts, own, affine.less(found.added).over(found.factor))

    def _untouched(self, node: fx.Node, source: fx.Node, channels: Tensor) -> list[fx.Node]:
        """The readers of the source that pick only what stays neutral."""
        found = []
        for reader in self.flow.readers(source):
            if reader is node or not picks(reader):
                continue
            part = crossing(reader)
            made = outputs_of(reader) if part is not None else ()
            seen = [part.after(channels, output) for output in made if part is not None]
            if all(part is not None and bool((part == NEUTRAL).all()) for part in seen):
                found.append(reader)
        return found

    def _sum(self, node: fx.Node, channels: Tensor, affine: Affine) -> list[Landing]:
        """scale * (a + b) + shift: both are scaled, one of them is shifted."""
        plain = operator(node) == "aten::add" and node.kwargs.get("alpha", 1) == 1
        if not plain or len(inputs_of(node)) != 2:
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
_STEPS: dict[Kind | None, Step] = {
    Kind.ADD: Backward._sum,
    Kind.SCALE: Backward._scaled,
}
