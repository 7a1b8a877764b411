"""Which value of a graph is which value of its source: by name and value, else by value alone.

Names alone prove nothing (an optimizer hands them on to other values), and where a graph was
written by another exporter there are none in common. Equal is what `judge` lets pass without any
native error: 8 ulp of the value's type, so that constants rounded to that type may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from normsurgery.verifying.differences import ulp
from normsurgery.verifying.judge import FREE_ULPS, judge

_SAMPLE = 32  # elements that a first look compares


def correspond(
    graph: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, str]:
    """Name in the graph -> name in the source of a value that is the same.

    Args:
        graph, source: float64 values (integers and booleans as they are) of one and the same input.
        dtypes: type that each value has in the graph: in its ulps values are compared; float32
            where it is not known.

    A value of the same name comes first, if it is equal; else the first of the source, in its
    order, that is equal in shape and in every element. Empty values correspond by name only.
    """
    index = ValueIndex([source])
    found: dict[str, str] = {}
    for name, value in graph.items():
        match = index.find([value], name, _dtype(dtypes, name))
        if match is not None:
            found[name] = match
    return found


def same_value(found: Tensor, truth: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether two float64 values (or integers) are one, but for constants rounded to `dtype`."""
    if found.shape != truth.shape or found.is_floating_point() != truth.is_floating_point():
        return False
    if torch.equal(found, truth) or found.numel() == 0:
        return True
    if not found.is_floating_point():
        return False
    return judge(found.double(), truth.double(), precision=_narrow(dtype)).passed is True


class ValueIndex:
    """The values of a source over several inputs, to be found by what they are."""

    def __init__(self, cases: Sequence[Mapping[str, Tensor]]) -> None:
        """cases: the values of each input, by name; a name is known if every input has it."""
        self._cases = cases
        self._groups: dict[tuple[object, ...], list[str]] = {}
        self._samples: dict[tuple[object, ...], tuple[Tensor, list[float]]] = {}
        for name in cases[0] if cases else ():
            if all(name in case for case in cases):
                self._groups.setdefault(_kind([case[name] for case in cases]), []).append(name)

    def find(
        self, values: Sequence[Tensor], name: str = "", dtype: torch.dtype = torch.float32
    ) -> str | None:
        """The name of an equal value, `name` itself before any other; None if there is none.

        values: one for each of the cases.
        """
        return next(self.all(values, name, dtype), None)

    def all(
        self, values: Sequence[Tensor], name: str = "", dtype: torch.dtype = torch.float32
    ) -> Iterator[str]:
        """Every name of an equal value, `name` itself first."""
        if self.holds(values, name, dtype):
            yield name
        if all(value.numel() == 0 for value in values):
            return
        for other in self._alike(values, dtype):
            if other != name and self.holds(values, other, dtype):
                yield other

    def holds(self, values: Sequence[Tensor], name: str, dtype: torch.dtype) -> bool:
        """Whether `name` is known and means these values."""
        if any(name not in case for case in self._cases):
            return False
        return all(
            same_value(value, case[name], dtype)
            for value, case in zip(values, self._cases, strict=True)
        )

    def _alike(self, values: Sequence[Tensor], dtype: torch.dtype) -> Iterable[str]:
        """Names whose sampled elements in the first case leave it open that they are equal."""
        kind = _kind(values)
        names = self._groups.get(kind, [])
        if not names or not values[0].is_floating_point() or values[0].numel() == 0:
            return names
        if kind not in self._samples:
            found = [self._cases[0][name] for name in names]
            scales = [_scale(value) for value in found]
            self._samples[kind] = torch.stack([_sampled(value) for value in found]), scales
        rows, scales = self._samples[kind]
        units = [FREE_ULPS * ulp(scale, _narrow(dtype)) for scale in scales]
        allowed = torch.tensor(units, dtype=torch.float64)[:, None]
        apart = (rows - _sampled(values[0])).abs() > allowed
        return [name for name, far in zip(names, apart.any(1).tolist(), strict=True) if not far]


def _kind(values: Sequence[Tensor]) -> tuple[object, ...]:
    shapes = tuple(tuple(value.shape) for value in values)
    return (values[0].is_floating_point(), *shapes)


def _sampled(value: Tensor) -> Tensor:
    flat = value.flatten().double()
    step = max(1, flat.numel() // _SAMPLE)
    return flat[::step][:_SAMPLE].nan_to_num()


def _scale(value: Tensor) -> float:
    return float(torch.where(value.isfinite(), value.abs(), 0.0).max())


def _dtype(dtypes: Mapping[str, torch.dtype] | None, name: str) -> torch.dtype:
    return (dtypes or {}).get(name, torch.float32)


def _narrow(dtype: torch.dtype) -> torch.dtype:
    """The type in whose ulps a value is compared; a value of no floating type as float32."""
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return torch.float32
    return dtype
