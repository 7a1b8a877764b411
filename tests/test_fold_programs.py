"""Folds in graphs the user holds: programs and graph modules come back as what they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from transformers_zoo import models, randomise

import normsurgery as ns
from normsurgery import artefacts
from normsurgery.errors import UsageError
from normsurgery.folding.checks import Check
from normsurgery.inputs import as_inputs, flatten_outputs
from normsurgery.norms.examples import randomised

torch.set_num_threads(1)
BOUND = 1e-9


class ConvNormRelu(nn.Module):
    """A bias that has to be made, one that is there, and a transposed one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second, self.bn2 = nn.Conv2d(8, 6, 3, groups=2), nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2, bias=False)
        self.bn3 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.first(x)))
        y = torch.relu(self.bn2(self.second(y)))
        return self.bn3(self.up(y))


class NormLinear(nn.Module):
    """Two readers of one norm: one has a bias and one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.gate = nn.Linear(6, 5), nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.up(y) * torch.sigmoid(self.gate(y))


class Tied(nn.Module):
    """One weight under two names; export keeps one of them in its signature."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6, bias=False)
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.a(y) - torch.tanh(self.b(y))


class Functional(nn.Module):
    """Weights that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(8, 3, 3, 3))
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.w))


class Product(nn.Module):
    """A product with a parameter: there is no argument for a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(6, 5))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.w


IMAGES, TOKENS = (2, 3, 9, 9), (2, 4, 6)


def ready(model: nn.Module) -> nn.Module:
    return randomised(model).double().eval()


def example(shape: tuple[int, ...], batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn((batch, *shape[1:]), generator=generator, dtype=torch.float64)


def exported(model: nn.Module, shape: tuple[int, ...]) -> ExportedProgram:
    return torch.export.export(model, (example(shape),), dynamic_shapes=({0: Dim("batch")},))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def operators(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("build", "shape", "steps", "left"),
    [
        (ConvNormRelu, IMAGES, 3, ["conv2d", "relu", "conv2d", "relu", "conv_transpose2d"]),
        (NormLinear, TOKENS, 1, ["layer_norm", "linear", "linear", "sigmoid", "mul"]),
        (Tied, TOKENS, 1, ["layer_norm", "linear", "linear", "tanh", "sub"]),
        (Functional, IMAGES, 1, ["conv2d"]),
    ],
    ids=lambda item: getattr(item, "__name__", None),
)
def test_a_program_is_folded_and_keeps_its_dynamic_batch(build, shape, steps, left, tmp_path):
    model = ready(build())
    program = exported(model, shape)
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    graph = str(program.graph)
    folded, report = ns.fold(program, inputs=(example(shape),))
    assert isinstance(folded, ExportedProgram) and report.evidence.passed
    assert len(report.plan.steps) == steps and not report.plan.skips
    assert [name.split(".")[1] for name in operators(folded.graph)] == left
    assert not any("bn" in name and "tracked" not in name for name in folded.state_dict)
    assert str(program.graph) == graph
    assert all(torch.equal(program.state_dict[name], t) for name, t in before.items())
    artefacts.save(artefacts.load(saved(program, tmp_path)), folded, report, tmp_path / "out.pt2")
    loaded = artefacts.load(tmp_path / "out.pt2").model
    for batch in (2, 5):
        x = example(shape, batch)
        assert error(folded.module()(x), model(x)) < BOUND
        assert torch.equal(loaded.module()(x), folded.module()(x))
    moved = report.keymap.load(program.state_dict)
    assert all(torch.equal(moved[name], t) for name, t in folded.state_dict.items())
    assert not ns.fold(loaded, inputs=(example(shape),))[1].plan.steps


def saved(program: ExportedProgram, folder) -> str:
    torch.export.save(program, folder / "in.pt2")
    return str(folder / "in.pt2")


def test_a_norm_that_needs_a_bias_no_call_can_hold_is_refused_with_the_reason():
    program = exported(ready(Product()), TOKENS)
    folded, report = ns.fold(program, inputs=(example(TOKENS),))
    (skip,) = report.plan.skips
    assert skip.reason.startswith(Check.NO_BIAS.value) and not report.plan.steps
    assert folded.state_dict.keys() == program.state_dict.keys()


def test_a_program_exported_in_train_mode_is_refused():
    model = ready(ConvNormRelu()).train()
    _, report = ns.fold(exported(model, IMAGES), inputs=(example(IMAGES),))
    assert not report.plan.steps and len(report.plan.skips) == 3
    assert all(skip.reason.startswith(Check.TRAIN_MODE.value) for skip in report.plan.skips)


def test_a_plan_made_once_is_carried_out_again_and_a_program_is_not_edited_in_place():
    program = exported(ready(ConvNormRelu()), IMAGES)
    first, report = ns.fold(program, inputs=(example(IMAGES),))
    again, _ = ns.fold(program, plan=report.plan, inputs=(example(IMAGES),))
    assert all(torch.equal(again.state_dict[n], t) for n, t in first.state_dict.items())
    with pytest.raises(UsageError, match="in place"):
        ns.fold(program, inputs=(example(IMAGES),), inplace=True)


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("resnet", {}, {("into producer", "identity"): 11}),
        ("vit", {}, {("into consumers", "layernorm"): 5}),
        ("vit", {"rmsnorm": True}, {("residual stream", "rmsnorm"): 5}),
    ],
)
def test_exported_transformers(name, options, steps):
    row = models()[name]
    model = row.build()
    randomise(model)
    model = model.eval().double()
    inputs = as_inputs(row.inputs()).to(dtype=torch.float64)
    program = torch.export.export(model, inputs.args, dict(inputs.kwargs))
    folded, report = ns.fold(program, inputs=inputs, verify=False, **options)
    found = [(step.rule, step.to) for step in report.plan.steps]
    assert {pair: found.count(pair) for pair in found} == steps and not report.plan.skips
    with torch.no_grad():
        wanted = flatten_outputs(inputs.call(model))
        got = flatten_outputs(inputs.call(folded.module()))
    assert len(wanted) == len(got) > 0
    assert all(error(a, b) < BOUND for a, b in zip(got.values(), wanted.values(), strict=True))


def test_metadata_asserts_of_a_program_are_no_readers():
    """Llama casts inside its norm; the export asserts the type of what it casts."""
    row = models()["llama"]
    model = row.build()
    randomise(model)
    inputs = as_inputs(row.inputs())
    program = torch.export.export(model.eval(), inputs.args, dict(inputs.kwargs))
    folded, report = ns.fold(program, inputs=inputs)
    assert {step.rule for step in report.plan.steps} == {"into consumers"}
    assert len(report.plan.steps) == 5 and report.evidence.passed
    assert not any("layernorm" in name for name in folded.state_dict)
    assert "rsqrt" not in str(folded.graph)


@pytest.mark.parametrize("kind", ["symbolic", "unlifted"])
@pytest.mark.parametrize(
    ("build", "shape"),
    [(ConvNormRelu, IMAGES), (NormLinear, TOKENS), (Tied, TOKENS), (Functional, IMAGES)],
)
def test_a_graph_module_comes_back_as_one(build, shape, kind):
    model = ready(build())
    graph = fx.symbolic_trace(model) if kind == "symbolic" else exported(model, shape).module()
    code, names = graph.code, set(graph.state_dict())
    folded, report = ns.fold(graph, inputs=(example(shape),))
    assert isinstance(folded, fx.GraphModule) and report.plan.steps and report.evidence.passed
    assert graph.code == code and set(graph.state_dict()) == names
    for batch in (2, 5):
        x = example(shape, batch)
        assert error(folded(x), model(x)) < BOUND
    assert not any("batch_norm" in str(node.target) for node in folded.graph.nodes)
    moved = report.keymap.load(graph.state_dict())
    assert all(torch.equal(moved[name], t) for name, t in folded.state_dict().items())
    assert not ns.fold(folded, inputs=(example(shape),))[1].plan.steps


def test_a_graph_in_train_mode_is_refused():
    graph = fx.symbolic_trace(ready(ConvNormRelu()).train())
    with pytest.raises(UsageError, match="train mode"):
        ns.fold(graph, inputs=(example(IMAGES),))


class OneIntoTheOther(nn.Module):
    """The first norm goes into the second one's tensors, of which an affine is made then."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(4, 4, 1)
        for j in "12":
            setattr(self, f"w{j}", nn.Parameter(torch.rand(4) + 0.5))
            setattr(self, f"b{j}", nn.Parameter(torch.rand(4)))
            self.register_buffer(f"m{j}", torch.rand(4))
            self.register_buffer(f"v{j}", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x.relu(), self.m1, self.v1, self.w1, self.b1)
        z = F.batch_norm(y, self.m2, self.v2, self.w2, self.b2)
        return z.relu() * self.c(y).sigmoid()


def test_an_affine_is_made_of_edited_tensors() -> None:
    model = OneIntoTheOther().double().eval()
    example = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim("n")},))
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    folded, report = ns.fold(program, inputs=(example,))
    rules = [step.rule for step in report.plan.steps]
    assert report.passed and rules == ["into consumers", "standalone affine"]
    assert all(torch.equal(before[name], t) for name, t in program.state_dict.items())
    for batch in (2, 3, 5):
        x = torch.randn(batch, 4, 5, 6, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(folded.module()(x), model(x), rtol=BOUND, atol=BOUND)
    assert not ns.fold(folded, inputs=(example,), verify=False)[1].plan.steps
