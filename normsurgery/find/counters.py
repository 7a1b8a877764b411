"""The batch counter beside running statistics."""

from __future__ import annotations

from collections.abc import Mapping

from normsurgery.graph import Recording


def counter(recording: Recording, parameters: Mapping[str, str]) -> dict[str, str]:
    """The batch counter beside running statistics, which no call is given.

    Only a counter that the run advanced belongs to the norm: a forward may leave it alone.
    """
    if "running_mean" not in parameters:
        return {}
    path = parameters["running_mean"].rpartition(".")[0]
    buffers = recording.model.get_submodule(path).named_buffers(path, recurse=False)
    counters = {n for n, b in buffers if b.dim() == 0 and not b.is_floating_point()}
    values = recording.values
    advanced = [
        values[op.inputs[0]].name
        for op in recording.ops
        if op.inputs and op.target._schema.is_mutable and values[op.inputs[0]].name in counters
    ]
    return {"num_batches_tracked": advanced[0]} if advanced and advanced[0] else {}
