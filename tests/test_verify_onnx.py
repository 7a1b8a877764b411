"""verify() where a side is ONNX: what is asked first, on which inputs, and what is found inside."""

import hashlib
import json
import math
import random

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx_cases.graphs import graph, node, with_attribute, with_weight
from torch import Tensor, nn

from normsurgery.errors import UsageError
from normsurgery.inputs import Inputs
from normsurgery.onnxfile.reading import of_proto
from normsurgery.onnxfile.sessions import Session
from normsurgery.verifying import Evidence, judge, verify
from normsurgery.verifying.axes import Axis, dynamic_axes, sizes_to_try
from normsurgery.verifying.conversion import conversion
from normsurgery.verifying.exported import verify_export
from normsurgery.verifying.graph_inputs import inputs_of
from normsurgery.verifying.hard_inputs import inputs_of_a_graph
from normsurgery.verifying.inside import look_inside
from normsurgery.verifying.rounding import losses_of_rounding
from normsurgery.verifying.runners import run_float64, run_native
from normsurgery.verifying.shaking import summed
from normsurgery.verifying.sources import torch_source

FLOAT = torch.float32
ROWS = {"x": (FLOAT, ["batch", 16])}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Linear, LayerNorm, Linear, LayerNorm; parameters far from 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(16, 16), nn.LayerNorm(16)
        self.fc2, self.norm2 = nn.Linear(16, 16), nn.LayerNorm(16)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(drawn(*parameter.shape, seed=index) / 3 + (parameter.dim() < 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.fc1(x))
        return self.norm2(self.fc2(y).relu())


def net_graph() -> onnx.ModelProto:
    weights = dict(Net().named_parameters())
    return graph(
        [
            node("Gemm", "x fc1.weight fc1.bias", "a", transB=1),
            node("LayerNormalization", "a norm1.weight norm1.bias", "b", epsilon=1e-5),
            node("Gemm", "b fc2.weight fc2.bias", "c", transB=1),
            node("Relu", "c", "d"),
            node("LayerNormalization", "d norm2.weight norm2.bias", "y", epsilon=1e-5),
        ],
        ROWS,
        {"y": (FLOAT, ["batch", 16])},
        weights,
    )


X = (drawn(4, 16, seed=9),)


@pytest.fixture(scope="module")
def good() -> Evidence:
    return verify(Net(), net_graph(), X)


def test_a_right_graph_passes_at_every_stage_and_inside(good):
    assert good.passed, str(good)
    names = [(stage.name, stage.runner) for stage in good.stages]
    levels = [(f"onnxruntime {level}", "cpu") for level in ("off", "basic", "extended", "all")]
    assert names == [("graph in float64", "float64"), *levels]
    assert all(stage.verdict.passed for stage in good.stages)
    assert all(sum(stage.operators.values()) == 2 for stage in good.stages[:2])
    assert [value.value for value in good.inner] == ["a", "b", "c", "d", "y"]
    assert good.coverage is not None and good.coverage.share == 1
    assert good.coverage.corresponding == 5
    assert all(value.total_ulps >= 0 for value in good.inner)


def test_the_evidence_of_a_graph_survives_json(good):
    data = json.loads(json.dumps(good.to_json(), allow_nan=False))
    again = Evidence.from_json(data)
    assert again.to_json() == good.to_json() and again.passed
    assert again.inner[0].total_ulps == good.inner[0].total_ulps


def test_every_kind_of_hard_input_is_run(good):
    cases = {comparison.case for comparison in good.comparisons}
    assert {"example", "zeros", "mean 10000", "one NaN", "one Inf", "1e19", "1e-20"} <= cases
    assert {"batch 1", "batch 2", "batch 7", "batch 17"} <= cases


@pytest.mark.parametrize("name", ("fc1.weight", "norm1.bias", "norm2.weight"))
def test_one_weight_off_by_a_thousandth_is_caught(name):
    def off(value: Tensor) -> Tensor:
        value.view(-1)[5] *= 1 + 2**-10
        return value

    evidence = verify(Net(), with_weight(net_graph(), name, off), X, hard=False)
    failed = {stage.name for stage in evidence.stages if stage.verdict.passed is False}
    assert "graph in float64" in failed and not evidence.passed


@pytest.mark.parametrize("source", (Net, net_graph), ids=("module", "file"))
def test_an_eps_that_only_the_norms_own_hard_inputs_show_is_caught_there(source):
    wrong = with_attribute(net_graph(), "LayerNormalization", 1, epsilon=1.01e-5)
    evidence = verify(source(), wrong, X)
    outputs = [c for c in evidence.comparisons if c.verdict.passed is False]
    inner = {value.value for value in evidence.inner if value.verdict.passed is False}
    assert not outputs and inner == {"y"}
    assert "epsilon" in " ".join(evidence.failures)


def in_half(model: nn.Module) -> onnx.ModelProto:
    program = torch.onnx.export(
        model.half().eval(), (X[0].half(),), dynamo=True, opset_version=20, verbose=False
    )
    assert program is not None
    return program.model_proto


def test_the_rounding_to_half_is_a_stage_of_its_own():
    stages = {stage.name: stage for stage in verify(Net(), in_half(Net()), X, hard=False).stages}
    found = stages["conversion to float16"]
    assert found.runner == "float64" and found.verdict.passed and found.verdict.max_error > 0
    assert "conversion to float16" not in {
        stage.name for stage in verify(Net(), net_graph(), X).stages
    }


def test_a_conversion_that_changes_more_than_rounding_fails_at_its_stage():
    changed = Net()
    with torch.no_grad():
        changed.fc2.weight[3] *= 1.5
    source = torch_source(changed, torch.float16)
    assert conversion(Net(), torch_source(Net(), torch.float16), Inputs(X), 0).verdict.passed
    assert conversion(Net(), source, Inputs(X), 0).verdict.passed is False


def test_train_mode_and_gradients_are_no_questions_for_a_graph():
    with pytest.raises(UsageError, match="no train mode"):
        verify(Net(), net_graph(), X, modes=("eval", "train"))
    with pytest.raises(UsageError, match="no gradients"):
        verify(Net(), net_graph(), X, gradients=True)


def fingerprint(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    grads = [p.grad is None for p in model.parameters()]
    state = (torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes())
    found.update(repr((modes, hooks, grads, random.getstate())).encode() + b"".join(state))
    return found.hexdigest()


def bn_graph(model: nn.BatchNorm2d) -> onnx.ModelProto:
    return graph(
        [node("BatchNormalization", "x weight bias mean var", "y", epsilon=1e-5)],
        {"x": (FLOAT, ["batch", 4, 3, 3])},
        {"y": (FLOAT, ["batch", 4, 3, 3])},
        {
            "weight": model.weight,
            "bias": model.bias,
            "mean": model.running_mean,
            "var": model.running_var,
        },
    )


def test_nothing_of_the_users_is_touched():
    model = nn.BatchNorm2d(4).train()
    model(drawn(8, 4, 3, 3))  # statistics and the number of batches are not the initial ones
    file, x = bn_graph(model), drawn(2, 4, 3, 3)
    kept, before = x.clone(), fingerprint(model)
    content = file.SerializeToString(deterministic=True)
    evidence = verify(model, file, (x,))
    assert evidence.passed, str(evidence)
    assert fingerprint(model) == before and torch.equal(x, kept)
    assert file.SerializeToString(deterministic=True) == content


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.noise = nn.Identity(), nn.Sequential(nn.Identity(), Draws())

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.first(x))


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-3 * torch.randn_like(x)


def identity_graph() -> onnx.ModelProto:
    return graph([node("Identity", "x", "y")], ROWS, {"y": (FLOAT, ["batch", 16])})


def test_a_source_that_draws_random_numbers_fails_and_the_module_is_named():
    evidence = verify(Noisy(), identity_graph(), X, hard=False)
    found = [c for c in evidence.comparisons if c.quantity == "randomness"]
    assert len(found) == 1 and found[0].verdict.passed is False
    assert "noise.1, a Draws" in found[0].verdict.reason


class OverTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


def over_the_batch_graph() -> onnx.ModelProto:
    return graph(
        [node("ReduceMean", "x axes", "mean", keepdims=1), node("Sub", "x mean", "y")],
        ROWS,
        {"y": (FLOAT, ["batch", 16])},
        {"axes": [0]},
    )


def test_a_sample_that_depends_on_its_batch_is_a_failure_unless_it_is_meant():
    model = nn.Sequential(nn.Identity(), OverTheBatch())
    evidence = verify(model, over_the_batch_graph(), X)
    failed = [c for c in evidence.comparisons if c.verdict.passed is False]
    assert [c.quantity for c in failed] == ["batch dependence"]
    assert "depends on its batch" in failed[0].verdict.reason
    assert "1, a OverTheBatch" in failed[0].verdict.reason
    file = of_proto(over_the_batch_graph())
    meant = verify_export(model, Inputs(X), file, allow_batch_stats=True)
    assert meant.passed and any("depends on its batch" in note for note in meant.notes)


def test_two_runs_of_a_graph_must_agree():
    file = identity_graph()
    file.graph.node[0].output[0], file.graph.node[0].name = "z", "node_z"
    file.graph.node.extend(
        [
            onnx.helper.make_node("RandomNormalLike", ["x"], ["noise"], scale=1e-2),
            node("Add", "z noise", "y"),
        ]
    )
    evidence = verify(nn.Identity(), file, X, hard=False)
    assert any(c.quantity == "two runs" for c in evidence.comparisons)
    assert not evidence.passed


@pytest.mark.parametrize(
    ("values", "lost"),
    [
        ([1.0, 70000.0], True),
        ([1e-9, 3e-9], True),
        ([2e-7, 3e-7], True),
        ([1.0, 1e-9, 0.3], False),
        ([0.0, 0.0], False),
        ([60000.0, 1e-3], False),
        ([math.inf, 1.0], False),
    ],
)
def test_what_rounding_destroys_is_named_by_tensor(values, lost):
    model = nn.BatchNorm1d(len(values))
    model.running_var.copy_(torch.tensor(values))
    found = losses_of_rounding(model, torch.float16)
    assert [c.quantity for c in found] == (["rounding of running_var"] if lost else [])


def axis(**facts: object) -> Axis:
    return Axis(**{"name": "n", "places": ((0, 1),), "size": 8, **facts})  # type: ignore[arg-type]


def test_sizes_of_axes_are_small_odd_and_at_their_bounds():
    assert list(sizes_to_try(axis(places=((0, 0),), size=4))) == [1, 2, 7, 17]
    assert list(sizes_to_try(axis())) == [1, 2, 9, 17]
    assert list(sizes_to_try(axis(low=2, high=64))) == [1, 2, 9, 17, 64]
    assert list(sizes_to_try(axis(low=5, high=8))) == [5]


def test_only_dynamic_axes_vary_and_all_inputs_that_share_one_vary_together():
    file = of_proto(
        graph(
            [node("Add", "x y", "z")],
            {"x": (FLOAT, ["batch", "length", 3]), "y": (FLOAT, ["batch", 1, 3])},
            {"z": (FLOAT, ["batch", "length", 3])},
        )
    )
    inputs = Inputs((drawn(4, 6, 3),), {"y": drawn(4, 1, 3)})
    axes = dynamic_axes(file, inputs, ("x", "y"))
    assert [(a.name, a.places, a.size) for a in axes] == [
        ("batch", ((0, 0), (1, 0)), 4),
        ("length", ((0, 1),), 6),
    ]
    cases = {case.label: case.inputs for case in inputs_of_a_graph(inputs, axes)}
    assert cases["batch 7"].kwargs["y"].shape == (7, 1, 3)
    assert cases["length 7"].args[0].shape == (4, 7, 3)
    assert all(case.args[0].shape[2] == 3 for case in cases.values())


def test_hard_inputs_are_what_their_labels_say_and_what_the_type_can_hold():
    cases = {c.label: c.inputs.args[0] for c in inputs_of_a_graph(Inputs(X), ())}
    assert int(cases["one NaN"].isnan().sum()) == 1 and int(cases["one Inf"].isinf().sum()) == 1
    sizes = cases["300 to 60000"].abs()
    assert float(sizes.min()) >= 300 and float(sizes.max()) <= 6e4
    assert not bool(cases["1e19"].square().sum().isfinite())
    half = {c.label for c in inputs_of_a_graph(Inputs((X[0].half(),)), ())}
    assert "300 to 60000" in half and not half & {"1e19", "1e-20"}
    ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.ones(1, 4, dtype=torch.long)
    tokens = inputs_of_a_graph(Inputs((ids, mask)), (), rows={0: 9}, padding=1)
    padded = next(c.inputs.args for c in tokens if c.label == "padding")
    assert padded[0][0, 2:].tolist() == [1, 1] and padded[1].tolist() == [[1, 1, 0, 0]]


def test_inputs_of_a_graph_alone_fit_it():
    table = drawn(5, 16)
    file = of_proto(
        graph(
            [node("Gather", "table ids", "rows"), node("Add", "rows x", "y")],
            {"ids": (torch.int64, ["batch", "length"]), "x": (FLOAT, ["batch", "length", 16])},
            {"y": (FLOAT, ["batch", "length", 16])},
            {"table": table},
        )
    )
    given = inputs_of(file)
    assert given.kwargs["ids"].shape == (2, 8) and int(given.kwargs["ids"].max()) < 5
    again = onnx.ModelProto()
    again.CopyFrom(file.proto)
    assert verify(file, again).passed


class Fragile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise RuntimeError("wants more than one")
        return x


def test_what_the_source_refuses_is_not_applicable_and_alone_no_pass():
    evidence = verify(Fragile(), identity_graph(), X)
    left = {item.case: item.reason for item in evidence.left_out}
    assert "wants more than one" in left["batch 1"] and evidence.passed
    alone = verify(Fragile(), identity_graph(), (drawn(1, 16),), hard=False)
    assert not alone.passed and "wants more than one" in " ".join(alone.failures)


def test_a_nan_where_the_source_has_none_never_passes_and_the_other_way_round():
    swallowed = graph(
        [node("IsNaN", "x", "bad"), node("Where", "bad zero x", "y")],
        ROWS,
        {"y": (FLOAT, ["batch", 16])},
        {"zero": 0.0},
    )
    failed = {
        c.case for c in verify(nn.Identity(), swallowed, X).comparisons if c.verdict.passed is False
    }
    assert failed == {"one NaN"}


def test_a_runner_that_is_not_there_is_not_run_and_required_it_is_a_failure():
    evidence = verify(Net(), net_graph(), X, on=("cpu", "tensorrt"), hard=False)
    assert evidence.passed
    assert [item.runner for item in evidence.left_out if item.kind == "not run"] == ["tensorrt"]
    required = verify(Net(), net_graph(), X, require_runner=("tensorrt",), hard=False)
    assert not required.passed and "tensorrt" in required.failures[-1]


def test_runs_are_saved_and_judged_later(tmp_path):
    path, wrong = tmp_path / "run.safetensors", tmp_path / "wrong.safetensors"
    verify(Net(), net_graph(), X, save=path)
    assert verify(Net(), path).passed
    spoiled = with_weight(net_graph(), "fc2.bias", lambda value: value + 1e-3)
    verify(Net(), spoiled, X, save=wrong)
    assert not verify(Net(), wrong).passed


def test_an_inner_value_is_judged_by_its_own_error(monkeypatch):
    """A kernel that computes badly is found; what comes after it computes well from there."""
    honest = Session.run

    def spoiled(self, feeds, wanted=()):
        found = honest(self, feeds, wanted)
        if "b" in found:
            below = Session(after_b(), level="off", also=["c", "d"])
            found["b"] = found["b"] * (1 + 2**-12)
            found |= honest(below, {"b": found["b"]})
        return found

    def after_b() -> onnx.ModelProto:
        whole = net_graph()
        del whole.graph.node[:2]
        value = onnx.helper.make_tensor_value_info
        del whole.graph.input[:]
        whole.graph.input.append(value("b", onnx.TensorProto.FLOAT, ["batch", 16]))
        return whole

    monkeypatch.setattr(Session, "run", spoiled)
    inside = look_inside(of_proto(net_graph()), Inputs(X), order=("x",))
    failed = [value.value for value in inside.values if value.verdict.passed is False]
    assert failed == ["b"]
    far = {value.value for value in inside.values if value.total_ulps > 100}
    assert {"b", "c"} <= far


class Upcast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rms_graph(upcast: bool) -> onnx.ModelProto:
    half, wide = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    first, last = ("wide", "wider") if upcast else ("x", "y")
    nodes = [
        node("Mul", f"{first} {first}", "square"),
        node("ReduceMean", "square axes", "moment", keepdims=1),
        node("Add", "moment eps", "shifted"),
        node("Sqrt", "shifted", "root"),
        node("Div", f"{first} root", last),
    ]
    if upcast:
        nodes = [node("Cast", "x", "wide", to=wide), *nodes, node("Cast", "wider", "y", to=half)]
    port = (torch.float16, ["batch", 16])
    eps = torch.tensor(1e-6) if upcast else torch.tensor(1e-6).half()
    return graph(nodes, {"x": port}, {"y": port}, {"axes": [-1], "eps": eps})


def test_a_lost_upcast_that_the_cpu_hides_is_found_by_rounding_every_operation():
    x = (X[0].half(),)
    assert verify(Upcast(), rms_graph(upcast=True), x).passed
    lost = verify(Upcast(), rms_graph(upcast=False), x)
    told = [c for c in lost.comparisons if c.runner == "emulated"]
    assert told and "node_square (Mul)" in told[0].verdict.reason and not lost.passed


def test_swapped_missing_and_narrowed_outputs_fail():
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x + 2

    def two(first: float, second: float, *outputs: str) -> onnx.ModelProto:
        return graph(
            [node("Add", "x one", "a"), node("Add", "x two", "b")],
            ROWS,
            {name: (FLOAT, ["batch", 16]) for name in outputs},
            {"one": first, "two": second},
        )

    assert verify(Two(), two(1.0, 2.0, "a", "b"), X, hard=False).passed
    assert not verify(Two(), two(2.0, 1.0, "a", "b"), X, hard=False).passed
    fewer = verify(Two(), two(1.0, 2.0, "a"), X, hard=False)
    assert "1 outputs (a), the original has 2" in " ".join(fewer.failures)


def one_pass(x: Tensor) -> Tensor:
    variance = x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()
    return (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()


def two_pass(x: Tensor) -> Tensor:
    centred = x - naive_mean(x)
    return centred / (naive_mean(centred.square()) + 1e-5).sqrt()


def naive_mean(x: Tensor) -> Tensor:
    """One after another, each partial sum rounded."""
    total = torch.zeros(x.shape[:-1], dtype=x.dtype)
    for column in x.unbind(-1):
        total = total + column
    return (total / x.shape[-1])[..., None]


@pytest.mark.parametrize("mean", (100.0, 1e3, 1e4))
def test_ill_conditioned_inputs_are_decided_and_tell_a_bad_kernel_from_a_plain_sum(mean):
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, (256,))

    x = drawn(8, 256) + mean
    inputs = Inputs((x,))
    truth = run_float64(Norm(), inputs, "eval", seed=0).outputs["output"]
    native = Norm()(x)
    rounding = torch.finfo(FLOAT).eps / 2
    run = run_float64(Norm(), inputs, "eval", seed=0, rounding=rounding, shaking=True)
    off = run.outputs["output"]
    assert judge(two_pass(x), truth, native, shaken=off).passed is True
    assert judge(one_pass(x), truth, native, shaken=off).passed is False


def test_a_native_run_that_is_poor_for_no_reason_of_the_input_leaves_it_open():
    truth = drawn(64).double()
    native = (truth * (1 + 1e-3)).float()
    off = truth * (1 + 1e-7)
    assert judge(truth.float(), truth, native, shaken=off).passed is None
    hopeless = truth + drawn(64, seed=1)
    assert judge(truth.float(), truth, truth.float(), shaken=hopeless).passed is None


def test_a_sum_is_moved_by_as_much_as_adding_one_after_another_is_off():
    x = torch.full((200, 3000), math.pi, dtype=torch.float64)
    rounding = torch.finfo(FLOAT).eps / 2
    moved = summed(x, [1], rounding, torch.Generator().manual_seed(0))
    naive = (naive_mean(x[:1].float()).double() - x[:1].float().double()[0, 0]).abs()
    assert float((moved - x).abs().max()) * 4 > float(naive)
    assert judge(moved, x).passed is False


def test_the_file_may_be_the_source_and_the_module_what_is_judged():
    assert verify(net_graph(), Net(), X).passed
    wrong = Net()
    with torch.no_grad():
        wrong.norm1.weight[3] *= 1 + 2**-10
    assert not verify(net_graph(), wrong, X).passed


def test_without_memory_for_the_truth_nothing_passes_and_it_is_said():
    evidence = verify(Net(), net_graph(), X, memory=8)
    assert not evidence.passed and not evidence.inner and not evidence.stages
    assert "a float64 run needs" in evidence.failures[0]


def test_the_first_wrong_operation_is_blamed():
    wrong = with_attribute(net_graph(), "LayerNormalization", 0, epsilon=1e-2)
    evidence = verify(Net(), wrong, X, blame=True)
    assert evidence.blamed is not None and evidence.blamed.node == "node_b"
    assert Evidence.from_json(evidence.to_json()).blamed == evidence.blamed


def test_a_native_run_on_a_gpu_is_one_in_full_precision_and_the_setting_is_put_back(monkeypatch):
    seen = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return x

    before = torch.backends.cudnn.allow_tf32
    run_native(Looks(), Inputs(X), "eval", seed=0)
    # As torch.backends.disable_global_flags() leaves it, which torch's own test helpers call.
    monkeypatch.setattr(torch.backends, "__allow_nonbracketed_mutation_flag", False)
    run_native(Looks(), Inputs(X), "eval", seed=0)
    assert seen == 2 * [(False, False)] and torch.backends.cudnn.allow_tf32 is before
