"""From the output of a norm on to what reads it: the weights that can take up its affine.

`consumers(value, affine)` answers with the Landings after which the model computes the same though
the value is x instead of scale * x + shift. Every reader must be a layer, or hand the value on to
layers.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from normsurgery.fold.channels import NEUTRAL, forwards, moves, squeezed, varies
from normsurgery.fold.checks import Check
from normsurgery.fold.ground import Affine, Ground, Landing, Refused
from normsurgery.fold.landings import is_layer, layer, on_input
from normsurgery.fold.linearity import (
    AVERAGES,
    GATHERS,
    PADDINGS,
    averaged_forwards,
    averages_evenly,
    gathered_axes,
    number_of,
    padded_axes,
    pads_with_values,
    why_not,
)
from normsurgery.fold.merged_layers import on_merged_input
from normsurgery.fold.norm_landings import on_norm_input
from normsurgery.graph.nodes import argument, inputs_of, operator, outputs_of, shape


class Forward:
    """One walk; `changed` are the values that hold other numbers afterwards."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.flow = ground.flow
        self.changed: set[fx.Node] = set()
        self.products: set[fx.Node] = set()

    def consumers(self, value: fx.Node, channels: Tensor, affine: Affine) -> list[Landing]:
        """Raises Refused where anything else reads the value."""
        if bool((channels == NEUTRAL).all()):
            return []
        self.changed.add(value)
        if value in self.flow.returned:
            raise Refused(Check.RETURNED, self.ground.name(value))
        if value in self.flow.kept:
            raise Refused(Check.OUTPUT_USED, f"{self.ground.name(value)} is kept in an attribute")
        landings: list[Landing] = []
        # A branch of a merged layer reads what the layer reads, maybe behind a norm that is gone.
        passed = {node for merged in self.ground.merged for node in merged.nodes}
        for run in self.ground.gone_from(value):
            passed.update(run.nodes)
            landings += self.consumers(run.end, channels, affine)
        for merged in (m for m in self.ground.merged if m.source is value):
            landings.append(on_merged_input(self.ground, merged, channels, affine))
        for run in self.ground.going_from(value):
            landing = on_norm_input(self.ground, run, channels, affine)
            if landing is not None:
                self.changed |= {v for node in run.nodes for v in outputs_of(node)} - {run.end}
                passed.update(run.nodes)
                landings.append(landing)
        for node in self.flow.readers(value):
            if node not in passed:
                landings += self._read(node, value, channels, affine)
        return landings

    def _read(
        self, node: fx.Node, value: fx.Node, channels: Tensor, affine: Affine
    ) -> list[Landing]:
        if is_layer(self.ground, node):
            if layer(self.ground, node).input is not value:
                raise Refused(Check.UNKNOWN, f"{self.ground.path(node)} multiplies with it")
            return [on_input(self.ground, node, channels, affine)]
        if moves(node) and inputs_of(node)[0] is value:
            return self._moved(node, channels, affine)
        step = _STEPS.get(operator(node))
        if step is None:
            name = operator(node).removeprefix("aten::")
            raise Refused(why_not(node), f"{name} in {self.ground.path(node)}")
        return step(self, node, value, channels, affine)

    def _moved(self, node: fx.Node, channels: Tensor, affine: Affine) -> list[Landing]:
        landings: list[Landing] = []
        for output in outputs_of(node):
            found = forwards(node, channels, output)
            if found is None:
                raise Refused(
                    Check.AXIS, f"{self.ground.path(node)} mixes the channels with others"
                )
            landings += self.consumers(output, found, affine)
        return landings

    def _cat(
        self, node: fx.Node, value: fx.Node, channels: Tensor, affine: Affine
    ) -> list[Landing]:
        """The other parts stay neutral."""
        (output,) = outputs_of(node)
        full = shape(output)
        axis = int(argument(node, 1, "dim", 0)) % len(full)
        sizes = list(channels.shape)
        sizes[axis] = full[axis]
        found = channels.new_full(sizes, NEUTRAL)
        start = 0
        for part in inputs_of(node):
            size = shape(part)[axis]
            if part is value and size:
                spread = list(channels.shape)
                spread[axis] = size
                found.narrow(axis, start, size).copy_(channels.expand(spread))
            start += size
        return self.consumers(output, squeezed(found), affine)

    def _average(
        self, node: fx.Node, value: fx.Node, channels: Tensor, affine: Affine
    ) -> list[Landing]:
        (output,) = outputs_of(node)
        found = averaged_forwards(node, channels, shape(output))
        if found is None:
            raise Refused(Check.AXIS, f"{self.ground.path(node)} averages over the channels")
        if affine.shift is not None and not averages_evenly(node):
            raise Refused(
                Check.ZERO_PADDING, f"{self.ground.path(node)} averages zeros in at the border"
            )
        return self.consumers(output, found, affine)

    def _padded(
        self, node: fx.Node, value: fx.Node, channels: Tensor, affine: Affine
    ) -> list[Landing]:
        axes = padded_axes(node, channels.dim())
        if affine.shift is not None and axes and not pads_with_values(node):
            raise Refused(Check.ZERO_PADDING, f"{self.ground.path(node)} pads with a constant")
        if any(varies(channels, axis) for axis in axes):
            raise Refused(Check.AXIS, f"{self.ground.path(node)} pads the channels")
        return self.consumers(outputs_of(node)[0], channels, affine)

    def _gathered(
        self, node: fx.Node, value: fx.Node, channels: Tensor, affine: Affine
    ) -> list[Landing]:
        axes = gathered_axes(node) if inputs_of(node)[0] is value else None
        if axes is None or any(varies(channels, axis) for axis in axes):
            raise Refused(Check.AXIS, f"{self.ground.path(node)} gathers channels")
        return self.consumers(outputs_of(node)[0], channels, affine)

    def _times(
        self, node: fx.Node, value: fx.Node, channels: Tensor, affine: Affine
    ) -> list[Landing]:
        if len(inputs_of(node)) == 2:
            return self._product(node, value, channels, affine)
        number = number_of(node)
        if not number:
            raise Refused(Check.NON_LINEAR, f"a product in {self.ground.path(node)}")
        return self.consumers(outputs_of(node)[0], channels, affine.over(1.0 / number))

    def _product(
        self, node: fx.Node, value: fx.Node, channels: Tensor, affine: Affine
    ) -> list[Landing]:
        """(scale * x) * g is scale * (x * g), whatever g is, as long as it stays what it is."""
        divided = operator(node) == "aten::div" and inputs_of(node)[0] is not value
        if affine.shift is not None or divided or node in self.products:
            raise Refused(Check.NON_LINEAR, f"a product in {self.ground.path(node)}")
        self.products.add(node)
        (output,) = outputs_of(node)
        sizes = shape(output)
        own = channels.reshape([1] * (len(sizes) - channels.dim()) + list(channels.shape))
        if any(size not in (1, full) for size, full in zip(own.shape, sizes, strict=True)):
            raise Refused(Check.AXIS, f"{self.ground.path(node)} repeats one channel over all")
        return self.consumers(output, own, affine)

    def _added(
        self, node: fx.Node, value: fx.Node, channels: Tensor, affine: Affine
    ) -> list[Landing]:
        raise Refused(Check.ADDED, f"in {self.ground.path(node)}")


Step = Callable[[Forward, fx.Node, fx.Node, Tensor, Affine], list[Landing]]
_STEPS: dict[str, Step] = {
    "aten::add": Forward._added,
    "aten::sub": Forward._added,
    "aten::cat": Forward._cat,
    "aten::mul": Forward._times,
    "aten::div": Forward._times,
    "aten::neg": Forward._times,
    **dict.fromkeys(AVERAGES, Forward._average),
    **dict.fromkeys(PADDINGS, Forward._padded),
    **dict.fromkeys(GATHERS, Forward._gathered),
}
