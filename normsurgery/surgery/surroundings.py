"""What else in a model depends on one of its modules, read once for all of them."""

from __future__ import annotations

from functools import cached_property

from torch import nn

from normsurgery.surgery.readers import Read, reads
from normsurgery.surgery.tree import holders


class Surroundings:
    """Of one model, as it is when first asked."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @cached_property
    def _holders(self) -> dict[int, str]:
        return holders(self._model)

    @cached_property
    def _reads(self) -> dict[int, list[Read]]:
        return reads(self._model)

    def holder_of(self, module: nn.Module) -> str | None:
        """Where the module is held outside the module tree."""
        return self._holders.get(id(module))

    def reads_of(self, module: nn.Module) -> list[Read]:
        """The reads of its attributes in the forwards of others."""
        return self._reads.get(id(module), [])
