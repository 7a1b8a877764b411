"""Options of conversions: names and types are checked before anything is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normsurgery as ns
from normsurgery.errors import UsageError
from normsurgery.optiontypes import wanted_instead

MODEL = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
IMAGES = (torch.randn(2, 3, 8, 8),)


@pytest.mark.parametrize(
    "to,option,value,wanted",
    [
        ("groupnorm", "num_groups", "abc", "a whole number"),
        ("groupnorm", "num_groups", "", "a whole number"),
        ("groupnorm", "num_groups", 4.0, "a whole number"),
        ("groupnorm", "num_groups", True, "a whole number"),
        ("groupnorm", "affine", "abc", "true or false"),
        ("dyt", "alpha", "x", "a number"),
        ("randomaggregation", "candidates", 3, "a text or a list"),
        ("randomaggregation", "seed", "one", "a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused_in_words(
    to: str, option: str, value: Any, wanted: str
) -> None:
    """`--set num_groups=abc` once failed in a comparison, `affine=abc` was taken for true."""
    with pytest.raises(UsageError, match=f"{to}: {option} must be {wanted}"):
        ns.swap(MODEL, to, options={option: value}, inputs=IMAGES)


@pytest.mark.parametrize("to,option,value", [("groupnorm", "num_groups", 4), ("dyt", "alpha", 1)])
def test_a_value_that_fits_is_taken(to: str, option: str, value: Any) -> None:
    _, report = ns.swap(MODEL, to, options={option: value}, inputs=IMAGES)
    assert report.plan.steps[0].options[option] == value


@pytest.mark.parametrize("name", ns.names())
def test_every_option_of_every_norm_says_its_type(name: str) -> None:
    for conversion in ns.get(name).conversions.values():
        for option in conversion.option_names():
            assert wanted_instead(conversion.build, option, object()), (name, option)
