"""Public tests for norms: what every registered norm must pass, a third party's as well.

    from normsurgery.testing import parametrize_with_norm_checks

    @parametrize_with_norm_checks([MY_NORM])
    def test_my_norm(check):
        check()

Every check raises AssertionError that says what was expected and what was measured. The only
tolerances are those of `normsurgery.verifying.judge`. A conversion's options are the norm's own, so
those are tested one by one: `check_conversion(NORM, source_of(...), random_input(shape), options)`.
"""

from normsurgery.testing.cases import random_input
from normsurgery.testing.checks import Check, norm_checks, parametrize_with_norm_checks
from normsurgery.testing.conversions import check_conversion, source_of

__all__ = [
    "Check",
    "check_conversion",
    "norm_checks",
    "parametrize_with_norm_checks",
    "random_input",
    "source_of",
]
