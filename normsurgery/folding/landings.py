"""The edits on the weights of one node that take up a scale and a shift of its output or input."""

from __future__ import annotations

from torch import Tensor, fx

from normsurgery.edits.types import AddProduct, Create, Edit, Scale, Shift
from normsurgery.flow.flow import Operand
from normsurgery.flow.nodes import (
    arguments,
    frames,
    inputs_of,
    operator,
    position,
    shape,
)
from normsurgery.flow.operators import CONVOLUTION
from normsurgery.folding.channels import vector
from normsurgery.folding.checks import Check
from normsurgery.folding.ground import Affine, Ground, Landing, Refused, is_torch_layer
from normsurgery.folding.layers import Layer, layer, whole_operand
from normsurgery.rewriting.owner.biases import bias_name, read_by, weight_without_bias

# --- the side of the output ---------------------------------------------------------------------


def on_output(ground: Ground, node: fx.Node, channels: Tensor, affine: Affine) -> Landing:
    """The layer gives scale * y + shift instead of y. Raises Refused."""
    found = layer(ground, node)
    placed = affine_at(ground, node, channels, found.channel_axis, affine)
    groups = found.groups if found.transposed else 1
    edits: list[Edit] = []
    if placed.scale is not None:
        edits.append(Scale(found.weight.name, placed.scale, found.out, groups))
    name, created = bias_of(ground, found, wanted=placed.shift is not None)
    edits += created
    if name is not None:
        if placed.scale is not None and not created:
            edits.append(Scale(name, placed.scale, 0))
        edits += [Shift(name, placed.shift)] if placed.shift is not None else []
    return Landing((node,), tensors_of_layer(found), tuple(edits))


def tensors_of_layer(found: Layer) -> tuple[Operand, ...]:
    return (found.weight,) if found.bias is None else (found.weight, found.bias)


def bias_of(ground: Ground, found: Layer, *, wanted: bool) -> tuple[str | None, list[Edit]]:
    """The name of the bias that the node itself adds, and what creates it. Raises Refused.

    wanted: there has to be one.
    """
    if found.bias is not None:
        return found.bias.name, []
    if found.late_bias is not None:
        if wanted:
            raise Refused(Check.NO_BIAS, f"{ground.path(found.node)} adds its bias later")
        return None, []
    name = _bias_name(ground, found)
    if name in ground.created:
        return name, []
    if not wanted:
        return None, []
    created = create_bias(ground, found)
    return created.target, [created]


def _bias_name(ground: Ground, found: Layer) -> str | None:
    """What a bias of the layer is called, which may not be there; None where it can hold none."""
    module = ground.child_of(found.node, found.weight)
    if module is None:
        return _bias_in_graph(ground, found)
    if "bias" not in module._parameters or not is_torch_layer(module):
        return None
    path = ground.flow.path(module)
    return f"{path}.bias" if path else "bias"


def _bias_in_graph(ground: Ground, found: Layer) -> str | None:
    """The same for a layer that is a call in a graph the user holds."""
    frame = next(iter(frames(found.node)), None)
    owner = None if frame is None else frame.module
    if frame is None or not isinstance(owner, fx.GraphModule):
        return None
    call = next((node for node in owner.graph.nodes if node.name == frame.node), None)
    weight = None if call is None else weight_without_bias(call)
    if weight is None or read_by(owner, weight) is not found.weight.tensor:
        return None
    name = bias_name(found.weight.name)
    path, _, last = name.rpartition(".")
    above = ground.flow.path(owner)
    free = getattr(ground.model.get_submodule(path), last, None) is None
    return name if free and (not above or name.startswith(f"{above}.")) else None


def on_rows(ground: Ground, node: fx.Node, channels: Tensor, affine: Affine) -> Landing:
    """The rows of an embedding. Raises Refused."""
    weight = whole_operand(ground, node, inputs_of(node)[0])
    placed = affine_at(ground, node, channels, -1, affine)
    edits: list[Edit] = []
    edits += [Scale(weight.name, placed.scale, 1)] if placed.scale is not None else []
    edits += [Shift(weight.name, placed.shift, 1)] if placed.shift is not None else []
    return Landing((node,), (weight,), tuple(edits))


def on_constant(
    ground: Ground, node: fx.Node, value: fx.Node, channels: Tensor, affine: Affine
) -> Landing:
    """A named tensor that is added along the channels: scale * b + shift. Raises Refused."""
    operand = ground.weight(value, node)
    index, axis = _along(ground, node, operand, value, channels)
    placed = affine.at(index, _features(affine, len(index)))
    edits: list[Edit] = []
    edits += [Scale(operand.name, placed.scale, axis)] if placed.scale is not None else []
    edits += [Shift(operand.name, placed.shift, axis)] if placed.shift is not None else []
    return Landing((node,), (operand,), tuple(edits))


def _along(
    ground: Ground, node: fx.Node, operand: Operand, value: fx.Node, channels: Tensor
) -> tuple[list[int], int]:
    """The channels along the one axis of the named tensor that they run along."""
    places = [place for place, size in enumerate(channels.shape) if size != 1]
    if not places and channels.numel() == 1:
        places = [channels.dim() - 1] if operand.tensor.numel() == 1 else []
    own = [place - channels.dim() + len(shape(value)) for place in places]
    if len(own) != 1 or own[0] < 0 or operand.axes[own[0]] is None:
        raise Refused(Check.AXIS, f"{operand.name} does not run along the channels")
    axis = operand.axes[own[0]]
    assert axis is not None
    if operand.tensor.shape[axis] != channels.shape[places[0]]:
        raise Refused(Check.AXIS, f"{operand.name} does not run along the channels")
    return channels.reshape(-1).tolist(), axis


def create_bias(ground: Ground, found: Layer) -> Create:
    """A bias for a layer without one, where its class can hold it. Raises Refused."""
    where, name = ground.path(found.node), _bias_name(ground, found)
    if name is None:
        raise Refused(Check.NO_BIAS, f"{where} computes without a bias and could not hold one")
    if ground.choices.keep_classes:
        raise Refused(Check.NO_BIAS, f"{where} has none, and its class is kept as it is")
    features = found.weight.tensor.shape[found.out] * (found.groups if found.transposed else 1)
    return Create(name, (features,), found.weight.name)


def affine_at(ground: Ground, node: fx.Node, channels: Tensor, axis: int, affine: Affine) -> Affine:
    """The affine for the channels along `axis` of a node's input or output. Raises Refused."""
    index = vector(channels, axis)
    if index is None:
        raise Refused(
            Check.AXIS, f"{ground.path(node)} works on axis {axis}, the norm's channels on another"
        )
    return affine.at(index.tolist(), _features(affine, index.numel()))


def _features(affine: Affine, default: int) -> int:
    known = affine.scale or affine.shift
    return default if known is None else int(known.settings.get("features", default))


# --- the side of the input ----------------------------------------------------------------------


def on_input(
    ground: Ground, node: fx.Node, channels: Tensor, affine: Affine, *, pads: bool = True
) -> Landing:
    """The layer is given x instead of scale * x + shift. Raises Refused.

    pads: with zeros, as it does; else something else will have padded its input by then.
    """
    found = layer(ground, node)
    placed = affine_at(ground, node, channels, found.channel_axis, affine)
    groups = 1 if found.transposed else found.groups
    edits: list[Edit] = []
    nodes, tensors = [node], [found.weight]
    if placed.shift is not None:
        if pads:
            _require_even_shift(ground, found)
        name, created, adds = _bias_for_input(ground, found)
        nodes += adds
        tensors += [bias for bias in (found.bias, found.late_bias) if bias is not None]
        weight = found.weight.name
        edits += created
        edits.append(AddProduct(name, weight, placed.shift, found.into, found.out, found.groups))
    if placed.scale is not None:
        edits.append(Scale(found.weight.name, placed.scale, found.into, groups))
    return Landing(tuple(nodes), tuple(tensors), tuple(edits))


def _bias_for_input(ground: Ground, found: Layer) -> tuple[str, list[Edit], list[fx.Node]]:
    """The bias that takes up what a shift of the input adds, and the nodes that add it."""
    if found.late_bias is None:
        name, created = bias_of(ground, found, wanted=True)
        assert name is not None
        return name, created, []
    uses = ground.flow.uses(found.late_bias)
    later = [
        use for use in uses if position(use) > position(found.node) and operator(use) == "aten::add"
    ]
    if not later:
        raise Refused(Check.NO_BIAS, f"{ground.path(found.node)} does not add its bias")
    return found.late_bias.name, [], later[:1]


def _require_even_shift(ground: Ground, found: Layer) -> None:
    """A shift of the input is one number per output channel, unless zeros are padded in."""
    where = ground.path(found.node)
    if found.transposed and not _is_pointwise(found):
        raise Refused(
            Check.ZERO_PADDING, f"{where} is transposed: a shift reaches its border unevenly"
        )
    if found.transposed or operator(found.node) != CONVOLUTION or not any(arguments(found.node)[4]):
        return
    raise Refused(
        Check.ZERO_PADDING,
        f"{where} pads its input with zeros, which the norm does not shift",
        "Use pad='explicit' to write the padding out." if _could_pad(ground, found) else "",
    )


def _could_pad(ground: Ground, found: Layer) -> bool:
    """Whether an explicit padding is there to be asked for: it would be seen by every reader."""
    readers = ground.flow.readers(found.input)
    return not ground.choices.explicit_pad and all(operator(n) == CONVOLUTION for n in readers)


def _is_pointwise(found: Layer) -> bool:
    """A transposed convolution that reads each place alone."""
    stride, padding, more = (arguments(found.node)[place] for place in (3, 4, 7))
    kernel = found.weight.tensor.shape[2:]
    return {*kernel, *stride} == {1} and not any((*padding, *more))
