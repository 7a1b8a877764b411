"""Weights that stand beside an ONNX file, and models too large for one protobuf message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from normsurgery.errors import CannotRead

LARGE_FILE = 2**31 - 2**20  # protobuf takes no message of 2 GiB


def load_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """Put the weights that stand in other files into the model, in place. Raises CannotRead."""
    folder = path.resolve().parent
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        if not onnx.external_data_helper.uses_external_data(tensor):
            continue
        info = onnx.external_data_helper.ExternalDataInfo(tensor)
        file = folder / info.location
        if not file.is_file():
            raise CannotRead(
                f"{path}: its weights are in {info.location!r}, which is not beside it. Copy that "
                f"file into the same directory, under the same name."
            )
        end = int(info.offset or 0) + _size(tensor, info)
        if file.stat().st_size < end:
            raise CannotRead(
                f"{path}: {info.location!r} is truncated: {tensor.name!r} ends at byte {end}, the "
                f"file has {file.stat().st_size}. Copy or export it again."
            )
        try:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise CannotRead(
                f"{path}: cannot read {info.location!r}: {first_line(error)}."
            ) from None
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _size(tensor: onnx.TensorProto, info: Any) -> int:
    if info.length is not None:
        return int(info.length)
    elements = 1
    for size in tensor.dims:
        elements *= size
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return elements * int(dtype.itemsize)


def weight_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of the weights in the main graph: 2 GB and more cannot be one protobuf message."""
    return sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in proto.graph.initializer)


def save_large(proto: onnx.ModelProto, folder: Path) -> str:
    """Write a model with its weights beside it; the proto is left as it was. Returns the path."""
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    path = str(folder / "model.onnx")
    onnx.save(copied, path, save_as_external_data=True, location="weights", size_threshold=1024)
    return path


def first_line(error: Exception) -> str:
    """The first line of what an error says, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
