"""dyt: the values it takes over, its axis, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normsurgery.errors import CannotConvert, WrongShape
from normsurgery.norms.dyt import NORM, DynamicTanh
from normsurgery.spec import Fidelity, Source


def layernorm_like(axis: int, weight_offset: float = 0.0, bias: bool = True) -> Source:
    tensors = {"weight": torch.linspace(-2, 3, 6).requires_grad_()}
    if bias:
        tensors["bias"] = torch.linspace(4, 5, 6).requires_grad_(False)
    settings = {
        "eps": 1e-6,
        "channel_axis": axis,
        "features": 6,
        "weight_offset": weight_offset,
    }
    return Source("rmsnorm", "net.norm", settings, tensors, training=False, dtype=torch.float32)


@pytest.mark.parametrize("axis", [1, -1])
def test_it_takes_over_scale_shift_axis_mode_and_requires_grad(axis: int) -> None:
    """Catches: a lost weight offset (Gemma's `1 + weight`), affine along the wrong axis."""
    source = layernorm_like(axis, weight_offset=1.0)
    norm = NORM.conversions["*"].build(source, alpha=0.25)
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    shape = (6, 1) if axis == 1 else (6,)
    scale = source.tensors["weight"].detach().double().reshape(shape) + 1
    expected = torch.tanh(0.25 * x) * scale + source.tensors["bias"].double().reshape(shape)
    got = norm.double()(x)
    assert (got - expected).abs().max() / expected.abs().max() < 1e-10
    assert not norm.training
    assert norm.weight.requires_grad and not norm.bias.requires_grad
    assert norm.weight.data_ptr() != source.tensors["weight"].data_ptr()


def test_reset_starts_fresh() -> None:
    norm = NORM.conversions["*"].build(layernorm_like(-1), init="reset")
    assert torch.equal(norm.weight, torch.ones(6)) and torch.equal(norm.bias, torch.zeros(6))
    assert norm.alpha.item() == 0.5


def test_every_new_parameter_learns() -> None:
    norm = NORM.conversions["*"].build(layernorm_like(-1))
    norm.bias.requires_grad_()
    norm(torch.randn(4, 6)).square().sum().backward()
    for parameter in norm.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.count_nonzero() > 0


def test_options_and_promise() -> None:
    conversion = NORM.conversion("layernorm")
    source = layernorm_like(-1)
    assert conversion.option_names() == ("alpha",)
    assert conversion.resolve(source, {}) == {"alpha": 0.5}
    assert conversion.promise(source, {}) is Fidelity.RETRAIN
    for alpha in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(CannotConvert, match=r"net\.norm"):
            conversion.build(source, alpha=alpha)


def test_a_wrong_axis_is_refused_even_when_another_axis_fits() -> None:
    with pytest.raises(WrongShape, match="axis 1"):
        DynamicTanh(6, channel_axis=1)(torch.randn(2, 5, 6))


def test_parameters_in_float32_and_input_in_bfloat16() -> None:
    norm = DynamicTanh(6)
    assert norm(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert isinstance(norm, nn.Module)
