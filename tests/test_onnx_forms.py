"""What the norms become in ONNX at every opset, and that onnxruntime computes it.

The laws (normsurgery/testing/exports.py) take each norm's first example at five opsets. Here is the
rest: every example at the other two and in half precision, and what is special about a form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normsurgery import spec
from normsurgery.export.decompositions import operator_of, translations
from normsurgery.export.quiet import quiet
from normsurgery.norms.l2norm import L2Norm
from normsurgery.onnxfile.sessions import Session, optimised
from normsurgery.spec import Reading
from normsurgery.testing.cases import hard_inputs, random_input, run
from normsurgery.testing.exports import onnx_model
from normsurgery.verify.judge import Verdict, judge

OPSETS = tuple(range(18, 25))
HALF = (torch.float16, torch.bfloat16)


def drawn(module: nn.Module) -> nn.Module:
    """The module in eval with parameters and statistics far from 0 and 1."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator) + 0.4
            tensor.data.copy_(values if "var" in name else 1.3 * values - 0.2)
    return module.eval()


def computed(model: onnx.ModelProto, *inputs: Tensor) -> list[Tensor]:
    onnx.checker.check_model(model, full_check=True)
    session = Session(model, threads=1)
    names = [port.name for port in model.graph.input]
    return list(session.run(dict(zip(names, inputs, strict=True))).values())


def operators(model: onnx.ModelProto) -> tuple[str, ...]:
    return tuple(node.op_type for node in model.graph.node)


def verdict_of(module: nn.Module, y: Tensor, x: Tensor, truth: Callable[..., Tensor]) -> Verdict:
    """Against the float64 truth, with what native torch and one rounding of the input make."""
    up = (torch.arange(x.numel()) % 2 == 0).reshape(x.shape)
    moved = torch.nextafter(x, torch.where(up, torch.inf, -torch.inf).to(x.dtype))
    rounded = truth(moved) if x.dtype is torch.float32 else None
    return judge(y, truth(x), run(module, x), rounded)


def formula(kind: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: spec.get(kind).reference(module, x)


def within(verdict: Verdict) -> bool:
    """Passed; or undecided, the input being ill-conditioned, and yet within what is allowed."""
    return verdict.passed is True or (verdict.passed is None and verdict.factor <= 1.0)


class Side(nn.Module):
    """Several norms side by side, each on its own input: one graph for all of them."""

    def __init__(self, norms: list[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [norm(x) for norm, x in zip(self.norms, xs, strict=True)]


# --- every example of every norm -------------------------------------------------------------


def every_example() -> list[tuple[str, spec.NormSpec, nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    return [
        (f"{norm.name} ({example.label})", norm, example.module().eval(), example.inputs[0])
        for norm in spec.specs()
        if norm.onnx is not None
        for example in norm.examples()
    ]


@pytest.mark.parametrize("opset", [19, 22])
def test_every_example_at_the_opsets_that_the_laws_leave_out(opset: int) -> None:
    cases = every_example()
    xs = [random_input(shape).float() for *_, shape in cases]
    model = side_by_side([module for _, _, module, _ in cases], xs, opset)
    assert len(model.graph.output) == len(cases) > 60
    session = Session(model, threads=1)
    names = [port.name for port in model.graph.input]
    for label, inputs in several([shape for *_, shape in cases]):
        found = session.run(dict(zip(names, inputs, strict=True))).values()
        for (name, norm, module, _), x, y in zip(cases, inputs, found, strict=True):
            verdict = verdict_of(module, y, x, formula(norm.name, module))
            assert within(verdict), (name, label, str(verdict))


def several(shapes: list[tuple[int, ...]]) -> Iterator[tuple[str, list[Tensor]]]:
    """Hard inputs of every shape at once."""
    for cases in zip(*(hard_inputs(shape) for shape in shapes), strict=True):
        yield cases[0][0], [x.float() for _, x in cases]
    yield "mean 1e3", [(random_input(shape, seed=2) + 1e3).float() for shape in shapes]
    yield "zeros", [torch.zeros(shape) for shape in shapes]


def side_by_side(norms: list[nn.Module], xs: list[Tensor], opset: int) -> onnx.ModelProto:
    from normsurgery.export.canonical import canonicalised
    from normsurgery.export.tracing import trace
    from normsurgery.export.translating import translate
    from normsurgery.inputs import Inputs
    from normsurgery.treecopy import tree_copy

    inputs = Inputs((xs,), {})
    canonical, _ = canonicalised(tree_copy(Side(norms), clone=True).eval(), inputs)
    model: onnx.ModelProto = translate(trace(canonical, inputs), opset).optimised
    onnx.checker.check_model(model, full_check=True)
    return model


IN_HALF = ("layernorm", "layernorm2d", "layernorm_chw", "groupnorm", "rmsnorm", "batchnorm")


@pytest.mark.parametrize("opset", [20, 23])
def test_every_example_in_float16(opset: int) -> None:
    """float16 on the CPU proves nothing about a GPU, but a graph that is wrong in its types or its
    scale shows. Instance norm is left out here: torch's own is far off, and says nothing."""
    cases = [case for case in every_example() if case[1].name in IN_HALF]
    halves = [module.half() for _, _, module, _ in cases]
    for label, scale, shift in (("random", 1.0, 0.0), ("large", 3e3, 0.0), ("mean", 1.0, 30.0)):
        xs = [(random_input(shape, seed=4) * scale + shift).half() for *_, shape in cases]
        if label == "random":
            session = Session(model := side_by_side(halves, xs, opset), threads=1)
        names = [port.name for port in model.graph.input]
        found = session.run(dict(zip(names, xs, strict=True))).values()
        for (name, norm, module, _), x, y in zip(cases, xs, found, strict=True):
            if "no cast" in name and label == "large":
                continue  # it squares in float16, and onnxruntime's CPU kernels in float32
            verdict = verdict_of(module, y, x, formula(norm.name, module))
            assert within(verdict), (name, label, str(verdict))


@pytest.mark.parametrize("p", [1.0, 3.0])
@pytest.mark.parametrize("places", [(True, False), (False, True), (False, False)])
def test_a_length_with_another_p_is_that_of_torch(p: float, places: tuple[bool, bool]) -> None:
    clamp, outside = places
    norm, x = L2Norm(eps=0.3, eps_clamp=clamp, eps_outside=outside, p=p), random_input((3, 12))
    truth = spec.get("l2norm").reference(norm, x)
    assert judge(run(norm, x), truth).passed is True
    if clamp:
        assert judge(F.normalize(x, p=p, dim=-1, eps=0.3), truth).passed is True


# --- GroupNorm -------------------------------------------------------------------------------


def means() -> Iterator[tuple[str, Tensor]]:
    x = random_input((2, 12, 5, 3))
    for mean in (0.0, 10.0, 100.0, 1e3, 1e4):
        yield f"mean {mean:g}", (x + mean).float()
    for value in (0.0, 3.7, 100.3):
        yield f"constant {value:g}", torch.full(x.shape, value)
    yield "tiny variance", (x * 3e-3).float()


@pytest.mark.parametrize("opset", OPSETS)
def test_a_group_norm_is_centred_at_every_opset(opset: int) -> None:
    norm, x = drawn(nn.GroupNorm(3, 12)), random_input((2, 12, 5, 3)).float()
    model = onnx_model(norm, x, opset, dynamic_batch=True)
    assert operators(model) == ("Reshape", "InstanceNormalization", "Reshape", "Mul", "Add")
    for label, hard in means():
        (y,) = computed(model, hard)
        verdict = verdict_of(norm, y, hard, formula("groupnorm", norm))
        assert within(verdict), (label, str(verdict))


def test_the_operator_that_torch_writes_for_it_is_not_centred() -> None:
    """Why it is written otherwise: with torch's own translation the same inputs fail."""
    norm, x = drawn(nn.GroupNorm(3, 12)), random_input((2, 12, 5, 3)).float()
    with quiet():
        program = torch.onnx.export(norm, (x,), dynamo=True, opset_version=21, verbose=False)
    assert program is not None and operators(program.model_proto) == ("GroupNormalization",)
    failed = [
        label
        for label, hard in means()
        if not within(
            verdict_of(
                norm, computed(program.model_proto, hard)[0], hard, formula("groupnorm", norm)
            )
        )
    ]
    assert {"mean 100", "mean 1000", "mean 10000"} <= set(failed)


class Grouped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_group_norm_takes_any_batch_also_an_empty_one(dtype: torch.dtype) -> None:
    norm, x = drawn(nn.GroupNorm(3, 12)).to(dtype), random_input((2, 12, 5, 3)).to(dtype)
    model = onnx_model(norm, x, 20, dynamic_batch=True)
    session = Session(model, threads=1)
    for batch in (0, 1, 7):
        given = random_input((batch, 12, 5, 3), seed=3).to(dtype)
        (y,) = session.run({model.graph.input[0].name: given}).values()
        assert y.shape == given.shape and y.dtype is dtype
        if batch:
            assert within(verdict_of(norm, y, given, formula("groupnorm", norm)))
    for hard in ((x + 1e4).to(dtype), torch.full(x.shape, 100.25, dtype=dtype)):
        (y,) = session.run({model.graph.input[0].name: hard}).values()
        assert within(verdict_of(norm, y, hard, formula("groupnorm", norm)))


@pytest.mark.parametrize("opset", [18, 22])
@pytest.mark.parametrize("norm", [Grouped(), drawn(nn.GroupNorm(4, 12))])
def test_a_group_norm_takes_any_height_and_width(norm: nn.Module, opset: int) -> None:
    from normsurgery.export.tracing import trace
    from normsurgery.export.translating import translate
    from normsurgery.inputs import Inputs

    axes = {"x" if isinstance(norm, Grouped) else "input": {0: "batch", 2: "height", 3: "width"}}
    x = random_input((2, 12, 5, 4)).float()
    model = translate(trace(norm, Inputs((x,), {}), axes), opset).optimised
    for shape in ((1, 12, 3, 7), (3, 12, 1, 2), (2, 12, 8, 5), (0, 12, 2, 2)):
        hard = (random_input(shape) + 1e3).float()
        (y,) = computed(model, hard)
        assert y.shape == hard.shape
        if y.numel():
            wide = norm.double()(hard.double()).detach()
            norm.float()
            assert within(verdict_of(norm, y, hard, lambda v, w=wide: w)), shape


def test_a_group_norm_that_was_decomposed_before_is_centred_too() -> None:
    from normsurgery.export.translating import translate

    norm, x = drawn(nn.GroupNorm(3, 12)), random_input((2, 12, 5, 3)).float()
    program = torch.export.export(norm, (x,)).run_decompositions()
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.native_group_norm.default" in targets
    model = translate(program, 23).optimised
    hard = (x + 1e3).float()
    assert within(verdict_of(norm, computed(model, hard)[0], hard, formula("groupnorm", norm)))


# --- RMSNorm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", OPSETS)
def test_an_rms_norm_keeps_its_eps(opset: int) -> None:
    """onnxscript's own optimiser deletes one of 1e-8 and less, and a row of zeros becomes NaN."""
    norm, x = drawn(nn.RMSNorm(12, eps=1e-12)), random_input((2, 5, 12)).float()
    model = onnx_model(norm, x, opset, dynamic_batch=True)
    chain = ("Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul")
    assert operators(model) == (("RMSNormalization",) if opset >= 23 else chain)
    for scale in (0.0, 1e-5, 1.0, 1e4):
        hard = x * scale
        (y,) = computed(model, hard)
        assert within(verdict_of(norm, y, hard, formula("rmsnorm", norm))), scale


def test_onnxruntime_fuses_the_chain_below_opset_23() -> None:
    """The spelling x / sqrt(...) is the one it knows; with torch's own, a reciprocal, it does not
    fuse at any level."""
    norm, x = drawn(nn.RMSNorm(12, eps=1e-6)), random_input((2, 5, 12)).float()
    assert operators(optimised(onnx_model(norm, x, 20), "extended")) == (
        "SimplifiedLayerNormalization",
    )
    with quiet():
        theirs = torch.onnx.export(norm, (x,), dynamo=True, opset_version=20, verbose=False)
    assert theirs is not None
    assert "Reciprocal" in operators(optimised(theirs.model_proto, "extended"))


@pytest.mark.parametrize("opset", [20, 23, 24])
@pytest.mark.parametrize("dtype", HALF)
def test_torchs_rms_norm_in_half_precision_is_float32_between_casts(
    dtype: torch.dtype, opset: int
) -> None:
    """Also in bfloat16, which has no kernel on the CPU for anything but Cast; and where the squares
    overflow float16."""
    norm, x = drawn(nn.RMSNorm(12, eps=1e-6)).to(dtype), random_input((2, 5, 12)).to(dtype)
    model = onnx_model(norm, x, opset, dynamic_batch=True)
    found = operators(model)
    assert found[0] == found[-1] == "Cast" and found.count("Cast") == 2
    for scale in (1.0, 300.0, 6e3):
        hard = x * scale
        (y,) = computed(model, hard)
        assert within(verdict_of(norm, y, hard, formula("rmsnorm", norm))), scale


# --- others ----------------------------------------------------------------------------------


def test_an_instance_norm_with_running_statistics_is_one_batch_norm() -> None:
    norm = drawn(nn.InstanceNorm2d(6, affine=True, track_running_stats=True))
    x = random_input((3, 6, 5, 3)).float()
    model = onnx_model(norm, x, 20, dynamic_batch=True)
    assert operators(model) == ("BatchNormalization",)
    assert within(verdict_of(norm, computed(model, x)[0], x, formula("instancenorm", norm)))


@pytest.mark.parametrize("opset", [18, 22])
def test_an_instance_norm_in_bfloat16_is_written_out(opset: int) -> None:
    """Below opset 22 the operator has no bfloat16, and the graph would be invalid."""
    norm = drawn(nn.InstanceNorm2d(6, affine=True)).bfloat16()
    x = random_input((3, 6, 5, 3)).bfloat16()
    model = onnx_model(norm, x, opset, dynamic_batch=True)
    assert "InstanceNormalization" not in operators(model)
    assert within(verdict_of(norm, computed(model, x)[0], x, formula("instancenorm", norm)))


@pytest.mark.parametrize("norm", [nn.LayerNorm(12), nn.RMSNorm(12, eps=1e-6), nn.RMSNorm(12)])
@pytest.mark.parametrize("opset", [20, 23])
def test_float64_is_computed_in_float64(norm: nn.Module, opset: int) -> None:
    """An epsilon attribute is float32, and so is what onnxruntime fuses an RMS norm to."""
    module, x = drawn(norm).double(), random_input((2, 5, 12)) * 3e-3
    kind = "layernorm" if isinstance(norm, nn.LayerNorm) else "rmsnorm"
    (y,) = computed(onnx_model(module, x, opset), x)
    assert y.dtype is torch.float64
    assert judge(y, spec.get(kind).reference(module, x)).passed is True


@pytest.mark.parametrize(
    ("kind", "opset", "dtype", "operator"),
    [
        ("layernorm", 18, torch.float32, "LayerNormalization"),
        ("layernorm", 20, torch.float64, ""),
        ("rmsnorm", 22, torch.float32, ""),
        ("rmsnorm", 23, torch.float16, "RMSNormalization"),
        ("rmsnorm", 24, torch.float32, "RMSNormalization"),
        ("groupnorm", 18, torch.float32, ""),
        ("groupnorm", 24, torch.float16, ""),
        ("instancenorm", 20, torch.float32, "InstanceNormalization"),
        ("instancenorm", 24, torch.bfloat16, ""),
        ("batchnorm", 20, torch.bfloat16, "BatchNormalization"),
        ("dyt", 23, torch.float32, ""),
    ],
)
def test_the_operator_of_a_kind_and_why_there_is_none(
    kind: str, opset: int, dtype: torch.dtype, operator: str
) -> None:
    known = spec.get(kind)
    if known.operator is None:
        assert not operator
        return
    sizes = {"running_mean": "running_mean"} if kind == "batchnorm" else {}
    found, why = operator_of(known.operator(Reading(sizes, {"channel_axis": -1})), opset, dtype)
    assert found == operator
    assert bool(why) is not bool(operator)


def test_the_table_has_every_translation_at_every_opset() -> None:
    tables: list[dict[Any, Any]] = [translations(opset) for opset in OPSETS]
    assert all(set(table) == set(tables[0]) for table in tables)
    assert {str(target) for target in tables[0]} >= {
        "aten.group_norm.default",
        "aten.native_group_norm.default",
        "aten.rms_norm.default",
    }


class OverWhatThereIs(nn.Module):
    """Norms without parameters over axes whose sizes are not fixed."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[1:]) + F.instance_norm(x.transpose(1, 2)).transpose(1, 2)
        return y + F.rms_norm(x, x.shape[-2:], eps=1e-6)


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_sizes_of_the_normalised_axes_may_be_dynamic(opset: int, dtype: torch.dtype) -> None:
    from normsurgery.export.tracing import trace
    from normsurgery.export.translating import translate
    from normsurgery.inputs import Inputs

    norm, x = OverWhatThereIs(), random_input((2, 5, 12)).to(dtype)
    axes = {"x": {0: "batch", 1: "length", 2: "width"}}
    model = translate(trace(norm, Inputs((x,), {}), axes), opset).optimised
    for shape in ((2, 5, 12), (1, 9, 3), (4, 2, 7)):
        other = random_input(shape, seed=5).to(dtype)
        (y,) = computed(model, other)
        assert within(verdict_of(norm, y, other, lambda v: norm(v.double())))
