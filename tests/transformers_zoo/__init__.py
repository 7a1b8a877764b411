"""Small transformers models with random weights, and by hand what normalises in each of them.

Every row says how many norms of which kind a plain forward in eval mode runs, as a reader of the
model's source would count them: `sites` are distinct norms, `calls` how often they run in one
forward where that is another number. Nothing here knows normsurgery.
"""

from __future__ import annotations

from transformers_zoo.decoders import decoders
from transformers_zoo.encoders import encoders
from transformers_zoo.row import Row, randomise
from transformers_zoo.vision import vision

__all__ = ["Row", "models", "randomise"]


def models() -> dict[str, Row]:
    """All rows by name."""
    return {**vision(), **encoders(), **decoders()}
