"""Is it still the same model? Every answer is measured against a float64 truth."""

from normsurgery.verify.evidence import Comparison, Drift, Evidence, LeftOut
from normsurgery.verify.hard_inputs import Case, hard_inputs
from normsurgery.verify.judge import Verdict, judge
from normsurgery.verify.promise import measure
from normsurgery.verify.verifying import verify

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
