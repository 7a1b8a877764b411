"""Faults and equivalent rewrites planted in exported graphs, and what counts as a fault.

What counts is decided here, by a float64 run of both graphs with onnx's own reference operators.
Nothing here knows normsurgery but for `judge`, the one place with tolerances; the graphs are handed
in by the tests.
"""

from __future__ import annotations

from onnx_mutants.drawing import draw
from onnx_mutants.evaluate import evaluate
from onnx_mutants.faults import FAULTS, Mutant
from onnx_mutants.graphs import Graph
from onnx_mutants.rewrites import REWRITES

__all__ = ["FAULTS", "REWRITES", "Graph", "Mutant", "draw", "evaluate"]
