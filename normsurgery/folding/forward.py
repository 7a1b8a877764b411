"""From the output of a norm on to what reads it: the weights that can take up its affine.

`consumers(value, affine)` answers with the Landings after which the model computes the same though
the value is x instead of scale * x + shift. Every reader must be a layer, or hand the value on to
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

from torch import Tensor, fx

from normsurgery.flow.nodes import inputs_of, operator, outputs_of, shape
from normsurgery.flow.operators import Kind, kind_of
from normsurgery.folding.channels import NEUTRAL
from normsurgery.folding.checks import Check
from normsurgery.folding.crossings import Crossing, crossings, require_shift_crosses, why_not
from normsurgery.folding.ground import Affine, Ground, Landing, Refused
from normsurgery.folding.landings import on_input
from normsurgery.folding.layers import is_layer, layer
from normsurgery.folding.merged_layers import on_merged_input
from normsurgery.folding.norm_landings import on_norm_input


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
        across = crossings(node)
        if across:
            return self._crossed(across, node, value, channels, affine)
        step = _STEPS.get(kind_of(node))
        if step is None:
            name = operator(node).removeprefix("aten::")
            raise Refused(why_not(node), f"{name} in {self.ground.path(node)}")
        return step(self, node, value, channels, affine)

    def _crossed(
        self,
        across: Sequence[Crossing],
        node: fx.Node,
        value: fx.Node,
        channels: Tensor,
        affine: Affine,
    ) -> list[Landing]:
        read = [found for found in across if found.source is value]
        if not read:
            raise Refused(Check.UNKNOWN, f"{self.ground.path(node)} does not hand it on")
        landings: list[Landing] = []
        for found, output in product(read, outputs_of(node)):
            require_shift_crosses(self.ground, found, node, affine)
            own = found.after(channels, output)
            if own is None:
                raise Refused(Check.AXIS, f"{self.ground.path(node)} {found.mixes}")
            onward = affine.over(1.0 / found.factor).less(-found.added)
            landings += self.consumers(output, own, onward)
        return landings

    def _product(
        self, node: fx.Node, value: fx.Node, channels: Tensor, affine: Affine
    ) -> list[Landing]:
        """(scale * x) * g is scale * (x * g), whatever g is, as long as it stays what it is."""
        divided = operator(node) == "aten::div" and inputs_of(node)[0] is not value
        single = len(inputs_of(node)) != 2 or node in self.products
        if affine.shift is not None or divided or single:
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
_STEPS: dict[Kind | None, Step] = {
    Kind.ADD: Forward._added,
    Kind.SCALE: Forward._product,
}
