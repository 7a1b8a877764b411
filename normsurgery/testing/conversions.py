"""Conversions: each is run from every example, and what it promises is what is measured."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.errors import CannotConvert
from normsurgery.norms.examples import randomised
from normsurgery.spec import Conversion, Fidelity, NormSpec, Source, specs
from normsurgery.testing.cases import (
    DRAWS,
    MODES,
    by_name,
    hard_inputs,
    judge_with_floor,
    made,
    random_input,
    same,
)
from normsurgery.verifying.judge import judge


def check_conversions(spec: NormSpec) -> None:
    """Every conversion is run from every example; what it promises is what is measured."""
    kinds = [other.name for other in specs() if other.attach == "norm"]
    if spec.name not in kinds and spec.attach == "norm":
        kinds.append(spec.name)
    done = 0
    for kind in kinds if spec.attach == "norm" else ("",):
        for source, x in sources(spec, kind):
            conversion = spec.conversion(source.kind)
            done += conversion is not None and _promise_kept(spec, conversion, source, x, {})
    assert done, f"{spec.name}: no conversion could be run"


def check_conversion(spec: NormSpec, source: Source, x: Tensor, options: Mapping[str, Any]) -> None:
    """One conversion with options: what it promises is what is measured."""
    conversion = spec.conversion(source.kind)
    assert conversion is not None, f"{spec.name}: no conversion from {source.kind}"
    assert _promise_kept(spec, conversion, source, x, options), (
        f"{spec.name} refuses {source.where} with {dict(options)}"
    )


def _promise_kept(
    spec: NormSpec, conversion: Conversion, source: Source, x: Tensor, options: Mapping[str, Any]
) -> bool:
    """False where the conversion refuses, with a reason and a cure."""
    where = f"{source.where} -> {spec.name} {dict(options) or ''}"
    try:
        resolved = dict(conversion.resolve(source, options) if conversion.resolve else options)
        module = conversion.build(source, init="copy", **resolved)
    except CannotConvert as error:
        assert error.why and error.cure, f"{where}: refused without a reason or a cure"
        return False
    promised = conversion.promise(source, resolved)
    assert source.module is not None
    measured = measured_fidelity(source.module, module, x, draws=DRAWS if spec.random else 1)
    assert measured == promised, f"{where}: promises {promised.name}, measured {measured.name}"
    for parameter in (*module.parameters(), *module.buffers()):
        expected = not parameter.is_floating_point() or parameter.dtype == source.dtype
        assert expected, f"{where}: a tensor is {parameter.dtype}, not {source.dtype}"
    assert module.training == source.training, f"{where}: its mode is not the source's"
    return True


def measured_fidelity(old: nn.Module, new: nn.Module, x: Tensor, *, draws: int = 1) -> Fidelity:
    """What a replacement keeps, on hard inputs of the shape of `x`, in float64.

    draws: how often each runs on each input; more than once where it is random.
    """
    hard = list(hard_inputs(tuple(x.shape)))
    runs = {
        training: [
            (_pass(old, case, training, draws), _pass(new, case, training, draws))
            for _, case in hard
        ]
        for training in MODES
    }
    labels = [label for label, _ in hard]
    if not _same_outputs(labels, runs[False]):
        return Fidelity.RETRAIN
    if not _same_outputs(labels, runs[True]):
        return Fidelity.EVAL
    kept = all(_same_gradients(a, b) for pairs in runs.values() for a, b in pairs)
    return Fidelity.IDENTICAL if kept else Fidelity.FORWARD


@dataclass(frozen=True)
class _Pass:
    output: Tensor
    gradients: Mapping[str, Tensor]


def _pass(module: nn.Module, x: Tensor, training: bool, draws: int) -> _Pass:
    module = copy.deepcopy(module).train(training)
    x = x.clone().requires_grad_()
    y = torch.stack([module(x) for _ in range(draws)])
    weights = torch.linspace(0.5, 2.0, y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
    torch.autograd.backward((y * weights).sum())
    gradients = {name: p.grad for name, p in learned.items() if p.grad is not None}
    assert x.grad is not None
    return _Pass(y.detach(), {**gradients, "(input)": x.grad})


def _same_outputs(labels: Sequence[str], pairs: Sequence[tuple[_Pass, _Pass]]) -> bool:
    return all(
        (judge_with_floor if label == "constant" else judge)(b.output, a.output).passed is True
        for label, (a, b) in zip(labels, pairs, strict=True)
    )


def _same_gradients(a: _Pass, b: _Pass) -> bool:
    """Of the input and of the parameters that both have; relative, since zero has no scale."""
    shared = [name for name in a.gradients if name in b.gradients]
    scale = max(float(a.gradients[name].abs().max()) for name in shared)
    floor = torch.full((1,), scale, dtype=torch.float64)
    return all(
        same(
            torch.cat([a.gradients[name].flatten(), floor]),
            torch.cat([b.gradients[name].flatten(), floor]),
        )
        for name in shared
    )


def source_of(spec: NormSpec, module: nn.Module, shape: tuple[int, ...], where: str) -> Source:
    """The Source a site of this module would have, called on an input of that shape."""
    reading = spec.read(module)
    settings = {"channel_axis": 1, **reading.settings}
    settings.setdefault("features", shape[settings["channel_axis"]])
    return Source(
        kind=spec.name,
        where=where,
        settings=settings,
        tensors={role: by_name(module, name) for role, name in reading.tensors.items()},
        shape=shape,
        module=module,
        training=module.training,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )


def sources(spec: NormSpec, kind: str) -> Iterator[tuple[Source, Tensor]]:
    """Examples of `kind` for a norm; a linear layer and a convolution for what acts on those."""
    if spec.attach != "norm":
        yield from _layer_sources()
        return
    other = next((known for known in specs() if known.name == kind), spec)
    for example in other.examples():
        for shape in example.inputs:
            module = made(example, True)
            several = (max(2, shape[0]), *shape[1:])  # batch norms cannot train on one value
            yield (
                source_of(other, module, shape, f"{kind} ({example.label})"),
                random_input(several),
            )


def _layer_sources() -> Iterator[tuple[Source, Tensor]]:
    layers: tuple[tuple[str, nn.Module, tuple[int, ...], int], ...] = (
        ("linear", nn.Linear(6, 5), (4, 6), -1),
        ("conv2d", nn.Conv2d(4, 6, 3), (2, 4, 7, 5), 1),
    )
    for kind, layer, shape, axis in layers:
        module = randomised(layer).double()
        yield (
            Source(
                kind=kind,
                where=kind,
                settings={"channel_axis": axis, "features": shape[axis]},
                tensors=dict(module.named_parameters()),
                shape=shape,
                module=module,
                dtype=torch.float64,
                device=torch.device("cpu"),
            ),
            random_input(shape),
        )
