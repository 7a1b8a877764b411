"""What is printed of an ONNX graph that was verified: its stages, its inside, who is to blame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .tables import table

if TYPE_CHECKING:
    from normsurgery.verifying import Evidence


def shown(measured: Evidence) -> Iterator[str]:
    """The failures that the tables below tell, as `Evidence.failures` words them."""
    yield from (f"stage {stage}" for stage in measured.stages)
    yield from (f"value {value}" for value in measured.inner)


def inside(measured: Evidence) -> None:
    """Print the stages, what was compared inside, the values that failed, and the blame."""
    from normsurgery.reporting import content

    if measured.stages:
        _undecided(measured)
        print()
        stages = content.stage_table(measured)
        table(stages.headers, stages.rows)
    if measured.coverage is not None:
        print(measured.coverage)
    failed = content.failed_inside(measured)
    if failed:
        count = sum(value.verdict.passed is False for value in measured.inner)
        print()
        print(f"{count} values inside failed" + (", the first:" if count > len(failed) else ":"))
        values = content.inner_table(failed)
        table(values.headers, values.rows)
    if measured.blamed is not None:
        print()
        print("the first operation that diverges")
        pairs(content.blame_rows(measured.blamed))


def _undecided(measured: Evidence) -> None:
    """On which inputs nothing is known, which the table of the worst does not show."""
    open_cases = (c.case for c in measured.comparisons if c.verdict.passed is None)
    named = ", ".join(dict.fromkeys(open_cases))
    if named:
        print(f"undecided on {named}: torch itself is too far from the truth there")


def pairs(rows: Iterable[tuple[str, str]]) -> None:
    """A name and a text in each line, the texts below one another."""
    told = list(rows)
    width = max((len(name) for name, _ in told), default=0)
    for name, text in told:
        print(f"  {name.ljust(width)}  {text}")
