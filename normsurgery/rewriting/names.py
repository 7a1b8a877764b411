"""Names below a module: joining them to its path, and making new ones."""

from __future__ import annotations

import itertools
from collections.abc import Container


def join(path: str, name: str) -> str:
    """`name` below the module at `path`; "" is the model."""
    return f"{path}.{name}" if path else name


def fresh_name(stem: str, taken: Container[str], *, first: int = 0) -> str:
    """The first of `stem_0`, `stem_1`, ... (counted from `first`) that is not taken."""
    numbered = (f"{stem}_{number}" for number in itertools.count(first))
    return next(name for name in numbered if name not in taken)
