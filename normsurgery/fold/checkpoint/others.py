"""The files of a result that are no shards: copied, but for what the fold changes in them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from normsurgery import __version__
from normsurgery.artefacts.checkpoints import RECORD
from normsurgery.artefacts.loaded import MARK
from normsurgery.fold.checkpoint.evaluating import Evaluation
from normsurgery.fold.checkpoint.layout import CONFIG, INDEX, Layout, read_object
from normsurgery.fold.checkpoint.resuming import Workplace
from normsurgery.fold.checkpoint.streaming import OutputShard
from normsurgery.fold.untied_flags import TIED
from normsurgery.jsonfiles import write_json
from normsurgery.report import Report


def write_others(
    layout: Layout, outputs: tuple[OutputShard, ...], evaluation: Evaluation, place: Workplace
) -> None:
    """Every file that is no shard: copied, but for the index and what untying changes."""
    for path in layout.others:
        target = place.files / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if str(path) not in (INDEX, RECORD):
            shutil.copyfile(layout.directory / path, target)
    if evaluation.copied:
        write_json(place.files / CONFIG, _untied(layout.config))
    if layout.index is not None:
        write_json(place.files / INDEX, _index(layout.index, outputs))


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with `tie_word_embeddings` false, in that of its language model too."""
    made = {
        key: _untied(value) if isinstance(value, Mapping) and _has_words(value) else value
        for key, value in config.items()
    }
    return {**made, TIED: False}


def _has_words(config: Mapping[str, Any]) -> bool:
    return TIED in config or "vocab_size" in config


def _index(index: Mapping[str, Any], outputs: tuple[OutputShard, ...]) -> dict[str, Any]:
    homes = {output.key: shard.name for shard in outputs for output in shard.outputs}
    kept = [key for key in index["weight_map"] if key in homes]
    added = [key for key in homes if key not in index["weight_map"]]
    metadata = dict(index.get("metadata") or {})
    metadata["total_size"] = sum(shard.nbytes for shard in outputs)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(
            output.source.nbytes // output.source.dtype.itemsize
            for shard in outputs
            for output in shard.outputs
        )
    return {**index, "metadata": metadata, "weight_map": {k: homes[k] for k in [*kept, *added]}}


def write_record(layout: Layout, place: Workplace, report: Report) -> None:
    """normsurgery.json: what was folded, and nothing to make again on load."""
    before = layout.directory / RECORD
    earlier = read_object(before).get("folds", []) if before.is_file() else []
    write_json(
        place.files / RECORD,
        {MARK: __version__, "plan": [], "folds": [*earlier, report.to_json()]},
    )
