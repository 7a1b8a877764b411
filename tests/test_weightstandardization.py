"""weightstandardization: which weights share a mean, and the plain layer that is left."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from normsurgery.errors import CannotConvert, WrongShape
from normsurgery.norms.weightstandardization import NORM, WeightStandardization
from normsurgery.spec import Fidelity, Source


class InOut(nn.Module):
    """A linear layer that stores its weight as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, bias=False), (2, 3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), (2, 3, 5, 5)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "(in, out)": (InOut, (3, 6)),
}


def source(module: nn.Module | None) -> Source:
    tensors = {} if module is None else dict(module.named_parameters(recurse=False))
    settings = {"output_axis": 1} if isinstance(module, InOut) else {}
    return Source("layer", "net.layer", settings, tensors, module=module)


def standardized(module: nn.Module, **options: float) -> nn.Module:
    return NORM.conversions["*"].build(source(module), **options)


def per_neuron(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The weights that reach each output channel, found by differentiating the layer."""
    weight = layer.weight.detach().clone().requires_grad_()
    y = torch.func.functional_call(layer, {"weight": weight}, (torch.rand_like(x) + 1,))
    axis = -1 if x.dim() == 2 else 1
    found = []
    for channel in range(y.shape[axis]):
        (used,) = torch.autograd.grad(y.select(axis, channel).sum(), weight, retain_graph=True)
        found.append(used != 0)
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_each_output_channel_has_mean_zero_and_variance_one(name: str) -> None:
    """Which weights belong to an output is taken from the layer itself, groups and all."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    plain = make().double()
    layer = standardized(plain, eps=1e-6)
    x = torch.randn(shape, dtype=torch.float64)
    for used in per_neuron(plain, x):
        old, new = plain.weight[used], layer.weight[used]
        expected = (old - old.mean()) / (old.var(correction=0) + 1e-6).sqrt()
        assert ((new - expected).abs().max() / expected.abs().max()).item() < 1e-10
    assert layer(x).shape == plain(x).shape


@pytest.mark.parametrize("name", LAYERS)
def test_strip_gives_the_plain_layer_and_leaves_the_other_alone(name: str) -> None:
    """Catches: torch's removal deletes `weight` from the class that a copy shares."""
    make, shape = LAYERS[name]
    plain = make()
    layer = standardized(plain)
    twin = copy.deepcopy(layer)
    x = torch.randn(shape)
    expected = layer(x)
    stripped = NORM.strip(layer)
    assert type(stripped) is type(plain)
    assert stripped.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(stripped(x), expected)
    assert torch.equal(layer(x), expected) and torch.equal(twin(x), expected)
    assert isinstance(stripped.weight, nn.Parameter)


def test_the_source_is_unchanged_and_the_weight_is_kept() -> None:
    plain = nn.Conv2d(3, 4, 3).eval()
    before = plain.weight.detach().clone()
    layer = standardized(plain)
    assert type(plain) is nn.Conv2d and torch.equal(plain.weight, before)
    original = layer.parametrizations.weight.original
    assert torch.equal(original, before) and original is not plain.weight
    assert isinstance(layer, nn.Conv2d) and not layer.training


def test_training_moves_the_weight_across_its_scale() -> None:
    """Finite non-zero gradients, orthogonal to the weight and to a shift of it."""
    layer = standardized(nn.Conv2d(3, 4, 3).double(), eps=0.0)
    layer(torch.randn(2, 3, 6, 6, dtype=torch.float64)).square().sum().backward()
    original = layer.parametrizations.weight.original
    gradient = original.grad.flatten(1)
    assert gradient.isfinite().all() and gradient.count_nonzero() > 0
    size = (original.flatten(1) * gradient).abs().sum(1)
    assert ((original.flatten(1) * gradient).sum(1).abs() / size).max() < 1e-10
    assert (gradient.sum(1).abs() / gradient.abs().sum(1)).max() < 1e-10


def test_options_and_promise() -> None:
    conversion = NORM.conversion("conv2d")
    at = source(nn.Conv2d(3, 4, 3))
    assert conversion.promise(at, {}) is Fidelity.RETRAIN
    assert conversion.resolve(at, {}) == {"eps": 1e-6}
    assert standardized(nn.Linear(6, 4), eps=0.1).parametrizations.weight[0].eps == 0.1


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(6, 4, 1, groups=2),
        parametrizations.weight_norm(nn.Linear(6, 4)),
        nn.LayerNorm(6),
        nn.Embedding(5, 6),
        nn.ReLU(),
        None,
    ],
    ids=["3 weights", "transposed", "computed", "vector", "table", "no weight", "a call"],
)
def test_what_cannot_be_standardized_is_refused(module: nn.Module | None) -> None:
    with pytest.raises(CannotConvert, match=r"net\.layer"):
        standardized(module)


def test_a_vector_is_no_weight() -> None:
    with pytest.raises(WrongShape, match="two or more"):
        WeightStandardization()(torch.randn(4))
