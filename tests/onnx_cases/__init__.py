"""Pairs of a model and an ONNX file, each with the verdict that its planted cause gives it.

known: the pairs of the reference, on which torch's own verifier is right 33 times of 48.
good: correct pairs that a careless check rejects. bad: faults that it lets through. ours: what
`ns.export` writes where torch's exporter writes something wrong.
"""

from __future__ import annotations

from onnx_cases.bad import BAD
from onnx_cases.case import Case, Sides
from onnx_cases.good import GOOD
from onnx_cases.known import KNOWN
from onnx_cases.ours import OURS

CASES: tuple[Case, ...] = (*KNOWN, *GOOD, *BAD, *OURS)

__all__ = ["CASES", "Case", "Sides"]
