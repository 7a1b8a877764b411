"""export(): what is written, what is refused, and that planted faults do not get through."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import normsurgery as ns
from normsurgery.errors import (
    CannotRead,
    CannotRun,
    CannotTrace,
    NormsurgeryError,
    PromiseBroken,
    UnknownName,
    UsageError,
)
from normsurgery.exporting import exporting, optimising, preparing, writing
from normsurgery.exporting.annotating import MODULE, SOURCE
from normsurgery.exporting.eps import AS_ZERO, AT_EXPORT, find_eps
from normsurgery.exporting.facts import EpsFact
from normsurgery.exporting.half import cast_copy
from normsurgery.exporting.opsets import choose_opset
from normsurgery.exporting.refusals import require_inference
from normsurgery.exporting.tracing import trace
from normsurgery.exporting.translating import translate
from normsurgery.inputs import Inputs
from normsurgery.onnxfile.reading import all_nodes, read
from normsurgery.report import Report
from normsurgery.verifying import judge
from normsurgery.verifying.runners import run_float64, run_native

FEATURES = 6


class Block(nn.Module):
    """A module that calls its norms from a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES, eps=1e-12)
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.linear(self.norm(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.block = Block()
        self.head = nn.Linear(8 * FEATURES, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.drop(F.relu(self.bn(self.conv(x)))).mean(2)).flatten(1))


def net() -> Net:
    torch.manual_seed(3)
    made = Net()
    with torch.no_grad():
        made.bn.running_mean.normal_()
        made.bn.running_var.uniform_(0.5, 2.0)
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made.eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


def run_file(path: Path, *tensors: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    fed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, fed)]


def assert_same(path: Path, model: nn.Module, *tensors: Tensor) -> None:
    """The file computes what the model does, as well as it does."""
    truth = run_float64(model, Inputs(tensors), "eval", seed=0).outputs
    native = run_native(model, Inputs(tensors), "eval", seed=0).outputs
    for got, (name, exact) in zip(run_file(path, *tensors), truth.items(), strict=True):
        verdict = judge(got, exact, native[name])
        assert verdict.passed, verdict


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path, Report]:
    """A model in mixed modes, exported with a dynamic batch and verified."""
    model = net()
    model.train()
    model.block.eval()
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    report = ns.export(model, path, (images(1),), dynamic={0: "batch"})
    return model, path, report


# --- what is written ------------------------------------------------------------------------------


def test_a_model_is_exported_verified_and_its_report_saved(
    exported: tuple[Net, Path, Report],
) -> None:
    _, path, report = exported
    assert report.passed, str(report)
    assert report.verb == "export"
    assert report.evidence is not None
    assert report.evidence.stages
    assert report.onnx is not None
    assert report.onnx.path == str(path)
    assert report.onnx.inputs == {"x": "float32[batch, 3, 8, 8]"}
    assert report.onnx.outputs == {"output": "float32[batch, 4]"}
    assert report.onnx.operators == {"LayerNormalization": 1}
    assert report.onnx.bytes == path.stat().st_size
    assert [step.site.path for step in report.plan.steps] == ["bn", "block.norm"]
    assert report.keymap.edited
    assert {"onnx", "onnxruntime", "torch"} <= report.versions.keys()
    saved = Report.load(path.with_name("net.onnx.report.json"))
    assert saved.to_json() == report.to_json()


def test_every_module_that_was_switched_is_listed(exported: tuple[Net, Path, Report]) -> None:
    model, _, report = exported
    assert report.onnx is not None
    assert report.onnx.switched == ("", "conv", "bn", "drop", "head")
    assert [path for path, module in model.named_modules() if module.training] == list(
        report.onnx.switched
    )


def test_the_file_takes_other_batches(exported: tuple[Net, Path, Report]) -> None:
    _, path, _ = exported
    for batch in (1, 2, 7):
        assert_same(path, net(), images(batch))


def test_every_node_says_its_module_and_line(exported: tuple[Net, Path, Report]) -> None:
    model, path, _ = exported
    paths = dict(model.named_modules())
    told = [
        {entry.key: entry.value for entry in n.metadata_props} for n in all_nodes(onnx.load(path))
    ]
    assert told
    assert all(entry[MODULE] in paths for entry in told)
    assert all("tests/test_export.py:" in entry[SOURCE] for entry in told), told
    by_operator = dict(zip([n.op_type for n in onnx.load(path).graph.node], told, strict=True))
    assert by_operator["LayerNormalization"][MODULE] == "block.norm"
    assert by_operator["Conv"][MODULE] == "conv"
    assert by_operator["LayerNormalization"][SOURCE].endswith("F.relu(self.linear(self.norm(x)))")


def test_nodes_that_an_optimiser_made_get_the_metadata_of_their_neighbours() -> None:
    from normsurgery.exporting.annotating import annotate_nodes

    def node(operator: str, given: str, made: str, scopes: str = "") -> onnx.NodeProto:
        proto = onnx.helper.make_node(operator, [given], [made], name=made)
        if scopes:
            proto.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
        return proto

    nodes = [
        node("Identity", "x", "first"),
        node("Relu", "first", "known", "['', 'block', 'relu']"),
        node("Sqrt", "known", "behind"),
        node("Shape", "x", "size", "['', '_empty_nn_module_stack_from_metadata_hook', 'size']"),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [], [])
    model = onnx.helper.make_model(graph)
    annotate_nodes(model)
    modules = [{e.key: e.value for e in n.metadata_props}[MODULE] for n in model.graph.node]
    assert modules == ["block", "block", "block", ""]


def test_the_file_says_what_it_was_made_from(exported: tuple[Net, Path, Report]) -> None:
    _, path, _ = exported
    told = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert told["normsurgery.version"] == ns.__version__
    assert told["normsurgery.source"] == "Net"
    assert told["normsurgery.opset"] == "20"
    assert told["normsurgery.dtype"] == "fp32"
    assert told["normsurgery.dynamic"] == '["batch"]'
    assert told["normsurgery.inputs"] == '["x"]'
    assert len(told["normsurgery.plan"]) == 64


def state_of(model: nn.Module) -> dict[str, Any]:
    tensors = {name: t.detach().clone() for name, t in model.state_dict(keep_vars=True).items()}
    return {
        "bytes": {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        "modes": [module.training for module in model.modules()],
        "objects": [(id(m), sorted(vars(m)), len(m._forward_hooks)) for m in model.modules()],
        "parameters": [(id(p), p.requires_grad, p.grad is None) for p in model.parameters()],
    }


def random_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


class Counting(nn.Module):
    """Moves a buffer and keeps an activation in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.register_buffer("calls", torch.zeros(()))
        self.inner.conv.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept = self.inner(x)
        return self.kept


def test_the_model_and_the_random_states_stay_as_they_were(tmp_path: Path) -> None:
    model = Counting()
    model.inner.bn.train()
    model(images())
    model.kept = model.kept.detach()
    kept, before, drawn = model.kept, state_of(model), random_states()
    ns.export(model, tmp_path / "m.onnx", (images(),), hard=False)
    assert state_of(model) == before
    assert model.kept is kept
    assert random_states() == drawn


class Outputs(nn.Module):
    """Nothing, the same tensor twice, an input as it is, and a name that is also an input's."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        z = x * 2 + y

        @dataclass
        class Result:
            z: Tensor
            nothing: None
            again: Tensor
            x: Tensor

        return Result(z, None, z, x)


def test_outputs_of_a_dataclass_keep_their_names(tmp_path: Path) -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    report = ns.export(Outputs(), tmp_path / "o.onnx", {"x": x, "y": y}, dynamic={0: "n"})
    assert report.passed, str(report)
    assert report.onnx is not None
    assert list(report.onnx.outputs) == ["z", "again", "x_output"]
    z, again, passed = run_file(tmp_path / "o.onnx", x, y)
    assert torch.equal(z, again)
    assert torch.equal(passed, x)


class Caching(nn.Module):
    """As a language model: keeps a cache by default, as its configuration says."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.config = type("Config", (), {"use_cache": True})()

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits = self.linear(x)
        cache = object() if self.config.use_cache else None
        return {"logits": logits, "past_key_values": cache}


def test_a_model_that_keeps_a_cache_is_exported_without(tmp_path: Path) -> None:
    model = Caching()
    report = ns.export(model, tmp_path / "c.onnx", (torch.randn(2, 3),), verify=False)
    assert report.onnx is not None
    assert list(report.onnx.outputs) == ["logits"]
    assert model.config.use_cache


def test_a_graph_module_is_exported(tmp_path: Path) -> None:
    traced = fx.symbolic_trace(net())
    report = ns.export(traced, tmp_path / "g.onnx", (images(),), hard=False)
    assert report.passed, str(report)
    assert_same(tmp_path / "g.onnx", net(), images())


def test_an_exported_program_is_exported(tmp_path: Path) -> None:
    shapes = ({0: torch.export.Dim("n")},)
    program = torch.export.export(net(), (images(),), dynamic_shapes=shapes, strict=False)
    path = tmp_path / "p.onnx"
    report = ns.export(program, path, dynamic={0: "batch"}, hard=False)
    assert report.passed, str(report)
    assert report.onnx is not None
    assert report.onnx.inputs == {"x": "float32[batch, 3, 8, 8]"}
    assert [step.site.kind for step in report.plan.steps] == ["batchnorm", "layernorm"]
    assert_same(path, net(), images(5))
    fixed = torch.export.export(net(), (images(),), strict=False)
    with pytest.raises(CannotTrace, match=r"axis 0 of x is fixed to 2 in the exported program"):
        ns.export(fixed, tmp_path / "f.onnx", dynamic={0: "batch"})
    with pytest.raises(UsageError, match="its graph cannot be cast"):
        ns.export(fixed, tmp_path / "f.onnx", dtype="fp16")


class Sizes(nn.Module):
    """Returns numbers beside a tensor, and computes under no_grad."""

    def forward(self, x: Tensor, times: int = 3) -> tuple[int, Tensor, int]:
        with torch.no_grad():
            y = F.layer_norm(x, (3,))
        return times, y * times, x.shape[0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_numbers_that_a_program_returns_are_left_out(dynamic: bool, tmp_path: Path) -> None:
    shapes = ({0: torch.export.Dim("n")},) if dynamic else None
    program = torch.export.export(Sizes(), (X,), dynamic_shapes=shapes, strict=False)
    report = ns.export(program, tmp_path / "s.onnx", (X,), hard=False)
    assert report.passed, str(report)
    assert report.onnx is not None
    assert list(report.onnx.outputs) == ["1"]
    returned = program.module()(X)
    assert returned[0] == 3
    assert returned[2] == 2


def test_weights_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    report = ns.export(net(), path, (images(),), external_data=True, hard=False)
    assert report.passed, str(report)
    assert report.onnx is not None
    data = tmp_path / "big.onnx.data"
    assert report.onnx.external_data == data.name
    assert report.onnx.bytes == path.stat().st_size + data.stat().st_size
    assert_same(path, net(), images())
    ns.export(net(), path, (images(),), external_data=False, verify=False, force=True)
    assert not data.exists()
    assert_same(path, net(), images())


def test_weights_above_the_limit_go_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = onnx.helper.make_graph([], "g", [], [])
    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1000, np.float32), "w"))
    model = onnx.helper.make_model(graph)
    assert not writing.wants_external_data(model, None)
    monkeypatch.setattr(writing, "LARGE_FILE", 4000)
    assert writing.wants_external_data(model, None)
    with pytest.raises(UsageError, match="2 GiB at most"):
        writing.wants_external_data(model, False)


def test_without_a_path_the_class_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = ns.export(nn.Linear(3, 3), inputs=(torch.randn(2, 3),), verify=False)
    assert report.evidence is None
    assert sorted(os.listdir()) == ["linear.onnx", "linear.onnx.report.json"]


def test_no_fold_leaves_the_batch_norm_to_the_runtime(tmp_path: Path) -> None:
    report = ns.export(net(), tmp_path / "n.onnx", (images(),), fold=False, verify=False)
    assert report.onnx is not None
    assert not report.plan.steps
    assert report.onnx.operators == {"BatchNormalization": 1, "LayerNormalization": 1}
    assert [fact.eps for fact in report.onnx.eps] == [1e-5, 1e-12]
    assert_same(tmp_path / "n.onnx", net(), images())


def test_weights_that_are_nan_are_told(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight[0, 1] = float("nan")
    report = ns.export(model, tmp_path / "n.onnx", (torch.randn(2, 3),), verify=False)
    assert "weight has 1 values that are NaN" in report.notes


# --- dynamic axes ---------------------------------------------------------------------------------


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.softmax(-1) @ y.transpose(0, 1)


def test_axes_of_one_name_are_one_and_a_batch_of_one_is_no_fact(tmp_path: Path) -> None:
    dynamic = {"x": {0: "batch", 1: "width"}, "y": {-1: "width"}}
    inputs = {"x": torch.randn(1, 3), "y": torch.randn(5, 3)}
    report = ns.export(Two(), tmp_path / "t.onnx", inputs, dynamic=dynamic, hard=False)
    assert report.passed, str(report)
    assert report.onnx is not None
    assert report.onnx.inputs == {"x": "float32[batch, width]", "y": "float32[5, width]"}
    assert_same(tmp_path / "t.onnx", Two(), torch.randn(1, 8), torch.randn(5, 8))
    assert_same(tmp_path / "t.onnx", Two(), torch.randn(4, 1), torch.randn(5, 1))


class Positions(nn.Module):
    """A table of 12 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[:, : x.shape[1]]


def test_an_axis_is_as_long_as_the_model_allows(tmp_path: Path) -> None:
    inputs = (torch.randn(2, 5),)
    report = ns.export(
        Positions(), tmp_path / "p.onnx", inputs, dynamic={0: "batch", 1: "sequence"}, hard=False
    )
    assert report.passed, str(report)
    assert any("sequence is 12 at most" in note for note in report.notes), report.notes
    torch.manual_seed(0)
    (y,) = run_file(tmp_path / "p.onnx", torch.zeros(1, 12))
    assert y.shape == (1, 12)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 2:
            return x + 1
        return x - 1


class Pairs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 2, 3)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


X = torch.randn(2, 3)
UNTRACEABLE: list[tuple[nn.Module, tuple[Tensor, ...], Any, str]] = [
    (
        Fixed(),
        (X,),
        {0: "batch"},
        r"axis batch \(axis 0 of x\) is fixed to 2 .*test_export.py:\d+ in forward: if x.shape",
    ),
    (Pairs(), (X,), {0: "batch"}, r"batch .* cannot take every size: .*view\(-1, 2, 3\)"),
    (
        Two(),
        (X, torch.randn(5, 3)),
        {"x": {1: "a"}, "y": {1: "b"}},
        r"a \(axis 1 of x\).* must be equal at .*test_export.py.* Give both the name",
    ),
    (Branching(), (X,), None, r"depends on the values of its inputs .*if x.sum\(\) > 0"),
]


@pytest.mark.parametrize(("model", "tensors", "dynamic", "words"), UNTRACEABLE)
def test_what_cannot_be_traced_names_axis_and_line(
    model: nn.Module, tensors: tuple[Tensor, ...], dynamic: Any, words: str
) -> None:
    with pytest.raises(CannotTrace, match=words) as caught:
        trace(model, Inputs(tensors), dynamic)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


# --- what is refused ------------------------------------------------------------------------------


class Drawing(nn.Module):
    """Holds a module `inner` with one way of drawing random numbers."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = Called(draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


class Called(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


class NeverEval(nn.Dropout):
    def train(self, mode: bool = True) -> NeverEval:
        return super().train(True)


def in_train_mode(x: Tensor) -> Tensor:
    return F.batch_norm(x, torch.zeros(3), torch.ones(3), training=True)


def overflowing() -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(3))
    model[1].running_var.fill_(1e6)
    return model


def underflowing() -> nn.Module:
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.fill_(1e-9)
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(3, 3)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "dropout that drops": (
        lambda: Drawing(lambda x: F.dropout(x, 0.5, training=True)),
        {},
        CannotTrace,
        "draws random numbers in eval mode",
    ),
    "a dropout that stays in train mode": (
        lambda: nn.Sequential(nn.Linear(3, 3), NeverEval(0.5)),
        {},
        CannotTrace,
        "draws random numbers in eval mode",
    ),
    "numpy": (
        lambda: Drawing(lambda x: x * float(np.random.rand())),
        {},
        CannotTrace,
        "with another seed its output output is another",
    ),
    "batch norm without statistics": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)),
        {},
        CannotTrace,
        r"without running statistics: 1 .*--allow-batch-stats",
    ),
    "batch norm in train mode": (
        lambda: Drawing(in_train_mode),
        {"allow_batch_stats": True},
        CannotTrace,
        r"batch norm in train mode: inner .*training=False",
    ),
    "an old opset": (lambda: nn.Linear(3, 3), {"opset": 17}, UsageError, "from 18 to 24"),
    "a future opset": (lambda: nn.Linear(3, 3), {"opset": 25}, UsageError, "from 18 to 24"),
    "an unknown dtype": (lambda: nn.Linear(3, 3), {"dtype": "int8"}, UnknownName, "fp16, fp32"),
    "an unknown runner": (lambda: nn.Linear(3, 3), {"on": ("gpu",)}, UnknownName, "cuda"),
    "an unknown input": (
        lambda: nn.Linear(3, 3),
        {"dynamic": {"x": {0: "batch"}}},
        UnknownName,
        "Known: input",
    ),
    "an unknown axis": (
        lambda: nn.Linear(3, 3),
        {"dynamic": {2: "batch"}},
        UsageError,
        r"no axis 2 in any input \(input: \(2, 3\)\)",
    ),
    "no name for an axis": (
        lambda: nn.Linear(3, 3),
        {"dynamic": {0: "a batch"}},
        UsageError,
        "'a batch' cannot name the dynamic axis 0 of input",
    ),
    "one name for two sizes": (
        lambda: nn.Linear(3, 3),
        {"dynamic": {0: "n", 1: "n"}},
        UsageError,
        "both named n, and the example has 2 and 3",
    ),
    "an axis that cannot grow": (
        lambda: nn.Conv1d(1, 1, 1),
        {"dynamic": {0: "channels"}},
        CannotTrace,
        r"does not run with axis 0 of input \(channels\) at size 2: RuntimeError: .* Leave that",
    ),
    "inputs that do not fit": (
        lambda: nn.Linear(4, 4),
        {},
        CannotTrace,
        "Linear does not run on its inputs .*RuntimeError: .*Give inputs that it takes",
    ),
    "no values": (on_meta, {}, CannotRead, "meta device"),
    "a statistic that overflows": (
        overflowing,
        {"dtype": "fp16", "fold": False},
        UsageError,
        r"fp16 cannot hold this model: 1.running_var: 3 of 3 values are too large",
    ),
    "weights that vanish": (
        underflowing,
        {"dtype": "fp16"},
        UsageError,
        r"weight: 9 of 9 values are too small for fp16",
    ),
    "no kernel": (
        lambda: nn.Linear(3, 3),
        {"dtype": "bf16"},
        CannotRun,
        r"no kernel for Gemm .*bfloat16.* leave cpu out of on",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    build, options, error, words = REFUSED[case]
    inputs = {"no values": None, "an axis that cannot grow": (X[:1],)}.get(case, (X,))
    with pytest.raises(error, match=words):
        ns.export(build(), tmp_path / "m.onnx", inputs, verify=False, **options)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "draw",
    [
        torch.rand_like,
        torch.bernoulli,
        lambda x: x + torch.randn(3),
        lambda x: F.dropout(x, 0.5, training=True),
        lambda x: F.alpha_dropout(x, 0.5, training=True),
        lambda x: F.rrelu(x, training=True),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    ],
)
def test_a_random_operation_of_the_graph_is_named_with_its_module(
    draw: Callable[[Tensor], Tensor],
) -> None:
    program = trace(Drawing(draw), Inputs((X.sigmoid(),)))
    with pytest.raises(CannotTrace, match=r"draws random numbers in eval mode: inner \(.*\.py:\d+"):
        require_inference(program, allow_batch_stats=False)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.rrelu(x),
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3)),
        lambda x: x @ F.batch_norm(torch.arange(9.0).view(3, 3), None, None, training=True),
    ],
)
def test_what_only_might_draw_or_take_the_batch_is_fine(call: Callable[[Tensor], Tensor]) -> None:
    require_inference(trace(Drawing(call), Inputs((X,))), allow_batch_stats=False)


def test_batch_statistics_are_exported_where_that_is_asked_for(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    x = torch.randn(4, 3)
    path = tmp_path / "b.onnx"
    report = ns.export(model, path, (x,), allow_batch_stats=True, hard=False)
    assert report.passed, str(report)
    assert any("statistics of the batch, as asked for: 1 (" in note for note in report.notes)
    assert_same(path, model, x)


def test_bfloat16_that_the_opset_does_not_allow_is_refused(tmp_path: Path) -> None:
    words = r"Conv of conv does not take bfloat16 in opset 20\. It does from opset 22"
    with pytest.raises(UsageError, match=words):
        ns.export(net(), tmp_path / "m.onnx", (images(),), dtype="bf16", opset=20, verify=False)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "prepared", lambda *_: pytest.fail("work was done"))
    with pytest.raises(UsageError, match="no such directory"):
        ns.export(net(), tmp_path / "no" / "m.onnx")
    with pytest.raises(UsageError, match="is a directory"):
        ns.export(net(), tmp_path)
    for name in ("m.onnx", "m.onnx.data", "m.onnx.report.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UsageError, match=f"{name} exists already.*--force"):
            ns.export(net(), tmp_path / "m.onnx")
        (tmp_path / name).unlink()


# --- nothing is half written ----------------------------------------------------------------------


class Interrupted(BaseException):
    pass


def cut_off(model: onnx.ModelProto, path: Path) -> None:
    Path(path).write_bytes(b"half of it")
    raise Interrupted


def broken_report(self: Report) -> dict[str, Any]:
    raise Interrupted


@pytest.fixture(scope="module")
def prepared() -> tuple[Any, Any]:
    """A small model up to the point where its file is written."""
    asked = preparing.Asked(None, fold=False, allow_batch_stats=False)
    made = preparing.prepared(nn.Linear(3, 3), (X,), None, asked)
    return made, translate(made.program, 20)


# Without old files nothing is set aside, so there are two renames.
PLACES = [("file", False), ("report", False), (0, False), (1, False)]
PLACES += [("file", True), ("report", True), *((rename, True) for rename in range(5))]


@pytest.mark.parametrize(("place", "there"), PLACES)
def test_an_interrupted_write_leaves_what_was_there(
    place: str | int,
    there: bool,
    prepared: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted while the file or the report is written, or at one of the renames: three that
    set aside what is there, and two that put the new files into place."""
    names = ("m.onnx", "m.onnx.data", "m.onnx.report.json") if there else ()
    for name in names:
        (tmp_path / name).write_text(f"old {name}")
    monkeypatch.setattr(exporting, "prepared", lambda *_: prepared[0])
    monkeypatch.setattr(exporting, "translate", lambda *_: prepared[1])
    replace, renames = os.replace, iter(range(20))

    def failing(source: Any, final: Any) -> None:
        if next(renames) == place:
            raise Interrupted
        replace(source, final)

    monkeypatch.setattr(os, "replace", failing)
    if place == "file":
        monkeypatch.setattr(onnx, "save", cut_off)
    if place == "report":
        monkeypatch.setattr(Report, "to_json", broken_report)
    with pytest.raises(Interrupted):
        ns.export(nn.Linear(3, 3), tmp_path / "m.onnx", (X,), verify=False, force=there)
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert all((tmp_path / name).read_text() == f"old {name}" for name in names)


def test_a_file_that_fails_its_verification_does_not_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias is lost in the optimiser: outputs differ, and every norm has its eps."""
    honest = optimising.optimise

    def lossy(model: Any) -> None:
        honest(model)
        import onnx_ir as ir

        bias = model.graph.initializers["bias"]
        bias.const_value = ir.tensor(np.zeros(3, np.float32), name="bias")

    monkeypatch.setattr(optimising, "optimise", lossy)
    report = ns.export(nn.Linear(3, 3), tmp_path / "m.onnx", (X,), hard=False)
    assert not report.passed
    assert report.exit_code == 1
    assert sorted(os.listdir(tmp_path)) == ["m.failed.onnx", "m.failed.onnx.report.json"]
    assert report.onnx is not None
    assert report.onnx.path == str(tmp_path / "m.failed.onnx")
    assert any("m.onnx was not written" in note for note in report.notes)
    forced = ns.export(nn.Linear(3, 3), tmp_path / "m.onnx", (X,), hard=False, force=True)
    assert not forced.passed
    assert (tmp_path / "m.onnx").exists()


# --- every eps is there ---------------------------------------------------------------------------


class HandWritten(nn.Module):
    """A norm that ONNX has no operator for, with its eps added under the root."""

    def __init__(self, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.randn(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x / (x.pow(2).sum(-1, keepdim=True) + self.eps).sqrt()


def fifty(norm: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(*(norm() for _ in range(50)))


@pytest.fixture(scope="module")
def fifty_written() -> tuple[Any, onnx.ModelProto]:
    program = trace(fifty(HandWritten), Inputs((torch.randn(2, FEATURES),)))
    return program, translate(program, 20).optimised


def test_fifty_norms_have_fifty_eps(fifty_written: tuple[Any, onnx.ModelProto]) -> None:
    facts = find_eps(*fifty_written)
    assert [fact.site for fact in facts] == [str(index) for index in range(50)]
    assert all(fact.eps == 1e-12 and fact.found for fact in facts)
    assert len({fact.node for fact in facts}) == 50


@pytest.mark.parametrize("fault", ["removed", "changed"])
def test_one_eps_of_fifty_that_is_not_there_is_named(
    fault: str, fifty_written: tuple[Any, onnx.ModelProto]
) -> None:
    program, honest = fifty_written
    written = onnx.ModelProto()
    written.CopyFrom(honest)
    node = next(
        node
        for node in written.graph.node
        if node.op_type == "Add"
        and any(e.key == MODULE and e.value == "37" for e in node.metadata_props)
    )
    if fault == "removed":
        node.op_type = "Identity"
        del node.input[1]
    else:
        changed = onnx.numpy_helper.from_array(np.array(1e-11, np.float32), "other")
        written.graph.initializer.append(changed)
        node.input[1] = "other"
    lost = [fact for fact in find_eps(program, written) if not fact.found]
    assert lost == [EpsFact("37", 1e-12, "")]


def test_the_rules_that_delete_an_eps_make_the_export_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxscript's own rules, put back in."""
    from onnxscript.rewriter import _DEFAULT_REWRITE_RULES, RewriteRuleSet

    model = nn.Sequential(*(HandWritten() for _ in range(3)))
    inputs = (torch.randn(2, FEATURES),)
    path = tmp_path / "m.onnx"
    report = ns.export(model, path, inputs, verify=False)
    assert report.onnx is not None
    assert [fact.site for fact in report.onnx.eps] == ["0", "1", "2"]
    monkeypatch.setattr(optimising, "rules", lambda: RewriteRuleSet(list(_DEFAULT_REWRITE_RULES)))
    with pytest.raises(PromiseBroken, match=r"3 of 3 eps .*: 1e-12 of 0, 1e-12 of 1, 1e-12 of 2"):
        ns.export(model, tmp_path / "other.onnx", inputs, verify=False)
    assert not (tmp_path / "other.onnx").exists()


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, (FEATURES,), eps=1e-9),
    "rms_norm": lambda x: F.rms_norm(x, (FEATURES,), eps=1e-9),
    "group_norm": lambda x: F.group_norm(x, 2, eps=1e-9),
    "instance_norm": lambda x: F.instance_norm(x[None], eps=1e-9),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(FEATURES), torch.ones(FEATURES), eps=1e-9),
    "normalize": lambda x: F.normalize(x, eps=1e-9),
    "normalize p=1": lambda x: F.normalize(x, p=1, eps=1e-9),
    "rsqrt of a mean of squares": lambda x: x * torch.rsqrt(x.square().mean(-1, True) + 1e-9),
    "power": lambda x: x * ((x * x).mean(-1, True) + 1e-9).pow(-0.5),
    "variance": lambda x: x / (x.var(-1, keepdim=True) + 1e-9).sqrt(),
    "deviation": lambda x: x / (x.std(-1, keepdim=True) + 1e-9),
    "var_mean": lambda x: x / (torch.var_mean(x, -1, keepdim=True)[0] + 1e-9).sqrt(),
    "number first": lambda x: x / (1e-9 + x.norm(dim=-1, keepdim=True)),
    "a tensor": lambda x: x / (x.norm(dim=-1, keepdim=True) + torch.tensor(1e-9)),
    "clamp": lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-9),
    "maximum": lambda x: x / torch.maximum(x.norm(dim=-1, keepdim=True), torch.tensor(1e-9)),
    "upcast": lambda x: x / (x.double().pow(2).mean(-1, True).float() + 1e-9).sqrt(),
}


class All(nn.Module):
    """Several calls, each in a module of its own, on one input."""

    def __init__(self, calls: dict[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.each = nn.ModuleDict({name: Called(call) for name, call in calls.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: module(x) for name, module in self.each.items()}


def test_every_spelling_of_an_eps_is_seen_and_kept() -> None:
    program = trace(All(SPELLINGS), Inputs((torch.randn(4, FEATURES),)))
    facts = find_eps(program, translate(program, 20).optimised)
    assert [fact.site.removeprefix("each.") for fact in facts] == list(SPELLINGS)
    assert {np.float32(fact.eps) for fact in facts} == {np.float32(1e-9)}
    assert all(fact.found and fact.node not in (AT_EXPORT, AS_ZERO) for fact in facts), facts


def eps_of(model: nn.Module, *tensors: Tensor) -> list[EpsFact]:
    program = trace(model, Inputs(tensors))
    return list(find_eps(program, translate(program, 20).optimised))


class Guarded(nn.Module):
    """A norm and a draw in regions that torch.export keeps as graphs of their own."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.call(x.exp())
        return y * 2


def test_an_eps_under_autocast_is_seen_and_kept() -> None:
    (fact,) = eps_of(Guarded(SPELLINGS["variance"]), torch.randn(2, FEATURES))
    assert fact.eps == 1e-9
    assert fact.found


def test_a_draw_under_autocast_is_refused() -> None:
    program = trace(Guarded(lambda x: F.dropout(x, 0.5, training=True)), Inputs((X,)))
    with pytest.raises(CannotTrace, match="dropout draws random numbers"):
        require_inference(program, allow_batch_stats=False)


def test_an_eps_that_is_an_argument_of_none_is_that_of_the_machine() -> None:
    (fact,) = eps_of(nn.RMSNorm(FEATURES), torch.randn(2, FEATURES))
    assert fact.eps == torch.finfo(torch.float32).eps
    assert fact.found


def test_a_norm_of_a_weight_is_computed_at_export() -> None:
    def call(x: Tensor) -> Tensor:
        return x @ (weight / (weight.norm(dim=0, keepdim=True) + 1e-12))

    weight = torch.randn(FEATURES, FEATURES)
    (fact,) = eps_of(Drawing(call), torch.randn(2, FEATURES))
    assert fact == EpsFact("inner", 1e-12, AT_EXPORT)


def test_an_eps_that_half_precision_has_no_number_for_is_told() -> None:
    (fact,) = eps_of(nn.Sequential(HandWritten(1e-12)).half(), torch.randn(2, FEATURES).half())
    assert fact == EpsFact("0", 1e-12, AS_ZERO)
    (fact,) = eps_of(HandWritten(1e-5).half(), torch.randn(2, FEATURES).half())
    assert fact.node.startswith("node_")


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.norm(x) + self.norm(x * 2)


def test_norms_that_are_one_computation_share_their_node() -> None:
    facts = eps_of(Twice(), torch.randn(2, FEATURES))
    assert [fact.site for fact in facts] == ["norm", "norm", "norm"]
    assert facts[0].node == facts[1].node != facts[2].node
    assert all(fact.found for fact in facts)


# --- the optimiser --------------------------------------------------------------------------------

EXACT: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "+ 1e-9": (lambda x: x + 1e-9, ["Add"]),
    "- 1e-9": (lambda x: x - 1e-9, ["Sub"]),
    "* (1 + 1e-6)": (lambda x: x * (1 + 1e-6), ["Mul"]),
    "/ (1 + 1e-6)": (lambda x: x / (1 + 1e-6), ["Div"]),
    "+ 0": (lambda x: (x + 0.0).exp(), ["Exp"]),
    "- 0": (lambda x: (x - 0.0).sin(), ["Sin"]),
    "* 1": (lambda x: (x * 1.0).cos(), ["Cos"]),
    "/ 1": (lambda x: (x / 1.0).atan(), ["Atan"]),
    "1 x": (lambda x: (1.0 * x).tan(), ["Tan"]),
    "bounded from below": (lambda x: x.clamp(min=0.5), ["Max"]),
    "bounded from above": (lambda x: x.clamp(max=0.5), ["Min"]),
    "bounded on both sides": (lambda x: x.clamp(-0.5, 0.5), ["Clip"]),
    "integers": (lambda x: x.long().clamp(min=1), ["Cast", "Clip"]),
}


def test_only_what_changes_nothing_is_taken_out() -> None:
    calls = {name: call for name, (call, _) in EXACT.items()}
    written = translate(trace(All(calls), Inputs((X,))), 20).optimised
    found: dict[str, list[str]] = {name: [] for name in EXACT}
    for node in written.graph.node:
        module = next(e.value for e in node.metadata_props if e.key == MODULE)
        found[module.removeprefix("each.")].append(node.op_type)
    assert found == {name: operators for name, (_, operators) in EXACT.items()}


def test_infinity_is_bounded_as_in_torch(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, float("inf"), -2.0], [float("nan"), 0.0, 1.0], [0.0, 0.0, 0.0]])
    ns.export(Drawing(F.normalize), tmp_path / "n.onnx", (X,), dynamic={0: "n"}, verify=False)
    (y,) = run_file(tmp_path / "n.onnx", x)
    verdict = judge(y, F.normalize(x.double()) + 1)
    assert verdict.passed, verdict


# --- opsets and types -----------------------------------------------------------------------------

OPSETS: list[tuple[Callable[[], nn.Module], Tensor, torch.dtype, int, str]] = [
    (lambda: nn.Linear(3, 3), X, torch.float32, 20, "the default"),
    (lambda: nn.LayerNorm(3), X, torch.float32, 20, "the default"),
    (lambda: nn.RMSNorm(3), X, torch.float32, 23, "the first with RMSNormalization"),
    (lambda: nn.RMSNorm(3), X, torch.float16, 20, "is kept for float32"),
    (lambda: nn.RMSNorm(3), X, torch.bfloat16, 20, "is kept for float32"),
    (lambda: nn.Linear(3, 3), X, torch.bfloat16, 20, "the default"),
    (lambda: nn.Conv2d(3, 3, 1), images(), torch.float32, 20, "the default"),
    (lambda: nn.Conv2d(3, 3, 1), images(), torch.bfloat16, 22, "conv2d takes bfloat16"),
    (lambda: nn.AvgPool2d(2), images(), torch.bfloat16, 22, "avg_pool2d takes bfloat16"),
    (lambda: nn.InstanceNorm2d(3), images(), torch.bfloat16, 22, "instance_norm takes bfloat16"),
]


@pytest.mark.parametrize(("build", "x", "dtype", "opset", "reason"), OPSETS)
def test_the_opset_is_what_the_model_needs(
    build: Callable[[], nn.Module], x: Tensor, dtype: torch.dtype, opset: int, reason: str
) -> None:
    program = trace(build().to(dtype), Inputs((x.to(dtype),)))
    chosen, said = choose_opset(program, None)
    assert chosen == opset
    assert reason in said
    assert choose_opset(program, 19) == (19, "asked for")


def test_an_opset_that_is_asked_for_is_written(tmp_path: Path) -> None:
    for opset in (18, 24):
        path = tmp_path / f"{opset}.onnx"
        report = ns.export(nn.RMSNorm(3), path, (X,), opset=opset, verify=False)
        assert report.onnx is not None
        assert report.onnx.opset == opset == read(path).opset
        assert report.onnx.opset_reason == "asked for"


def test_half_precision_is_proven_against_the_float32_model(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "h.onnx"
    report = ns.export(model, path, (images(),), dtype="fp16", dynamic={0: "batch"})
    assert report.passed, str(report)
    assert report.onnx is not None
    assert report.onnx.dtype == "float16"
    assert report.onnx.inputs == {"x": "float16[batch, 3, 8, 8]"}
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert weights["head.weight"].dtype == np.float16
    assert np.array_equal(weights["head.weight"], model.head.weight.detach().half().numpy())
    assert model.head.weight.dtype == torch.float32


def test_a_cast_keeps_what_it_can_and_tells_what_it_loses() -> None:
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight[0, 0] = 1e-9
    model.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    made, notes = cast_copy(model, torch.float16)
    assert made.mask.tolist() == [0.0, -float("inf")]
    assert len(notes) == 1
    assert notes[0].startswith("1 tensors have values too small for full precision in fp16")
    assert notes[0].endswith("weight: 1 of 9 values")
    assert model.weight.dtype == torch.float32
    norm, _ = cast_copy(nn.RMSNorm(3), torch.float16)
    assert norm.eps == torch.finfo(torch.float32).eps


def test_every_error_is_one_of_ours() -> None:
    assert all(issubclass(error, NormsurgeryError) for _, _, error, _ in REFUSED.values())


class Remembering(nn.Module):
    """Adds what it has seen, and keeps a part of it."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(FEATURES))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.seen
        if self.in_place:
            self.seen.mul_(0.9).add_(x.mean(0))
        else:
            self.seen = self.seen * 0.9 + x.mean(0)
        return y


class Tallying(nn.Module):
    """Writes a buffer that no output reads, and one that it writes back as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("ramp", torch.arange(float(FEATURES)))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.ramp.copy_(torch.arange(float(FEATURES)))
        return x + self.ramp


class Summing(nn.Module):
    """Gives the very buffer that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.mean(0)
        return self.total


class Numbered(nn.Module):
    """State that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Remembering(in_place=True), "writes seen in its eval forward"),
        (nn.Sequential(Remembering(in_place=False), nn.Linear(FEATURES, 2)), "writes 0.seen"),
        (Summing(), "writes total"),
        (Numbered(), "keeps what is no tensor"),
    ],
)
def test_state_from_call_to_call_is_refused_by_its_name(
    model: nn.Module, said: str, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CannotTrace, match=f"{said}.*Pass that state as an input"):
        ns.export(model, tmp_path / "m.onnx", (torch.randn(3, FEATURES),))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_state_of_an_exported_program_is_refused(tmp_path: Path) -> None:
    x = torch.randn(3, FEATURES)
    program = torch.export.export(Remembering(in_place=True), (x,), strict=False)
    with pytest.raises(CannotTrace, match="writes seen"):
        ns.export(program, tmp_path / "m.onnx", (x,))


def test_what_a_call_writes_and_no_output_reads_is_told(tmp_path: Path) -> None:
    report = ns.export(Tallying(), tmp_path / "m.onnx", (torch.randn(3, FEATURES),))
    assert report.evidence is not None and report.evidence.passed
    assert [note for note in report.notes if "writes" in note] == [
        "the eval forward also writes calls; the file does not"
    ]


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) + 1


def test_a_model_that_works_in_place_on_its_input_is_exported(tmp_path: Path) -> None:
    x = torch.randn(3, FEATURES)
    kept = x.clone()
    report = ns.export(Doubling(), tmp_path / "m.onnx", (x,))
    assert report.evidence is not None and report.evidence.passed
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dynamic", [[0], "batch", True])
def test_dynamic_that_is_no_table_is_refused(dynamic: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dynamic is .* Give \{0: 'batch'\}"):
        ns.export(nn.Linear(3, 2), tmp_path / "m.onnx", (torch.randn(3, 3),), dynamic=dynamic)


def test_a_runner_may_be_given_by_its_name_alone(tmp_path: Path) -> None:
    x = torch.randn(3, 3)
    report = ns.export(
        nn.Linear(3, 2), tmp_path / "m.onnx", (x,), on="cpu", require_runner="cpu", hard=False
    )
    assert report.evidence is not None and report.evidence.required == ("cpu",)
    with pytest.raises(UnknownName, match="unknown runner 'gpu'"):
        ns.export(nn.Linear(3, 2), tmp_path / "n.onnx", (x,), on="cpu, gpu")


class Conditional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))
        return y


def test_torch_cond_is_refused_and_goes_on_working(tmp_path: Path) -> None:
    x = torch.randn(3, 3)
    with pytest.raises(CannotTrace, match=r"Conditional branches with torch\.cond"):
        ns.export(Conditional(), tmp_path / "m.onnx", (x,))
    program = torch.export.export(Conditional(), (x,), strict=False)
    with pytest.raises(CannotTrace, match=r"control flow on values \(cond\)"):
        ns.export(program, tmp_path / "m.onnx", (x,), fold=False)


def test_torchscript_cannot_be_traced() -> None:
    x = torch.randn(3, 3)
    with pytest.raises(CannotTrace, match=r"is TorchScript.*the Python model"):
        trace(torch.jit.trace(nn.Linear(3, 2), x), Inputs((x,), {}))
