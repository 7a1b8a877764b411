"""Python's collector of cyclic garbage, held off while everything that is made stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """A recording makes hundreds of thousands of objects, all of which are kept: to look through
    them for garbage again and again took more than a third of the time to plan a large model."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
