"""Running somebody's model without moving the random numbers the caller will draw."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Leave Python's, numpy's and torch's generators as they were, on the model's devices too."""
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
