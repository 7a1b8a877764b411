"""Norms that are calls with the very same tensors and settings, at several places of the forwards.

`F.batch_norm(conv(x), mean, var, ...)`, written twice around one convolution, is two norms for
`find`. Neither can be folded alone, for the convolution serves both; together they can, as one
module that is called twice can. The first of them leads: its Step has the edits, and those of the
others have none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from normsurgery.fold.ground import Ground
from normsurgery.plan import Step
from normsurgery.survey import Site

INTO_NEIGHBOURS = ("into producer", "into consumers")


def twins(sites: Sequence[Site]) -> list[list[Site]]:
    """The groups of two and more sites that are one norm, called at several places."""
    groups: list[list[Site]] = []
    for site in sites:
        if site.form == "module" or not site.parameters:
            continue
        group = next((group for group in groups if _are_one(group[0], site)), None)
        if group is None:
            groups.append([site])
        else:
            group.append(site)
    return [group for group in groups if len(group) > 1]


def _are_one(first: Site, second: Site) -> bool:
    return (
        first.kind == second.kind
        and first.parameters == second.parameters
        and first.settings == second.settings
    )


def followers(lead: Step, steps: Sequence[Step]) -> list[Site]:
    """The sites that were decided together with that of `lead`."""
    if not lead.edits:
        return []
    return [
        step.site
        for step in steps
        if is_follower(step) and step.rule == lead.rule and _are_one(lead.site, step.site)
    ]


def is_follower(step: Step) -> bool:
    """Whether another step has the edits of this one: alone, such a rule always makes some."""
    return step.rule in INTO_NEIGHBOURS and not step.edits


@contextmanager
def as_one(ground: Ground, lead: Site, others: Collection[Site]) -> Iterator[None]:
    """The runs of the others count as runs of `lead` as well, within."""
    own = ground.runs[lead.index]
    ground.runs[lead.index] = own + tuple(r for site in others for r in ground.runs[site.index])
    try:
        yield
    finally:
        ground.runs[lead.index] = own
