"""Swaps in a graph the user holds: the same kind comes back, and computes what it should."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import normsurgery as ns
from normsurgery.errors import CannotRewrite
from normsurgery.rewriting.owner.exported import rewrite_exported
from normsurgery.rewriting.owner.graphs import rewrite_graph_module
from normsurgery.survey import CallSite, Origin, Site

C = 12


class Block(nn.Module):
    """Two functional norms, one of them written by hand; batch norm with its own buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)
        self.weight = nn.Parameter(torch.rand(C) + 0.5)
        self.bias = nn.Parameter(torch.rand(C) + 0.5)
        self.gain = nn.Parameter(torch.rand(C) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(self.fc(x), (C,), self.weight, self.bias, 1e-5)
        h = F.gelu(h)
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        self.bn.num_batches_tracked.add_(1)
        return F.relu(
            F.batch_norm(
                x,
                self.bn.running_mean,
                self.bn.running_var,
                self.bn.weight,
                self.bn.bias,
                False,
                0.1,
                1e-5,
            )
        )


def site(node: fx.Node, value: fx.Node, kind: str, parameters: dict[str, str]) -> Site:
    return Site(
        index=0,
        kind=kind,
        paths=("",),
        form="call",
        class_name="GraphModule",
        parameters=parameters,
        settings={"eps": 1e-5, "channel_axis": -1, "features": C},
        call=CallSite("", "", None, Origin(value.name), node=node.name),
    )


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return module


def nodes(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """(output, input) of the layer norm, and of the hand-written RMS norm, of Block."""

    def called(*words: str) -> list[fx.Node]:
        return [
            n
            for n in graph.nodes
            if n.op.startswith("call_") and any(word in str(n.target) for word in words)
        ]

    last = called("mul")[-1]
    layer, gelu = called("layer_norm")[0], called("gelu")[0]
    return [(layer, layer.args[0]), (last, gelu)]


def equal(a: Tensor, b: Tensor) -> None:
    """In float64, to the criterion for formulas."""
    error = float((a - b).detach().abs().max())
    assert error <= 1e-10 * float(a.detach().abs().max())


def expected(block: Block, first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    return second(F.gelu(first(block.fc(x))))


TENSORS = ({"weight": "weight", "bias": "bias"}, {"weight": "gain"})


def test_graph_module_is_rewritten_in_place():
    """The same object comes back; the old formula, its parameters and nothing else are gone."""
    torch.manual_seed(0)
    block = Block().double()
    traced = fx.symbolic_trace(block)
    first, second = randomised(nn.RMSNorm(C).double()), randomised(nn.LayerNorm(C).double())
    (layer, value), (last, gelu) = nodes(traced.graph)
    layer.meta["mark"] = "kept"
    names = rewrite_graph_module(
        traced,
        [
            (site(layer, value, "layernorm", TENSORS[0]), first),
            (site(last, gelu, "rmsnorm", TENSORS[1]), second),
        ],
    )
    x = torch.randn(3, C).double()
    equal(expected(block, first, second, x), traced(x))
    assert names == ("norm_0", "norm_1")
    assert sorted(traced.state_dict()) == [
        "fc.bias",
        "fc.weight",
        "norm_0.weight",
        "norm_1.bias",
        "norm_1.weight",
    ]
    calls = [n for n in traced.graph.nodes if n.op.startswith("call_")]
    assert [str(n.target) for n in calls][::3] == ["fc", "norm_1"]
    assert next(n for n in calls if n.target == "norm_0").meta["mark"] == "kept"
    assert traced.fc is not None


def test_counter_of_the_old_norm_goes():
    """An in-place update has no users and is no dead code to fx: it would keep the old buffer."""
    traced = fx.symbolic_trace(Counting())
    node = next(n for n in traced.graph.nodes if n.target is F.batch_norm)
    roles = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    found = site(node, node.args[0], "batchnorm", {role: f"bn.{role}" for role in roles})
    rewrite_graph_module(traced, [(found, nn.Identity())])
    assert not traced.state_dict()
    x = torch.randn(3, C)
    assert torch.equal(traced(x), F.relu(x))


def test_tensor_read_elsewhere_stays():
    """Deleting it would break the other reader."""

    class Shared(Block):
        def forward(self, x):
            h = F.layer_norm(self.fc(x), (C,), self.weight, self.bias, 1e-5)
            return h + self.weight

    traced = fx.symbolic_trace(Shared())
    node = next(n for n in traced.graph.nodes if n.target is F.layer_norm)
    found = site(node, node.args[0], "layernorm", TENSORS[0])
    rewrite_graph_module(traced, [(found, nn.Identity())])
    assert "weight" in traced.state_dict()
    assert "bias" not in traced.state_dict()
    traced(torch.randn(3, C))


def test_unknown_node_changes_nothing():
    """A site of another graph must not leave this one half edited."""
    traced = fx.symbolic_trace(Block())
    (layer, value), _ = nodes(traced.graph)
    good = site(layer, value, "layernorm", TENSORS[0])
    other = Site(**{**vars(good), "call": CallSite("", "", None, Origin("x"), node="nowhere")})
    code = traced.code
    with pytest.raises(CannotRewrite):
        rewrite_graph_module(traced, [(good, nn.Identity()), (other, nn.Identity())])
    assert traced.code == code
    assert not hasattr(traced, "norm_0")


def exported(model: nn.Module, x: Tensor, dynamic: bool = True) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if dynamic else None
    return torch.export.export(model.eval(), (x,), dynamic_shapes=shapes)


def test_exported_program_is_rewritten_with_its_dynamic_sizes():
    """The program still takes other batch sizes, saves and loads; the given one is unchanged."""
    torch.manual_seed(0)
    block = Block().double()
    x = torch.randn(4, 7, C).double()
    program = exported(block, x)
    before = str(program.graph)
    first, second = randomised(nn.RMSNorm(C).double()), randomised(nn.LayerNorm(C).double())
    (layer, value), (last, gelu) = nodes(program.graph)
    changed = rewrite_exported(
        program,
        [
            (site(layer, value, "layernorm", TENSORS[0]), first),
            (site(last, gelu, "rmsnorm", TENSORS[1]), second),
        ],
    )
    assert isinstance(changed, torch.export.ExportedProgram)
    buffer = io.BytesIO()
    torch.export.save(changed, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for size in (2, 4, 9):
        x = torch.randn(size, 7, C).double()
        for result in (changed, loaded):
            equal(expected(block, first, second, x), result.module()(x))
    with pytest.raises((RuntimeError, AssertionError)):
        loaded.module()(torch.randn(65, 7, C).double())
    assert sorted(changed.state_dict) == [
        "fc.bias",
        "fc.weight",
        "norm_0.weight",
        "norm_1.bias",
        "norm_1.weight",
    ]
    assert changed.range_constraints == program.range_constraints
    assert str(program.graph) == before
    equal(block(x), program.module()(x))
    assert first.training


def test_exported_norm_with_buffers_and_sizes_of_its_own():
    """A norm that reads its input's size, and one with running statistics, are inlined as well."""

    class ByPosition(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.rand(C).double())
            self.register_buffer("hidden", torch.rand(C).double(), persistent=False)

        def forward(self, x):
            n, length = x.shape[0], x.shape[1]
            flat = x.reshape(n * length, C)
            return (flat + self.shift + self.hidden).reshape(n, length, C) / length

    torch.manual_seed(0)
    block = Block().double()
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(
        block.eval(), (torch.randn(4, 7, C).double(),), dynamic_shapes=shapes
    )
    (layer, value), (last, gelu) = nodes(program.graph)
    first, second = ByPosition(), randomised(nn.LayerNorm(C).double())
    changed = rewrite_exported(
        program,
        [
            (site(layer, value, "layernorm", TENSORS[0]), first),
            (site(last, gelu, "rmsnorm", TENSORS[1]), second),
        ],
    )
    buffer = io.BytesIO()
    torch.export.save(changed, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for size in ((2, 3), (5, 11)):
        x = torch.randn(*size, C).double()
        for result in (changed, loaded):
            equal(expected(block, first, second, x), result.module()(x))


def test_exported_batchnorm_with_statistics():
    """Running statistics are buffers: they go with the old norm, and come with the new one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()).double()
    randomised(model).eval()
    x = torch.randn(2, 3, 8, 8).double()
    program = exported(model, x)
    node = next(n for n in program.graph.nodes if "batch_norm" in str(n.target))
    roles = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    found = site(node, node.args[0], "batchnorm", {role: f"1.{role}" for role in roles})
    norm = randomised(nn.BatchNorm2d(6).double())
    changed = rewrite_exported(program, [(found, norm)])
    norm.eval()
    equal(model[2](norm(model[0](x))), changed.module()(x))
    assert not any(name.startswith("1.") for name in changed.state_dict)
    assert "norm_0.running_mean" in changed.state_dict


def test_program_that_updates_its_statistics_is_refused():
    """In train mode the program's outputs include the old norm's new statistics."""
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)).train()
    program = torch.export.export(model, (torch.randn(4, C),)).run_decompositions()
    node = next(n for n in program.graph.nodes if "batch_norm" in str(n.target))
    found = site(node, node.args[0], "batchnorm", {"weight": "1.weight", "bias": "1.bias"})
    with pytest.raises(CannotRewrite, match="statistics"):
        rewrite_exported(program, [(found, nn.LayerNorm(C))])


def test_exported_norm_becomes_nothing():
    """With the identity the value's own node is left, and keeps what is known of it."""
    block = Block().double()
    x = torch.randn(4, 7, C).double()
    program = exported(block, x)
    (layer, value), _ = nodes(program.graph)
    found = site(layer, value, "layernorm", TENSORS[0])
    changed = rewrite_exported(program, [(found, nn.Identity())])
    _, (_, gelu) = nodes(program.graph)
    assert "gelu" in str(gelu.target)
    h = F.gelu(block.fc(x))
    expected_output = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * block.gain
    equal(expected_output, changed.module()(x))
    assert "weight" not in changed.state_dict


class Twice(nn.Module):
    """Two functional norms of which one goes into the other, and a weight that gets a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.c = nn.Conv2d(4, 4, 1)
        for j in "12":
            setattr(self, f"w{j}", nn.Parameter(torch.rand(4) + 0.5))
            setattr(self, f"b{j}", nn.Parameter(torch.rand(4)))
            self.register_buffer(f"m{j}", torch.rand(4))
            self.register_buffer(f"v{j}", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.w)
        y = F.batch_norm(x, self.m1, self.v1, self.w1, self.b1).relu()
        z = F.batch_norm(y, self.m2, self.v2, self.w2, self.b2)
        return z.relu() * self.c(y).sigmoid()


@pytest.mark.parametrize("inside", [False, True])
def test_a_fold_in_place_is_undone(inside: bool) -> None:
    graph = fx.symbolic_trace(Twice().double().eval())
    model = nn.Sequential(nn.ReLU(), graph) if inside else graph
    model.eval()
    inputs = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    wanted, old, code = model(inputs), graph.graph, graph.code
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, report = ns.fold(model, inputs=(inputs,), inplace=True)
    assert len(report.plan.steps) == 2 and "w_bias" in dict(graph.named_parameters())
    torch.testing.assert_close(model(inputs), wanted)
    report.undo()
    assert graph.graph is old and graph.code == code
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(model(inputs), wanted)
