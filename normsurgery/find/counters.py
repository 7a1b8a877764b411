"""The batch counter beside running statistics."""

from __future__ import annotations

from collections.abc import Mapping

from normsurgery.graph import Flow
from normsurgery.graph.nodes import inputs_of, name_of, writes


def counter(recording: Flow, parameters: Mapping[str, str]) -> dict[str, str]:
    """The batch counter beside running statistics, which no call is given.

    Only a counter that the run advanced belongs to the norm: a forward may leave it alone.
    """
    if "running_mean" not in parameters:
        return {}
    path = parameters["running_mean"].rpartition(".")[0]
    buffers = recording.model.get_submodule(path).named_buffers(path, recurse=False)
    counters = {n for n, b in buffers if b.dim() == 0 and not b.is_floating_point()}
    written = (
        inputs_of(node)[0] for node in recording.operations if writes(node) and inputs_of(node)
    )
    advanced = [name for value in written if (name := name_of(value)) in counters]
    return {"num_batches_tracked": advanced[0]} if advanced and advanced[0] else {}
