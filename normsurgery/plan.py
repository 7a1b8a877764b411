"""What shall be done to a model, decided before anything is touched: the Plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from normsurgery.errors import UsageError
from normsurgery.htmltable import html_table
from normsurgery.jsonfiles import read_json, write_json
from normsurgery.spec import Fidelity
from normsurgery.steps import Step
from normsurgery.survey import Skip

Init = Literal["copy", "reset"]
INITS = ("copy", "reset")


@dataclass(frozen=True)
class MeasuredCall:
    """A call of the model on which a fold was planned.

    ran: whether the model takes such a call; where it does not, nothing was measured. changed: the
    outputs that it gives beside those of the example and that hold other numbers after the fold.
    """

    name: str
    ran: bool
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Ordered Steps, and a Skip with a reason for everything else that normalises. JSON.

    calls: of a fold, the calls that each step holds for.
    """

    model: str
    steps: tuple[Step, ...]
    skips: tuple[Skip, ...] = ()
    init: Init = "copy"
    versions: Mapping[str, str] = field(default_factory=dict)
    calls: tuple[MeasuredCall, ...] = ()

    @property
    def fidelity(self) -> Fidelity:
        """What the whole plan promises: the least of its steps."""
        return min((step.fidelity for step in self.steps), default=Fidelity.IDENTICAL)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "init": self.init,
            "steps": [step.to_json() for step in self.steps],
            "skips": [asdict(skip) for skip in self.skips],
            "versions": dict(self.versions),
            "calls": [asdict(call) for call in self.calls],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote. Raises UsageError where `data` is not one."""
        try:
            return cls(
                model=data["model"],
                steps=tuple(Step.from_json(item) for item in data["steps"]),
                skips=tuple(Skip(**item) for item in data["skips"]),
                init=checked_init(data["init"]),
                versions=dict(data["versions"]),
                calls=tuple(_call_from_json(item) for item in data.get("calls", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"this is not a plan: {type(error).__name__}: {error}. "
                "Make one with --dry-run, or with plan(...).save(path)."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan, or the plan of a report, from a JSON file."""
        data = read_json(path, "a plan")
        return cls.from_json(data.get("plan", data))

    def __str__(self) -> str:
        lines = [str(step) for step in self.steps]
        lines += [skip_line(skip) for skip in self.skips]
        return "\n".join(lines) or "nothing to do"

    def _repr_html_(self) -> str:
        return html_table(("site", "from", "to", "promise"), self._cells())

    def _cells(self) -> Iterator[tuple[str, str, str, str]]:
        for step in self.steps:
            options = "".join(f" {name}={value}" for name, value in step.options.items())
            promise = step.fidelity.name.lower()
            yield step.site.label, step.site.kind, step.to + options, promise
        for skip in self.skips:
            yield skip.path, skip.kind, "left alone", skip.reason


def _call_from_json(data: Mapping[str, Any]) -> MeasuredCall:
    return MeasuredCall(data["name"], data["ran"], tuple(data["changed"]))


def skip_line(skip: Skip) -> str:
    hint = f". {skip.hint}" if skip.hint else ""
    return f"{skip.path or '(the model itself)'}  {skip.kind or '?'}  skipped: {skip.reason}{hint}"


def checked_init(init: str) -> Init:
    if init not in INITS:
        raise UsageError(f"init is {init!r}; it must be one of: {', '.join(INITS)}.")
    return "copy" if init == "copy" else "reset"


def versions() -> dict[str, str]:
    """The versions a plan was made with."""
    import torch

    from normsurgery import __version__

    return {"normsurgery": __version__, "torch": str(torch.__version__)}
