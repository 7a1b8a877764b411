"""Every law of every registered norm. The laws themselves are in normsurgery/testing/."""

from __future__ import annotations

import pytest

from normsurgery import spec
from normsurgery.testing import Check, norm_checks, parametrize_with_norm_checks


@parametrize_with_norm_checks(spec.specs())
def test_law(check: Check) -> None:
    check()


def test_every_norm_meets_every_kind_of_check() -> None:
    """A norm that quietly lost its checks would pass everything."""
    for norm in spec.specs():
        names = {check.name for check in norm_checks(norm)}
        assert {"formula", "gradients", "conversions", "onnx opset 20", "low precision"} <= names
        assert sum(name.startswith("law ") for name in names) == len(spec.Law)


def test_an_expected_failure_must_name_a_check() -> None:
    with pytest.raises(KeyError, match="identity:no such check"):
        parametrize_with_norm_checks(
            [spec.get("identity")], expected_failures={"identity:no such check": "a reason"}
        )


def test_an_expected_failure_is_strict() -> None:
    """One that passes must fail the run, so that the list cannot rot."""
    mark = parametrize_with_norm_checks(
        [spec.get("identity")], expected_failures={"identity:formula": "a reason"}
    )
    marked = [parameter for parameter in mark.args[1] if parameter.marks]
    assert [parameter.id for parameter in marked] == ["identity:formula"]
    assert marked[0].marks[0].kwargs == {"reason": "a reason", "strict": True}
