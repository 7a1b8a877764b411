"""A module that is called twice: with untie=True one call gets a copy, where that frees a fold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import normsurgery as ns
from normsurgery import artefacts
from normsurgery.fold.checks import Check
from normsurgery.norms.examples import randomised
from normsurgery.plan import Plan
from normsurgery.report import Report

EXACT = 1e-9  # relative, float64 against float64
KERNEL, BIAS = 8 * 4 * 3 * 3 * 8, 8 * 8  # bytes in float64


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 8, 3, **options)


class TwoNames(nn.Module):
    """One convolution under two names, a batch norm behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = conv(), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.again = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv(x))) + self.bn2(self.again(x.flip(-1)))


class TwoCalls(nn.Module):
    """One convolution, called twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = conv(), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flip(-1) * 2
        return torch.relu(self.bn1(self.conv(x))) + self.bn2(self.conv(y))


class OneNormed(nn.Module):
    """Only the first of three calls is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        y = y + self.conv(x * 3)
        if not self.training:
            y = y + torch.tanh(self.conv(x.flip(-1)))
        return y


class Block(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.body, self.bn = nn.Sequential(nn.ReLU(), shared), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.body(x))


class SharedContainer(nn.Module):
    """Two blocks hold one container, and the convolution in it has two paths by that."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block(conv())
        self.second = Block(conv())
        self.second.body = self.first.body

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) + self.second(x.flip(-1))


class Consumer(nn.Module):
    """Two norms, and one linear that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2, self.linear = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.linear(self.n1(tokens)) + torch.tanh(self.linear(self.n2(tokens + 1)))


class OneOwner(nn.Module):
    """The calls stand in a child's forward; another pair of calls needs no copy."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.same, self.bn = TwoCalls(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.bn(self.same(y)) + self.bn(self.same(y.flip(-1)))


class WeightNormed(TwoNames):
    """The shared convolution computes its weight, which is baked into both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = self.again = weight_norm(conv())


class Nested(nn.Module):
    """A call within a call, and an unused name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.unused = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv(torch.relu(self.bn1(self.conv(x)))))


class ByKeyword(TwoCalls):
    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.relu(self.bn1(self.conv(input=x)))]
        with torch.no_grad():
            parts.append(self.bn2(self.conv(input=x * 2)))
        return torch.cat(parts, 1)


class PaddingConsumer(nn.Module):
    """Two norms in front of one convolution that pads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(self.bn1(x))) + self.conv(self.bn2(x * 2))


class SharedSequential(nn.Module):
    """The convolution has one caller, a container that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bn1, self.bn2 = nn.Sequential(conv()), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.body(x))) + self.bn2(self.body(x * 2))


class InALoop(nn.Module):
    """One expression calls it for every level: there is no second call to rewrite."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])

    def forward(self, x: Tensor) -> Tensor:
        return sum(torch.relu(norm(self.conv(x * (n + 1)))) for n, norm in enumerate(self.norms))


class InALambda(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = conv(), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (lambda y: self.bn1(self.conv(y))), (lambda y: self.bn2(self.conv(y)))
        return torch.relu(first(x)) + second(x * 2)


class BesideAFunction(nn.Module):
    """The same forward has a norm by function, which is taken out of it: it is rewritten once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = conv(), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.last, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv(x))) + self.bn2(self.conv(x.flip(-1)))
        return nn.functional.batch_norm(
            self.last(y),
            self.bn3.running_mean,
            self.bn3.running_var,
            self.bn3.weight,
            self.bn3.bias,
        )


# model -> the copies that are needed, and their bytes.
UNTIED: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "two names": (TwoNames, {"again.weight": KERNEL, "again.bias": BIAS}),
    "two calls": (TwoCalls, {"conv_2.weight": KERNEL, "conv_2.bias": BIAS}),
    "shared container": (
        SharedContainer,
        {"second.body.1.weight": KERNEL, "second.body.1.bias": BIAS},
    ),
    "a consumer": (Consumer, {"linear_2.weight": 6 * 4 * 8, "linear_2.bias": 6 * 8}),
    "in a child": (OneOwner, {"inner.conv_2.weight": KERNEL, "inner.conv_2.bias": BIAS}),
    "one of three is normed": (
        OneNormed,
        {"conv_2.weight": KERNEL, "conv_3.weight": KERNEL},
    ),
    "weight norm": (
        WeightNormed,
        {
            "again.bias": BIAS,
            "again.parametrizations.weight.original0": 8 * 8,
            "again.parametrizations.weight.original1": KERNEL,
        },
    ),
    "nested": (Nested, {"conv_2.weight": KERNEL // 2, "conv_2.bias": BIAS // 2}),
    "a container": (SharedSequential, {"body_2.0.weight": KERNEL, "body_2.0.bias": BIAS}),
    "by keyword": (ByKeyword, {"conv_2.weight": KERNEL, "conv_2.bias": BIAS}),
    "a consumer that pads": (
        PaddingConsumer,
        {"conv_2.weight": 6 * 4 * 9 * 8, "conv_2.bias": 6 * 8},
    ),
}
BLOCKED = {
    "in a loop": InALoop,
    "in a lambda": InALambda,
    "beside a function": BesideAFunction,
}


def built(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, seed: int = 5) -> Any:
    return randomised(make(), seed).to(dtype).eval()


def drawn(batch: int, place: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 4, *((8, 8), (5, 7))[place])
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)


def folded(model: nn.Module, **options: Any) -> tuple[nn.Module, Report]:
    x = drawn(2, 0, next(model.parameters()).dtype)
    return ns.fold(model, inputs=(x,), **{"untie": True, "pad": "explicit", **options})


def relative_error(candidate: Tensor, reference: Tensor) -> float:
    assert candidate.shape == reference.shape
    return float((candidate - reference).detach().abs().max() / reference.detach().abs().max())


def equal_outputs(first: nn.Module, second: nn.Module) -> None:
    for batch in (1, 2, 3):
        for place in (0, 1):
            assert torch.equal(first(drawn(batch, place)), second(drawn(batch, place)))


def reasons(report: Report) -> list[str]:
    """Why norms stay, or stay an affine, with what would help."""
    left = [note for step in report.plan.steps if step.to == "affine" for note in step.notes]
    return [*left, *(f"{skip.reason}. {skip.hint}" for skip in report.plan.skips)]


@pytest.mark.parametrize("name", UNTIED)
def test_a_shared_module_gets_a_copy(name: str) -> None:
    make, copies = UNTIED[name]
    model = built(make)
    changed, report = folded(model)
    assert report.passed and not reasons(report)
    notes = [note for step in report.plan.steps for note in step.notes]
    for tensor, size in copies.items():
        assert f"untied: {tensor} is a copy of its own ({size} bytes)" in notes
    assert sum(note.startswith("untied") for note in notes) == len(copies)
    for batch in (1, 2, 3):
        for place in (0, 1):
            x = drawn(batch, place)
            assert relative_error(changed(x), model(x)) < EXACT
    state = {n: t for n, t in changed.state_dict().items() if not n.startswith("unused")}
    assert len({state[n].data_ptr() for n in state}) == len(state), "something is still tied"
    assert isinstance(changed, make)
    assert not folded(changed)[1].plan.steps


@pytest.mark.parametrize("name", UNTIED)
def test_without_the_option_it_stays_and_the_cost_is_said(name: str) -> None:
    make, copies = UNTIED[name]
    changed, report = folded(built(make), untie=False)
    left = reasons(report)
    assert left and all(reason.startswith(Check.CALLED_AGAIN.value) for reason in left)
    assert all("untie=True gives" in reason for reason in left)
    assert all(f"({sum(copies.values())} bytes)" in reason for reason in left)
    assert not any("_2." in name for name in changed.state_dict())


@pytest.mark.parametrize("name", BLOCKED)
def test_where_no_copy_can_be_given_the_option_is_not_named(name: str) -> None:
    model = built(BLOCKED[name])
    for untie in (False, True):
        changed, report = folded(model, untie=untie)
        left = reasons(report)
        assert len(left) == 2 and report.passed
        assert all(reason.startswith(Check.CALLED_AGAIN.value) for reason in left)
        assert not any("untie=True" in reason for reason in left)
        assert relative_error(changed(drawn(3, 1)), model(drawn(3, 1))) < EXACT


@pytest.mark.parametrize("name", UNTIED)
def test_the_keymap_and_a_rebuilt_model_agree_with_the_fold(name: str, tmp_path: Path) -> None:
    make, _ = UNTIED[name]
    changed, report = folded(built(make))
    other = built(make, seed=11)
    again = folded(other)[0]
    loaded = report.keymap.load(other.state_dict())
    assert set(loaded) == set(again.state_dict())
    assert all(torch.equal(loaded[n], t) for n, t in again.state_dict().items())
    report.plan.save(tmp_path / "plan.json")
    with torch.device("meta"):
        empty = make().double().eval()
    for fresh in (make().double().eval(), empty):
        rebuilt = ns.rebuild(fresh, Plan.load(tmp_path / "plan.json"))
        rebuilt.load_state_dict(changed.state_dict(), assign=True)
        equal_outputs(rebuilt, changed)


@pytest.mark.parametrize("name", UNTIED)
def test_undo_ties_again(name: str) -> None:
    model = built(UNTIED[name][0])
    before = copy.deepcopy(model)
    pointers = {n: t.data_ptr() for n, t in model.state_dict().items()}
    changed, report = folded(model, inplace=True)
    assert changed is model and set(model.state_dict()) != set(pointers)
    report.undo()
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == pointers
    assert repr(model) == repr(before)
    equal_outputs(model, before)


# torch refuses to pickle a parametrized module.
@pytest.mark.parametrize("name", [name for name in UNTIED if name != "weight norm"])
def test_it_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = built(UNTIED[name][0])
    torch.save(model, tmp_path / "m.pt")
    trust = (__name__,)
    source = artefacts.load(tmp_path / "m.pt", trust=trust)
    changed, report = folded(source.model)
    artefacts.save(source, changed, report, tmp_path / "out.pt")
    loaded = artefacts.load(tmp_path / "out.pt", trust=trust)
    equal_outputs(loaded.model, changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", UNTIED)
def test_in_lower_precision_it_is_as_right_as_it_was(name: str, dtype: torch.dtype) -> None:
    _, report = folded(built(UNTIED[name][0], dtype))
    assert report.passed and not reasons(report)


def test_a_head_on_two_levels_needs_no_copy() -> None:
    """Every call is followed by the same norm: the shared convolution takes it up once."""
    _, report = folded(built(OneOwner))
    edited = {edit.target for step in report.plan.steps for edit in step.edits}
    assert {"same.weight", "same.bias"} <= edited
    assert not any(name.startswith("same_2") for name in edited)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_knows_that_its_head_is_tied_no_more(inplace: bool) -> None:
    """`tie_weights` and `from_pretrained` tie again what the configuration says is tied."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = hf.LlamaConfig(**sizes, num_attention_heads=4, vocab_size=97, tie_word_embeddings=True)
    model = randomised(hf.LlamaForCausalLM(config).double().eval(), 0)
    given = {"input_ids": torch.randint(0, 97, (2, 8)), "use_cache": False}
    with torch.no_grad():
        folded, report = ns.fold(model, inputs=given, untie=True, inplace=inplace)
        assert report.passed
        right = folded(**given).logits
        assert not folded.config.tie_word_embeddings and not folded.model.config.tie_word_embeddings
        folded.tie_weights()
        assert torch.equal(folded(**given).logits, right)
        other = hf.LlamaForCausalLM(folded.config).double().eval()
        assert other.lm_head.weight is not other.model.embed_tokens.weight
    if inplace:
        report.undo()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert config.tie_word_embeddings and model.config.tie_word_embeddings
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
