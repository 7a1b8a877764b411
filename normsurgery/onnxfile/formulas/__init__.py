"""Float64 formulas of ONNX operators, where ONNX's own reference has none, a poor or a slow one."""

from __future__ import annotations

from onnx.reference.op_run import OpRun

from normsurgery.onnxfile.formulas import flow, layers, norms, pointwise, runtime

OPERATORS: list[type[OpRun]] = [
    *norms.OPERATORS,
    *layers.OPERATORS,
    *pointwise.OPERATORS,
    *flow.OPERATORS,
    *runtime.OPERATORS,
]
