"""What was found in a model: Sites, Skips, and the Survey of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

from normsurgery.errors import UsageError
from normsurgery.htmltable import html_table
from normsurgery.jsonfiles import read_json, write_json

Form = Literal["module", "call", "formula"]
FoundBy = Literal["type", "graph", "run", "proof"]


@dataclass(frozen=True)
class Span:
    """A stretch of source, lines counted from the first line of its function (0)."""

    line: int
    column: int
    end_line: int
    end_column: int


@dataclass(frozen=True)
class Origin:
    """Where a value in a forward comes from: a name bound there, or the expression that made it."""

    name: str | None = None
    span: Span | None = None


@dataclass(frozen=True)
class CallSite:
    """Where in which forward a call or a formula stands.

    `function` is `package.module:Class.forward`, the function whose source `source_hash` (sha256 of
    its dedented source) and the spans speak of. `output` is the expression whose value is the
    norm's output, `input` the value it normalises, `region` every expression that belongs to it.
    `node` is used instead of spans where the owner is a fx.GraphModule or an exported program.
    `operations` are a formula's own operations as data (`graph.operations`), where they are plain.
    """

    function: str
    source_hash: str
    output: Span | None
    input: Origin
    region: tuple[Span, ...] = ()
    node: str | None = None
    operations: tuple[Mapping[str, Any], ...] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Site:
    """One normalization in one model: one module object, one call, or one formula in a forward.

    paths: every path that binds the module (the owner, for a call or a formula); "" is the model.
    parameters: role -> fully qualified name (first alias) in the model's state_dict.
    settings: as `Reading.settings` says: JSON values; `eps`, `channel_axis`, `features` at least.
    shape: smallest input shape over the recorded calls; None if it was found without a run.
    proof_error: largest relative error against the float64 reference when it was proven.
    """

    index: int
    kind: str
    paths: tuple[str, ...]
    form: Form
    class_name: str
    parameters: Mapping[str, str]
    settings: Mapping[str, Any]
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    calls: int | None = None
    attach: Literal["norm", "weight", "layer"] = "norm"
    call: CallSite | None = None
    producer: str | None = None
    consumers: tuple[str, ...] = ()
    found_by: FoundBy = "type"
    proof_error: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def label(self) -> str:
        """What to show and to select by: the path, and for a call its line in the forward."""
        if self.call is None:
            return self.path
        place = self.call.node or (f"line{self.call.output.line}" if self.call.output else "?")
        return f"{self.path}#{place}" if self.path else f"#{place}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        call = data.get("call")
        values = dict(data)
        values["paths"] = tuple(data["paths"])
        values["consumers"] = tuple(data.get("consumers", ()))
        values["notes"] = tuple(data.get("notes", ()))
        values["shape"] = tuple(data["shape"]) if data.get("shape") is not None else None
        values["call"] = _call_from_json(call) if call else None
        return cls(**values)


def _call_from_json(data: Mapping[str, Any]) -> CallSite:
    def span(value: Mapping[str, int] | None) -> Span | None:
        return Span(**value) if value else None

    origin = data["input"]
    return CallSite(
        function=data["function"],
        source_hash=data["source_hash"],
        output=span(data["output"]),
        input=Origin(origin["name"], span(origin["span"])),
        region=tuple(Span(**item) for item in data["region"]),
        node=data.get("node"),
        operations=tuple(data["operations"]) if data.get("operations") else None,
    )


@dataclass(frozen=True)
class Skip:
    """Something that normalises, or may, and is not a Site; or a Site that a plan leaves alone."""

    path: str
    reason: str
    hint: str = ""
    kind: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Survey:
    """All Sites and all Skips of a model; `notes` say how they were found and what was left out."""

    model: str
    sites: tuple[Site, ...]
    skips: tuple[Skip, ...]
    inputs: str | None = None
    notes: tuple[str, ...] = field(default=())

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def counts(self) -> dict[str, int]:
        """Sites by kind."""
        return dict(Counter(site.kind for site in self.sites))

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts().items())
        rows = ["  ".join(cells) for cells in self._cells()]
        return "\n".join([f"{self.model}: {counts or 'no normalization'}", *rows, *self.notes])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return (
            html_table(("site", "kind", "class", "input", "how it is known"), self._cells()) + notes
        )

    def _cells(self) -> Iterator[tuple[str, str, str, str, str]]:
        for site in self.sites:
            shape = "" if site.shape is None else str(list(site.shape))
            yield (
                site.label or "(the model itself)",
                site.kind,
                site.class_name,
                shape,
                site.found_by,
            )
        for skip in self.skips:
            yield skip.path or "(the model itself)", skip.kind, "", "", f"skipped: {skip.reason}"

    def save(self, path: str | Path) -> None:
        """Write the survey as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Survey:
        """Read a survey from a JSON file. Raises UsageError where it holds none."""
        data = read_json(path, "a survey")
        try:
            return cls.from_json(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"{path} is not a survey: {type(error).__name__}: {error}. "
                "Make one with find(...).save(path)."
            ) from error

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "inputs": self.inputs,
            "counts": self.counts(),
            "sites": [site.to_json() for site in self.sites],
            "skips": [skip.to_json() for skip in self.skips],
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Survey:
        return cls(
            model=data["model"],
            sites=tuple(Site.from_json(item) for item in data["sites"]),
            skips=tuple(Skip(**item) for item in data["skips"]),
            inputs=data.get("inputs"),
            notes=tuple(data.get("notes", ())),
        )


def renumbered(sites: list[Site]) -> tuple[Site, ...]:
    """The sites with `index` counting from 0 in their order."""
    return tuple(replace(site, index=index) for index, site in enumerate(sites))
