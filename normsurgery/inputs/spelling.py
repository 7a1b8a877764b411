"""Inputs as text: `1x3x224x224`, `int64[1,16]<30522`, `mask=bool[1,16]`, `use_cache=False`, a file.

The values are random and the same every time: the n-th tensor is drawn from its own seed, n.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from normsurgery.artefacts.pickles import load_tensors
from normsurgery.errors import CannotRead, UsageError
from normsurgery.inputs.values import Inputs

_NAMED = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.+)", re.DOTALL)
_SIZES = re.compile(r"\d+(x\d+)+")
_TYPED = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<sizes>[\d,\s]*)\](<(?P<bound>\d+))?")
_CONSTANTS = {"true": True, "false": False, "none": None}
_DEFAULT_BOUND = 10  # for token ids without a bound: few vocabularies are smaller
_FILES = (".pt", ".pth", ".npy", ".safetensors")
_FORMS = (
    "Known forms: 1x3x224x224, float16[2,3], int64[1,16]<30522, bool[1,16], name=FORM, "
    "name=True, or a file (.pt, .npy, .safetensors)."
)


def parse(texts: Sequence[str]) -> Inputs:
    """The inputs that `--input` texts describe, in their order.

    A form without `name=` is the next positional argument. Floating values are from N(0, 1),
    integers below their bound, booleans even odds. A `.safetensors` file, or a `.pt` file that
    holds a dict, gives keyword arguments by its names. Raises UsageError, CannotRead.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for position, text in enumerate(texts):
        named = _NAMED.fullmatch(text.strip())
        value = _value(named["value"] if named else text.strip(), position, bool(named))
        if named:
            _add(kwargs, named["name"], value)
        elif isinstance(value, dict):
            for name, item in value.items():
                _add(kwargs, name, item)
        else:
            args.append(value)
    return Inputs(tuple(args), kwargs, tuple(texts))


def _add(kwargs: dict[str, Any], name: str, value: Any) -> None:
    if name in kwargs:
        raise UsageError(f"the input {name!r} is given twice.")
    kwargs[name] = value


def _value(text: str, position: int, named: bool) -> Any:
    if _SIZES.fullmatch(text):
        return _random(torch.float32, [int(size) for size in text.split("x")], None, position)
    typed = _TYPED.fullmatch(text)
    if typed:
        return _typed(text, typed, position)
    if Path(text).suffix in _FILES:
        return _read(Path(text))
    if named and text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    if named:
        return _number(text)
    raise UsageError(f"cannot read the input {text!r}. {_FORMS}")


def _typed(text: str, typed: re.Match[str], position: int) -> Tensor:
    dtype = getattr(torch, typed["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"{typed['dtype']!r} in the input {text!r} is no dtype of torch. {_FORMS}")
    sizes = [int(size) for size in typed["sizes"].split(",") if size.strip()]
    bound = int(typed["bound"]) if typed["bound"] else None
    if bound is not None and (dtype.is_floating_point or dtype.is_complex or bound < 1):
        raise UsageError(f"the bound in {text!r} needs an integer dtype and must be 1 or more.")
    return _random(dtype, sizes, bound, position)


def _random(dtype: torch.dtype, sizes: list[int], bound: int | None, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.randn(sizes, dtype=dtype, generator=generator)
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)
    highest = 2 if dtype == torch.bool else bound or _DEFAULT_BOUND
    return torch.randint(highest, sizes, generator=generator).to(dtype)


def _number(text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise UsageError(f"cannot read the input value {text!r}. {_FORMS}")


def _read(path: Path) -> Any:
    """A tensor, or tensors by name, from a file; no code in it is run."""
    if not path.is_file():
        raise CannotRead(f"{path}: there is no such file of inputs.")
    if path.suffix == ".npy":
        return _read_array(path)
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CannotRead(f"{path}: not a readable safetensors file ({error}).") from None
    content = load_tensors(path)
    if isinstance(content, Tensor) or (isinstance(content, dict) and _are_tensors(content)):
        return content
    raise CannotRead(f"{path}: holds no tensor and no dict of tensors, so it is no input.")


def _are_tensors(content: dict[Any, Any]) -> bool:
    return bool(content) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )


def _read_array(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (ValueError, TypeError, OSError) as error:
        raise CannotRead(f"{path}: not a readable array of numbers ({error}).") from None


def spell(value: Any) -> str:
    """The text for a value: shape and dtype of a tensor (not its numbers), else the value.

    A list or dict, for which there is no form, is told by its type in angle brackets.
    """
    if isinstance(value, (list, tuple, dict)):
        return f"<{type(value).__name__}>"
    if not isinstance(value, Tensor):
        return str(value)
    dtype = str(value.dtype).removeprefix("torch.")
    text = f"{dtype}[{','.join(map(str, value.shape))}]"
    if value.dtype == torch.bool or value.dtype.is_floating_point or value.dtype.is_complex:
        return text
    highest = int(value.max()) if value.numel() and not value.is_meta else 0
    return f"{text}<{max(highest, 0) + 1}"
