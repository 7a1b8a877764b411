"""torch's exporter and its helpers talk on loggers and by warnings; here they are silent."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = (
    "torch.onnx._internal.exporter._registration",
    "torch.onnx._internal.exporter._core",
    "torch.onnx._internal.exporter._compat",
    "torch.fx.experimental.symbolic_shapes",
    "torch.export",
    "torch._export",
    "torch._export.non_strict_utils",
    "onnxscript",
    "onnx_ir",
)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, and no log lines below an error, of torch's exporter and of onnxscript."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
