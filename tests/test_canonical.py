"""Norms written by hand become torch's own before export, and what stays says why."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgery import spec
from normsurgery.exporting.canonical import canonicalised
from normsurgery.exporting.cast_first import RMS_NORM_CAST_FIRST, CastFirstRMSNorm, WideRMSNorm
from normsurgery.exporting.decompositions import as_written
from normsurgery.exporting.facts import Canonical
from normsurgery.exporting.tracing import trace
from normsurgery.exporting.translating import translate
from normsurgery.inputs import Inputs
from normsurgery.numerics.precision import float64_copy, lifted
from normsurgery.onnxfile.sessions import Session
from normsurgery.survey import Survey
from normsurgery.testing.cases import random_input
from normsurgery.treecopy import tree_copy
from normsurgery.verifying.judge import judge, same_bits

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOKENS, IMAGE = (2, 5, 12), (2, 12, 5, 3)


class Weighted(nn.Module):
    """A weight and a bias of 12, far from 1 and 0, such that 1 + weight is rounded in half."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.31, 1.77, 12))
        self.bias = nn.Parameter(torch.linspace(-0.9, 0.8, 12))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.31, 1.77, 12))


class CastThenWeight(Scaled):
    """Llama's and T5's order."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class AroundZero(Scaled):
    """Gemma's: 1 + weight, in float32, and then the cast."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).type_as(x)


class WeightThenCast(Scaled):
    """OLMo's order."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight * y).to(x.dtype)


class NoCast(Scaled):
    """Squares in the type of the input, whose squares overflow float16."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class LayerNormByHand(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (F16, BF16) else x
        centred = wide - wide.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return (centred / torch.sqrt(variance + 1e-12) * self.weight + self.bias).to(x.dtype)


class LayerNormWithoutCast(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class ByDeviation(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return (
            self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
            + self.bias
        )


class LayerNorm2dByHand(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        y = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * y + self.bias[:, None, None]


class GroupNormByHand(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(x.shape[0], 3, -1)
        variance, mean = torch.var_mean(y, -1, unbiased=False, keepdim=True)
        y = ((y - mean) / torch.sqrt(variance + 1e-5)).reshape(x.shape)
        return y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class InstanceNormByHand(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (2, 3), unbiased=False, keepdim=True)
        y = (x - mean) / torch.sqrt(variance + 1e-5)
        return y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class FrozenByHand(nn.Module):
    """As torchvision's FrozenBatchNorm2d."""

    def __init__(self) -> None:
        super().__init__()
        for name, first in (("weight", 0.3), ("bias", -0.9), ("mean", -0.4), ("var", 0.5)):
            self.register_buffer(name, torch.linspace(first, first + 1.4, 12))

    def forward(self, x: Tensor) -> Tensor:
        tensors = (getattr(self, name) for name in ("weight", "bias", "mean", "var"))
        weight, bias, mean, variance = (t.reshape(1, -1, 1, 1) for t in tensors)
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Around(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x * 1.5) + 0.1)


class InItsForward(nn.Module):
    """The formula stands in the forward of a layer that does more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.scale = nn.Parameter(torch.linspace(0.31, 1.77, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return torch.tanh(y)


def example(shape: tuple[int, ...], dtype: torch.dtype = F32) -> Tensor:
    return random_input(shape).to(dtype)


def made(
    norm: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[nn.Module, nn.Module, Tensor, tuple[Canonical, ...]]:
    """The model before and after, an input, and what is said of its norms."""
    torch.manual_seed(0)
    before = Around(norm()).eval().to(dtype)
    x = example(shape, dtype)
    after, norms = canonicalised(tree_copy(before, clone=True), Inputs((x,), {}))
    return before, after, x, norms


def written(model: nn.Module, x: Tensor, opset: int = 23) -> tuple[str, ...]:
    program = trace(model, Inputs((x,), {}), {0: "batch"})
    graph = translate(program, opset).optimised.graph
    return tuple(node.op_type for node in graph.node)


CHAIN = ("Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul")
GROUPED = ("Reshape", "InstanceNormalization", "Reshape", "Mul", "Add")


@pytest.mark.parametrize(
    ("norm", "shape", "kind", "at_20", "at_23"),
    [
        (CastThenWeight, TOKENS, "rmsnorm", CHAIN, ("RMSNormalization",)),
        (AroundZero, TOKENS, "rmsnorm", CHAIN, ("RMSNormalization",)),
        (WeightThenCast, TOKENS, "rmsnorm", CHAIN, ("RMSNormalization",)),
        (NoCast, TOKENS, "rmsnorm", CHAIN, ("RMSNormalization",)),
        (LayerNormByHand, TOKENS, "layernorm", ("LayerNormalization",), ("LayerNormalization",)),
        (
            LayerNorm2dByHand,
            IMAGE,
            "layernorm2d",
            ("Transpose", "LayerNormalization", "Transpose"),
            ("Transpose", "LayerNormalization", "Transpose"),
        ),
        (GroupNormByHand, IMAGE, "groupnorm", GROUPED, GROUPED),
        (
            InstanceNormByHand,
            IMAGE,
            "instancenorm",
            ("InstanceNormalization",),
            ("InstanceNormalization",),
        ),
        (FrozenByHand, IMAGE, "batchnorm", ("BatchNormalization",), ("BatchNormalization",)),
    ],
)
def test_a_norm_by_hand_is_written_as_its_operator(
    norm: Callable[[], nn.Module],
    shape: tuple[int, ...],
    kind: str,
    at_20: tuple[str, ...],
    at_23: tuple[str, ...],
) -> None:
    before, after, x, norms = made(norm, shape, F32)
    assert [(said.site, said.kind) for said in norms] == [("norm", kind)]
    assert norms[0].operator
    for opset, expected in ((20, at_20), (23, at_23)):
        assert written(after, x, opset) == ("Mul", *expected, "Add", "Relu")
        (said,) = as_written(norms, opset, F32)
        assert said.operator in ("", *expected) and bool(said.operator) is not bool(said.note)
    with torch.no_grad():
        for scale, shift in ((1.0, 0.0), (3e-3, 0.0), (1.0, 30.0)):
            hard = x * scale + shift
            assert judge(after(hard), truth(before, hard), before(hard)).passed is True


def test_left_as_it_is_it_would_be_written_out() -> None:
    before, _, x, _ = made(LayerNormByHand, TOKENS, F32)
    assert written(before, x).count("ReduceMean") == 2


def truth(model: nn.Module, x: Tensor) -> Tensor:
    """In float64 with exactly these weights, the casts that are written in the forward lifted."""
    with lifted(), torch.no_grad():
        y: Tensor = float64_copy(model)(x.double())
    return y


# --- half precision --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(
    ("norm", "becomes", "at_23"),
    [
        (CastThenWeight, CastFirstRMSNorm, ("RMSNormalization",)),
        (AroundZero, WideRMSNorm, ("Cast", "RMSNormalization", "Cast")),
        (WeightThenCast, WideRMSNorm, ("Cast", "RMSNormalization", "Cast")),
    ],
)
def test_each_order_of_casts_is_kept_to_the_bit(
    dtype: torch.dtype, norm: Callable[[], nn.Module], becomes: type, at_23: tuple[str, ...]
) -> None:
    before, after, x, norms = made(norm, TOKENS, dtype)
    assert type(after.norm) is becomes
    assert norms[0].operator == "RMSNormalization" and "as it was" in norms[0].note
    assert written(after, x) == ("Mul", *at_23, "Add", "Relu")
    with torch.no_grad():
        for scale in (1.0, 3e-3, 300.0, 6e3):  # from 256 on, squares overflow float16
            assert same_bits(after(x * scale), before(x * scale)), scale


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_orders_differ_so_the_test_above_can_fail(dtype: torch.dtype) -> None:
    x, weight = example((64, 12), dtype), Scaled().weight.detach().to(dtype)
    first, last = CastFirstRMSNorm(weight, 1e-6), WideRMSNorm(weight, 1e-6)
    rounded = WideRMSNorm((1 + weight).to(dtype), 1e-6)
    exact = WideRMSNorm(1 + weight.float(), 1e-6)
    with torch.no_grad():
        assert not torch.equal(first(x), last(x))
        assert not torch.equal(rounded(x), exact(x))


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("norm", [CastThenWeight, AroundZero, WeightThenCast])
def test_onnxruntime_computes_the_same_in_float16(
    norm: Callable[[], nn.Module], opset: int
) -> None:
    before, after, x, _ = made(norm, TOKENS, F16)
    program = trace(after, Inputs((x,), {}), {0: "batch"})
    session = Session(translate(program, opset).optimised, threads=1)
    for scale in (1.0, 3e-3, 300.0, 6e3):
        hard = x * scale
        (y,) = session.run({"x": hard}).values()
        with torch.no_grad():
            assert judge(y, truth(before, hard), before(hard)).passed is True


@pytest.mark.parametrize(
    ("norm", "shape", "dtype", "why"),
    [
        (NoCast, TOKENS, F16, "squares in float16"),
        (NoCast, TOKENS, BF16, "squares in bfloat16"),
        (LayerNormWithoutCast, TOKENS, F16, "float32 (large input)"),
        (LayerNorm2dByHand, IMAGE, F16, "float32 (large input)"),
        (ByDeviation, TOKENS, F32, "eps stands outside the root"),
        (lambda: nn.BatchNorm1d(5, track_running_stats=False), TOKENS, F32, "batch"),
    ],
)
def test_what_no_operator_computes_stays_and_says_why(
    norm: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype, why: str
) -> None:
    before, after, x, norms = made(norm, shape, dtype)
    assert type(after.norm) is type(before.norm)
    assert [said.operator for said in norms] == [""]
    assert why in norms[0].note
    with torch.no_grad():
        assert torch.equal(after(x), before(x))


def test_an_operator_would_change_what_overflows() -> None:
    """Why the one above stays: eager float16 gives zeros here, the operator does not."""
    x = example(TOKENS, F16) * 300
    by_hand, torchs = NoCast().half(), nn.RMSNorm(12, eps=1e-6).half()
    with torch.no_grad():
        assert by_hand(x).eq(0).any() and not torchs(x).eq(0).any()


def test_a_float32_input_with_a_float16_weight_is_computed_in_float32() -> None:
    """As the last norm of Mamba with its residual in float32."""

    class Promoted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = CastThenWeight().half()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(x.float()))

    x = example(TOKENS)
    before = Promoted().eval()
    after, norms = canonicalised(tree_copy(before, clone=True), Inputs((x,), {}))
    assert [said.operator for said in norms] == ["RMSNormalization"]
    assert written(after, x) == ("RMSNormalization", "Relu")
    assert judge(after(x).detach(), truth(before, x), before(x).detach()).passed is True


# --- in a forward, and in a tree -------------------------------------------------------------


def test_a_formula_in_a_forward_is_rewritten() -> None:
    torch.manual_seed(0)
    before, x = InItsForward().eval(), example(TOKENS)
    after, norms = canonicalised(tree_copy(before, clone=True), Inputs((x,), {}))
    assert isinstance(after, InItsForward)
    assert [(said.kind, said.operator) for said in norms] == [("rmsnorm", "RMSNormalization")]
    assert written(after, x) == ("MatMul", "Add", "RMSNormalization", "Tanh")
    assert written(after, x, 20) == ("MatMul", "Add", *CHAIN, "Tanh")
    with torch.no_grad():
        assert judge(after(x), truth(before, x), before(x)).passed is True


def test_a_norm_with_a_gate_is_not_taken_for_one_without() -> None:
    class Gated(Scaled):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
            return y * F.silu(gate)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Gated()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x, x + 1.0)
            return y

    before, x = Holder().eval(), example(TOKENS)
    after, _ = canonicalised(tree_copy(before, clone=True), Inputs((x,), {}))
    with torch.no_grad():
        assert judge(after(x), truth(before, x), before(x)).passed is True
    assert "Sigmoid" in written(after, x)


def test_a_parent_that_reads_the_weight_keeps_its_norm() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = CastThenWeight()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x) + self.norm.weight
            return y

    x = example(TOKENS)
    after, norms = canonicalised(Reader().eval(), Inputs((x,), {}))
    assert isinstance(after.norm, CastThenWeight)
    assert "would not compute with a replacement" in norms[0].note and not norms[0].operator


def test_a_norm_at_two_paths_is_replaced_at_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = CastThenWeight()
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(torch.tanh(self.first(x)))
            return y

    before, x = Twice().eval(), example(TOKENS)
    after, norms = canonicalised(tree_copy(before, clone=True), Inputs((x,), {}))
    assert isinstance(after.first, nn.RMSNorm) and after.first is after.second
    assert len(norms) == 1
    assert written(after, x) == ("RMSNormalization", "Tanh", "RMSNormalization")
    with torch.no_grad():
        assert judge(after(x), truth(before, x), before(x)).passed is True


def test_torchs_own_norms_are_the_same_objects_after() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.GroupNorm(3, 12), nn.InstanceNorm2d(12)
    ).eval()
    kept = list(model)
    after, norms = canonicalised(model, Inputs((example((2, 3, 6, 6)),), {}))
    assert all(a is b for a, b in zip(after, kept, strict=True))
    assert [said.operator for said in norms] == [
        "BatchNormalization",
        "GroupNormalization",
        "InstanceNormalization",
    ]


def test_a_model_that_is_itself_a_norm_becomes_torchs() -> None:
    x = example(TOKENS)
    after, _ = canonicalised(LayerNormByHand().eval(), Inputs((x,), {}))
    assert type(after) is nn.LayerNorm


def test_every_normalization_that_is_found_is_told_of() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.by_hand = nn.LayerNorm(12), CastThenWeight()

        def forward(self, x: Tensor) -> Tensor:
            y = F.normalize(self.by_hand(self.own(x)), dim=-1)
            return F.layer_norm(y, (12,)) / y.abs().sum(-1, keepdim=True)

    from normsurgery.finding import find

    x = example(TOKENS)
    model = Several().eval()
    survey: Survey = find(model, (x,))
    _, norms = canonicalised(tree_copy(model, clone=True), Inputs((x,), {}))
    assert len(norms) == len(survey.sites) + len(survey.skips) >= 4
    assert all(said.operator or said.note for said in norms)


def test_twelve_layers_take_seconds() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    started = time.process_time()
    after, norms = canonicalised(model, Inputs((), {"input_ids": torch.arange(14).reshape(2, 7)}))
    assert time.process_time() - started < 10.0
    assert [said.operator for said in norms] == ["RMSNormalization"] * 25
    assert sum(type(module) is nn.RMSNorm for module in after.modules()) == 25


# --- the operator of its own -----------------------------------------------------------------


def inputs_of_the_operator() -> Iterator[tuple[Tensor, Tensor]]:
    for dtype in (F32, F16, BF16, torch.float64):
        yield example(TOKENS, dtype), torch.linspace(0.4, 1.9, 12).to(dtype)
    yield example(IMAGE), torch.linspace(0.4, 1.9, 15).reshape(5, 3)


@pytest.mark.parametrize(("x", "weight"), [*inputs_of_the_operator()])
def test_the_operator_computes_the_rms_norm_in_every_type(x: Tensor, weight: Tensor) -> None:
    y = RMS_NORM_CAST_FIRST(x, weight, 1e-3)
    sizes = list(weight.shape)
    settings = {"eps": 1e-3, "channel_axis": -1, "features": sizes[-1], "normalized_shape": sizes}
    tensors = {"weight": weight.double()}
    expected = spec.get("rmsnorm").formula(x.double(), tensors, settings, False)
    assert judge(y, expected).passed is True
    torch.library.opcheck(RMS_NORM_CAST_FIRST, (x, weight, 1e-3))


def test_the_operator_is_float64_throughout_where_casts_are_lifted() -> None:
    x, weight = random_input(TOKENS), torch.linspace(0.4, 1.9, 12).double()
    with lifted():
        y = RMS_NORM_CAST_FIRST(x, weight, 1e-3)
    assert y.dtype is torch.float64
    assert judge(y, F.rms_norm(x, (12,), weight, 1e-3)).passed is True
