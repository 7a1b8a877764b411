"""What verify can compare: how a side is loaded, and what must not be compared with what."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normsurgery.errors import CannotRead, UsageError
from normsurgery.treecopy import tensors_of

if TYPE_CHECKING:
    from onnx import ModelProto

    from normsurgery.onnxfile.reading import OnnxFile

    Model = nn.Module | ExportedProgram | OnnxFile | ModelProto | str | Path
    Loaded = nn.Module | ExportedProgram | OnnxFile


def loaded(model: Model, other: Model | None = None) -> Loaded:
    """The model of a path; an ONNX model is read and checked.

    Weights alone are those of the factory that the other side names. Raises CannotRead.
    """
    if is_onnx(model):
        return _onnx_file(model)
    if not isinstance(model, (str, Path)):
        return model
    from normsurgery.artefacts import load

    if str(model).endswith(".safetensors") and isinstance(other, str) and ":" in other:
        return load(other, weights=model).model
    return load(model).model


def is_onnx(model: object) -> bool:
    """An ONNX model, in memory or in a file. Loads onnx for nobody who does not have one."""
    if isinstance(model, (str, Path)):
        return str(model).endswith(".onnx")
    return type(model).__name__ in ("ModelProto", "OnnxFile")


def is_saved_run(model: object, other: object) -> bool:
    """A `.safetensors` file that holds runs, not the weights of a factory."""
    if not isinstance(model, (str, Path)) or not str(model).endswith(".safetensors"):
        return False
    from normsurgery.verifying.saved import is_run

    return is_run(Path(model))


def _onnx_file(model: Any) -> OnnxFile:
    from normsurgery.onnxfile.reading import OnnxFile, of_proto, read

    if isinstance(model, OnnxFile):
        return model
    return read(model) if isinstance(model, (str, Path)) else of_proto(model)


def as_module(model: Loaded) -> nn.Module:
    """The module to run. Raises UsageError for what is no model, CannotRead for meta tensors."""
    if isinstance(model, ExportedProgram):
        return model.module()
    if not isinstance(model, nn.Module):
        raise UsageError(
            "verify compares modules, exported programs, ONNX models and files, not "
            f"{type(model).__name__}."
        )
    if any(tensor.is_meta for tensor in tensors_of(model)):
        raise CannotRead(
            f"{type(model).__name__} has tensors on the meta device, which have no values. "
            "Load its weights first."
        )
    return model


def parameter_names(model: Loaded) -> tuple[str, ...]:
    """Names by which the inputs of a call go, in order; of a torch model."""
    if isinstance(model, ExportedProgram):
        return tuple(n for n in model.graph_signature.user_inputs if isinstance(n, str))
    if not isinstance(model, nn.Module):
        return tuple(port.name for port in model.inputs)
    try:
        return tuple(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return ()


def has_fixed_batch(model: Loaded) -> bool:
    """An exported program accepts another batch only if its inputs were exported with a dynamic
    first dimension."""
    if not isinstance(model, ExportedProgram):
        return False
    wanted = set(model.graph_signature.user_inputs)
    values = (node.meta.get("val") for node in model.graph.nodes if node.name in wanted)
    return any(
        isinstance(value, Tensor) and value.dim() > 0 and isinstance(value.shape[0], int)
        for value in values
    )


def refuse_same_file(a: object, b: object) -> None:
    """Raises UsageError where both sides are one file."""
    if not isinstance(a, (str, Path)) or not isinstance(b, (str, Path)):
        return
    first, second = Path(a), Path(b)
    if str(a) == str(b) or (first.exists() and second.exists() and first.samefile(second)):
        raise UsageError(
            f"both sides are {a}: comparing a file with itself proves nothing. Give two files."
        )


def refuse_shared_storage(a: nn.Module, b: nn.Module) -> None:
    """Raises UsageError where both sides are one object or share the storage of a tensor."""
    if a is b:
        raise UsageError(
            "both sides are the same object, so nothing would be proven. Compare with the "
            "original, loaded once more."
        )
    storages = {t.untyped_storage().data_ptr() for t in tensors_of(a)} - {0}
    for name, tensor in [*b.named_parameters(), *b.named_buffers()]:
        if tensor.untyped_storage().data_ptr() in storages:
            raise UsageError(
                f"both sides share the storage of {name}: what changes one changes the other, so "
                "nothing would be proven. Compare with the original, loaded once more."
            )


def float_type(model: Loaded) -> torch.dtype | None:
    """The floating type that a model says it computes in; None where it has none.

    Of a torch model the coarsest of its parameters. Of a graph the coarsest that it takes as input,
    since a graph that narrows what it was given loses something; where it takes only integers, the
    type in which most of its weights are.
    """
    from normsurgery.verifying.judge import coarsest

    if isinstance(model, ExportedProgram):
        held = [t.dtype for t in model.state_dict.values() if isinstance(t, Tensor)]
    elif isinstance(model, nn.Module):
        held = [t.dtype for t in model.parameters()] or [t.dtype for t in model.buffers()]
    else:
        held = [port.dtype for port in model.inputs]
        if not any(map(_computes_in, held)):
            return _type_of_most_weights(model)
    found = sorted({dtype for dtype in held if _computes_in(dtype)}, key=str)
    return coarsest(found) if found else None


def _type_of_most_weights(file: OnnxFile) -> torch.dtype | None:
    from normsurgery.onnxfile.reading import TYPES

    counts: dict[torch.dtype, int] = {}
    for tensor in file.proto.graph.initializer:
        dtype = TYPES.get(tensor.data_type)
        if dtype is not None and _computes_in(dtype):
            counts[dtype] = counts.get(dtype, 0) + math.prod(tensor.dims)
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def _computes_in(dtype: torch.dtype) -> bool:
    """8-bit types are storage, not arithmetic."""
    return dtype.is_floating_point and dtype.itemsize > 1
