"""The side that is held to be right: its float64 truth, and what it computes in its own type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from normsurgery.inputs import Inputs, flatten_outputs
from normsurgery.numerics.precision import materialise_eps
from normsurgery.treecopy import tree_copy
from normsurgery.verifying.runners import run_float64, run_native
from normsurgery.verifying.sides import as_module, float_type, parameter_names

if TYPE_CHECKING:
    from normsurgery.onnxfile.float64 import Float64Graph
    from normsurgery.onnxfile.reading import OnnxFile
    from normsurgery.onnxfile.sessions import Session

Tensors = Mapping[str, Tensor]


class Source(Protocol):
    """A model as the reference of a comparison. Inputs are in the type that it takes."""

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the inputs of a call, in order."""

    def truth(self, inputs: Inputs, seed: int) -> Tensors:
        """The outputs in float64, by name. Raises what the model raises, or NotFloat64."""

    def moved(self, inputs: Inputs, seed: int) -> Tensors:
        """The truth, with inputs and weights moved by one rounding of the model's type."""

    def shaken(self, inputs: Inputs, seed: int) -> Tensors:
        """The same, and what every operation gives moved by one rounding too."""

    def native(self, inputs: Inputs, seed: int, runner: str) -> Tensors:
        """The outputs in the model's own type. Raises what the model raises."""


class Candidate(Protocol):
    """The model that is judged."""

    def run(self, inputs: Inputs, seed: int, runner: str) -> Tensors:
        """Outputs by name. Raises what the model or the runtime raises."""

    def missing(self, runner: str) -> str:
        """Why this machine cannot run it there, or ""."""


@dataclass(frozen=True)
class TorchSource:
    """A module in the type of the comparison, run in eval mode.

    rounding: half the distance between two numbers of that type, relative.
    rounded_to: that type, where it is coarser than the model's own.
    everything: caches are outputs too, because the candidate has them.
    """

    module: nn.Module
    order: tuple[str, ...]
    rounding: float
    rounded_to: torch.dtype | None = None
    everything: bool = False

    @property
    def _flatten(self) -> Callable[[Any], dict[str, Tensor]]:
        return all_tensors if self.everything else flatten_outputs

    def truth(self, inputs: Inputs, seed: int) -> Tensors:
        return run_float64(self.module, inputs, "eval", seed=seed, flatten=self._flatten).outputs

    def moved(self, inputs: Inputs, seed: int) -> Tensors:
        return self._off_by_rounding(inputs, seed, shaking=False)

    def shaken(self, inputs: Inputs, seed: int) -> Tensors:
        return self._off_by_rounding(inputs, seed, shaking=True)

    def _off_by_rounding(self, inputs: Inputs, seed: int, *, shaking: bool) -> Tensors:
        return run_float64(
            self.module,
            inputs,
            "eval",
            seed=seed,
            rounding=self.rounding,
            shaking=shaking,
            flatten=self._flatten,
        ).outputs

    def native(self, inputs: Inputs, seed: int, runner: str) -> Tensors:
        device = "cuda" if runner != "cpu" and torch.cuda.is_available() else "cpu"
        return run_native(
            self.module, inputs, "eval", seed=seed, device=device, flatten=self._flatten
        ).outputs


@dataclass(frozen=True)
class TorchCandidate:
    """A torch model that is held against an ONNX file."""

    module: nn.Module

    def run(self, inputs: Inputs, seed: int, runner: str) -> Tensors:
        return run_native(self.module, inputs, "eval", seed=seed, device=runner).outputs

    def missing(self, runner: str) -> str:
        from normsurgery.verifying.runners import missing_runner

        return missing_runner(runner)


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX file as the reference: its meaning in float64, and its own onnxruntime run."""

    file: OnnxFile
    sessions: dict[str, Session] = field(default_factory=dict, repr=False)

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(port.name for port in self.file.inputs)

    @cached_property
    def graph(self) -> Float64Graph:
        from normsurgery.onnxfile.float64 import Float64Graph

        return Float64Graph(self.file.proto)

    def truth(self, inputs: Inputs, seed: int) -> Tensors:
        return self._outputs(self.graph.run(self._feeds(inputs), None))

    def moved(self, inputs: Inputs, seed: int) -> Tensors:
        return self._off_by_rounding(inputs, seed, shaking=False)

    def shaken(self, inputs: Inputs, seed: int) -> Tensors:
        return self._off_by_rounding(inputs, seed, shaking=True)

    def _off_by_rounding(self, inputs: Inputs, seed: int, *, shaking: bool) -> Tensors:
        from normsurgery.verifying.inside import moved_values

        dtype = float_type(self.file) or torch.float32
        values = moved_values(self.graph, self._feeds(inputs), dtype, seed, shaking=shaking)
        return self._outputs(values)

    def native(self, inputs: Inputs, seed: int, runner: str) -> Tensors:
        from normsurgery.onnxfile.sessions import Session

        if runner not in self.sessions:
            self.sessions[runner] = Session(self.file, level="off", runner=runner)
        return self.sessions[runner].run(self._feeds(inputs))

    def _feeds(self, inputs: Inputs) -> dict[str, Any]:
        return fed(self.file, inputs, self.order)

    def _outputs(self, values: Tensors) -> Tensors:
        return {port.name: values[port.name] for port in self.file.outputs}


@dataclass(frozen=True)
class OnnxCandidate:
    """An ONNX model, run by onnxruntime at one optimisation level."""

    file: OnnxFile
    order: tuple[str, ...]
    level: str = "all"
    sessions: dict[str, Session] = field(default_factory=dict, repr=False)

    def run(self, inputs: Inputs, seed: int, runner: str) -> Tensors:
        return self.session(runner).run(fed(self.file, inputs, self.order))

    def session(self, runner: str) -> Session:
        """Raises CannotRun."""
        from normsurgery.onnxfile.sessions import Session

        if runner not in self.sessions:
            self.sessions[runner] = Session(self.file, level=self.level, runner=runner)
        return self.sessions[runner]

    def missing(self, runner: str) -> str:
        from normsurgery.onnxfile.sessions import missing_provider

        return missing_provider(runner)


def torch_source(model: nn.Module | ExportedProgram, dtype: torch.dtype | None) -> TorchSource:
    """The model with its weights rounded to `dtype` where that is coarser than its own."""
    module, order = as_module(model), parameter_names(model)
    own = float_type(model) or torch.float32
    if dtype is None or torch.finfo(dtype).eps <= torch.finfo(own).eps:
        return TorchSource(module, order, torch.finfo(own).eps / 2)
    rounded = _rounded(module, dtype)
    return TorchSource(rounded, order, torch.finfo(dtype).eps / 2, dtype)


def fed(file: OnnxFile, inputs: Inputs, order: tuple[str, ...]) -> dict[str, Any]:
    """The arrays that a graph takes. Raises DoesNotFit, a UsageError."""
    from normsurgery.onnxfile.feeding import feeds

    return feeds(file, as_taken(file, inputs), order)


def as_taken(file: OnnxFile, inputs: Inputs) -> Inputs:
    """The inputs in the one floating type that the graph takes, if it takes one: a graph that
    computes in fp16 may take and give fp32."""
    types = {port.dtype for port in file.inputs if port.dtype.is_floating_point}
    return inputs.to(dtype=types.pop()) if len(types) == 1 else inputs


def _rounded(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the module in another floating type, with the eps it had in its own."""
    copied = tree_copy(module, clone=True)
    materialise_eps(copied)
    return copied.to(dtype)


def all_tensors(output: Any) -> dict[str, Tensor]:
    """Every tensor of an output, caches included, in the order in which they are exported."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return {str(index): tensor for index, tensor in enumerate(tensors)}
