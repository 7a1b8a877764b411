"""The ONNX form that the source should have, written again the way the file at hand was."""

from __future__ import annotations

import hashlib
import itertools
import logging
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from normsurgery.errors import NormsurgeryError
from normsurgery.exporting.quiet import quiet
from normsurgery.inputs import Inputs
from normsurgery.onnxfile.reading import OnnxFile, all_nodes

if TYPE_CHECKING:
    from onnx import ModelProto

    from normsurgery.exporting.dynamic import Dynamic

logger = logging.getLogger("normsurgery")


@dataclass(frozen=True)
class Rebuilt:
    """program: its node names are names of ONNX values. graphs: its ONNX forms, if it has any."""

    program: ExportedProgram
    graphs: tuple[ModelProto, ...] = ()

    def like(self, file: OnnxFile) -> ModelProto | None:
        """The form whose operators are most like those of `file`."""
        wanted = _operators(file.proto)

        def shared(other: ModelProto) -> float:
            found = _operators(other)
            return sum((wanted & found).values()) / max(1, sum((wanted | found).values()))

        return max(self.graphs, key=shared, default=None)


def rebuilt(
    model: nn.Module | ExportedProgram, file: OnnxFile, inputs: Inputs
) -> Iterator[Rebuilt]:
    """The source exported again, at the opset of `file` and with its dynamic axes.

    First as normsurgery exports it, where the file says that it was; then as torch does; last, if
    it can be traced and no more, the traced program alone. Each is made when it is asked for.
    """
    key = _key(model, file, inputs)
    for source, known, kept in _KEPT:
        if source() is model and known == key:
            return iter(kept)
    kept = _Kept(_made(model, file, inputs))
    _KEPT.append((weakref.ref(model), key, kept))
    return iter(kept)


def _made(model: nn.Module | ExportedProgram, file: OnnxFile, inputs: Inputs) -> Iterator[Rebuilt]:
    told = _told(file)
    if "normsurgery.version" in told:
        yield from _attempt(lambda: _ours(model, file, inputs, bool(told.get("normsurgery.plan"))))
    yield from _attempt(lambda: _torchs(model, file, inputs))
    yield from _attempt(lambda: Rebuilt(_program(model, file, inputs)))


class _Kept:
    """What an iterator gives, made once and kept."""

    def __init__(self, source: Iterator[Rebuilt]) -> None:
        self._source, self._found = source, list[Rebuilt]()

    def __iter__(self) -> Iterator[Rebuilt]:
        for place in itertools.count():
            if place == len(self._found):
                new = next(self._source, None)
                if new is None:
                    return
                self._found.append(new)
            yield self._found[place]


# The last sources that were exported again: many files may be held against one of them.
_KEPT: deque[tuple[Any, object, _Kept]] = deque(maxlen=2)


def _key(model: nn.Module | ExportedProgram, file: OnnxFile, inputs: Inputs) -> object:
    """All that a second export depends on; a source whose weights have changed is another one."""
    told = _told(file)
    leaves = tree_leaves((inputs.args, dict(inputs.kwargs)))
    shapes = [(t.shape, t.dtype) if isinstance(t, Tensor) else repr(t) for t in leaves]
    hashed = hashlib.blake2b()
    held = model.state_dict if isinstance(model, ExportedProgram) else model.state_dict()
    for name, tensor in sorted(held.items()):
        if isinstance(tensor, Tensor):
            hashed.update(name.encode())
            hashed.update(
                tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
    return (
        file.opset,
        repr(_axes(model, file, inputs)),
        "normsurgery.version" in told,
        bool(told.get("normsurgery.plan")),
        repr(shapes),
        hashed.digest(),
    )


def _told(file: OnnxFile) -> dict[str, str]:
    return {entry.key: entry.value for entry in file.proto.metadata_props}


def _attempt(make: object) -> Iterator[Rebuilt]:
    try:
        yield make()  # type: ignore[operator]
    except Exception as error:  # what one exporter cannot do, the next may
        logger.info("not exported again: %s: %s", type(error).__name__, error)


def _ours(
    model: nn.Module | ExportedProgram,
    file: OnnxFile,
    inputs: Inputs,
    fold: bool,
) -> Rebuilt:
    from normsurgery.exporting.preparing import Asked, prepared
    from normsurgery.exporting.translating import translate

    asked = Asked(dtype=None, fold=fold, allow_batch_stats=True)
    ready = prepared(model, inputs, _axes(model, file, inputs), asked)
    made = translate(ready.program, file.opset)
    return Rebuilt(made.program, (made.optimised, made.raw))


def _torchs(model: nn.Module | ExportedProgram, file: OnnxFile, inputs: Inputs) -> Rebuilt:
    program = _program(model, file, inputs)
    with quiet(), torch.no_grad():
        made = torch.onnx.export(
            program, dynamo=True, optimize=False, opset_version=file.opset, verbose=False
        )
        assert made is not None
        raw = made.model_proto
        made.optimize()
        optimised = made.model_proto
    assert made.exported_program is not None
    return Rebuilt(made.exported_program, (optimised, raw))


def _program(model: nn.Module | ExportedProgram, file: OnnxFile, inputs: Inputs) -> ExportedProgram:
    from normsurgery.exporting.tracing import trace

    if isinstance(model, ExportedProgram):
        return model
    dynamic = _axes(model, file, inputs)
    try:
        return trace(model, inputs, dynamic)
    except NormsurgeryError:
        if not dynamic:
            raise
        return trace(model, inputs, None)


def _axes(model: nn.Module | ExportedProgram, file: OnnxFile, inputs: Inputs) -> Dynamic | None:
    """The dynamic axes that the file names, by the names of the model's own inputs."""
    from normsurgery.exporting.dynamic import tensor_names

    if isinstance(model, ExportedProgram):
        return None
    names = list(tensor_names(model, inputs))
    ports = [port.name for port in file.inputs]
    mine = ports if set(ports) <= set(names) else names
    found = {
        name: {axis: size for axis, size in enumerate(port.shape or ()) if isinstance(size, str)}
        for name, port in zip(mine, file.inputs, strict=False)
    }
    named = {name: axes for name, axes in found.items() if axes}
    return named or None


def _operators(proto: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in all_nodes(proto) if node.op_type != "Constant")
