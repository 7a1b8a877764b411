"""torch's fused transformer encoder path, which computes with a norm's tensors and never calls it.

`nn.TransformerEncoderLayer` in eval mode without gradients hands `norm1.weight`, `norm1.bias` and
the weights of its linears to one fused operator. A replaced norm would be ignored there, silently
where it happens to have the same attributes. The path is switched off on every layer that was
edited, and so is the nested input that `nn.TransformerEncoder` makes for it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def switch_off(model: nn.Module, replaced: Iterable[nn.Module]) -> list[str]:
    """Switch the path off wherever it would read one of `replaced` (still bound in the tree).

    Returns the paths of the layers, for the report.
    """
    edited = {id(module) for module in replaced}
    layers = {
        id(layer): (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.TransformerEncoderLayer)
        and any(id(child) in edited for child in layer.modules())
    }
    for _, layer in layers.values():
        layer.activation_relu_or_gelu = 0
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            id(child) in layers for child in encoder.modules()
        ):
            encoder.use_nested_tensor = False
    return [path for path, _ in layers.values()]
