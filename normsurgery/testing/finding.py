"""Recognition by numbers: a norm whose tensors have lost their names is still known."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from normsurgery.spec import NormSpec, Reading, specs
from normsurgery.testing.cases import by_name, made, modes, random_input, same


def check_hypotheses(spec: NormSpec) -> None:
    """A module whose tensors have lost their names is still recognised, by some norm's readings."""
    for example in spec.examples():
        shape = example.inputs[0]
        for training in modes(spec):
            module = made(example, training)
            assert _recognised(spec, module, shape), (
                f"{spec.name} ({example.label}): no hypothesis equals it (training={training})"
            )


def _recognised(spec: NormSpec, module: nn.Module, shape: tuple[int, ...]) -> bool:
    reading = spec.read(module)
    x = random_input(shape)
    expected = spec.reference(module, x)
    tensors = {
        f"tensor_{index}": value.detach().double()
        for index, name in enumerate(reversed(list(reading.tensors.values())))
        if (value := by_name(module, name)).is_floating_point()
    }
    sizes = {name: tuple(value.shape) for name, value in tensors.items()}
    for other in (spec, *(known for known in specs() if known.name != spec.name)):
        for hypothesis in other.hypotheses(shape, sizes) if other.hypotheses else ():
            if _equals(other, hypothesis, reading, tensors, x, expected, module.training):
                return True
    return False


def _equals(
    spec: NormSpec,
    hypothesis: Reading,
    reading: Reading,
    tensors: Mapping[str, Tensor],
    x: Tensor,
    expected: Tensor,
    training: bool,
) -> bool:
    by_role = {role: tensors[name] for role, name in hypothesis.tensors.items()}
    settings = {**hypothesis.settings, "eps": reading.settings["eps"]}
    y = spec.formula(x, by_role, settings, training)
    return y.shape == expected.shape and same(y, expected)
