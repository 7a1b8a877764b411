"""Between a model's state_dict names and a checkpoint's keys.

The names come from transformers' own conversion mapping and renamings (legacy `gamma` and `beta`,
base-model prefixes, merged experts); ties from the identity of the model's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from normsurgery.errors import CannotRead
from normsurgery.folding.checkpoint.layout import Layout
from normsurgery.folding.checkpoint.pieces import Composite, NotPlacement, Piece


@dataclass(frozen=True)
class Names:
    """Which file tensors hold which of a model's tensors.

    pieces: canonical name (the first alias) -> the boxes that its values lie in. Where files hold
        a tied tensor under several keys, these are the boxes of the first.
    copies: canonical name -> (alias, key): keys that hold the tied values once more.
    aliases: each state_dict name -> its canonical name.
    shapes: canonical name -> shape.
    unknown: file keys that the model does not know.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    copies: Mapping[str, tuple[tuple[str, str], ...]]
    aliases: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    unknown: tuple[str, ...]


@dataclass
class _Found:
    composites: dict[str, tuple[str, Composite]] = field(default_factory=dict)  # name -> key, box
    unknown: list[str] = field(default_factory=list)


def read_names(model: nn.Module, layout: Layout) -> Names:
    """The names of `model` (on the meta device, ties kept) in the files of `layout`.

    Raises CannotRead where a tensor of the model is in no file and tied to none, or has another
    shape there.
    """
    state: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    aliases = {name: group[0] for group in groups.values() for name in group}
    found = _matched(model, layout, state)
    pieces: dict[str, tuple[Piece, ...]] = {}
    copies: dict[str, tuple[tuple[str, str], ...]] = {}
    for group in groups.values():
        present = [name for name in group if name in found.composites]
        if not present:
            raise _missing(layout, group)
        composite = found.composites[present[0]][1]
        _check_shape(layout, group[0], composite, tuple(state[group[0]].shape))
        pieces[group[0]] = composite.pieces
        if len(present) > 1:
            _check_plain(layout, present, found)
            copies[group[0]] = tuple((name, found.composites[name][0]) for name in present[1:])
    return Names(
        pieces,
        copies,
        aliases,
        {name: tuple(state[name].shape) for name in set(aliases.values())},
        tuple(found.unknown),
    )


def _matched(model: Any, layout: Layout, state: Mapping[str, Any]) -> _Found:
    """transformers' loading of the files' keys, with shapes in the place of tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    entries = layout.entries
    mapping = get_model_conversion_mapping(model)
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    prefix = model.base_model_prefix
    found = _Found()
    conversions: dict[str, Any] = {}
    for key in sorted(entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, dict(state))
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, dict(state))
        if name not in state:
            found.unknown.append(key)
        elif pattern is None:
            found.composites[name] = key, Composite.of_file(key, entries[key].shape)
        else:
            conversion = conversions.setdefault(name, deepcopy(by_pattern[pattern]))
            conversion.add_tensor(name, key, pattern, Composite.of_file(key, entries[key].shape))
    for name, conversion in conversions.items():
        _convert(model, name, conversion, state, found)
    return found


def _convert(
    model: Any, name: str, conversion: Any, state: Mapping[str, Any], found: _Found
) -> None:
    try:
        made = conversion.convert(name, model=model, config=model.config)
    except NotPlacement as error:
        operations = ", ".join(type(item).__name__ for item in conversion.operations)
        raise CannotRead(
            f"{name} is made of the files' tensors by {operations}, which does more than join and "
            f"split them ({error}). Load the model, write it with save_pretrained and "
            "save_original_format=False, and fold that."
        ) from None
    for target, value in made.items():
        composite = value[0] if isinstance(value, list) else value
        if target in state:
            found.composites[target] = composite.pieces[0].key, composite


def _check_plain(layout: Layout, present: list[str], found: _Found) -> None:
    """Ties of tensors that are joined or split from others are not followed."""
    if any(len(found.composites[name][1].pieces) > 1 for name in present):
        raise CannotRead(
            f"{layout.directory}: {' and '.join(present)} are tied, are both in the files, and are "
            "joined from several tensors there. Write the checkpoint again with save_pretrained."
        )


def _check_shape(layout: Layout, name: str, composite: Composite, wanted: tuple[int, ...]) -> None:
    if tuple(composite.shape) != wanted:
        raise CannotRead(
            f"{layout.directory}: {name} has shape {list(composite.shape)} in the files "
            f"({composite.pieces[0].key}), and the model that config.json describes wants "
            f"{list(wanted)}. Mend config.json, or fetch the right weights."
        )


def _missing(layout: Layout, group: list[str]) -> CannotRead:
    return CannotRead(
        f"{layout.directory}: no file holds {group[0]}, and it is tied to nothing that one holds. "
        "It would be random. Save the whole model with save_pretrained, with the class that "
        "`architectures` in config.json should name."
    )
