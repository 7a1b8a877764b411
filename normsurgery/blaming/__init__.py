"""blame: the first operation of an ONNX graph that does not compute what its source computes."""

from normsurgery.blaming.blaming import blame
from normsurgery.blaming.steps import BlamedStep, StepsBlame

__all__ = ["BlamedStep", "StepsBlame", "blame"]
