"""What a model returns, by name: its tensors, its numbers, and what is neither."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

# Keys and values kept for the next call are a means, not a result.
_CACHES = frozenset({"past_key_values", "cache_params"})
_NUMBERS = (bool, int, float, complex)


def flatten_outputs(output: Any) -> dict[str, Tensor]:
    """All tensors of an output: `output` for a bare tensor, else paths such as `logits`, `0`,
    `hidden_states.1`. Takes tuples, lists, named tuples, mappings (transformers' outputs are such)
    and dataclasses, nested; leaves out caches and whatever is no tensor.

    A sparse tensor is given dense, a nested one as its parts, by index as those of a list.
    """
    return {path: _dense(leaf) for path, leaf in _leaves(output, "") if isinstance(leaf, Tensor)}


def flatten_numbers(output: Any) -> dict[str, Tensor]:
    """All Python numbers and booleans of an output as tensors of no dimension, by the same paths.

    A float is in the default type of torch: what a model reads out of a tensor is no finer.
    """
    return {path: _number(leaf) for path, leaf in _leaves(output, "") if isinstance(leaf, _NUMBERS)}


def neither(output: Any) -> tuple[str, ...]:
    """The paths of what is no tensor and no number, each with its class: `1, a Normal`."""
    known = (Tensor, *_NUMBERS, type(None))
    return tuple(
        f"{path}, a {type(leaf).__name__}"
        for path, leaf in _leaves(output, "")
        if not isinstance(leaf, known)
    )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not _has_entries(value):
        yield path or "output", value
        return
    for name, item in _entries(value):
        if name not in _CACHES:
            yield from _leaves(item, f"{path}.{name}" if path else name)


def _number(value: complex) -> Tensor:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = float(value)
    return torch.tensor(value)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _has_entries(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_nested
    if isinstance(value, (Mapping, tuple, list)):
        return True
    return is_dataclass(value) and not isinstance(value, type)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield from ((str(index), part) for index, part in enumerate(value.unbind()))
    elif isinstance(value, Mapping):
        yield from ((str(name), item) for name, item in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, (tuple, list)):
        yield from ((str(index), item) for index, item in enumerate(value))
    else:
        yield from ((item.name, getattr(value, item.name)) for item in fields(value))
