"""Fourth rung: what a hand-written norm computes, proven in float64 against registered formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normsurgery import spec as registry
from normsurgery.spec import NormSpec, Reading

FORMULA_LIMIT = 1e-10  # relative, in float64, on every hard input
_SEED = 20240607

# What is proven: the output for an input, with the given tensors in place of the norm's own.
Run = Callable[[Tensor, Mapping[str, Tensor], bool], Tensor]


@dataclass(frozen=True)
class Proof:
    """A registered formula that agrees: its name, its Reading (eps measured), the worst error.

    inputs: of a norm with further inputs, which argument is which.
    """

    kind: str
    reading: Reading
    error: float
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Cases:
    """Inputs, the outputs for them, and the largest output, which errors are relative to.

    further: what else each run was given, by argument.
    """

    inputs: tuple[tuple[Tensor, Tensor, bool], ...]
    scale: float
    further: Mapping[str, Tensor]


def prove(
    run: Run,
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    eps_candidates: tuple[float, ...],
    *,
    modes: tuple[bool, ...] = (False,),
    first: str | None = None,
    further: Mapping[str, Tensor] | None = None,
) -> Proof | None:
    """The registered norm that `run` computes, or None if it computes none of them.

    run: called as `run(x, values, training)` with float64 tensors, `x` of `shape`; must be true
    float64 throughout (`precision.lifted`). `tensors` gives names and shapes of what it reads;
    values are drawn far from 0 and 1. `eps_candidates` are the small numbers seen in its code:
    which of them is the eps is measured on an input of tiny variance. `first`: the kind to try
    before the others, for a formula that several kinds share (a group norm of one group).
    `further`: the other tensors that `run` is given, by argument (float64); a norm with further
    inputs must be given as many, and they are its inputs in that order.
    """
    generator = torch.Generator().manual_seed(_SEED)
    values = {name: _drawn(tensor, generator) for name, tensor in tensors.items()}
    cases = _cases(run, shape, values, modes, generator, further or {})
    if not cases.scale > 0.0:
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for found in sorted(registry.specs(), key=lambda spec: spec.name != first):
        if found.hypotheses is None or (found.inputs and len(found.inputs) != len(cases.further)):
            continue
        for reading in found.hypotheses(shape, shapes):
            proof = _test(found, reading, values, cases, eps_candidates)
            if proof is not None:
                return proof
    return None


def _drawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Values in (0.4, 2.2) or its negative; what can only be positive stays so."""
    if not tensor.is_floating_point():
        return tensor
    drawn = 0.4 + 1.8 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    if not isinstance(tensor, torch.nn.Parameter):  # a buffer may be a variance
        return drawn
    sign = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return drawn * sign


def _cases(
    run: Run,
    shape: tuple[int, ...],
    values: Mapping[str, Tensor],
    modes: tuple[bool, ...],
    generator: torch.Generator,
    further: Mapping[str, Tensor],
) -> _Cases:
    """Tiny variance first: it is what tells eps, and rejects most hypotheses at once."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    hard = (3e-3 * noise, noise, noise + 1e3, torch.full(shape, 0.7, dtype=torch.float64))
    inputs = tuple((x, run(x, values, training), training) for x in hard for training in modes)
    return _Cases(inputs, max(float(y.abs().max()) for _, y, _ in inputs), further)


def _test(
    found: NormSpec,
    reading: Reading,
    values: Mapping[str, Tensor],
    cases: _Cases,
    eps_candidates: tuple[float, ...],
) -> Proof | None:
    tensors = {role: values[name] for role, name in reading.tensors.items()}
    unused = set(values) - set(reading.tensors.values())
    if any(values[name].is_floating_point() for name in unused):
        return None
    fixed = reading.settings.get("eps")
    for eps in (fixed,) if fixed is not None else eps_candidates:
        settings = {**reading.settings, "eps": eps}
        error = _worst(found, tensors, settings, cases)
        if error <= FORMULA_LIMIT:
            inputs = dict(zip(found.inputs, cases.further, strict=False))
            return Proof(found.name, Reading(reading.tensors, settings), error, inputs)
    return None


def _worst(
    found: NormSpec,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    cases: _Cases,
) -> float:
    """Largest error over the cases, relative to the largest output; infinite above the limit."""
    worst = 0.0
    further = dict(zip(found.inputs, cases.further.values(), strict=False))
    for x, y, training in cases.inputs:
        expected = found.formula(x, tensors, settings, training, **further)
        if expected.shape != y.shape:
            return float("inf")
        error = float((expected - y).abs().max()) / cases.scale
        if not error <= FORMULA_LIMIT:
            return float("inf")
        worst = max(worst, error)
    return worst
