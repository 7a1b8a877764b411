"""The Steps of a Plan: one frozen type for each thing that is done to a site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from normsurgery.fold.editjson import edit_from_json, edit_to_json
from normsurgery.fold.edits import Edit
from normsurgery.spec import Fidelity
from normsurgery.survey import Site


@dataclass(frozen=True)
class Step:
    """One site and what is done to it; each kind of step is a type of its own.

    to: the kind of norm that is there afterwards, "identity" where there is none.
    options: complete: what the conversion would choose itself is filled in.
    fidelity: what the step promises.
    child: for a call or a formula, the name under which its owner will hold the new norm.
    edits: what becomes of other tensors. changes: the modules that give other numbers afterwards,
        which the edits make up for in what reads these.
    """

    site: Site
    to: str
    options: Mapping[str, Any]
    fidelity: Fidelity
    notes: tuple[str, ...] = ()
    child: str = ""
    edits: tuple[Edit, ...] = ()
    changes: tuple[str, ...] = ()

    name: ClassVar[str] = ""
    rule_name: ClassVar[str] = ""

    @property
    def rule(self) -> str:
        """Of a fold: where the norm went, in words."""
        return self.rule_name

    @property
    def action(self) -> str:
        """What the user asked for: swap, or fold; copy and replay are swaps that change no bit."""
        return "fold" if isinstance(self, FoldStep) else self.name

    def to_json(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **own,
            "type": self.name,
            "site": self.site.to_json(),
            "options": dict(self.options),
            "fidelity": self.fidelity.name.lower(),
            "edits": [edit_to_json(edit) for edit in self.edits],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Step:
        """Raises KeyError, TypeError or ValueError where the data are no step."""
        kind = TYPES[data["type"]]
        values = {field.name: _frozen(data[field.name]) for field in fields(kind)}
        return kind(
            **{
                **values,
                "site": Site.from_json(data["site"]),
                "options": data["options"],
                "fidelity": Fidelity.parse(data["fidelity"]),
                "edits": tuple(edit_from_json(item) for item in data["edits"]),
            }
        )

    def __str__(self) -> str:
        options = "".join(f" {name}={value}" for name, value in self.options.items())
        shape = "" if self.site.shape is None else f"  {list(self.site.shape)}"
        notes = "".join(f"  ({note})" for note in self.notes)
        return (
            f"{self.site.label or '(the model itself)'}  {self.site.kind} -> {self.to}{options}"
            f"{shape}  {self.fidelity.name}{notes}"
        )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Swap(Step):
    """The new norm is built by a conversion."""

    name = "swap"


@dataclass(frozen=True)
class Duplicate(Step):
    """A copy of the very module takes its place: of its own kind and class, it changes no bit."""

    name = "copy"


@dataclass(frozen=True)
class Replay(Step):
    """A module that runs the very operations of a formula takes its place."""

    name = "replay"


class FoldStep(Step):
    """What a fold does: other weights change by the edits, and promises hold in eval mode."""


@dataclass(frozen=True)
class Fold(FoldStep):
    """A norm whose scale and shift went by `where` into other weights; `to` is what is left."""

    where: str = ""

    name = "fold"

    @property
    def rule(self) -> str:
        return self.where


@dataclass(frozen=True)
class Together(FoldStep):
    """A call of a norm that is folded with another call of it: `lead`, the site whose step has the
    edits of both."""

    lead: int = -1
    where: str = ""

    name = "together"

    @property
    def rule(self) -> str:
        return self.where


@dataclass(frozen=True)
class Merge(FoldStep):
    """Parallel branches of one sum go into the layer of one of them, the site.

    owner: the module that adds them up. branches: their paths, the one that stays first. places:
    the modules that give nothing from now on.
    """

    owner: str = ""
    branches: tuple[str, ...] = ()
    places: tuple[str, ...] = ()

    name, rule_name = "merge", "parallel branches"


@dataclass(frozen=True)
class MergedNorm(FoldStep):
    """A norm that goes with the branches of a Merge, which has the edits."""

    name, rule_name = "merged norm", "parallel branches"


@dataclass(frozen=True)
class BakeWeight(FoldStep):
    """A weight that was computed before each forward becomes a plain one."""

    name, rule_name = "bake", "baked weight"


@dataclass(frozen=True)
class Strip(FoldStep):
    """A norm that differs in training only becomes what it is in inference."""

    name, rule_name = "strip", "inference form"


@dataclass(frozen=True)
class Untie(FoldStep):
    """A shared module gets a copy for one of its calls. source: its path; size: bytes copied."""

    source: str = ""
    size: int = 0

    name, rule_name = "untie", "untied"


_TYPES = (Swap, Duplicate, Replay, Fold, Together, Merge, MergedNorm, BakeWeight, Strip, Untie)
TYPES: Mapping[str, type[Step]] = {kind.name: kind for kind in _TYPES}
