"""neuronwise: the forward of the layer it replaces, gradients of the explicit reparametrisation."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from normsurgery.errors import CannotConvert, UsageError
from normsurgery.norms import neuronwise
from normsurgery.norms.gates import DERIVATIVES, GateTap, gate_weights
from normsurgery.norms.neuronwise import NORM, Neuronwise, NeuronwiseLinear
from normsurgery.spec import Fidelity, Source

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (9, 5)),
    "linear 3-d": (lambda: nn.Linear(5, 4), (3, 6, 5)),
    "linear no bias": (lambda: nn.Linear(5, 4, bias=False), (9, 5)),
    "conv1d same even": (lambda: nn.Conv1d(3, 4, 4, padding="same"), (2, 3, 9)),
    "conv2d stride dilation": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(2, 1), dilation=(2, 1), groups=2),
        (3, 4, 9, 8),
    ),
    "conv2d no bias": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False), (3, 2, 5, 5)),
    "conv2d reflect": (
        lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"),
        (3, 2, 6, 5),
    ),
    "conv2d circular depthwise": (
        lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3, padding_mode="circular"),
        (2, 3, 5, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
}


def source(module: nn.Module, **settings: Any) -> Source:
    tensors = dict(module.named_parameters(recurse=False))
    return Source("layer", "net.layer", settings, tensors, module=module, training=module.training)


def wrapped(module: nn.Module, gate: dict[str, Any] | None = None, **options: Any) -> Neuronwise:
    settings = {} if gate is None else {"gate": gate}
    return NORM.conversions["*"].build(source(module, **settings), **options)  # type: ignore[return-value]


def direct(activation: str) -> dict[str, Any]:
    return {"activation": activation, "direct": True, "module": None}


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Every input of every neuron: (positions, out, in per neuron), by differentiating the layer.

    The inputs of neuron j at position i are d z_ij / d W_j, taken one output at a time: slow, and
    independent of every formula under test.
    """
    weight = layer.weight.detach().clone().requires_grad_()
    z = torch.func.functional_call(layer, {"weight": weight}, (x,))
    z = z.movedim(1, -1) if isinstance(layer, nn.modules.conv._ConvNd) else z
    z = z.reshape(-1, weight.shape[0])
    rows = []
    for i in range(z.shape[0]):
        (all_neurons,) = torch.autograd.grad(z[i].sum(), weight, retain_graph=True)
        rows.append(all_neurons.reshape(weight.shape[0], -1))
    return torch.stack(rows)


def explicit(
    layer: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    gate: str | None,
    mode: str,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradients through z = V . (x - mu) / sigma + c, built sample by sample, mapped back."""
    inputs = patches(layer, x)
    weight = layer.weight.detach().reshape(layer.weight.shape[0], -1)
    bias = None if layer.bias is None else layer.bias.detach()
    plain = (inputs * weight).sum(-1) + (0 if bias is None else bias)
    open_ = torch.ones_like(plain) if gate is None else gate_weights(gate, (), plain).double()
    mass = open_.sum(0)[:, None]
    assert mass.min() > 1e-2  # no dead neuron: those have a test of their own
    mu = (open_[..., None] * inputs).sum(0) / mass
    if bias is None:
        mu = torch.zeros_like(mu)
    moment = (open_[..., None] * (inputs - mu) ** 2).sum(0) / mass + eps
    sigma = torch.ones_like(mu) if mode == "center" else moment.sqrt()
    v = (weight * sigma).requires_grad_()
    c = ((0 if bias is None else bias) + (weight * mu).sum(-1)).requires_grad_()
    z = (((inputs - mu) / sigma) * v).sum(-1) + c
    shape = layer(x).movedim(1, -1).shape if x.dim() > 2 and _is_conv(layer) else layer(x).shape
    out = z.reshape(shape)
    dv, dc = torch.autograd.grad(loss(out.movedim(-1, 1) if _is_conv(layer) else out), (v, c))
    if mode == "raw":
        return dv.reshape(layer.weight.shape), None if bias is None else dc
    dw = dv / sigma
    db = None if bias is None else dc - (dw * mu).sum(-1)
    return dw.reshape(layer.weight.shape), db


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("mode", neuronwise.MODES)
@pytest.mark.parametrize("gate", [None, "relu", "gelu"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_the_explicit_reparametrisation(
    name: str, gate: str | None, mode: str
) -> None:
    """Catches: a lost `gb = db - gW . mu`, a wrong padding, group or shift in the statistics."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = make().double()
    x = torch.randn(shape, dtype=torch.float64) + 0.3
    layer = wrapped(plain, direct(gate) if gate else None, mode=mode, eps=1e-3)
    target = torch.randn_like(plain(x))

    def loss(z: Tensor) -> Tensor:
        return ((F.gelu(z) - target) ** 2).mean()

    loss(layer(x)).backward()
    dw, db = explicit(plain, x, loss, gate, mode, 1e-3)
    assert relative(layer.weight.grad, dw) < 1e-12
    if db is not None:
        assert relative(layer.bias.grad, db) < 1e-12


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_input_gradients_are_the_same_bits(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = make()
    layer = wrapped(plain, direct("relu"))
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expected, got = plain(x), layer(y)
    assert torch.equal(expected, got)
    assert torch.equal(plain.eval()(x), layer.eval()(y))
    g = torch.randn_like(expected)
    expected.backward(g)
    got.backward(g)
    assert torch.equal(x.grad, y.grad)
    assert not torch.equal(plain.weight.grad, layer.weight.grad)
    with torch.no_grad():
        assert torch.equal(plain(x), layer(y))


def test_an_unbatched_convolution() -> None:
    plain = nn.Conv2d(2, 3, 3)
    x = torch.randn(2, 6, 6)
    one, batch = wrapped(plain, direct("relu")), wrapped(plain, direct("relu"))
    one(x).square().sum().backward()
    batch(x[None]).square().sum().backward()
    assert torch.equal(plain(x), one(x))
    assert torch.equal(one.weight.grad, batch.weight.grad)


def test_a_large_mean_does_not_cost_digits() -> None:
    """With mean / std = 300 the plain difference of moments is wrong by several per cent."""
    torch.manual_seed(0)
    x = torch.randn(256, 8) + 300
    layer = NeuronwiseLinear(8, 4, eps=0.0)
    double = copy.deepcopy(layer).double()
    g = torch.randn(256, 4)
    layer(x).backward(g)
    double(x.double()).backward(g.double())
    assert relative(layer.weight.grad.double(), double.weight.grad) < 1e-4


def test_a_dead_neuron_keeps_its_ordinary_gradient() -> None:
    plain = nn.Linear(3, 2).double()
    with torch.no_grad():
        plain.bias[1] = -1e3
    layer = wrapped(plain, direct("relu"))
    x = torch.randn(7, 3, dtype=torch.float64)
    g = torch.randn(7, 2, dtype=torch.float64)
    plain(x).backward(g)
    layer(x).backward(g)
    assert relative(layer.weight.grad[1], plain.weight.grad[1]) < 1e-12
    assert relative(layer.bias.grad[1:], plain.bias.grad[1:]) < 1e-12
    assert relative(layer.weight.grad[0], plain.weight.grad[0]) > 1e-3


@pytest.mark.parametrize("name", DERIVATIVES)
def test_every_gate_is_the_derivative_of_its_activation(name: str) -> None:
    """Catches: a gate table entry with a wrong slope, border or argument."""
    z = torch.linspace(-9.7, 9.9, 401, dtype=torch.float64).requires_grad_()
    activation = getattr(F, name.replace("log_sigmoid", "logsigmoid"))
    (expected,) = torch.autograd.grad(activation(z).sum(), z)
    got = gate_weights(name, (), z.detach()).double()
    assert relative(got, expected.abs()) < 1e-10


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("leaky_relu", (0.2,)),
        ("elu", (1.7,)),
        ("celu", (2.0,)),
        ("gelu", ("tanh",)),
        ("hardtanh", (0.0, 6.0)),
        ("softplus", (2.0, 50.0)),
    ],
)
def test_a_gate_takes_its_activations_arguments(name: str, arguments: tuple[Any, ...]) -> None:
    z = torch.linspace(-4.7, 7.9, 301, dtype=torch.float64).requires_grad_()
    keywords = {"approximate": "tanh"} if name == "gelu" else {}
    y = getattr(F, name)(z, **keywords) if keywords else getattr(F, name)(z, *arguments)
    (expected,) = torch.autograd.grad(y.sum(), z)
    got = gate_weights(name, arguments, z.detach()).double()
    assert relative(got, expected.abs()) < 1e-10


class Block(nn.Module):
    """conv - norm - in-place activation twice through one activation module, residual around."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.norm1(self.conv1(x)))
        return self.act(self.norm2(self.conv2(hidden)) + x)


def tapped(block: Block) -> Block:
    """What surgery does with a conversion and its companions."""
    conversion = NORM.conversions["*"]
    for name in ("conv1", "conv2"):
        gate = {"activation": "relu", "direct": False, "module": "act"}
        at = source(getattr(block, name), gate=gate)
        layer = conversion.build(at)
        for path, change in conversion.companions(at, layer, {}).items():
            setattr(block, path, change(getattr(block, path)))
        setattr(block, name, layer)
    return block


def test_a_gate_behind_a_norm_and_a_residual_sum() -> None:
    """The gate is taken at the activation's input, at the right one of its two calls."""
    torch.manual_seed(0)
    plain = Block().double()
    block = tapped(copy.deepcopy(plain))
    assert isinstance(block.act, GateTap)
    assert block.conv1.link is block.conv2.link is block.act.link
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    seen: list[Tensor] = []
    plain.act.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach() > 0))
    reference = copy.deepcopy(plain)
    reference(x).square().sum().backward()
    assert torch.equal(plain(x), block(x))
    block(x).square().sum().backward()
    hidden = reference.norm1(plain.conv1(x)).relu().detach()
    for number, (name, inputs) in enumerate((("conv1", x), ("conv2", hidden))):
        ordinary = getattr(reference, name).weight
        layer = getattr(block, name)
        rows = patches(getattr(plain, name), inputs)
        gate = seen[number].movedim(1, -1).reshape(rows.shape[0], -1).double()
        second = (gate[..., None] * rows**2).sum(0) / gate.sum(0)[:, None]
        expected = ordinary.grad / (second.reshape(ordinary.shape) + layer.eps)
        assert relative(layer.weight.grad, expected) < 1e-12


def test_a_retained_graph_gives_the_same_gradient_twice() -> None:
    block = tapped(Block().double())
    loss = block(torch.randn(2, 3, 5, 5, dtype=torch.float64)).square().sum()
    first = torch.autograd.grad(loss, block.conv1.weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, block.conv1.weight)[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    block = tapped(Block().double())
    twin = copy.deepcopy(block)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    block(x).square().sum().backward()
    checkpoint(twin, x, use_reentrant=reentrant).square().sum().backward()
    for ours, theirs in zip(block.parameters(), twin.parameters(), strict=True):
        assert relative(theirs.grad, ours.grad) < 1e-12


def test_an_activation_that_overwrites_the_output() -> None:
    """ReLU in place on the layer's own output: the gate must have been taken before."""
    torch.manual_seed(0)
    plain = nn.Linear(4, 3)
    x, g = torch.randn(6, 4), torch.randn(6, 3)
    inplace, outofplace = wrapped(plain, direct("relu")), wrapped(plain, direct("relu"))
    F.relu(inplace(x), inplace=True).backward(g)
    F.relu(outofplace(x)).backward(g)
    assert torch.equal(inplace.weight.grad, outofplace.weight.grad)


def test_mixed_precision() -> None:
    """The output has autocast's type, the gradients the parameters', finite and close in sign."""
    layer = wrapped(nn.Linear(8, 4), direct("gelu"))
    x = torch.randn(32, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.count_nonzero() == 32


def test_half_precision_parameters() -> None:
    layer = wrapped(nn.Linear(8, 4).bfloat16(), direct("relu"))
    layer(torch.randn(32, 8, dtype=torch.bfloat16)).square().sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16
    assert layer.weight.grad.isfinite().all()


def test_frozen_parameters_stay_frozen() -> None:
    plain = nn.Linear(3, 2)
    plain.weight.requires_grad_(False)
    layer = wrapped(plain, direct("relu"))
    layer(torch.randn(5, 3)).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((2,), 5.0))


def test_compiles_to_one_graph() -> None:
    layer = wrapped(nn.Conv2d(2, 4, 3), direct("gelu")).double()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    compiled(x).square().sum().backward()
    assert relative(compiled.weight.grad, layer.weight.grad) < 1e-12


def test_a_tapped_block_runs_compiled() -> None:
    torch.manual_seed(0)
    block = tapped(Block().double())
    twin = copy.deepcopy(block)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    block(x).square().sum().backward()
    torch.compile(twin, backend="aot_eager")(x).square().sum().backward()
    for ours, theirs in zip(block.parameters(), twin.parameters(), strict=True):
        assert relative(theirs.grad, ours.grad) < 1e-12


def test_copies_and_pickles_after_a_forward() -> None:
    """Catches: a box or a graph left on the module, which neither deepcopy nor pickle takes."""
    block = tapped(Block())
    x = torch.randn(2, 3, 5, 5)
    block.conv1(x)  # waits for a gate that does not come
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for twin in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        assert twin.conv1.link is twin.act.link
        assert twin.conv1.link.waiting == []
        assert torch.equal(twin.eval()(x), block.eval()(x))


@pytest.mark.parametrize("name", LAYERS)
def test_strip_gives_the_plain_layer(name: str) -> None:
    make, shape = LAYERS[name]
    plain = make().eval()
    layer = wrapped(plain, {"activation": "relu", "direct": False, "module": "act"})
    stripped = NORM.strip(layer)
    assert type(stripped) is type(plain)
    assert vars(stripped).keys() == vars(plain).keys()
    assert stripped.training is plain.training
    assert not list(stripped.children())
    x = torch.randn(shape)
    assert torch.equal(stripped(x), plain(x))
    assert stripped.state_dict().keys() == plain.state_dict().keys()


def test_the_promise_and_the_options() -> None:
    conversion = NORM.conversion("linear")
    at = source(nn.Linear(3, 2), gate=direct("relu"))
    assert conversion.promise(at, {}) is Fidelity.FORWARD
    assert conversion.resolve(at, {}) == {"mode": "exact", "eps": 1e-3, "gate": "relu"}
    assert conversion.resolve(at, {"gate": "none"})["gate"] == "none"
    assert conversion.build(at, **conversion.resolve(at, {})).gate == "relu"
    assert conversion.build(at, gate="none").gate is None
    far = source(nn.Linear(3, 2), gate={"activation": "relu", "direct": False, "module": None})
    assert conversion.resolve(far, {})["gate"] == "none"
    unknown = source(nn.Linear(3, 2), gate=direct("no_such_activation"))
    assert conversion.resolve(unknown, {})["gate"] == "none"
    with pytest.raises(UsageError, match="mode"):
        conversion.build(at, mode="steepest")
    with pytest.raises(UsageError, match="gate"):
        conversion.build(at, gate="steepest")


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "module",
    [
        Doubled(3, 2),
        nn.ConvTranspose2d(3, 2, 3),
        nn.Embedding(3, 2),
        parametrizations.weight_norm(nn.Linear(3, 2)),
        None,
    ],
    ids=["own forward", "transposed", "no layer", "computed weight", "a call"],
)
def test_what_cannot_be_wrapped_is_refused(module: nn.Module | None) -> None:
    at = Source("layer", "net.layer", {}, {}, module=module)
    with pytest.raises(CannotConvert, match=r"net\.layer"):
        NORM.conversions["*"].build(at)


def test_a_step_on_badly_scaled_inputs_beats_plain_sgd() -> None:
    """What it is for: inputs with scales 1 and 100 and a large mean, one learning rate each."""
    torch.manual_seed(0)
    x = torch.randn(512, 4, dtype=torch.float64) * torch.tensor([1.0, 100.0, 1.0, 10.0]) + 50
    y = (x / torch.tensor([1.0, 100.0, 1.0, 10.0])).sum(1, keepdim=True).double()

    def after(layer: nn.Module, rate: float) -> float:
        for _ in range(100):
            layer.zero_grad()
            ((layer(x) - y) ** 2).mean().backward()
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter -= rate * parameter.grad
        return ((layer(x) - y) ** 2).mean().item()

    plain = nn.Linear(4, 1).double()
    assert after(wrapped(plain), 0.1) < 1e-6 * after(copy.deepcopy(plain), 1e-5)
