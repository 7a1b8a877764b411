"""blame: the first operation of an ONNX graph that does not compute what its source computes."""

from normsurgery.verify.blaming.blaming import blame
from normsurgery.verify.blaming.steps import BlamedStep, StepsBlame

__all__ = ["BlamedStep", "StepsBlame", "blame"]
