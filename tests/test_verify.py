"""verify(): planted faults are caught, correct models pass, nothing of the user's is touched."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normsurgery.errors import CannotRead, CannotTrace, UnknownName, UsageError
from normsurgery.inputs import Inputs
from normsurgery.verifying import Evidence, hard_inputs, judge, verify
from normsurgery.verifying.memory import available_bytes, float64_weight_bytes, parts_that_fit
from normsurgery.verifying.runners import run_float64, run_native, same_randomness

FEATURES = 24


def native(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (FEATURES,), weight, bias, 1e-5)


def two_pass(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight + bias


def upcast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x.float() - x.float().mean(-1, keepdim=True)
    scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return scaled.to(x.dtype) * weight + bias


def eps_outside(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    deviation = x.std(-1, keepdim=True, unbiased=False)
    return (x - x.mean(-1, keepdim=True)) / (deviation + 1e-5) * weight + bias


def no_eps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    deviation = x.std(-1, keepdim=True, unbiased=False)
    return (x - x.mean(-1, keepdim=True)) / deviation * weight + bias


def unbiased(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    root = torch.sqrt(x.var(-1, keepdim=True, unbiased=True) + 1e-5)
    return (x - x.mean(-1, keepdim=True)) / root * weight + bias


def one_pass(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = x.square().mean(-1, keepdim=True) - mean.square()
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def bias_dropped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (FEATURES,), weight, None, 1e-5)


def weight_ignored(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (FEATURES,), None, bias, 1e-5)


def wrong_axis(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-5) * weight + bias


def not_centred(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.rms_norm(x, (FEATURES,), weight, 1e-5) + bias


def over_the_batch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same where there is one sample."""
    centred = x - x.mean((0, -1), keepdim=True)
    return (
        centred * torch.rsqrt(centred.square().mean((0, -1), keepdim=True) + 1e-5) * weight + bias
    )


def nan_on_zeros(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = native(x, weight, bias)
    return torch.where((x == 0).all(-1, keepdim=True), math.nan, y)


class Block(nn.Module):
    """A norm, a projection, a second norm; all parameters far from 0 and 1."""

    def __init__(self, norm=native, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norm = norm
        self.weight = nn.Parameter(torch.randn(FEATURES, generator=generator) + 3)
        self.bias = nn.Parameter(torch.randn(FEATURES, generator=generator) * 2)
        self.project = nn.Parameter(torch.randn(FEATURES, FEATURES, generator=generator) / 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x, self.weight, self.bias)
        return self.norm(y @ self.project, self.weight, self.bias)


def example(dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(batch, 5, FEATURES, generator=generator).to(dtype),)


CORRECT = {
    torch.float32: (native, two_pass, upcast),
    torch.bfloat16: (native, upcast),
    torch.float16: (native, upcast),
}


@pytest.mark.parametrize(
    ("dtype", "norm"), [(dtype, norm) for dtype, norms in CORRECT.items() for norm in norms]
)
def test_another_correct_formula_passes(dtype, norm):
    evidence = verify(Block().to(dtype), Block(norm).to(dtype), example(dtype))
    assert evidence.passed, str(evidence)
    assert evidence.count("passed") > 10


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_fused_norm_in_place_of_a_formula_passes(dtype):
    """The direction of most swaps; constant rows must not fail it by the formula's luck."""
    evidence = verify(Block(two_pass).to(dtype), Block().to(dtype), example(dtype))
    assert evidence.passed, str(evidence)


@pytest.mark.parametrize(
    "fault",
    [
        eps_outside,
        no_eps,
        unbiased,
        one_pass,
        bias_dropped,
        weight_ignored,
        wrong_axis,
        not_centred,
        over_the_batch,
        nan_on_zeros,
    ],
)
def test_a_planted_fault_is_caught(fault):
    evidence = verify(Block(), Block(fault), example())
    assert not evidence.passed
    assert evidence.worst is not None and evidence.worst.verdict.passed is False


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("fault", [one_pass, bias_dropped, weight_ignored, wrong_axis, not_centred])
def test_a_planted_fault_is_caught_in_half_precision(dtype, fault):
    assert not verify(Block().to(dtype), Block(fault).to(dtype), example(dtype)).passed


class Upcast(Block):
    """Language models cast their logits up at the end."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def test_outputs_cast_up_do_not_make_a_half_precision_model_undecidable():
    a, x = Upcast().bfloat16(), example(torch.bfloat16)
    good = verify(a, Upcast(upcast).bfloat16(), x)
    assert good.passed and good.count("passed") > good.count("undecided"), str(good)
    assert not verify(a, Upcast(bias_dropped).bfloat16(), x).passed


def test_a_lost_upcast_is_caught_in_half_precision():
    """The squares overflow in fp16; the fused norm computes them in float32."""
    evidence = verify(Block().half(), Block(two_pass).half(), example(torch.float16))
    assert not evidence.passed
    assert "squares overflow" in {c.case for c in evidence.comparisons if not c.verdict.passed}


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        (one_pass, "mean 30"),
        (no_eps, "zeros"),
        (nan_on_zeros, "zeros"),
        (over_the_batch, "example"),
        (eps_outside, "tiny variance"),
    ],
)
def test_the_hard_input_made_for_a_fault_shows_it(fault, case):
    evidence = verify(Block(), Block(fault), example())
    failed = {c.case for c in evidence.comparisons if c.verdict.passed is False}
    assert case in failed


def test_a_fault_that_the_example_hides_is_caught_by_another_batch_size():
    one = example(batch=1)
    assert verify(Block(), Block(over_the_batch), one, hard=False).passed
    evidence = verify(Block(), Block(over_the_batch), one)
    failed = {c.case for c in evidence.comparisons if c.verdict.passed is False}
    assert {"batch 2", "batch 7"} <= failed and "batch 1" not in failed


def test_one_weight_off_by_a_thousandth_is_caught():
    changed = Block()
    with torch.no_grad():
        changed.weight[3] *= 1 + 2**-10
    assert not verify(Block(), changed, example()).passed


class Outputs(nn.Module):
    """Returns what `shape` makes of two tensors."""

    def __init__(self, shape) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.shape = shape
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(16.0).reshape(4, 4) / 7 - 1)
            self.layer.bias.copy_(torch.arange(4.0) + 1)

    def forward(self, x: Tensor):
        y = self.layer(x)
        return self.shape(y, y * 2)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (lambda a, b: (b, a), "error"),
        (lambda a, b: (a,), "outputs"),
        (lambda a, b: (a, b, a), "outputs"),
        (lambda a, b: (a, b[..., :1]), "shape"),
        (lambda a, b: (a, b[:1]), "shape"),
        (lambda a, b: (a, b.double()), "dtype"),
        (lambda a, b: (a, b.half()), "dtype"),
    ],
    ids=["swapped", "fewer", "more", "last dim 1", "batch 1", "double", "half"],
)
def test_other_outputs_fail(shape, reason):
    pair = Outputs(lambda a, b: (a, b)), Outputs(shape)
    evidence = verify(*pair, (torch.randn(3, 4),), hard=False)
    assert not evidence.passed
    assert reason in " ".join(evidence.failures)


def test_a_broadcastable_output_is_another_shape():
    pair = Outputs(lambda a, b: a * 0 + 1), Outputs(lambda a, b: a[..., :1] * 0 + 1)
    evidence = verify(*pair, (torch.randn(3, 4),), hard=False)
    assert "shape" in " ".join(evidence.failures)


def test_swapped_names_of_a_dict_fail():
    pair = Outputs(lambda a, b: {"a": a, "b": b}), Outputs(lambda a, b: {"b": a, "a": b})
    assert not verify(*pair, (torch.randn(3, 4),)).passed
    reordered = Outputs(lambda a, b: {"b": b, "a": a})
    assert verify(Outputs(lambda a, b: {"a": a, "b": b}), reordered, (torch.randn(3, 4),)).passed


def test_a_model_without_tensors_in_its_output_compares_nothing_and_fails():
    pair = Outputs(lambda a, b: None), Outputs(lambda a, b: None)
    evidence = verify(*pair, (torch.randn(3, 4),))
    assert not evidence.passed and "nothing was compared" in evidence.failures


def test_an_empty_output_beside_another_is_no_fault_but_alone_it_proves_nothing():
    pair = Outputs(lambda a, b: (a, b[:, :0])), Outputs(lambda a, b: (a, b[:, :0]))
    assert verify(*pair, (torch.randn(3, 4),)).passed
    alone = Outputs(lambda a, b: b[:, :0]), Outputs(lambda a, b: b[:, :0])
    assert "nothing was compared" in verify(*alone, (torch.randn(3, 4),)).failures


def test_a_mode_in_which_nothing_could_be_compared_is_no_pass():
    class EvalOnly(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("cannot train")
            return super().forward(x)

    a, b = EvalOnly(4, 4), EvalOnly(4, 4)
    b.load_state_dict(a.state_dict())
    assert verify(a, b, (torch.randn(3, 4),)).passed
    evidence = verify(a, b, (torch.randn(3, 4),), modes=("eval", "train"))
    assert not evidence.passed and "train mode" in evidence.failures[0]


def test_a_candidate_that_raises_fails_and_says_what():
    def broken(a, b):
        raise ValueError("no such thing")

    evidence = verify(Outputs(lambda a, b: a), Outputs(broken), (torch.randn(3, 4),), hard=False)
    assert not evidence.passed and "no such thing" in evidence.failures[0]


class Fragile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise RuntimeError("wants more than one")
        return x / (x.abs().sum(-1, keepdim=True))


def test_what_the_original_cannot_do_is_not_applicable_and_not_passed():
    evidence = verify(Fragile(), Fragile(), (torch.randn(3, 4),))
    left = {item.case: item for item in evidence.left_out}
    assert "wants more than one" in left["batch 1"].reason
    assert "not finite" in left["zeros"].reason
    compared = {c.case for c in evidence.comparisons}
    assert not compared & {"batch 1", "zeros"} and "example" in compared
    assert evidence.passed


def ill_conditioned(seed: int, order: int) -> nn.Module:
    """As in LeViT: batch norms with tiny running variances one after another, large values taken
    away again; float32 itself is off by far more than any usual tolerance."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(4):
        linear, norm = nn.Linear(32, 32), nn.BatchNorm1d(32)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(32, 32, generator=generator) / 6)
            linear.bias.copy_(torch.randn(32, generator=generator))
            norm.running_var.copy_(torch.rand(32, generator=generator) * 1e-2 + 1e-3)
            norm.running_mean.copy_(torch.randn(32, generator=generator))
            norm.weight.copy_(torch.rand(32, generator=generator) + 0.5)
        layers += [linear, norm]
    model = nn.Sequential(*layers).eval()
    return Reordered(model) if order else model


class Reordered(nn.Module):
    """The same function with the sums in another order: features of the input reversed."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            for layer in model:
                if isinstance(layer, nn.Linear):
                    layer.weight.copy_(layer.weight.flip(1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model:
            x = layer(x.flip(1)) if isinstance(layer, nn.Linear) else layer(x)
        return x


def test_a_correct_model_that_a_fixed_tolerance_fails_passes():
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    a, b = ill_conditioned(0, 0), ill_conditioned(0, 1)
    with torch.no_grad():
        assert float((a(x) - b(x)).abs().max()) > 1e-3
    evidence = verify(a, b, (x,))
    assert evidence.passed, str(evidence)
    with torch.no_grad():
        b.model[1].weight.mul_(1 + 2**-10)
    assert not verify(a, b, (x,)).passed


def with_batchnorm(momentum: float = 0.1) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=momentum), nn.Dropout(0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) + 2)
    return model


def test_train_mode_draws_the_same_dropout_and_compares_statistics():
    x = (torch.randn(8, 4, generator=torch.Generator().manual_seed(1)),)
    evidence = verify(with_batchnorm(), with_batchnorm(), x, modes=("eval", "train"))
    assert evidence.passed, str(evidence)
    quantities = {c.quantity for c in evidence.comparisons if c.mode == "train"}
    assert {"statistic 1.running_mean", "statistic 1.num_batches_tracked"} <= quantities
    decided = [
        c for c in evidence.comparisons if c.mode == "train" and c.quantity.startswith("output")
    ]
    assert any(c.verdict.passed for c in decided), "the float64 run drew another dropout"


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x * torch.rand(()),
        lambda x: x + torch.randn(x.shape),
        lambda x: x * torch.rand_like(x),
        lambda x: x + torch.randn_like(x, dtype=torch.float32),
        lambda x: x * torch.empty_like(x).uniform_(0.5, 2),
        lambda x: x + x.new_empty(x.shape).normal_(1.0, 2.0),
        lambda x: x * torch.empty_like(x).exponential_(),
        lambda x: x * x.new_empty(x.shape).bernoulli_(0.5),
        lambda x: F.dropout(x, 0.3) * torch.rand(x.shape, device=x.device),
        lambda x: x[torch.randperm(len(x))],
    ],
)
def test_the_truth_draws_the_random_numbers_of_the_native_run(draw):
    class Noisy(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(draw(x))

    (x,) = example()
    inputs = Inputs((x + 1,))
    truth = run_float64(Noisy(), inputs, "train", seed=4).outputs["output"]
    given = run_native(Noisy(), inputs, "train", seed=4).outputs["output"]
    assert judge(given, truth, given).passed is True
    other = run_native(Noisy(), inputs, "train", seed=5).outputs["output"]
    assert judge(other, truth, given).passed is False


def test_another_momentum_shows_in_the_statistics_only():
    x = (torch.randn(8, 4, generator=torch.Generator().manual_seed(1)),)
    evidence = verify(with_batchnorm(), with_batchnorm(0.2), x, modes=("train",))
    failed = {c.quantity for c in evidence.comparisons if c.verdict.passed is False}
    assert failed == {"statistic 1.running_mean", "statistic 1.running_var"}


class Detached(nn.Module):
    """Right outputs, wrong gradients."""

    def __init__(self, inner: nn.Module, wrong: bool) -> None:
        super().__init__()
        self.inner, self.wrong = inner, wrong

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y * 2 - y.detach() if self.wrong else y


def test_a_gradient_whose_truth_is_zero_may_stay_open():
    """A bias before a batch norm has no gradient; native torch gives rounding noise."""
    x = (torch.randn(8, 4, generator=torch.Generator().manual_seed(1)),)

    class OtherOrder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, module in with_batchnorm().named_children():
                self.add_module(name, module)

        def forward(self, x: Tensor) -> Tensor:
            linear, norm, dropout = self.children()
            return dropout(norm((linear.weight @ x.T + linear.bias[:, None]).T))

    evidence = verify(
        with_batchnorm(), OtherOrder(), x, modes=("train",), gradients=True, hard=False
    )
    assert evidence.passed, str(evidence)
    assert any("gradient of 0.bias" in place for place in evidence.undecided)


def test_gradients_are_judged_when_asked_for():
    pair = Detached(Block(), False), Detached(Block(), True)
    assert verify(*pair, example()).passed
    evidence = verify(*pair, example(), gradients=True)
    failed = {c.quantity for c in evidence.comparisons if c.verdict.passed is False}
    assert {"gradient of input 0", "gradient of inner.weight"} <= failed
    assert not {q for q in failed if q.startswith("output")}


class OnlyUnderNoGrad(nn.Module):
    """As torch's fused fast paths: another computation where no gradient is recorded."""

    def __init__(self, wrong_when: bool | None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        nn.init.constant_(self.layer.weight, 0.3)
        nn.init.constant_(self.layer.bias, 0.7)
        self.wrong_when = wrong_when

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * 2 if torch.is_grad_enabled() is self.wrong_when else y


@pytest.mark.parametrize("wrong_when", (False, True))
def test_both_the_plain_run_and_the_run_with_gradients_are_evidence(wrong_when):
    evidence = verify(OnlyUnderNoGrad(None), OnlyUnderNoGrad(wrong_when), (torch.randn(3, 4),))
    failed = {c.run for c in evidence.comparisons if c.verdict.passed is False}
    assert failed == {"grad" if wrong_when else "plain"}


def test_nothing_of_the_users_is_touched():
    a, b = with_batchnorm().train(), with_batchnorm().train()
    x = torch.randn(8, 4)
    kept = x.clone()
    before = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    state = torch.get_rng_state()
    verify(a, b, (x,), modes=("eval", "train"), gradients=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept) and not x.requires_grad
    for model, old in zip((a, b), before, strict=True):
        assert model.training and all(m.training for m in model.modules())
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        for name, value in model.state_dict().items():
            assert torch.equal(value, old[name]), name


def test_two_sides_that_share_anything_are_refused():
    a = Block()
    with pytest.raises(UsageError, match="same object"):
        verify(a, a, example())
    b = Block()
    b.weight = a.weight
    with pytest.raises(UsageError, match="weight"):
        verify(a, b, example())
    c = Block()
    c.weight = nn.Parameter(a.weight.detach()[:])
    with pytest.raises(UsageError, match="share"):
        verify(a, c, example())


def test_one_file_under_two_names_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"whatever")
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    with pytest.raises(UsageError, match="with itself"):
        verify(path, str(link), example())


def test_wrong_arguments_say_what_is_right():
    with pytest.raises(UnknownName, match="tpu"):
        verify(Block(), Block(), example(), on=("tpu",))
    with pytest.raises(UnknownName, match="evaluate"):
        verify(Block(), Block(), example(), modes=("evaluate",))
    with pytest.raises(UsageError, match="OrderedDict"):
        verify(Block().state_dict(), Block(), example())
    with pytest.raises(CannotTrace, match="Block"):
        verify(Block(), Block(), (torch.randn(2, 3),))
    with torch.device("meta"):
        empty = nn.Linear(3, 3)
    with pytest.raises(CannotRead, match="meta"):
        verify(empty, nn.Linear(3, 3), (torch.randn(2, 3),))


def test_a_runner_the_machine_lacks_is_not_run_and_never_passed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    evidence = verify(Block(), Block(), example(), on=("cpu", "cuda"), hard=False)
    assert [item.kind for item in evidence.left_out if item.runner == "cuda"] == ["not run"]
    assert evidence.passed and {c.runner for c in evidence.comparisons} == {"cpu"}
    required = verify(Block(), Block(), example(), require_runner=("cuda",), hard=False)
    assert not required.passed and "cuda" in required.failures[0]
    alone = verify(Block(), Block(), example(), on=("cuda",), hard=False)
    assert not alone.passed and "nothing was compared" in alone.failures


def test_exported_programs_are_compared_and_faults_in_them_found():
    a, x = Block().eval(), example()
    program = torch.export.export(Block().eval(), x, strict=False)
    assert verify(a, program, x).passed
    wrong = torch.export.export(Block(unbiased).eval(), x, strict=False)
    assert not verify(a, wrong, x).passed
    assert not verify(program, wrong, x).passed


def test_a_graph_module_is_a_module():
    a = Block().eval()
    traced = torch.fx.symbolic_trace(Block().eval())
    assert verify(a, traced, example()).passed
    assert not verify(traced, Block(unbiased), example()).passed


class HandWritten(nn.Module):
    """Upcasts by hand, as language models do: `.double()` alone would not be float64."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(FEATURES, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


def test_the_truth_is_float64_through_casts_by_hand():
    (x,) = example()
    found = run_float64(HandWritten(), Inputs((x,), {}), "eval", seed=0)
    (truth,) = found.outputs.values()
    exact = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)
    exact = exact * HandWritten().weight.detach().double()
    assert truth.dtype is torch.float64
    assert float((truth - exact).abs().max() / exact.abs().max()) < 1e-15


def test_the_seed_repeats_the_inputs_and_another_seed_changes_them():
    inputs = Inputs(example(), {})
    first, again = (hard_inputs(inputs, seed=5) for _ in range(2))
    other = hard_inputs(inputs, seed=6)
    by_label = {case.label: case.inputs.args[0] for case in other}
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.inputs.args[0], two.inputs.args[0])
        if one.label not in ("example", "zeros"):
            assert not torch.equal(one.inputs.args[0], by_label[one.label])


def test_hard_inputs_are_what_their_labels_say():
    cases = {c.label: c.inputs.args[0] for c in hard_inputs(Inputs(example(torch.float16), {}))}
    assert all(x.dtype is torch.float16 and bool(x.isfinite().all()) for x in cases.values())
    assert {f"batch {n}" for n in (1, 7)} <= cases.keys() and len(cases["batch 7"]) == 7
    assert not cases["zeros"].any()
    rows = cases["constant rows"]
    assert bool((rows == rows[..., :1]).all()) and len(rows[..., 0].unique()) > 5
    assert not bool(cases["squares overflow"].square().isfinite().all())
    tiny = cases["subnormal"].abs().max()
    assert 0 < tiny < torch.finfo(torch.float16).smallest_normal
    assert abs(float(cases["mean 1000"].double().mean()) - 1000) < 1
    outlier = cases["outlier channel"].abs().double().mean((0, 1))
    assert outlier.argmax() == 0 and outlier[0] > 50 * outlier[1:].max()


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.norm(self.embed(ids.view(ids.shape))) * mask[..., None]


def test_token_ids_reach_the_ends_of_the_embedding_and_masks_stay():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    inputs = Inputs((torch.tensor([[3, 4, 5], [6, 7, 8]]), mask), {})
    cases = {case.label: case.inputs.args for case in hard_inputs(inputs, model=Tokens())}
    assert cases["first ids"][0].unique().tolist() == [0]
    assert cases["last ids"][0].unique().tolist() == [49]
    assert cases["random ids"][0].max() > 8
    assert all(torch.equal(cases[c][1], mask) for c in ("first ids", "last ids", "random ids"))
    without = {case.label: case.inputs.args for case in hard_inputs(inputs)}
    assert without["last ids"][0].unique().tolist() == [8], "no embedding known: stay in range"


def test_a_wrong_last_row_of_an_embedding_is_caught():
    torch.manual_seed(0)
    a, b = Tokens(), Tokens()
    b.load_state_dict(a.state_dict())
    x = (torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.ones(2, 3, dtype=torch.long))
    assert verify(a, b, x).passed
    with torch.no_grad():
        b.embed.weight[49, 0] += 1
    assert not verify(a, b, x).passed


def test_a_model_too_large_for_float64_is_verified_module_by_module():
    def model(fault=native):
        return nn.ModuleDict({"first": Block(seed=1), "second": Block(fault, seed=2)})

    class Chain(nn.Module):
        def __init__(self, blocks: nn.ModuleDict) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks["second"](self.blocks["first"](x))

    a = Chain(model())
    room = float64_weight_bytes(Block()) + 1
    assert float64_weight_bytes(a) > room
    evidence = verify(a, Chain(model()), example(), memory=room)
    assert evidence.passed and "does not fit" in evidence.notes[0]
    assert {c.where for c in evidence.comparisons} == {"blocks.first", "blocks.second"}
    wrong = verify(a, Chain(model(unbiased)), example(), memory=room)
    failed = {c.where for c in wrong.comparisons if c.verdict.passed is False}
    assert failed == {"blocks.second"}
    assert not verify(a, Chain(model()), example(), memory=8).passed, "nothing fits"


def test_containers_are_gone_down_to_and_memory_is_known():
    model = nn.ModuleList([nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(9, 9)])])
    room = float64_weight_bytes(nn.Linear(4, 4))
    assert parts_that_fit(model, room) == (["0", "1.0"], ["1.1"])
    assert available_bytes() > 2**20


def test_randomness_is_put_back():
    import random

    import numpy as np

    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    outside = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with same_randomness(5):
        inside = draws()
    assert draws() == outside != inside
    with same_randomness(5):
        assert draws() == inside


def test_evidence_survives_json_and_shows_itself():
    evidence = verify(Block(), Block(nan_on_zeros), example(), on=("cpu",), seed=3)
    data = evidence.to_json()
    import json

    again = Evidence.from_json(json.loads(json.dumps(data, allow_nan=False)))
    assert again.to_json() == data and again.passed == evidence.passed is False
    text, page = str(evidence), evidence._repr_html_()
    assert text.startswith("FAILED") and "zeros" in text and "seed 3" in text
    assert "<table>" in page and "zeros" in page
    assert Evidence(seed=0).passed is False


def test_a_module_that_works_in_place_on_its_input_is_run_on_a_copy():
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_() + 1

    x = torch.randn(3, 4)
    kept = x.clone()
    assert verify(InPlace(), InPlace(), (x,), gradients=True).passed
    assert torch.equal(x, kept)
    assert run_native(InPlace(), Inputs((x,), {}), "eval", seed=0).is_finite()


class Of(nn.Module):
    """Whatever function it is given, as a module; `held` are buffers."""

    def __init__(self, function, **held: Tensor):
        super().__init__()
        self.function = function
        for name, tensor in held.items():
            self.register_buffer(name, tensor.clone())

    def forward(self, x: Tensor):
        return self.function(self, x)


def test_a_runner_may_be_given_by_its_name_alone():
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    x = (torch.randn(4, 3),)
    evidence = verify(one, two, x, on="cpu", require_runner="cpu", hard=False)
    assert evidence.passed and evidence.required == ("cpu",)
    with pytest.raises(UnknownName, match="unknown runner 'gpu'"):
        verify(one, two, x, on="cpu, gpu")


def test_torchscript_is_refused_as_the_original_and_taken_as_the_other():
    x = torch.randn(4, 3)
    plain = nn.Linear(3, 2)
    scripted = torch.jit.trace(copy.deepcopy(plain), x)
    assert verify(plain, scripted, (x,)).passed
    with pytest.raises(UsageError, match=r"the first model is TorchScript.*Give the Python model"):
        verify(scripted, plain, (x,))
    with pytest.raises(UsageError, match="0 is TorchScript"):
        verify(nn.Sequential(scripted), nn.Sequential(plain), (x,))


def test_torch_cond_is_run_without_its_compiler():
    def branching(module: nn.Module, x: Tensor):
        return torch.cond(x.sum() > 0, lambda x: x * module.k, lambda x: x - 1, (x,))

    x = torch.randn(3, 8).abs()
    assert verify(
        Of(branching, k=torch.tensor(2.0)), Of(branching, k=torch.tensor(2.0)), (x,)
    ).passed
    other = verify(Of(branching, k=torch.tensor(2.0)), Of(branching, k=torch.tensor(2.1)), (x,))
    assert other.count("failed") and not other.count("undecided")
    assert Of(branching, k=torch.tensor(2.0))(x).shape == x.shape  # torch.cond still works


def test_complex_numbers_have_a_truth():
    x = torch.randn(3, 4, dtype=torch.complex64)
    k = torch.randn(4, dtype=torch.complex64)
    times, added = Of(lambda m, x: x * m.k * 2, k=k), Of(lambda m, x: m.k * (x + x), k=k)
    assert verify(times, added, (x,)).count("passed") > 0
    assert verify(times, added, (x,)).passed
    assert not verify(times, Of(lambda m, x: x * m.k * 2.001, k=k), (x,)).passed


def test_a_cast_to_complex64_leaves_no_truth():
    narrow = Of(lambda m, x: x.to(torch.complex64) * 2)
    evidence = verify(narrow, Of(lambda m, x: x.to(torch.complex64) * 2), (torch.randn(3, 4),))
    assert evidence.passed and evidence.count("passed") == 0
    assert "output output is torch.complex64" in evidence.comparisons[0].verdict.reason


@pytest.mark.parametrize(
    "stored",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: torch.nested.nested_tensor([x, x[:1]]),
        lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
    ],
)
def test_sparse_and_nested_outputs_are_compared(stored):
    x = (torch.randn(3, 8),)
    assert verify(Of(lambda m, x: stored(x)), Of(lambda m, x: stored(x)), x).passed
    assert not verify(Of(lambda m, x: stored(x)), Of(lambda m, x: stored(x * 1.1)), x).passed


def test_numbers_in_the_output_are_judged():
    def returning(make):
        return Of(lambda m, x: {"y": x * 1, "n": make(x)})

    x = (torch.randn(3, 8),)
    three = returning(lambda x: 3.0)
    assert verify(three, returning(lambda x: 3), x).passed
    evidence = verify(three, returning(lambda x: 4.0), x)
    assert {c.quantity for c in evidence.comparisons if c.verdict.passed is False} == {"output n"}
    assert not verify(three, returning(lambda x: None), x).passed
    assert not verify(returning(lambda x: True), returning(lambda x: False), x).passed
    summed, otherwise = returning(lambda x: x.sum().item()), returning(lambda x: x.T.sum().item())
    assert verify(summed, otherwise, x).passed
    assert not verify(summed, returning(lambda x: x.sum().item() * 1.01), x).passed


def test_what_is_no_tensor_and_no_number_is_named():
    drawn = [
        Of(lambda m, x, scale=scale: (x * 1, torch.distributions.Normal(x, scale), None))
        for scale in (1, 2)
    ]
    evidence = verify(*drawn, (torch.randn(3, 8),))
    assert evidence.notes == ("not compared, being neither tensors nor numbers: 1, a Normal",)
