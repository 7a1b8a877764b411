"""Ways to run a model: float64 truth, native torch on the CPU and on CUDA.

Every run works on a clone of the model and of its inputs, in a mode of its own, from the same
random state; nothing of the user's is touched.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normsurgery.errors import UnknownName
from normsurgery.inputs import Inputs, flatten_outputs
from normsurgery.numerics.precision import NotFloat64, float64_copy, lifted, own_type
from normsurgery.treecopy import tree_copy
from normsurgery.verifying.evidence import Mode
from normsurgery.verifying.shaking import moved, shaken

RUNNERS = ("cpu", "cuda", "tensorrt")
Recording = Literal["plain", "grad", "backward"]
Flatten = Callable[[Any], Mapping[str, Tensor]]
FLOAT32_ROUNDING = torch.finfo(torch.float32).eps / 2


@dataclass(frozen=True)
class Run:
    """What one run gave: tensors by name; on the CPU, detached.

    statistics: every buffer after the run, under each of its names. gradients: of the inputs
    ("input 0") and of the parameters under each name (zeros where the output does not depend on
    one), or empty for a run without gradients.
    """

    outputs: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)

    def is_finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self.outputs.values() if _is_inexact(t))


def runner_names(runners: str | Sequence[str]) -> tuple[str, ...]:
    """Runners as a caller may give them: one name, names with commas between, or several."""
    if isinstance(runners, str):
        runners = [name.strip() for name in runners.split(",")]
    return tuple(name for name in runners if name)


def missing_runner(runner: str) -> str:
    """Why this machine cannot run a torch model there, or "". Raises UnknownName."""
    if runner not in RUNNERS:
        raise UnknownName("runner", runner, RUNNERS)
    if runner == "cuda" and not torch.cuda.is_available():
        return "this machine has no CUDA device that torch can use"
    if runner == "tensorrt":
        return "TensorRT runs ONNX models; a torch model runs on cpu and cuda"
    return ""


def run_native(
    model: nn.Module,
    inputs: Inputs,
    mode: Mode,
    *,
    seed: int,
    device: str = "cpu",
    recording: Recording = "plain",
    flatten: Flatten = flatten_outputs,
) -> Run:
    """One run of a clone of `model`, in its own dtype, on `device`.

    recording: "plain" is under no_grad with no mode and no hook active; "grad" builds the autograd
        graph; "backward" runs backward as well.
    flatten: what the model returns -> tensors by name.
    """
    clone = tree_copy(model, clone=True).to(device)
    with full_precision():
        return _run(clone, fresh(inputs, device), mode, seed, recording, flatten)


def run_float64(
    model: nn.Module,
    inputs: Inputs,
    mode: Mode,
    *,
    seed: int,
    recording: Recording = "plain",
    rounding: float = 0.0,
    shaking: bool = False,
    flatten: Flatten = flatten_outputs,
) -> Run:
    """The truth: `model` with exactly its rounded weights, computed in float64 (complex128)
    throughout.

    rounding: move every floating input, parameter and buffer by so much, relatively, up or down at
        random (FLOAT32_ROUNDING: one rounding of float32), which shows how well conditioned the
        truth is.
    shaking: move what every operation gives by so much too, as any computation in that type does.

    Raises NotFloat64 where an operation insists on a lower type, and whatever the model raises.
    """
    clone = _wide_complex(float64_copy(model).cpu())
    use_plain_experts(clone)
    given = _mapped_floats(fresh(inputs, "cpu"), _wide)
    if rounding:
        generator = torch.Generator().manual_seed(seed)
        given = _mapped_floats(given, lambda tensor: moved(tensor, rounding, generator))
        with torch.no_grad():
            for tensor in (*clone.parameters(), *clone.buffers()):
                if _is_inexact(tensor):
                    tensor.copy_(moved(tensor, rounding, generator))
    own = own_type(*(tuple(model.parameters()) or _floats_of(inputs)))
    with lifted(own), shaken(rounding, seed) if shaking else nullcontext():
        run = _run(clone, given, mode, seed, recording, flatten)
    _require_wide(run)
    return run


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor.double()


def _wide_complex(model: nn.Module) -> nn.Module:
    """The module with complex128 for complex parameters and buffers, which `double` leaves."""
    if not any(tensor.is_complex() for tensor in (*model.parameters(), *model.buffers())):
        return model
    widened: nn.Module = model._apply(  # type: ignore[no-untyped-call]
        lambda tensor: _wide(tensor) if tensor.is_complex() else tensor
    )
    return widened


def _require_wide(run: Run) -> None:
    """Raise NotFloat64 where a model casts to complex64 itself, which `lifted` does not lift."""
    for name, tensor in run.outputs.items():
        if tensor.is_complex() and tensor.dtype is not torch.complex128:
            raise NotFloat64(f"output {name} is {tensor.dtype} in a float64 reference run")


def _floats_of(inputs: Inputs) -> tuple[Tensor, ...]:
    leaves = tree_leaves((inputs.args, dict(inputs.kwargs)))
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def fresh(inputs: Inputs, device: str | torch.device | None = None) -> Inputs:
    """The inputs with every tensor cloned (a model may work in place), on `device` if given."""

    def clone(value: Any) -> Any:
        return value.detach().clone().to(device) if isinstance(value, Tensor) else value

    args, kwargs = tree_map(clone, (inputs.args, dict(inputs.kwargs)))
    return Inputs(args, kwargs, inputs.spelling)


def use_plain_experts(model: nn.Module) -> None:
    """Mixtures of experts in transformers default to grouped kernels that have no float64."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None and hasattr(getattr(model, "config", None), "_experts_implementation"):
        choose("eager")


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Raises NotImplementedError for the train mode of a model that has one mode only."""
    try:
        model.train(mode == "train")
    except NotImplementedError:  # an exported program is traced in eval mode, and stays there
        if mode == "train":
            raise


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, CUDA multiplies float32 as float32: by default convolutions round to 11 bits first
    (TF32), which is another precision than the one that is compared."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        # A plain assignment is forbidden after torch.backends.disable_global_flags().
        with cudnn.flags(
            enabled=cudnn.enabled,
            benchmark=cudnn.benchmark,
            benchmark_limit=cudnn.benchmark_limit,
            deterministic=cudnn.deterministic,
            allow_tf32=False,
        ):
            yield
    finally:
        matmul.allow_tf32 = kept


@contextmanager
def same_randomness(seed: int) -> Iterator[None]:
    """torch, numpy and random all start from `seed`, and are put back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _run(
    model: nn.Module,
    inputs: Inputs,
    mode: Mode,
    seed: int,
    recording: Recording,
    flatten: Flatten = flatten_outputs,
) -> Run:
    set_mode(model, mode)
    leaves: list[Tensor] = []
    grad = torch.set_grad_enabled(recording != "plain")
    with same_randomness(seed), grad, patch.object(torch, "cond", _plain_cond):
        given = _with_gradients(inputs, leaves) if recording == "backward" else inputs
        outputs = flatten(given.call(model))
        found = {}
        if recording == "backward":
            found = _gradients(model, leaves, list(outputs.values()), seed)
    statistics = {name: _kept(b) for name, b in model.named_buffers(remove_duplicate=False)}
    return Run({name: _kept(t) for name, t in outputs.items()}, statistics, found)


def _plain_cond(
    pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()
) -> Any:
    """What torch.cond computes, without the compiler that it calls: that takes no float64 run, and
    fails for the rest of the process where it met one."""
    return (true_fn if bool(pred) else false_fn)(*operands)


def _with_gradients(inputs: Inputs, leaves: list[Tensor]) -> Inputs:
    """Floating inputs as leaves; the model gets a clone, so that it may work in place."""

    def leaf(value: Tensor) -> Tensor:
        if value.is_complex():  # gradients of complex numbers are not judged
            return value
        leaves.append(value.detach().requires_grad_(True))
        return leaves[-1].clone()

    return _mapped_floats(inputs, leaf)


def _gradients(
    model: nn.Module, leaves: Sequence[Tensor], outputs: Sequence[Tensor], seed: int
) -> dict[str, Tensor]:
    """d(sum of outputs times fixed cotangents)/d(every input and every parameter)."""
    wanted = {f"input {index}": leaf for index, leaf in enumerate(leaves)}
    parameters = model.named_parameters(remove_duplicate=False)
    wanted |= {name: p for name, p in parameters if p.requires_grad}
    ends = [t for t in outputs if _is_floating(t) and t.requires_grad]
    if not ends or not wanted:
        return {}
    cotangents = [_cotangent(t, seed + index) for index, t in enumerate(ends)]
    values = torch.autograd.grad(ends, list(wanted.values()), cotangents, materialize_grads=True)
    return {name: _kept(gradient) for name, gradient in zip(wanted, values, strict=True)}


def _cotangent(output: Tensor, seed: int) -> Tensor:
    """Multiples of 1/8 in (-1, 1): the same numbers in every dtype and on every device."""
    generator = torch.Generator().manual_seed(seed)
    eighths = torch.randint(-7, 8, output.shape, generator=generator)
    return eighths.to(device=output.device, dtype=output.dtype) / 8


def _mapped_floats(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    def one(value: Any) -> Any:
        return change(value) if _is_inexact(value) else value

    args, kwargs = tree_map(one, (inputs.args, dict(inputs.kwargs)))
    return Inputs(args, kwargs)


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_inexact(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
