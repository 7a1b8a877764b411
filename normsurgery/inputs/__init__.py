"""What a model is run on: given, spelled as text, or inferred; and its outputs by name."""

from __future__ import annotations

from normsurgery.inputs.inference import infer
from normsurgery.inputs.outputs import flatten_outputs
from normsurgery.inputs.spelling import parse
from normsurgery.inputs.values import Inputs, as_inputs

__all__ = ["Inputs", "as_inputs", "flatten_outputs", "infer", "parse"]
