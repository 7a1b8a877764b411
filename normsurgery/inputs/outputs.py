"""The tensors in whatever a model returns, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

# Keys and values kept for the next call are a means, not a result.
_CACHES = frozenset({"past_key_values", "cache_params"})


def flatten_outputs(output: Any) -> dict[str, Tensor]:
    """All tensors of an output: `output` for a bare tensor, else paths such as `logits`, `0`,
    `hidden_states.1`. Takes tuples, lists, named tuples, mappings (transformers' outputs are such)
    and dataclasses, nested; leaves out caches and whatever is no tensor.
    """
    if isinstance(output, Tensor):
        return {"output": output}
    return dict(_tensors(output, ""))


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    for name, item in _entries(value):
        if name not in _CACHES:
            yield from _tensors(item, f"{path}.{name}" if path else name)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(name), item) for name, item in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, (tuple, list)):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((item.name, getattr(value, item.name)) for item in fields(value))
