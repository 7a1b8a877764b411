"""The laws of `normsurgery.spec.Law`: a declared one holds, an undeclared one fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from normsurgery.spec import Law, NormSpec
from normsurgery.testing.cases import by_name, first, random_input, same

NO_EPS = 1e-30  # "eps -> 0" of the laws, still a number that float64 can add


def law_check(law: Law) -> Callable[[NormSpec], None]:
    def check(spec: NormSpec) -> None:
        """A declared law holds, an undeclared one fails."""
        holds = _LAWS[law](spec, *first(spec))
        declared = law in spec.laws
        assert holds == declared, (
            f"{spec.name}: {law.name} is {'' if declared else 'not '}declared and "
            f"{'holds' if holds else 'does not hold'}: {law.value}"
        )

    return check


def _formula(
    spec: NormSpec, module: nn.Module, training: bool, *, affine: bool = True
) -> Callable[[Tensor], Tensor]:
    reading = spec.read(module)
    bare = spec.attach == "norm" and not affine
    tensors = {
        role: by_name(module, name).detach().double()
        for role, name in reading.tensors.items()
        if not (bare and role in ("weight", "bias"))
    }
    settings = dict(reading.settings)
    if settings.get("eps"):
        settings["eps"] = NO_EPS
    return lambda x: spec.formula(x, tensors, settings, training)


def _shift_invariant(spec: NormSpec, module: nn.Module, shape: tuple[int, ...]) -> bool:
    norm, x = _formula(spec, module, True), random_input(shape)
    return same(norm(x + 2.9), norm(x))


def _scale_invariant(spec: NormSpec, module: nn.Module, shape: tuple[int, ...]) -> bool:
    norm, x = _formula(spec, module, True), random_input(shape).requires_grad_()
    y = norm(x)
    weights = torch.linspace(0.5, 2.0, y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    products = (gradient * x).detach()
    size = products.abs().sum().reshape(1)
    orthogonal = same(size + products.sum(), size)
    invariant = same(norm(3.7 * x.detach()), y.detach())
    assert spec.gradient is not None or orthogonal == invariant, (
        f"{spec.name}: norm(a x) == norm(x) is {invariant}, but <x, dL/dx> = 0 is {orthogonal}"
    )
    return invariant


def _batch_independent(spec: NormSpec, module: nn.Module, shape: tuple[int, ...]) -> bool:
    norm, x = _formula(spec, module, True), random_input((3, *shape[1:]))
    return same(norm(x)[:2], norm(torch.cat([x[:2], 4.0 * x[2:] + 1.0]))[:2])


def _permutation_equivariant(spec: NormSpec, module: nn.Module, shape: tuple[int, ...]) -> bool:
    norm, x = _formula(spec, module, True), random_input((4, *shape[1:]))
    order = torch.tensor([2, 0, 3, 1])
    return same(norm(x[order]), norm(x)[order])


def _rotation_equivariant(spec: NormSpec, module: nn.Module, shape: tuple[int, ...]) -> bool:
    norm, x = _formula(spec, module, True, affine=False), random_input(shape)
    axis = spec.read(module).settings.get("channel_axis", 1)
    generator = torch.Generator().manual_seed(3)
    square = torch.randn(shape[axis], shape[axis], generator=generator, dtype=torch.float64)
    rotation: Tensor = torch.linalg.qr(square)[0]

    def rotated(value: Tensor) -> Tensor:
        return (value.movedim(axis, -1) @ rotation.T).movedim(-1, axis)

    y = norm(x)
    return y.shape == x.shape and same(norm(rotated(x)), rotated(y))


def affine_in_eval(spec: NormSpec, module: nn.Module, shape: tuple[int, ...]) -> bool:
    norm, x = _formula(spec, module, False), random_input(shape)
    axis = spec.read(module).settings.get("channel_axis", 1) % len(shape)
    other = 3.0 * random_input(shape, seed=8) - 1.0
    y = norm(x)
    if y.shape != x.shape:
        return False
    over = [d for d in range(len(shape)) if d != axis]
    mean_x, mean_y = x.mean(over, keepdim=True), y.mean(over, keepdim=True)
    covariance = ((x - mean_x) * (y - mean_y)).sum(over, keepdim=True)
    scale = covariance / (x - mean_x).square().sum(over, keepdim=True)
    return same(norm(other), (other - mean_x) * scale + mean_y)


_LAWS: Mapping[Law, Callable[[NormSpec, nn.Module, tuple[int, ...]], bool]] = {
    Law.SHIFT_INVARIANT: _shift_invariant,
    Law.SCALE_INVARIANT: _scale_invariant,
    Law.BATCH_INDEPENDENT: _batch_independent,
    Law.PERMUTATION_EQUIVARIANT: _permutation_equivariant,
    Law.ROTATION_EQUIVARIANT: _rotation_equivariant,
    Law.AFFINE_IN_EVAL: affine_in_eval,
}
