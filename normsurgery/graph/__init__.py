"""The data flow of one run of a model: what ran, on which values, and where that is written."""

from normsurgery.graph.record import record
from normsurgery.graph.recording import (
    FrameRecord,
    FunctionCall,
    ModuleCall,
    Op,
    Recording,
    Ref,
    Value,
)

__all__ = [
    "FrameRecord",
    "FunctionCall",
    "ModuleCall",
    "Op",
    "Recording",
    "Ref",
    "Value",
    "record",
]
