"""The models whose exports get faults: three architectures, a stack of norms, one in half."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers_zoo import models

from onnx_mutants.evaluate import Arrays

NORMS_OF_STACK = 50
LOUD = 300.0  # squares of such values are infinite in half precision


class Stack(nn.Module):
    """Fifty norms, each in front of a small linear, around a residual. Two outputs of one shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(NORMS_OF_STACK))
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(NORMS_OF_STACK))
        with torch.no_grad():
            for norm in self.norms:
                norm.weight.uniform_(0.3, 0.9)  # type: ignore[operator]
                norm.bias.uniform_(0.2, 0.8)  # type: ignore[operator]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        total = x
        for norm, linear in zip(self.norms, self.linears, strict=True):
            total = total + 0.1 * linear(norm(x))
            x = 0.5 * total
        return {"total": total, "last": x}


@dataclass(frozen=True)
class Source:
    """build: the model, fresh. inputs: of one call. axes: dynamic ones, as `ns.export` takes them.
    suite: the plain inputs on which a fault must show, by input name."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    axes: Mapping[str, Mapping[int, str]]
    suite: Callable[[], list[Arrays]]

    def program(self) -> ExportedProgram:
        """The model as torch exports it, with the same dynamic axes."""
        dims = {name: Dim.DYNAMIC for axes in self.axes.values() for name in axes.values()}
        shapes = {k: {i: dims[name] for i, name in axes.items()} for k, axes in self.axes.items()}
        with torch.no_grad():
            return torch.export.export(
                self.build(), (), self.inputs(), dynamic_shapes=shapes, strict=False
            )


@cache
def sources() -> dict[str, Source]:
    """All of them by name."""
    text = {"input_ids": {0: "batch", 1: "sequence"}}
    zoo = models()
    return {
        "resnet": Source(
            zoo["resnet"].build, zoo["resnet"].inputs, {"pixel_values": {0: "batch"}}, _images
        ),
        "gpt2": Source(zoo["gpt2"].build, zoo["gpt2"].inputs, text, _ids),
        "llama": Source(zoo["llama"].build, zoo["llama"].inputs, text, _ids),
        "stack": Source(Stack, _rows, {"x": {0: "batch"}}, lambda: _floats("x", (8,))),
        "loud llama": Source(_loud, zoo["llama"].inputs, text, _ids),
    }


def _loud() -> nn.Module:
    """A Llama with activations as large as those of large ones, in half precision."""
    model = models()["llama"].build()
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    with torch.no_grad():
        embedding.mul_(LOUD / embedding.std())
    return model.half()


def _rows() -> dict[str, Tensor]:
    return {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(6))}


def _images() -> list[Arrays]:
    return _floats("pixel_values", (3, 32, 32))


def _floats(name: str, shape: tuple[int, ...]) -> list[Arrays]:
    random = np.random.default_rng(7)
    values = [random.standard_normal((2, *shape)) for _ in range(3)]
    made = [values[0], 3e-3 * values[1], values[2] + 30]
    return [{name: value.astype(np.float32)} for value in made]


def _ids() -> list[Arrays]:
    random = np.random.default_rng(8)
    return [{"input_ids": random.integers(0, 97, shape)} for shape in ((2, 7), (3, 4))]
