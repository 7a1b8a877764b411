"""What was loaded, and what must be known to save a changed model in the same form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Kind = Literal["pickle", "exported", "directory", "factory"]

MARK = "normsurgery"  # key that marks a file of ours, in a dict and in safetensors metadata
SUFFIX = {"pickle": ".pt", "exported": ".pt2", "directory": "", "factory": ".safetensors"}


@dataclass(frozen=True)
class Loaded:
    """A model and where it came from.

    container, key: the dict that stood around a pickled model, and the model's key in it.
    plans: swaps that had been made before it was saved and were made again on load, oldest first.
    notes: what a reader should be told: the key used, what was left out, weights not finite.
    """

    model: nn.Module | ExportedProgram
    kind: Kind
    path: str
    notes: tuple[str, ...] = ()
    container: Mapping[Any, Any] | None = None
    key: str | None = None
    plans: tuple[Any, ...] = field(default=())

    def output(self, suffix: str) -> Path:
        """Where a changed model goes by default: `model.pt` becomes `model.groupnorm.pt`.

        A factory's goes into the working directory, under the factory's name.
        """
        if self.kind == "factory":
            name = self.path.rpartition(":")[2].replace(".", "-")
            return Path(f"{name}.{suffix}{SUFFIX[self.kind]}")
        path = Path(self.path)
        if self.kind == "directory":
            path = path.resolve()
            return path.with_name(f"{path.name}.{suffix}")
        return path.with_name(f"{path.stem}.{suffix}{path.suffix or SUFFIX[self.kind]}")
