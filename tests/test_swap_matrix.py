"""Every model of the zoo swapped to every registered norm: the committed table, and why it is so.

`python tests/swap_matrix.py` writes the table anew.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import pytest
from swap_matrix import TABLE, Outcome, Swapper, reason_of
from torch import nn
from transformers_zoo import models

import normsurgery as ns

ROWS = models()
CELLS: dict[str, dict[str, dict[str, Any]]] = json.loads(TABLE.read_text())

CONVOLUTIONAL = ("resnet", "bit", "efficientnet")
EVERYWHERE_ON_TRANSFORMERS = ("layernorm", "rmsnorm", "dyt", "affine")
EVERYWHERE_ON_CONVOLUTIONS = ("groupnorm", "layernorm2d", "randomaggregation", "evonorm-s0")
NEED_STATISTICS = ("layernorm", "layernorm2d", "layernorm_chw", "instancenorm", "groupnorm")
ON_LAYERS = ("neuronwise", "weightstandardization")


Predicate = Callable[[nn.Module, ns.Site, str], bool]


def few_elements(model: nn.Module, site: ns.Site, target: str) -> bool:
    """A statistic over at most three elements, as the shapes alone say."""
    assert site.shape is not None
    features = int(site.settings["features"])
    space = prod(site.shape[2:]) if site.settings["channel_axis"] == 1 else 1
    sample = features * space
    statistics = {"layernorm_chw": sample, "groupnorm": sample, "instancenorm": space}
    return statistics.get(target, features) <= 3


def mixes_positions(model: nn.Module, site: ns.Site, target: str) -> bool:
    """Channels are last, and the norm asked for takes statistics over the sample."""
    return site.settings["channel_axis"] == -1 and target in ("layernorm_chw", "instancenorm")


def few_weights(model: nn.Module, site: ns.Site, target: str) -> bool:
    weight = model.get_submodule(site.path).weight
    return weight.numel() // weight.shape[0] <= 3


def read_by_a_parent(model: nn.Module, site: ns.Site, target: str) -> bool:
    """The source of a class above spells an attribute of the module out."""
    for path in site.paths:
        parent, _, name = path.rpartition(".")
        source = inspect.getsource(type(model.get_submodule(parent)))
        if re.search(rf"self\.{name}\.\w+", source):
            return True
    return False


def of_a_weight(model: nn.Module, site: ns.Site, target: str) -> bool:
    return site.attach == "weight"


def given_or_asked_for_more(model: nn.Module, site: ns.Site, target: str) -> bool:
    """One of the two takes a further input (a gate) that the other is not given."""
    kinds = (site.kind, target)
    return any(ns.get(kind).inputs for kind in kinds) and site.kind != target


CONFIRMED_BY: dict[str, Predicate] = {
    "few elements": few_elements,
    "mixes positions": mixes_positions,
    "few weights": few_weights,
    "read elsewhere": read_by_a_parent,
    "read attribute missing": read_by_a_parent,
    "a weight's norm": of_a_weight,
    "no conversion": given_or_asked_for_more,
}
DECIDED_BY_SHAPE = ("few elements", "mixes positions")


@pytest.fixture(scope="module", params=list(ROWS))
def swapper(request: pytest.FixtureRequest) -> Iterator[tuple[str, Swapper]]:
    yield request.param, Swapper(ROWS[request.param])


@pytest.mark.parametrize("target", ns.names())
def test_a_swap_works_or_is_refused_as_the_table_says(
    swapper: tuple[str, Swapper], target: str
) -> None:
    """A swapped model runs, every new parameter has a finite non-zero gradient, a step moves it,
    and it generates where it could; a refusal gives a reason of the closed list."""
    name, swaps = swapper
    outcome = swaps.outcome(target)
    assert outcome.wrong == []
    assert outcome.to_json() == CELLS[name][target]
    _confirm(outcome, swaps, target)


def _confirm(outcome: Outcome, swaps: Swapper, target: str) -> None:
    """Every refusal is right by a predicate of this file, and what a shape forbids is refused."""
    survey = swaps.survey(ns.get(target).attach)
    known = [skip.reason for skip in survey.skips]
    reasons = {s.path: reason_of(s.reason) for s in outcome.skips if s.reason not in known}
    for site in survey.sites:
        refused = {reasons[site.label]} if site.label in reasons else set()
        if outcome.swapped == 0:  # the error names the reasons, not which site has which
            refused = set(outcome.refused)
        if refused:
            confirmed = [CONFIRMED_BY[reason](swaps.model, site, target) for reason in refused]
            assert any(confirmed), (site.label, refused)
        elif site.kind != target and site.attach == "norm":
            forbidden = [r for r in DECIDED_BY_SHAPE if CONFIRMED_BY[r](swaps.model, site, target)]
            assert not forbidden or target not in NEED_STATISTICS, (site.label, forbidden)


def test_the_table_is_whole() -> None:
    assert set(CELLS) == set(ROWS)
    assert all(set(cells) == set(ns.names()) for cells in CELLS.values())
    reasons = {
        reason for row in CELLS.values() for cell in row.values() for reason in cell["refused"]
    }
    assert not [reason for reason in reasons if reason.startswith("UNKNOWN")]


# A gated norm becomes no norm without a gate.
LEFT_ANYWHERE = {"a weight's norm", "inside a function", "no conversion"}
LEFT_IN = {
    "levit": {"few elements"},  # its small configuration has a site of two channels
    "mamba2": {"read elsewhere", "read attribute missing"},  # the fused path reads a norm's eps
}


@pytest.mark.parametrize("name", ROWS)
def test_what_must_work_works(name: str) -> None:
    """Read from the table, which the other test holds to what happens."""
    cells = CELLS[name]
    wanted = EVERYWHERE_ON_CONVOLUTIONS if name in CONVOLUTIONAL else EVERYWHERE_ON_TRANSFORMERS
    for target in wanted:
        assert cells[target]["swapped"] > 0, target
        left = set(cells[target]["refused"]) - LEFT_ANYWHERE - LEFT_IN.get(name, set())
        assert not left, (target, left)
    for target in ON_LAYERS:
        assert cells[target]["swapped"] > 0, target
