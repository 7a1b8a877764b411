"""Float64 that means float64: references run with every cast to a lower precision lifted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from normsurgery.errors import NormsurgeryError
from normsurgery.treecopy import tree_copy

LOWER_FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})


# Operations that fill a tensor with random numbers and take no other tensor.
_DRAWS = frozenset(
    f"aten::{name}"
    for name in (
        "rand",
        "randn",
        "rand_like",
        "randn_like",
        "uniform_",
        "normal_",
        "exponential_",
        "log_normal_",
        "cauchy_",
        "geometric_",
    )
)


class NotFloat64(NormsurgeryError):
    """An operation gave a floating result that is not float64 where only float64 is truth."""


class _Lifted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Turns every lower floating type, of a tensor or of a dtype argument, into float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _DRAWS:
            return _drawn(func, args, kwargs)
        if not func._schema.is_mutable:
            args, kwargs = tree_map(_lift, args), tree_map(_lift, kwargs)
        result = func(*args, **kwargs)
        if _hands_on(func):
            result = tree_map(_lift_tensor, result)
        tree_map(lambda value: _check(value, func), result)
        return result


def _drawn(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The numbers that a float32 model draws from the same random state: float64 draws differ."""
    if func._schema.is_mutable:
        return args[0].copy_(func(args[0].float(), *args[1:], **kwargs))
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        args = (args[0].float(), *args[1:])
    wanted = kwargs.get("dtype")
    if wanted is None or wanted.is_floating_point:
        kwargs = {**kwargs, "dtype": torch.float32}
    return _lift_tensor(func(*args, **kwargs))


def _hands_on(func: Any) -> bool:
    """Operations by which a tensor made outside, of any type, comes into the run."""
    return str(func).startswith(("aten.lift", "aten.detach", "aten.alias"))


def _lift(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value in LOWER_FLOATS:
        return torch.float64
    return _lift_tensor(value)


def _lift_tensor(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in LOWER_FLOATS else value


def _check(value: Any, func: Any) -> None:
    if isinstance(value, Tensor) and value.dtype in LOWER_FLOATS:
        raise NotFloat64(f"{func} gave {value.dtype} in a float64 reference run")


@contextmanager
def lifted(own: torch.dtype | None = None) -> Iterator[None]:
    """Run float64 modules truly in float64.

    Inside, `.float()`, `.to(torch.bfloat16)` and every `dtype=` of a lower floating type give
    float64 instead; a tensor of a lower type that is read is read exactly; an operation that still
    gives a lower floating result raises NotFloat64. Random numbers are those of a float32 run. The
    default dtype is float64 meanwhile.

    own: the type that the model has outside. `torch.finfo(x.dtype)`, by which a forward fills masks
    and guards divisions, then tells the limits of that type: they are constants of the model.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Lifted(), _limits_of(own):  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def _limits_of(own: torch.dtype | None) -> Iterator[None]:
    """Inside, torch.finfo of float64 is that of `own`."""
    known = torch.finfo

    def finfo(dtype: torch.dtype | None = None) -> Any:
        asked = torch.get_default_dtype() if dtype is None else dtype
        return known(own if asked is torch.float64 and own is not None else asked)

    if own in LOWER_FLOATS:
        torch.finfo = finfo  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.finfo = known  # type: ignore[misc]


def own_type(*tensors: Tensor) -> torch.dtype:
    """The floating type with the fewest digits among tensors; float32 where there is none."""
    floating = [t.dtype for t in tensors if t.is_floating_point() and t.element_size() > 1]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def materialise_eps(model: nn.Module) -> None:
    """Write out, in place, every eps that depends on the dtype the model has now.

    `nn.RMSNorm(eps=None)` takes the machine epsilon of the type it computes in, which would change
    with `.double()`: 1.19e-7 for fp32, fp16 and bf16, 2.2e-16 for fp64.
    """
    for module in model.modules():
        if isinstance(module, nn.RMSNorm) and module.eps is None:
            weight = module.weight
            double = weight is not None and weight.dtype == torch.float64
            module.eps = torch.finfo(torch.float64 if double else torch.float32).eps


def float64_copy(model: nn.Module) -> nn.Module:
    """A float64 clone of `model` with exactly its (rounded) weights and its materialised eps."""
    copied = tree_copy(model, clone=True)
    materialise_eps(copied)
    return copied.double()
