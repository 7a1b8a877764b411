"""randomaggregation: what is drawn, what is repeated, and the old norm bit for bit."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normsurgery import spec
from normsurgery.errors import CannotConvert, UnknownName, UsageError
from normsurgery.norms.examples import randomised
from normsurgery.norms.randomaggregation import NORM, RandomAggregation, fixed_path, set_path
from normsurgery.spec import Fidelity, Source


def source_of(
    norm: str, module: nn.Module, shape: tuple[int, ...], where: str = "net.bn"
) -> Source:
    reading = spec.get(norm).read(module)
    tensors = {role: attrgetter(name)(module) for role, name in reading.tensors.items()}
    return Source(
        norm,
        where,
        reading.settings,
        tensors,
        shape=shape,
        module=module,
        training=module.training,
        dtype=torch.float32,
    )


def build(source: Source, **options: Any) -> RandomAggregation:
    conversion = NORM.conversion(source.kind)
    assert conversion is not None
    built = conversion.build(source, **conversion.resolve(source, options))
    assert isinstance(built, RandomAggregation)
    return built


def maps(seed: int = 0, where: str = "net.bn", **options: Any) -> RandomAggregation:
    norm = randomised(nn.BatchNorm2d(8), seed)
    return build(source_of("batchnorm", norm, (4, 8, 5, 5), where), **options)


def paths_of(layer: RandomAggregation, times: int, x: Tensor | None = None) -> list[str]:
    """The names drawn in so many forwards, watched from outside."""
    seen: list[str] = []
    hooks = [
        norm.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, norm in layer.candidates.items()
    ]
    for _ in range(times):
        layer(torch.randn(2, 8, 4, 4) if x is None else x)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_batchnorm_branch_is_the_old_layer_bit_for_bit() -> None:
    """Outputs, gradients and statistics, in training and in eval."""
    old = randomised(nn.BatchNorm2d(8))
    layer = build(source_of("batchnorm", old, (4, 8, 5, 5)))
    layer.set_path("batchnorm")
    x, y = (torch.randn(4, 8, 5, 5, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        y.copy_(x)
    g = torch.randn(4, 8, 5, 5)
    for _ in range(3):
        expected, got = old(x), layer(y)
        assert torch.equal(expected, got)
        expected.backward(g)
        got.backward(g)
    branch = layer.candidates["batchnorm"]
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(old.weight.grad, branch.weight.grad)
    for name, tensor in old.state_dict().items():
        assert torch.equal(tensor, branch.state_dict()[name])
    old.eval()
    layer.eval().set_path(None)
    assert torch.equal(old(x), layer(x))


def test_a_candidate_has_its_own_tensors_with_the_sources_values() -> None:
    layer = maps()
    batch, group = layer.candidates["batchnorm"], layer.candidates["groupnorm"]
    assert torch.equal(batch.weight, group.weight) and torch.equal(batch.bias, group.bias)
    assert batch.weight is not group.weight
    assert batch.weight.data_ptr() != group.weight.data_ptr()


def test_paths_are_drawn_evenly_and_layers_draw_apart() -> None:
    first, second = maps(where="net.a"), maps(where="net.b")
    a, b = paths_of(first, 200), paths_of(second, 200)
    assert 70 < Counter(a)["groupnorm"] < 130
    assert a != b
    assert a != sorted(a)
    agree = sum(one == other for one, other in zip(a, b, strict=True))
    assert 70 < agree < 130


def test_granularity_network_draws_alike() -> None:
    first, second = maps(where="net.a", granularity="network"), maps(1, "b", granularity="network")
    assert paths_of(first, 50) == paths_of(second, 50)
    with pytest.raises(UsageError, match="granularity"):
        maps(granularity="sample")


def test_seeds_give_different_sequences() -> None:
    assert paths_of(maps(seed=0), 50) == paths_of(maps(seed=0), 50)
    layer = build(source_of("batchnorm", nn.BatchNorm2d(8), (4, 8, 5, 5)), seed=1)
    assert paths_of(layer, 50) != paths_of(maps(), 50)


def test_drawing_leaves_torchs_own_random_state_alone() -> None:
    layer = maps()
    x = torch.randn(2, 8, 4, 4)
    before = torch.get_rng_state()
    paths_of(layer, 5, x)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("assign", [False, True])
def test_resuming_repeats_the_draws(assign: bool) -> None:
    """The state is in the state_dict; a layer that had drawn before follows what it loads."""
    layer, other = maps(), maps(where="elsewhere")
    paths_of(layer, 7)
    paths_of(other, 3)
    saved = copy.deepcopy(layer.state_dict())
    assert saved["generator"].dtype == torch.int64
    expected = paths_of(layer, 40)
    other.load_state_dict(saved, assign=assign)
    assert paths_of(other, 40) == expected


def test_copies_and_pickles_continue_the_draws() -> None:
    layer = maps()
    paths_of(layer, 5)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = [copy.deepcopy(layer), torch.load(file, weights_only=False)]
    expected = paths_of(layer, 30)
    for twin in twins:
        assert paths_of(twin, 30) == expected


def test_a_broadcast_into_the_buffer_is_followed() -> None:
    """DDP writes rank 0's buffers over the others'; the next draw must be rank 0's."""
    rank0, rank1 = maps(), maps()
    paths_of(rank0, 9)
    paths_of(rank1, 4)
    rank1.generator.copy_(rank0.generator)
    assert paths_of(rank0, 30) == paths_of(rank1, 30)


def test_set_path_by_name_by_index_and_back() -> None:
    model = nn.Sequential(maps(where="a"), nn.ReLU(inplace=True), maps(where="b"))
    x = torch.randn(2, 8, 4, 4)
    set_path(model, 1)
    assert set(paths_of(model[0], 20)) == {"groupnorm"}
    before = [layer.state() for layer in (model[0], model[2])]
    with fixed_path(model, ["batchnorm", None]):
        model(x)
        assert model[0].policy() == "batchnorm" and model[2].policy() == "random"
    assert model[0].policy() == model[2].policy() == "groupnorm"
    assert model[0].state() == before[0] and model[2].state() != before[1]
    set_path(model.eval(), "random")
    assert set(paths_of(model[0], 20)) == {"batchnorm", "groupnorm"}
    set_path(model, None)
    assert set(paths_of(model[0], 20)) == {"batchnorm"}
    with pytest.raises(UnknownName, match="layernorm"):
        set_path(model, ["groupnorm", "layernorm"])
    assert model[0].policy() == "batchnorm"  # nothing was changed
    with pytest.raises(UsageError, match="3 paths"):
        set_path(model, [0, 0, 0])
    with pytest.raises(UnknownName):
        model[0].set_path(2)
    with pytest.raises(UsageError, match="swap"):
        set_path(nn.ReLU(), 0)


def test_what_is_not_drawn_gets_a_gradient_of_zero() -> None:
    """Needed by DDP; written as zeros, so that an inf among the unused parameters does no harm."""
    layer = maps()
    with torch.no_grad():
        layer.candidates["groupnorm"].weight[0] = float("inf")
    layer.set_path("batchnorm")
    layer(torch.randn(2, 8, 4, 4)).square().sum().backward()
    group = layer.candidates["groupnorm"]
    assert torch.equal(group.weight.grad, torch.zeros(8))
    assert torch.equal(group.bias.grad, torch.zeros(8))
    assert layer.candidates["batchnorm"].weight.grad.count_nonzero() == 8


@pytest.mark.parametrize("path", ["batchnorm", "groupnorm"])
def test_the_drawn_candidate_learns(path: str) -> None:
    layer = maps()
    layer.set_path(path)
    torch.nn.functional.relu_(layer(torch.randn(4, 8, 5, 5))).square().sum().backward()
    for parameter in layer.candidates[path].parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.count_nonzero() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_path_it_took(reentrant: bool) -> None:
    """A fresh draw in the recomputation would differentiate another function than was run."""
    layer = maps().double()
    twin = copy.deepcopy(layer)
    for _ in range(8):
        x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        layer(x).pow(3).sum().backward()
        checkpoint(twin, y, use_reentrant=reentrant).pow(3).sum().backward()
        assert torch.equal(x.grad, y.grad)
    assert layer.state() == twin.state()


class Net(nn.Module):
    def __init__(self, where: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        self.norms = nn.ModuleList(maps(where=name) for name in where)

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = torch.relu(norm(x) * 1.5)
        return x


def test_compiles_to_at_most_one_graph_per_candidate_and_layer() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = Net()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=counting)
    x = torch.randn(2, 8, 4, 4)
    for _ in range(40):
        assert torch.equal(twin(x), compiled(x))
    normalising = [g for g in graphs if "norm" in g.code]
    assert 0 < len(normalising) <= 4
    assert {layer.state()[1] for layer in model.norms} == {40}


def test_a_fixed_path_is_one_graph_and_exports() -> None:
    torch._dynamo.reset()
    model = Net().eval()
    x = torch.randn(2, 8, 4, 4)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert torch.equal(model(x), compiled(x))
    exported = torch.export.export(model, (x,))
    assert torch.equal(model(x), exported.module()(x))


def test_the_reference_follows_the_path() -> None:
    layer = maps().double()
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    for path in ("batchnorm", "groupnorm"):
        layer.set_path(path)
        y = layer(x)
        reference = NORM.reference(layer, x)
        assert (y - reference).abs().max() / reference.abs().max() < 1e-10


def affine_of(layer: Any) -> Any:
    reading = NORM.read(layer)
    tensors = {r: layer.state_dict()[n].double() for r, n in reading.tensors.items()}
    return NORM.affine(tensors, reading.settings)


def test_fixed_forms() -> None:
    layer = maps().eval()
    x = torch.randn(3, 8, 4, 4)
    stripped = NORM.strip(layer)
    assert type(stripped) is nn.BatchNorm2d and not stripped.training
    assert torch.equal(stripped(x), layer(x))
    scale, shift = affine_of(layer)
    expected = layer.double()(x.double())
    got = scale[:, None, None] * x.double() + shift[:, None, None]
    assert ((got - expected).abs().max() / expected.abs().max()) < 1e-10
    layer.set_path("groupnorm")
    assert type(NORM.strip(layer)) is nn.GroupNorm
    assert affine_of(layer) is None
    layer.set_path("random")
    assert affine_of(layer) is None
    with pytest.raises(CannotConvert, match="set_path"):
        NORM.strip(layer)


def test_the_promise() -> None:
    source = source_of("batchnorm", nn.BatchNorm2d(8), (2, 8, 4, 4))
    conversion = NORM.conversion("batchnorm")
    assert conversion.promise(source, {}) is Fidelity.EVAL
    assert conversion.promise(source, {"eval_path": "random"}) is Fidelity.RETRAIN
    assert conversion.promise(source, {"eval_path": "groupnorm"}) is Fidelity.RETRAIN
    others = {"candidates": "groupnorm,layernorm_chw"}
    assert conversion.promise(source, others) is Fidelity.RETRAIN
    assert conversion.resolve(source, {})["candidates"] == "batchnorm,groupnorm"


def test_an_ensemble_can_be_made_of_the_norm_on_an_ensembles_path() -> None:
    layer = maps().eval()
    source = source_of("randomaggregation", layer, (4, 8, 5, 5))
    again = build(source, candidates="batchnorm,layernorm_chw")
    x = torch.randn(4, 8, 5, 5)
    assert again.names == ("batchnorm", "layernorm_chw")
    assert torch.equal(again(x), layer(x))


def test_candidates_that_are_one_function_promise_more() -> None:
    """A group norm of one group is the layer norm over channels and space: nothing changes."""
    norm = nn.GroupNorm(1, 4)
    source = source_of("groupnorm", norm, (2, 4, 3, 3))
    assert NORM.conversion("groupnorm").promise(source, {}) is Fidelity.IDENTICAL


def test_tokens() -> None:
    norm = randomised(nn.LayerNorm(16))
    source = source_of("layernorm", norm, (2, 5, 16))
    layer = build(source)
    assert layer.names == ("layernorm", "rmsnorm")
    x = torch.randn(2, 5, 16)
    assert torch.equal(layer.eval()(x), norm(x))
    layer.set_path("rmsnorm")
    assert layer(x).shape == x.shape and not torch.equal(layer(x), norm(x))


def test_a_norm_without_a_module_is_built_from_its_values() -> None:
    norm = randomised(nn.LayerNorm(16))
    found = source_of("layernorm", norm, (2, 5, 16))
    formula = Source(
        found.kind, found.where, found.settings, found.tensors, found.shape, dtype=torch.float32
    )
    layer = build(formula).eval()
    x = torch.randn(2, 5, 16)
    assert torch.equal(layer(x), norm(x))


def test_refusals_name_the_site() -> None:
    source = source_of("batchnorm", nn.BatchNorm1d(2), (4, 2))
    with pytest.raises(CannotConvert, match=r"net\.bn"):
        build(source)
    wide = source_of("batchnorm", nn.BatchNorm2d(8), (4, 8, 5, 5))
    for candidates in ("batchnorm", "groupnorm,gn", "batchnorm,neuronwise", "batchnorm,rna"):
        with pytest.raises(UsageError, match="randomaggregation"):
            build(wide, candidates=candidates)
    with pytest.raises(UnknownName, match="layernorm"):
        build(wide, eval_path="layernorm")


def test_mode_and_requires_grad_are_the_sources() -> None:
    norm = nn.BatchNorm2d(8).eval()
    norm.weight.requires_grad_(False)
    layer = build(source_of("batchnorm", norm, (4, 8, 5, 5)))
    assert not any(module.training for module in layer.modules())
    assert not layer.candidates["groupnorm"].weight.requires_grad
    assert layer.candidates["groupnorm"].bias.requires_grad
