"""The data flow of one run of a model: what ran, on which values, and where that is written."""

from normsurgery.flow.calls import FrameRecord, FunctionCall, ModuleCall
from normsurgery.flow.flow import Flow
from normsurgery.flow.record import record

__all__ = ["Flow", "FrameRecord", "FunctionCall", "ModuleCall", "record"]
