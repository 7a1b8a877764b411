"""Edits: every kind against torch's own modules in float64; order, memory, JSON and casts."""

from __future__ import annotations

import json
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from transformers.pytorch_utils import Conv1D

from normsurgery.errors import UsageError
from normsurgery.fold.casting import cast
from normsurgery.fold.editjson import edit_from_json, edit_to_json
from normsurgery.fold.edits import (
    AddIdentity,
    AddKernel,
    AddProduct,
    AddTensor,
    Bake,
    Centre,
    Copy,
    Create,
    Drop,
    Edit,
    Fill,
    Scale,
    Shift,
    Vector,
    reads,
    writes,
)
from normsurgery.fold.running import run
from normsurgery.fold.vectors import values
from normsurgery.graph import record
from normsurgery.graph.operations import as_data
from normsurgery.inputs import Inputs
from normsurgery.norms.examples import randomised
from normsurgery.norms.weightstandardization import WeightStandardization, standardization_settings

BOUND = 1e-10


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.dtype == b.dtype == torch.float64
    return float(((a - b).abs().max() / b.abs().max()).detach())


def random(*shape: int, seed: int = 1) -> Tensor:
    """Of size 1.3 to 2.5 and random sign."""
    return randomised(nn.ParameterList([torch.zeros(shape, dtype=torch.float64)]), seed)[0].detach()


def edited(module: nn.Module, others: dict[str, Tensor], *edits: Edit) -> nn.Module:
    """The module with its tensors as the edits leave them."""
    own = {f"layer.{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    tensors = {**own, **others}
    run(edits, tensors)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[f"layer.{name}"])
    return module


def scale(name: str, **more: Any) -> Vector:
    return Vector("scale", {"weight": name}, {}, **more)


def shift(name: str, **more: Any) -> Vector:
    return Vector("shift", {"bias": name}, {}, **more)


def norm_vectors(norm: nn.Module) -> tuple[dict[str, Tensor], Vector, Vector]:
    """The tensors of a batch norm under `norm.`, its scale and its shift."""
    roles = ("weight", "bias", "running_mean", "running_var")
    tensors = {f"norm.{role}": getattr(norm, role).detach() for role in roles}
    names = {role: f"norm.{role}" for role in roles}
    given = {"eps": norm.eps, "features": norm.num_features}
    parts = (Vector(part, names, given, kind="batchnorm") for part in ("scale", "shift"))
    return tensors, *parts


# What each Edit does, against torch's modules


@pytest.mark.parametrize(
    ("layer", "x", "axis", "groups"),
    [
        (partial(nn.Conv2d, 4, 6, 3, groups=2), (2, 4, 5, 5), 0, 1),
        (partial(nn.ConvTranspose2d, 4, 6, 3), (2, 4, 5, 5), 1, 1),
        (partial(nn.ConvTranspose2d, 4, 6, 3, stride=2, groups=2), (2, 4, 5, 5), 1, 2),
        (partial(nn.ConvTranspose2d, 6, 6, 3, groups=6), (2, 6, 5, 5), 1, 6),
        (partial(nn.Conv1d, 4, 6, 3, padding=1), (2, 4, 5), 0, 1),
        (partial(nn.Conv3d, 4, 6, 2), (2, 4, 3, 3, 3), 0, 1),
        (partial(nn.Linear, 4, 6), (3, 4), 0, 1),
    ],
)
def test_a_batch_norm_goes_into_the_layer_before_it(
    layer: Callable[[], nn.Module], x: tuple[int, ...], axis: int, groups: int
) -> None:
    module = randomised(layer().double())
    norms = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    norm = randomised(norms[len(x)](6, eps=0.3).double(), 1).eval()
    given = random(*x)
    wanted = norm(module(given))
    tensors, by, added = norm_vectors(norm)
    edits = (
        Scale("layer.weight", by, axis, groups),
        Scale("layer.bias", by, 0),
        Shift("layer.bias", added),
    )
    assert relative(edited(module, tensors, *edits)(given), wanted) < BOUND


class Experts(nn.Module):
    """A linear per expert, its weight (experts, in, out) or (experts, out, in)."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(torch.zeros((3, 6, 4) if transposed else (3, 4, 6)))
        self.bias = nn.Parameter(torch.zeros(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.transpose(1, 2) if self.transposed else self.weight
        return x @ weight + self.bias[:, None]


# A transposed convolution whose padding cuts off the border, where fewer taps meet.
INNER = {"padding": 2, "groups": 2}


@pytest.mark.parametrize(
    ("layer", "x", "channels", "edit", "scaling"),
    [
        (partial(nn.Linear, 4, 6), (2, 3, 4), -1, {"axis": 1}, {"axis": 1}),
        (partial(Conv1D, 6, 4), (2, 3, 4), -1, {"axis": 0, "out_axis": 1}, {"axis": 0}),
        (partial(nn.Conv2d, 4, 6, 3), (2, 4, 5, 5), 1, {"axis": 1}, {"axis": 1}),
        (
            partial(nn.Conv2d, 4, 6, 3, groups=2),
            (2, 4, 5, 5),
            1,
            {"axis": 1, "groups": 2},
            {"axis": 1, "groups": 2},
        ),
        (
            partial(nn.Conv1d, 4, 8, 3, groups=4),
            (2, 4, 5),
            1,
            {"axis": 1, "groups": 4},
            {"axis": 1, "groups": 4},
        ),
        (
            partial(nn.ConvTranspose2d, 4, 6, 3, **INNER),
            (2, 4, 5, 5),
            1,
            {"axis": 0, "out_axis": 1, "groups": 2},
            {"axis": 0},
        ),
        (partial(Experts, False), (3, 5, 4), -1, {"axis": 1, "out_axis": 2}, {"axis": 1}),
        (partial(Experts, True), (3, 5, 4), -1, {"axis": 2, "out_axis": 1}, {"axis": 2}),
    ],
)
def test_a_scale_and_a_shift_go_into_the_layer_after_them(
    layer: Callable[[], nn.Module],
    x: tuple[int, ...],
    channels: int,
    edit: dict[str, int],
    scaling: dict[str, int],
) -> None:
    module, given = randomised(layer().double()), random(*x, seed=2)
    affine = {"norm.weight": random(4, seed=3), "norm.bias": random(4, seed=4)}
    shape = [1] * len(x)
    shape[channels] = 4
    wanted = module(given * affine["norm.weight"].view(shape) + affine["norm.bias"].view(shape))
    edits = (
        AddProduct("layer.bias", "layer.weight", shift("norm.bias"), **edit),
        Scale("layer.weight", scale("norm.weight"), **scaling),
    )
    assert relative(edited(module, affine, *edits)(given), wanted) < BOUND


def test_a_bias_is_created_copied_filled_and_dropped() -> None:
    tensors = {"w": random(3, 2), "old": random(2)}
    kept = tensors["w"].clone()
    run(
        [Create("b", (3,), "w"), Copy("head", "w"), Scale("w", scale("old"), 1), Drop("old")],
        tensors,
    )
    assert list(tensors) == ["w", "b", "head"]
    assert torch.equal(tensors["b"], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(tensors["head"], kept)
    run([Fill("w", 1.0)], tensors)
    assert torch.equal(tensors["w"], torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize(("layer", "axis"), [(partial(nn.Linear, 4, 6), 0), (Conv1D, 1)])
def test_a_centred_writer_writes_what_has_mean_zero(layer: Any, axis: int) -> None:
    module, x = randomised((layer(6, 4) if layer is Conv1D else layer()).double()), random(3, 4)
    wanted = module(x) - module(x).mean(-1, keepdim=True)
    edits = (Centre("layer.weight", axis), Centre("layer.bias", 0))
    assert relative(edited(module, {}, *edits)(x), wanted) < BOUND


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("by", [None, "norm.weight"])
def test_parallel_branches_become_one_convolution(groups: int, by: str | None) -> None:
    conv = partial(nn.Conv2d, 6, 6, groups=groups, dtype=torch.float64)
    wide = randomised(conv(kernel_size=(3, 5), padding=(1, 2)))
    thin, x = randomised(conv(kernel_size=1), 1), random(2, 6, 7, 7)
    others = {
        "thin.weight": thin.weight.detach(),
        "thin.bias": thin.bias.detach(),
        "norm.weight": random(6),
    }
    factor = 1.0 if by is None else others[by].view(6, 1, 1)
    wanted = wide(x) + thin(x) + factor * x
    edits = (
        AddKernel("layer.weight", "thin.weight", (1, 2)),
        AddTensor("layer.bias", "thin.bias"),
        AddIdentity("layer.weight", by and scale(by), (1, 2), groups),
    )
    assert relative(edited(wide, others, *edits)(x), wanted) < BOUND


def parametrized(make: Callable[[nn.Module], nn.Module], layer: nn.Module) -> nn.Module:
    """The layer with its weight computed in eval, from random tensors far from their first ones."""
    return randomised(make(layer.double())).eval()


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize(
    "layer", [partial(nn.Conv2d, 4, 6, 3), partial(nn.ConvTranspose2d, 4, 6, 3)]
)
def test_a_weight_norm_is_baked(layer: Callable[[], nn.Module], dim: int | None) -> None:
    module = parametrized(partial(parametrizations.weight_norm, dim=dim), layer())
    held = module.parametrizations.weight
    tensors = {"g": held.original0.detach(), "v": held.original1.detach()}
    run([Bake("weight", "weightnorm", {"g": "g", "v": "v"}, {"dim": held[0].dim})], tensors)
    assert relative(tensors["weight"], module.weight.detach()) < BOUND


@pytest.mark.parametrize(
    "layer",
    [partial(nn.Conv2d, 4, 6, 3), partial(nn.ConvTranspose2d, 4, 6, 3), partial(nn.Linear, 4, 6)],
)
def test_a_spectral_norm_is_baked(layer: Callable[[], nn.Module]) -> None:
    module = parametrized(parametrizations.spectral_norm, layer())
    held = module.parametrizations.weight
    tensors = {"w": held.original.detach(), "u": held[0]._u, "v": held[0]._v}
    edit = Bake("w", "spectralnorm", {"weight": "w", "u": "u", "v": "v"}, {"dim": held[0].dim})
    run([edit], tensors)
    assert relative(tensors["w"], module.weight.detach()) < BOUND


def test_a_standardized_weight_is_baked() -> None:
    def make(layer: nn.Module) -> nn.Module:
        return parametrize.register_parametrization(
            layer, "weight", WeightStandardization(eps=0.01)
        )

    module = parametrized(make, nn.Conv2d(4, 6, 3))
    tensors = {"w": module.parametrizations.weight.original.detach()}
    run(
        [Bake("w", "weightstandardization", {"weight": "w"}, standardization_settings(0.01))],
        tensors,
    )
    assert relative(tensors["w"], module.weight.detach()) < BOUND


# Vectors


def test_a_vector_is_taken_by_index_and_neutral_where_that_is_minus_one() -> None:
    tensors = {"weight": random(3), "bias": random(3, seed=2)}
    index = (2, -1, 0, 0)
    names = {"weight": "w", "bias": "b"}
    by = values(Vector("scale", names, {"weight_offset": 1.0}, index=index), tensors)
    w = tensors["weight"] + 1.0
    assert by.tolist() == [w[2].item(), 1.0, w[0].item(), w[0].item()]
    added = values(Vector("shift", names, {}, index=index, factor=-2.5), tensors)
    b = tensors["bias"] * -2.5
    assert added.tolist() == [b[2].item(), 0.0, b[0].item(), b[0].item()]


@pytest.mark.parametrize("part", ["scale", "shift"])
def test_a_role_that_is_not_there_is_neutral(part: Any) -> None:
    neutral = values(Vector(part, {}, {"features": 3, "weight_offset": 1.0}), {})
    assert neutral.tolist() == ([1.0] * 3 if part == "scale" else [0.0] * 3)
    with pytest.raises(UsageError, match="how many channels"):
        values(Vector(part, {}, {}), {})


def test_one_number_for_all_channels_is_spread() -> None:
    tensors = {"weight": random(1)}
    spread = values(Vector("scale", {"weight": "g"}, {"features": 3}), tensors)
    assert spread.tolist() == tensors["weight"].tolist() * 3


def test_a_norm_without_a_mean_or_a_weight_has_the_rest_of_its_statistics() -> None:
    tensors = {"running_var": random(3).abs(), "bias": random(3, seed=2)}
    names = {role: role for role in tensors}
    by = values(Vector("scale", names, {"eps": 0.1}, kind="batchnorm"), tensors)
    added = values(Vector("shift", names, {"eps": 0.1}, kind="batchnorm"), tensors)
    x = random(5, 3, seed=3)
    zero = torch.zeros(3, dtype=torch.float64)
    wanted = F.batch_norm(x, zero, tensors["running_var"], None, tensors["bias"], eps=0.1)
    assert relative(x * by + added, wanted) < BOUND


class Formula(nn.Module):
    """A frozen batch norm as a detector writes it, in half precision."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        shape = (1, 1, 3) if last else (1, 3, 1, 1)
        self.weight, self.bias = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        self.register_buffer("var", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        by = self.weight.half().float() * (self.var + 0.01).rsqrt()
        return ((x.bfloat16().float() * by).half() + self.bias).detach()


@pytest.mark.parametrize("last", [True, False])
def test_recorded_operations_are_run_in_float64(last: bool) -> None:
    module = randomised(Formula(last))
    shape = (2, 5, 3) if last else (2, 3, 4, 5)
    flow = record(module, Inputs((torch.randn(shape),)))
    (start,) = flow.graph.find_nodes(op="placeholder")
    roles = {"weight": "weight", "bias": "bias", "var": "var"}
    operations = as_data(flow.operations, start, roles)
    assert operations is not None
    given = {"features": 3, "channel_axis": -1 if last else 1, "shape": list(shape)}
    tensors = {name: tensor.detach().double() for name, tensor in module.state_dict().items()}
    scale_of = values(Vector("scale", roles, given, operations), tensors)
    shift_of = values(Vector("shift", roles, given, operations), tensors)
    wanted = tensors["weight"] / (tensors["var"] + 0.01).sqrt()
    assert relative(scale_of, wanted.flatten()) < BOUND
    assert relative(shift_of, tensors["bias"].flatten()) < BOUND


def operation(name: str, *args: Any) -> dict[str, Any]:
    return {"name": f"aten.{name}", "args": list(args), "kwargs": {}}


X, FIRST = {"x": True}, {"of": 0, "output": 0}
AFFINE = (
    operation("mul.Tensor", X, {"role": "weight"}),
    operation("add.Tensor", FIRST, {"role": "bias"}),
)


@pytest.mark.parametrize("ratio", [1e6, 1e-6])
def test_a_scale_is_exact_beside_a_much_larger_shift(ratio: float) -> None:
    tensors = {"weight": random(4), "bias": random(4, seed=2) * ratio}
    names = {"weight": "w", "bias": "b"}
    by = values(Vector("scale", names, {"features": 4, "channel_axis": -1}, AFFINE), tensors)
    added = values(Vector("shift", names, {"features": 4, "channel_axis": -1}, AFFINE), tensors)
    assert relative(by, tensors["weight"]) < 1e-15
    assert torch.equal(added, tensors["bias"])


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ((operation("relu.default", X),), "no scale and shift per channel"),
        ((operation("flip.default", X, [1]),), "no scale and shift per channel"),
        ((operation("mean.dim", X, [0], True),), "no scale and shift per channel"),
        ((operation("mul.Tensor", X, {"role": "weight"}),), "weight"),
        ((operation("view.default", X, [5, 5]),), "do not run"),
    ],
)
def test_operations_that_are_no_affine_function_are_refused(operations: Any, message: str) -> None:
    by = Vector("scale", {}, {"features": 4, "channel_axis": -1}, operations)
    with pytest.raises(UsageError, match=message):
        values(by, {})


# What is in memory, and errors


class Watched(dict[str, Tensor]):
    """A mapping that knows which entries were looked at."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.looked_at: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.looked_at.add(name)
        return super().__getitem__(name)


VECTORS, MATRICES = ("a", "b", "c", "d"), ("K", "L", "M", "N")
NAMES = (*VECTORS, *MATRICES)
SIZE = 3
SHAPES = {name: (SIZE,) if name in VECTORS else (SIZE, SIZE, 1) for name in NAMES}


FIXED = {name: random(*shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())}


def some_tensors() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in FIXED.items()}


def vectors_of(names: list[str]) -> st.SearchStrategy[Vector]:
    """Of live vectors, as both scale and shift, with and without statistics."""
    name = st.sampled_from(names)
    roles = st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("weight", "bias", "running_mean"), name)
    )
    index = st.none() | st.lists(st.integers(-1, SIZE - 1), min_size=SIZE, max_size=SIZE)
    return st.builds(
        Vector,
        st.sampled_from(["scale", "shift"]),
        roles,
        st.just({"features": SIZE}),
        index=index.map(lambda value: value if value is None else tuple(value)),
        factor=st.sampled_from([1.0, -0.5]),
    )


@st.composite
def programs(draw: st.DrawFn) -> list[Edit]:
    """Edits that can run in order on `some_tensors`, any of them on any tensors there are."""
    live, edits = list(NAMES), list[Edit]()
    for _ in range(draw(st.integers(1, 14))):
        edit = draw(one_edit(tuple(live)))
        edits.append(edit)
        if isinstance(edit, Drop):
            live.remove(edit.target)
        if isinstance(edit, (Create, Copy)) and edit.target not in live:
            live.append(edit.target)
    return edits


@cache
def one_edit(live: tuple[str, ...]) -> st.SearchStrategy[Edit]:
    small, large = ([n for n in live if n in group] for group in (VECTORS, MATRICES))
    gone = [name for name in NAMES if name not in live]
    by, zero = vectors_of(small), st.just(0)
    choices: list[st.SearchStrategy[Edit]] = []
    for names in (small, large):
        one = st.sampled_from(names)
        choices += [
            st.builds(Scale, one, by, zero),
            st.builds(Shift, one, by, zero),
            st.builds(AddTensor, one, one),
            st.builds(Copy, one, one).filter(lambda edit: edit.target != edit.source),
            st.builds(Centre, one, zero),
            st.builds(Fill, one, st.sampled_from([0.5, 2.0])),
        ]
        if len(names) > 2:
            choices.append(st.builds(Drop, one))
    if small and large:
        out, weight = st.sampled_from(small), st.sampled_from(large)
        choices += [
            st.builds(AddProduct, out, weight, by, st.just(1)),
            st.builds(AddIdentity, weight, st.none() | by, st.just((0,))),
            st.builds(AddKernel, weight, weight, st.just((0,))),
        ]
    for name in gone:
        choices.append(st.just(Create(name, SHAPES[name], "a")))
    return st.one_of(choices)


def same_bits(a: MutableMapping[str, Tensor], b: MutableMapping[str, Tensor]) -> bool:
    as_bytes = [{name: t.numpy().tobytes() for name, t in tensors.items()} for tensors in (a, b)]
    return as_bytes[0] == as_bytes[1]


@settings(max_examples=200)
@given(programs())
def test_only_what_an_edit_says_is_looked_at_and_nothing_given_is_changed(
    edits: list[Edit],
) -> None:
    given_ = some_tensors()
    before = {name: tensor.clone() for name, tensor in given_.items()}
    tensors: MutableMapping[str, Tensor] = dict(given_)
    for edit in edits:
        watched, old = Watched(dict(tensors)), dict(tensors)
        run([edit], watched)
        assert watched.looked_at <= {*reads(edit), edit.target, getattr(edit, "like", edit.target)}
        changed = {n for n in {*old, *watched} if old.get(n) is not watched.get(n)}
        assert changed <= set(writes(edit))
        tensors = dict(watched)
    assert same_bits(before, given_)
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    assert len(set(storages)) == len(storages)


def test_edits_in_place_leave_alone_what_shares_memory() -> None:
    shared, own = random(2, 3), random(2, 3)
    tensors = {"tied": shared, "alias": shared, "row": shared[0], "own": own}
    kept = shared.clone()
    edits = [Fill("row", 1.0), Centre("tied", 0), Centre("own", 0)]
    run(edits, tensors, inplace=True)
    assert torch.equal(tensors["alias"], kept)
    assert torch.equal(shared, kept)
    assert tensors["own"] is own
    assert tensors["tied"] is not shared


BY = scale("v")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Scale("gone", BY, 0), ("Scale of gone", "no tensor gone", "plan")),
        (Scale("w", scale("gone"), 0), ("Scale of w", "no tensor gone")),
        (Scale("w", BY, 0), ("Scale of w", "3 elements", "(4, 6)", "wants 4")),
        (Scale("w", BY, 2), ("no axis 2", "(4, 6)")),
        (Scale("w", BY, 1, 3), ("(4, 6)", "3 groups")),
        (Scale("w", BY, 1, 2), ("3 elements", "2 groups wants 12")),
        (Scale("half", BY, 0), ("half", "torch.float16", "float64")),
        (Scale("w", scale("v", index=(0, 3)), 0), ("channel 3", "3 channels")),
        (
            Scale("w", Vector("scale", {"weight": "v", "running_var": "b"}, {"eps": 1.0}), 0),
            ("v (3,), b (4,)", "different sizes"),
        ),
        (Shift("b", shift("v")), ("Shift of b", "3 elements", "wants 4")),
        (AddProduct("b", "w", shift("v"), 1), ("AddProduct of b", "3 elements", "wants 6")),
        (AddProduct("b", "w", shift("b"), 0), ("axis 0 is summed", "(4, 6)")),
        (AddProduct("v", "w", shift("six"), 1), ("(3,)", "w times the vector", "(4,)")),
        (AddProduct("v", "w", shift("b"), 0, 5), ("no axis 5",)),
        (Create("w", (2,), "b"), ("Create of w", "already", "(4, 6)")),
        (Copy("x", "gone"), ("Copy of x", "no tensor gone")),
        (Centre("b", 1), ("Centre of b", "no axis 1", "(4,)")),
        (Fill("gone", 1.0), ("Fill of gone", "no tensor gone")),
        (Drop("gone"), ("Drop of gone", "no such tensor")),
        (
            Bake("x", "spectralnorm", {"weight": "w", "u": "v", "v": "v"}, {"dim": 0}),
            ("Bake of x", "spectralnorm", "weight (4, 6), u (3,)"),
        ),
        (AddKernel("k", "k", (1,)), ("AddKernel of k", "(4, 6, 3)", "at (1,)")),
        (AddKernel("k", "w", (0,)), ("AddKernel of k", "w of shape (4, 6)")),
        (AddTensor("b", "v"), ("AddTensor of b", "(4,)", "v has shape (3,)")),
        (AddIdentity("k", None, (1,)), ("AddIdentity of k", "(4, 6, 3) in 1 groups")),
        (AddIdentity("square", None, (3,)), ("AddIdentity of square", "at (3,)")),
        (AddIdentity("square", BY, (1,)), ("3 elements", "wants 4")),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_so(edit: Edit, words: tuple[str, ...]) -> None:
    shapes = {"w": (4, 6), "b": (4,), "v": (3,), "six": (6,), "k": (4, 6, 3), "square": (4, 4, 3)}
    tensors = {name: random(*shape) for name, shape in shapes.items()}
    tensors["half"] = random(3).half()
    before = dict(tensors)
    with pytest.raises(UsageError) as error:
        run([edit], tensors)
    for word in words:
        assert word in str(error.value)
    assert all(tensors[name] is tensor for name, tensor in before.items())
    assert len(tensors) == len(before)


# JSON

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


def anything() -> st.SearchStrategy[Edit]:
    """Edits with any values in their fields, sensible or not."""
    settings_ = st.dictionaries(st.text(), JSON_VALUES, max_size=3)
    operations = st.none() | st.lists(settings_, min_size=1, max_size=3).map(tuple)
    by = st.builds(
        Vector,
        st.sampled_from(["scale", "shift"]),
        st.dictionaries(st.text(), st.text(), max_size=3),
        settings_,
        operations,
        st.none() | indices(),
        st.floats(allow_nan=False),
        st.text(),
    )
    maybe, places = st.none() | by, st.lists(st.integers(), max_size=3).map(tuple)
    more: dict[Any, dict[str, st.SearchStrategy[Any]]] = {
        AddIdentity: {"by": maybe, "at": places},
        AddKernel: {"at": places},
        Create: {"shape": places},
        Fill: {"value": st.floats(allow_nan=False)},
        Bake: {"settings": settings_},
    }
    kinds = (Scale, Shift, AddProduct, Copy, Centre, Drop, AddTensor, *more)
    with_vector = {Scale, Shift, AddProduct}
    return st.one_of(
        [
            st.builds(kind, **({"by": by} if kind in with_vector else {}), **more.get(kind, {}))
            for kind in kinds
        ]
    )


def indices() -> st.SearchStrategy[tuple[int, ...]]:
    runs = st.builds(
        lambda first, step, count: [first + step * i for i in range(count)],
        st.integers(-1, 9),
        st.integers(-2, 3),
        st.integers(0, 9),
    )
    return st.lists(runs, max_size=4).map(lambda parts: tuple(i for part in parts for i in part))


@settings(max_examples=300)
@given(anything())
@example(Scale("w", scale("v", index=()), 0))
def test_edits_survive_json_exactly(edit: Edit) -> None:
    assert edit_from_json(json.loads(json.dumps(edit_to_json(edit)))) == edit


@pytest.mark.parametrize(
    ("index", "longest"),
    [
        (range(100_000), 60),
        ([-1] * 50_000, 60),
        ([i // 49 for i in range(49 * 512)], 10_000),  # channels flattened with their space
        ([i % 4 * 16 + i // 4 for i in range(64)], 300),  # a channel shuffle
        ([3, 1, 2], 20),
    ],
)
def test_an_index_is_short_in_json(index: Any, longest: int) -> None:
    edit = Scale("w", scale("v", index=tuple(index)), 0)
    data = json.dumps(edit_to_json(edit))
    plain = json.dumps(edit_to_json(replace(edit, by=replace(edit.by, index=()))))
    assert len(data) - len(plain) <= longest
    assert edit_from_json(json.loads(data)) == edit


# Casts


def test_a_cast_that_only_rounds_loses_nothing() -> None:
    value = random(50, 7)
    value[0], value[1, 0] = 0.0, 2.0**-14
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        result, loss = cast(value, dtype)
        assert loss is None
        assert torch.equal(result, value.to(dtype))


@pytest.mark.parametrize(
    ("number", "dtype", "kind", "wider"),
    [
        (70000.0, torch.float16, "overflow", "fp32"),
        (65519.0, torch.float16, None, None),  # rounds to 65504
        (65520.0, torch.float16, "overflow", "fp32"),
        (1e39, torch.bfloat16, "overflow", "fp64"),
        (1e39, torch.float32, "overflow", "fp64"),
        (1e-9, torch.float16, "underflow", "fp32"),
        (2.0**-15 + 2.0**-25, torch.float16, "underflow", "fp32"),
        (2.0**-20, torch.float16, None, None),  # below the normal range, and still exact
        (-(2.0**-127) - 2.0**-134, torch.bfloat16, "underflow", "fp32"),
        (1e-45, torch.bfloat16, "underflow", "fp64"),
        (1e-50, torch.float32, "underflow", "fp64"),
        (1e-310, torch.float64, None, None),
        (float("inf"), torch.float16, "not finite", None),
        (float("nan"), torch.float64, "not finite", None),
        (0.0, torch.float16, None, None),
    ],
)
def test_a_cast_that_loses_more_says_how_much(
    number: float, dtype: torch.dtype, kind: str | None, wider: str | None
) -> None:
    value = random(300_000)
    value[299_998], value[299_999] = 0.0, number
    result, loss = cast(value, dtype)
    assert torch.equal(result.nan_to_num(0.0), value.to(dtype).nan_to_num(0.0))
    if kind is None:
        assert loss is None
        return
    assert loss is not None
    assert (loss.kind, loss.elements, loss.total, loss.wider) == (kind, 1, 300_000, wider)
    assert "1 of 300000 values" in str(loss)
    assert wider is None or f"{wider} holds them" in str(loss)
    assert loss.serious == (kind != "underflow")  # beside values of size 1 to 2
    if kind == "underflow":
        wanted = abs(float(value[-1].to(dtype).double()) - number) / abs(number)
        assert loss.error == wanted > torch.finfo(dtype).eps / 2


def test_an_underflow_is_serious_where_all_values_are_small() -> None:
    small = 2.0**-20 + 2.0**-25  # half a step of fp16 beside what it can hold
    for largest, share in ((1.0, 2.0**-14), (2.0**-16, 4.0)):
        _, loss = cast(torch.tensor([largest, -small], dtype=torch.float64), torch.half)
        assert loss is not None
        assert (loss.kind, loss.share, loss.serious) == ("underflow", share, share > 1.0)


def test_nothing_is_lost_of_an_empty_tensor_or_of_one_number() -> None:
    for value in (random(0, 3), random(1)[0]):
        result, loss = cast(value, torch.bfloat16)
        assert loss is None
        assert result.shape == value.shape


def test_an_edited_tensor_is_not_cast_to_integers() -> None:
    with pytest.raises(UsageError, match="int8"):
        cast(random(3), torch.int8)
