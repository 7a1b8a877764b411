"""Is it still the same model? Every answer is measured against a float64 truth."""

from normsurgery.verifying.evidence import Comparison, Drift, Evidence, LeftOut
from normsurgery.verifying.hard_inputs import Case, hard_inputs
from normsurgery.verifying.judge import Verdict, judge
from normsurgery.verifying.promise import measure
from normsurgery.verifying.verifying import verify

__all__ = [
    "Case",
    "Comparison",
    "Drift",
    "Evidence",
    "LeftOut",
    "Verdict",
    "hard_inputs",
    "judge",
    "measure",
    "verify",
]
