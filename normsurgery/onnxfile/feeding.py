"""The inputs of a torch call as the named arrays that an ONNX graph takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from normsurgery.errors import UsageError
from normsurgery.inputs import Inputs
from normsurgery.onnxfile.reading import OnnxFile, Port

Array = np.ndarray[Any, Any]


class DoesNotFit(UsageError):
    """The inputs of a call are not what the ONNX graph takes."""


def feeds(file: OnnxFile, inputs: Inputs, order: Sequence[str] | None = None) -> dict[str, Array]:
    """Input name -> array, for `Session.run` and `Float64Graph.run`.

    An argument is fed by name where its keyword (or its name in `order`, the parameter names of the
    model's forward) is an input of the graph; all others, nested ones flattened, in order. Python
    numbers are fed where the graph has an input for them. bfloat16 stays, as ml_dtypes.bfloat16.

    Raises DoesNotFit, naming input, shape and dtype, where anything is left over or does not fit.
    """
    named, rest = _by_name(file, inputs, order)
    open_ports = [port for port in file.inputs if port.name not in named]
    leaves = _tensor_leaves(rest, len(open_ports))
    if len(leaves) != len(open_ports):
        raise DoesNotFit(_count_fault(file, named, leaves))
    named |= {port.name: leaf for port, leaf in zip(open_ports, leaves, strict=True)}
    sizes: dict[str, tuple[int, str]] = {}
    return {port.name: _fed(port, named[port.name], sizes, file) for port in file.inputs}


def as_array(tensor: Tensor) -> Array:
    """The same bits as a numpy array, on the CPU; bfloat16 and float8 through ml_dtypes."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype not in _EXTRA:
        return tensor.resolve_conj().resolve_neg().numpy()
    import ml_dtypes

    bits = torch.uint16 if tensor.element_size() == 2 else torch.uint8
    array: Array = tensor.view(bits).numpy().view(getattr(ml_dtypes, _EXTRA[tensor.dtype]))
    return array


def as_tensor(array: Array | Tensor) -> Tensor:
    """A tensor of its own with the same bits; the other way round of `as_array`."""
    if isinstance(array, Tensor):
        return array.detach().cpu().clone()
    array = np.array(array, order="C")
    for dtype, name in _EXTRA.items():
        if array.dtype.name == name:
            bits = np.uint16 if array.dtype.itemsize == 2 else np.uint8
            return torch.from_numpy(array.view(bits)).view(dtype)
    return torch.from_numpy(array)


_EXTRA = {
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e4m3fnuz: "float8_e4m3fnuz",
    torch.float8_e5m2: "float8_e5m2",
    torch.float8_e5m2fnuz: "float8_e5m2fnuz",
}


def _by_name(
    file: OnnxFile, inputs: Inputs, order: Sequence[str] | None
) -> tuple[dict[str, Any], list[Any]]:
    """Arguments that go by name, and the rest in the order of the call."""
    ports = {port.name for port in file.inputs}
    named: dict[str, Any] = {}
    rest: list[Any] = []
    names = list(order or ())[: len(inputs.args)]
    names += [""] * (len(inputs.args) - len(names))
    keywords = sorted(inputs.kwargs, key=_position(order))
    pairs = [*zip(names, inputs.args, strict=True), *((k, inputs.kwargs[k]) for k in keywords)]
    for name, value in pairs:
        if name in ports and _is_value(value):
            named[name] = value
        else:
            rest.append(value)
    return named, rest


def _position(order: Sequence[str] | None) -> Any:
    """Keywords in the order of the forward's parameters, unknown ones last, as they were given."""
    places = {name: index for index, name in enumerate(order or ())}
    return lambda name: places.get(name, len(places))


def _is_value(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray, bool, int, float))


def _tensor_leaves(values: Sequence[Any], wanted: int) -> list[Any]:
    """Tensors; and Python numbers too where the graph has inputs for all of them."""
    leaves = [leaf for value in values for leaf in _leaves(value)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, (Tensor, np.ndarray))]
    if len(tensors) == wanted:
        return tensors
    both = [leaf for leaf in leaves if _is_value(leaf)]
    return both if len(both) == wanted else tensors


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _leaves(item)]
    leaves: list[Any] = tree_leaves(value)
    return leaves


def _count_fault(file: OnnxFile, named: Mapping[str, Any], leaves: Sequence[Any]) -> str:
    wanted = ", ".join(f"{port.name}: {port}" for port in file.inputs) or "none"
    by_name = [f"{name}={_spelled(value)}" for name, value in named.items()]
    given = ", ".join([*by_name, *map(_spelled, leaves)]) or "none"
    return (
        f"{file.place} takes {len(file.inputs)} inputs ({wanted}), but {len(named) + len(leaves)} "
        f"were given ({given}). Give each of them, by name or in that order."
    )


def _fed(port: Port, value: Any, sizes: dict[str, tuple[int, str]], file: OnnxFile) -> Array:
    if not isinstance(value, (Tensor, np.ndarray)):
        value = torch.tensor(value, dtype=port.dtype)
    tensor = value if isinstance(value, Tensor) else as_tensor(value)
    if tensor.dtype != port.dtype or not _fits(port, tensor, sizes):
        bound = ", ".join(f"{name} = {size} from {by}" for name, (size, by) in sizes.items())
        where = f" with {bound}" if bound else ""
        raise DoesNotFit(
            f"{file.place}: input {port.name!r} takes {port}{where}, but was given "
            f"{_spelled(tensor)}. Give it in that dtype and shape."
        )
    return as_array(tensor)


def _fits(port: Port, tensor: Tensor, sizes: dict[str, tuple[int, str]]) -> bool:
    """Fixed sizes are equal, and an axis that two inputs share has one size."""
    if port.shape is None:
        return True
    if len(port.shape) != tensor.dim():
        return False
    for wanted, size in zip(port.shape, tensor.shape, strict=True):
        if isinstance(wanted, int) and wanted != size:
            return False
        if isinstance(wanted, str) and sizes.setdefault(wanted, (size, port.name))[0] != size:
            return False
    return True


def _spelled(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value)
