"""The data flow of one run of a model: what ran, on which values, and where that is written."""

from normsurgery.graph.calls import FrameRecord, FunctionCall, ModuleCall
from normsurgery.graph.flow import Flow
from normsurgery.graph.record import record

__all__ = ["Flow", "FrameRecord", "FunctionCall", "ModuleCall", "record"]
