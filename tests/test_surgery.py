"""What a swap keeps, inherits and leaves alone: one test per way to get it wrong."""

from __future__ import annotations

import copy
import gc
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models.sites import survey_of
from models.traps import (
    Causal,
    Convolutional,
    DataDependent,
    HeldInList,
    NotDeepCopyable,
    Parts,
    PrivateNorm,
    SharedWeight,
    Tied,
    nothing_neutral,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import normsurgery as ns
from normsurgery.errors import CannotRead, CannotTrace, UsageError
from normsurgery.plan import Plan
from normsurgery.precision import float64_copy
from normsurgery.report import Report
from normsurgery.surgery.application import Applied, apply
from normsurgery.surgery.planning import plan
from normsurgery.treecopy import tree_copy
from normsurgery.verify import judge

IMAGES = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)),)
TOKENS = (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4)),)


def swapped(model: nn.Module, to: str, **selection: Any) -> Applied:
    """The edit alone, on a copy, without finding and measuring."""
    made = plan(survey_of(model), model, to, **selection)
    return apply(tree_copy(model, clone=True), made, None)


def fingerprint(model: nn.Module) -> str:
    """All that "unchanged" covers: objects, attributes, hooks, tensors, gradients, random state."""
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    algorithm, keys, *rest = np.random.get_state(legacy=True)
    digest.update(repr((random.getstate(), algorithm, rest)).encode() + np.asarray(keys).tobytes())
    for path, module in model.named_modules(remove_duplicate=False):
        digest.update(f"{path} {id(module)} {type(module)}".encode())
        for name, value in sorted(vars(module).items(), key=lambda item: item[0]):
            digest.update(name.encode())
            digest.update(_described(value))
    return digest.hexdigest()


def _described(value: Any) -> bytes:
    if isinstance(value, Tensor):
        grad = b"" if not value.is_leaf or value.grad is None else _described(value.grad)
        data = value.detach().double().numpy().tobytes()
        return f"{id(value)} {value.dtype} {value.requires_grad}".encode() + data + grad
    if isinstance(value, nn.Module):
        return str(id(value)).encode()
    if isinstance(value, dict):
        return b"".join(str(key).encode() + _described(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set)):
        return b"".join(_described(item) for item in value)
    return repr(value).encode()


# The input model, and what is not touched


@pytest.mark.parametrize("to", ["groupnorm", "batchnorm", "neuronwise", "weightstandardization"])
def test_the_input_model_is_unchanged(to: str) -> None:
    model = nothing_neutral(Convolutional())
    model(*IMAGES).sum().backward()
    model.norm1.register_forward_hook(lambda *_: None)  # type: ignore[operator, union-attr]
    before = fingerprint(model)
    ns.swap(model, to, inputs=IMAGES)
    assert fingerprint(model) == before


class DrawsInForward(nn.Module):
    """Draws from Python's and from numpy's generator in each forward, as SpecAugment does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x * (1 + random.random()) + float(np.random.rand()))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_draws_leaves_no_trace_in_any_random_state(inplace: bool) -> None:
    model = nothing_neutral(DrawsInForward())
    before = fingerprint(model)
    _, report = ns.swap(model, "rmsnorm", inputs=TOKENS, inplace=inplace)
    if inplace:
        report.undo()
    assert fingerprint(model) == before


def test_untouched_modules_are_the_same_objects_in_place() -> None:
    model = nothing_neutral(Convolutional())
    kept = {path: m for path, m in model.named_modules() if path not in ("norm1", "block.1")}
    tensors = {name: p for name, p in model.named_parameters() if "conv" in name or "head" in name}
    made = plan(survey_of(model), model, "layernorm2d")
    result, _ = ns.swap(model, plan=made, inputs=IMAGES, inplace=True)
    assert result is model
    for path, module in kept.items():
        assert model.get_submodule(path) is module
    for name, parameter in tensors.items():
        assert model.get_parameter(name) is parameter
    assert type(model.norm1) is not nn.BatchNorm2d


def test_the_copy_shares_nothing_with_the_original() -> None:
    model = nothing_neutral(Convolutional())
    changed, _ = ns.swap(model, "layernorm2d", inputs=IMAGES)
    ours = {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    theirs = {t.data_ptr() for t in (*changed.parameters(), *changed.buffers()) if t.numel()}
    assert not ours & theirs
    assert type(changed) is Convolutional


# X -> X


@pytest.mark.parametrize(
    ("make", "kind", "inputs"),
    [
        (Convolutional, "batchnorm", IMAGES),
        (Parts, "layernorm", TOKENS),
        (SharedWeight, "layernorm", TOKENS),
        (Tied, "batchnorm", (torch.randn(2, 8, 4, 4),)),
        (PrivateNorm, "batchnorm", (torch.randn(2, 8, 4, 4),)),
    ],
)
def test_the_same_kind_changes_no_bit_and_every_object(make: Any, kind: str, inputs: Any) -> None:
    model = nothing_neutral(make())
    done = swapped(model, kind)
    assert done.plan.steps and not done.keymap
    old, new = model.state_dict(), done.model.state_dict()
    assert list(old) == list(new)
    assert all(torch.equal(old[name], new[name]) for name in old)
    for step in done.plan.steps:
        fresh = done.model.get_submodule(step.site.path)
        assert fresh is not model.get_submodule(step.site.path)
        assert type(fresh) is type(model.get_submodule(step.site.path))
    ours, theirs = tree_copy(model, clone=True), done.model
    for net in (ours, theirs):
        net(*inputs).square().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.grad is b.grad is None or torch.equal(a.grad, b.grad), name  # type: ignore[arg-type]
    assert torch.equal(ours.eval()(*inputs), theirs.eval()(*inputs))


# What is inherited


def test_frozen_parameters_stay_frozen_one_by_one() -> None:
    for to in ("rmsnorm", "dyt", "layernorm"):
        done = swapped(nothing_neutral(Parts()), to).model
        assert all(p.requires_grad for p in done.plain.parameters())
        assert not any(p.requires_grad for p in done.frozen.parameters())
        assert not done.bias_only.weight.requires_grad
    assert done.bias_only.bias.requires_grad
    assert not list(done.bare.parameters())


def test_a_frozen_batch_norm_stays_frozen() -> None:
    model = nothing_neutral(Convolutional())
    model.norm1.requires_grad_(False)  # type: ignore[operator, union-attr]
    done = swapped(model, "dyt").model
    assert not any(p.requires_grad for p in done.norm1.parameters())
    assert all(p.requires_grad for p in done.block[1].parameters())


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_computed_parameter_is_frozen_with_the_one_it_is_made_of(frozen: str) -> None:
    """The scale of affine holds the old weight, its shift both the weight and the bias."""
    model = nothing_neutral(Convolutional())
    getattr(model.norm1, frozen).requires_grad_(False)
    done = swapped(model, "affine").model
    assert done.norm1.weight.requires_grad is (frozen != "weight")
    assert done.norm1.bias.requires_grad
    reset = swapped(model, "affine", init="reset").model
    assert reset.norm1.weight.requires_grad is (frozen != "weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_mode_are_inherited(dtype: torch.dtype) -> None:
    model = nothing_neutral(Convolutional()).to(dtype)
    model.block.eval()  # type: ignore[operator, union-attr]
    for to in ("layernorm2d", "rmsnorm", "dyt", "affine"):
        done = swapped(model, to).model
        assert done.norm1.training and not done.block[1].training
        assert not any(m.training for m in done.block[1].modules())
        for parameter in (*done.norm1.parameters(), *done.block[1].parameters()):
            assert parameter.dtype is dtype


def test_weights_and_eps_are_carried() -> None:
    model = nothing_neutral(Convolutional())
    done = swapped(model, "layernorm2d").model
    assert torch.equal(done.norm1.weight, model.norm1.weight)
    assert torch.equal(done.norm1.bias, model.norm1.bias)
    assert done.norm1.eps == 1e-3


def test_a_model_on_the_meta_device_is_swapped_there() -> None:
    with torch.device("meta"):
        model = Convolutional()
    for to in ("layernorm2d", "affine", "batchnorm", "dyt"):
        done = swapped(model, to).model
        assert all(tensor.is_meta for tensor in done.state_dict().values())


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_model_without_values_is_swapped_and_not_measured(offloaded: bool) -> None:
    """As a whole, or one part of it, as with weights that are offloaded."""
    model = nothing_neutral(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2)))
    model[1 if offloaded else slice(None)].to("meta")
    tokens = (torch.randn(2, 8, device="meta"),)
    made = plan(survey_of(model), model, "rmsnorm")
    wanted: dict[str, Any] = {"plan": made} if offloaded else {"to": "rmsnorm"}
    changed, report = ns.swap(model, inputs=tokens, **wanted)
    assert isinstance(changed[0], nn.RMSNorm) and report.evidence is None
    assert any("not measured" in note and "meta" in note for note in report.notes)


def test_hooks_still_run_and_a_handle_still_removes_them() -> None:
    model = nothing_neutral(Parts())
    seen: list[str] = []
    handles = [
        model.plain.register_forward_hook(lambda *_: seen.append("forward")),
        model.plain.register_forward_pre_hook(
            lambda *_, **__: seen.append("pre"), with_kwargs=True
        ),
        model.plain.register_full_backward_hook(lambda *_: seen.append("backward")),
        model.plain.register_state_dict_post_hook(lambda *_: seen.append("state")),
    ]
    made = plan(survey_of(model), model, "rmsnorm", only=("plain",))
    ns.swap(model, plan=made, inputs=TOKENS, inplace=True)
    assert isinstance(model.plain, nn.RMSNorm)
    seen.clear()
    model(*TOKENS).sum().backward()
    model.state_dict()
    assert seen == ["pre", "forward", "backward", "state"]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(*TOKENS).sum().backward()
    model.state_dict()
    assert seen == []


def test_a_hook_of_the_old_module_itself_stays_behind() -> None:
    """A method of the old norm, registered as its hook, would act on a module that is gone."""

    class WatchesItself(nn.LayerNorm):
        def __init__(self) -> None:
            super().__init__(8)
            self.calls = 0
            self.register_forward_hook(self.count)

        def count(self, *_: Any) -> None:
            self.calls += 1

    model = nn.Sequential(WatchesItself())
    for to in ("rmsnorm", "layernorm"):
        changed = swapped(model, to).model
        changed(*TOKENS)
        assert not changed[0]._forward_hooks and model[0].calls == 0


class CallsLayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(self.linear(x), (8,), self.weight)


def test_a_call_in_a_model_without_values_is_refused_with_the_reason() -> None:
    tokens = (torch.randn(2, 8, device="meta"),)
    with pytest.raises(UsageError, match=r"refused: .*no values \(meta device\)"):
        ns.swap(CallsLayerNorm().to("meta"), "rmsnorm", inputs=tokens)


@pytest.mark.parametrize("post", [False, True])
def test_hooks_on_a_parameter_that_stay_behind_are_named(post: bool) -> None:
    """In place only the replaced norm has new parameters; a copy has nothing but new ones."""

    def hook(tensor: Tensor) -> Tensor | None:
        return None if post else tensor * 0

    model = nothing_neutral(Parts())
    for norm in (model.plain, model.bias_only):
        bias: Any = norm.bias
        bias.register_post_accumulate_grad_hook(hook) if post else bias.register_hook(hook)
    made = plan(survey_of(model), model, "dyt", only=("plain",))
    for inplace, named in ((False, "plain.bias, bias_only.bias"), (True, "plain.bias")):
        _, report = ns.swap(model, plan=made, inputs=TOKENS, inplace=inplace)
        (note,) = (note for note in report.notes if "hooks" in note)
        assert note.startswith(f"hooks registered on {named} stay")
    report.undo()
    _, report = ns.swap(nothing_neutral(Parts()), plan=made, inputs=TOKENS)
    assert not any("hooks" in note for note in report.notes)


class Refuses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no data!.")


def test_inputs_that_do_not_run_are_refused_in_one_sentence() -> None:
    model = Refuses()
    made = plan(survey_of(model), model, "rmsnorm")
    with pytest.raises(CannotTrace, match=r"RuntimeError: no data!\. Give inputs"):
        ns.swap(model, plan=made, inputs=TOKENS)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def test_a_parametrization_is_inherited_with_its_tensor() -> None:
    model = nothing_neutral(Parts())
    parametrize.register_parametrization(model.plain, "weight", Doubled())
    done = swapped(model, "rmsnorm", only=("plain",))
    assert torch.equal(done.model.plain.weight, model.plain.weight)
    name = "plain.parametrizations.weight.original"
    assert torch.equal(done.model.state_dict()[name], model.state_dict()[name])
    done.model.load_state_dict(done.keymap.load(model.state_dict()))


def test_a_buffer_that_is_not_saved_is_still_not_saved() -> None:
    model = nothing_neutral(PrivateNorm())
    done = swapped(model, "randomaggregation").model
    means = [name for name, _ in done.named_buffers() if name.endswith("running_mean")]
    assert means and not any(name in done.state_dict() for name in means)


def test_attributes_set_on_a_parameter_are_carried() -> None:
    model = Parts()
    model.plain.weight.no_weight_decay = True
    assert swapped(model, "rmsnorm").model.plain.weight.no_weight_decay


# Ties


def test_a_norm_with_three_names_is_one_object_under_three_names() -> None:
    done = swapped(nothing_neutral(Tied()), "layernorm2d")
    model = done.model
    assert model.norm1 is model.norm2 is model.block[1]
    assert type(model.norm1) is not nn.BatchNorm2d
    assert len(done.plan.steps) == 1


@pytest.mark.parametrize("to", ["layernorm", "rmsnorm", "dyt"])
def test_a_weight_shared_with_the_rest_of_the_model_stays_shared(to: str) -> None:
    model = swapped(nothing_neutral(SharedWeight()), to).model
    assert model.norm1 is not model.norm2
    assert model.norm1.weight is model.norm2.weight is model.scale


def test_the_tie_holds_when_only_one_of_the_norms_is_swapped() -> None:
    model = swapped(nothing_neutral(SharedWeight()), "dyt", only=("norm2",)).model
    assert isinstance(model.norm1, nn.LayerNorm)
    assert model.norm1.weight is model.norm2.weight is model.scale


def test_members_of_an_ensemble_do_not_become_tied() -> None:
    done = swapped(nothing_neutral(Convolutional()), "randomaggregation").model
    names = {name for name, _ in done.norm1.named_parameters()}
    everything = {name for name, _ in done.norm1.named_parameters(remove_duplicate=False)}
    assert names == everything and len(names) > 2


# Undo


@pytest.mark.parametrize("to", ["layernorm2d", "batchnorm", "affine", "neuronwise"])
def test_undo_brings_back_the_very_same_model(to: str) -> None:
    model = nothing_neutral(Tied())
    images = (torch.randn(2, 8, 4, 4),)
    before = fingerprint(model)
    _, report = ns.swap(model, to, inputs=images, inplace=True)
    assert fingerprint(model) != before
    assert report.undo() is model
    assert fingerprint(model) == before


def test_undo_leaves_alone_what_happened_since() -> None:
    model = nothing_neutral(Convolutional())
    _, report = ns.swap(model, "layernorm2d", inputs=IMAGES, inplace=True)
    model.eval()
    with torch.no_grad():
        model.head.weight.zero_()
    report.undo()
    assert not model.training and not bool(model.head.weight.any())
    assert isinstance(model.norm1, nn.BatchNorm2d)


def test_undo_of_a_copy_says_that_nothing_was_changed() -> None:
    _, report = ns.swap(nothing_neutral(Convolutional()), "layernorm2d", inputs=IMAGES)
    with pytest.raises(UsageError, match="untouched"):
        report.undo()


def test_a_failed_swap_in_place_leaves_the_model_as_it_was() -> None:
    model = nothing_neutral(Convolutional())
    made = plan(survey_of(model), model, "layernorm2d")
    foreign = nothing_neutral(Parts())
    before = fingerprint(foreign)
    with pytest.raises(UsageError, match="another model"):
        ns.swap(foreign, plan=made, inputs=TOKENS, inplace=True)
    assert fingerprint(foreign) == before


# Shapes of models


def test_a_model_that_is_itself_a_norm_becomes_the_new_module() -> None:
    model = nothing_neutral(nn.BatchNorm2d(8))
    changed, report = ns.swap(model, "layernorm2d", inputs=(torch.randn(2, 8, 4, 4),))
    assert type(changed) is not nn.BatchNorm2d and type(model) is nn.BatchNorm2d
    changed.load_state_dict(report.keymap.load(model.state_dict()))


def test_a_model_that_cannot_be_deep_copied_is_swapped_and_unchanged() -> None:
    """deepcopy raises on old weight_norm after a forward and on a stored activation."""
    model = nothing_neutral(NotDeepCopyable())
    model(*TOKENS)
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    before = fingerprint(model)
    changed, report = ns.swap(model, "rmsnorm", inputs=TOKENS)
    assert fingerprint(model) == before
    assert isinstance(changed.norm, nn.RMSNorm) and report.passed
    changed(*TOKENS).sum().backward()


def test_a_norm_behind_a_branch_on_data_is_swapped() -> None:
    changed, _ = ns.swap(nothing_neutral(DataDependent()), "rmsnorm", inputs=(torch.ones(2, 8),))
    assert isinstance(changed.positive, nn.RMSNorm) and isinstance(changed.negative, nn.RMSNorm)


def test_a_norm_held_in_a_plain_list_is_a_skip() -> None:
    """Replaced in the tree only, the forward would go on running the old norm from the list."""
    model = nothing_neutral(HeldInList())
    made = plan(survey_of(model), model, "rmsnorm")
    assert [step.site.path for step in made.steps] == ["other"]
    (skip,) = made.skips
    assert skip.path == "norm" and "steps" in skip.reason


def test_group_norm_of_tokens_does_not_see_the_future() -> None:
    """nn.GroupNorm takes (N, L, C) for (N, C, L) where L == C, and mixes positions."""
    model = nothing_neutral(Causal())
    changed, _ = ns.swap(model, "groupnorm", inputs=(torch.randn(2, 8, 8),))
    x = torch.randn(2, 8, 8)
    later = x.clone()
    later[:, 5:] += 1
    assert torch.equal(changed(x)[:, :5], changed(later)[:, :5])
    assert not torch.equal(changed(x)[:, 5:], changed(later)[:, 5:])


# torch's fused encoder path


def encoder(layers: int = 2) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, layers).eval()


@pytest.mark.parametrize("to", ["rmsnorm", "dyt", "groupnorm", "identity"])
def test_an_encoder_layer_computes_with_its_new_norms(to: str) -> None:
    """In eval without gradients torch hands norm1.weight to a fused operator: a replaced norm is
    ignored silently, or fails for lack of a bias."""
    model = nothing_neutral(encoder())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    x = torch.randn(2, 6, 16)
    changed, report = ns.swap(model, to, inputs=(x,))
    truth = float64_copy(changed)(x.double()).detach()
    with torch.no_grad():
        plain, before = changed(x), model(x)
    native = changed(x).detach()
    assert judge(plain, truth, native).passed
    assert judge(before, truth, native).passed is False
    assert any("fused encoder path" in note for note in report.notes)
    assert all(layer.activation_relu_or_gelu == 1 for layer in model.layers)  # type: ignore[union-attr]


def test_an_encoder_with_one_swapped_layer_takes_padding_masks() -> None:
    """The encoder would pass a nested tensor on to the layers after a first, untouched one."""
    model = encoder()
    made = plan(survey_of(model), model, "rmsnorm", only=("layers.1.*",))
    changed, _ = ns.swap(model, plan=made, inputs=(torch.randn(2, 6, 16),))
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.no_grad():
        out = changed(torch.randn(2, 6, 16), src_key_padding_mask=mask)
    assert out.shape == (2, 6, 16) and bool(out[0].isfinite().all())


def test_undo_switches_the_fused_path_on_again() -> None:
    model, x = encoder(), torch.randn(2, 6, 16)
    before = fingerprint(model)
    _, report = ns.swap(model, "rmsnorm", inputs=(x,), inplace=True)
    assert all(layer.activation_relu_or_gelu == 0 for layer in model.layers)  # type: ignore[union-attr]
    report.undo()
    assert fingerprint(model) == before


class UsesItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.read.weight)


def test_a_layer_whose_weight_is_read_is_not_wrapped() -> None:
    """As nn.MultiheadAttention reads out_proj.weight and never calls out_proj."""
    _, report = ns.swap(UsesItsWeight(), "neuronwise", inputs=TOKENS)
    assert [step.site.path for step in report.plan.steps] == ["called"]
    (skip,) = report.plan.skips
    assert skip.path == "read" and "self.read.weight" in skip.reason
    _, report = ns.swap(encoder(1), "neuronwise", inputs=(torch.randn(2, 6, 16),))
    assert not any("out_proj" in step.site.path for step in report.plan.steps)


# Wrapped models


def test_a_compiled_model_is_operated_on_inside_and_that_is_said() -> None:
    model = nothing_neutral(Convolutional())
    compiled = torch.compile(model, backend="eager")
    changed, report = ns.swap(compiled, "layernorm2d", inputs=IMAGES)  # type: ignore[arg-type]
    assert type(changed) is Convolutional
    assert any("compiled" in note for note in report.notes)


def test_distributed_wrappers_are_refused_with_the_way_out() -> None:
    with pytest.raises(UsageError, match=r"DataParallel.*\.module"):
        ns.swap(nn.DataParallel(Convolutional()), "layernorm2d", inputs=IMAGES)
    nested = nn.Sequential(nn.DataParallel(Convolutional()))
    with pytest.raises(UsageError, match=r"\.module"):
        ns.swap(nested, "layernorm2d", inputs=IMAGES)


def test_torchscript_and_lazy_models_are_refused() -> None:
    with pytest.raises(UsageError, match="TorchScript"):
        ns.swap(torch.jit.trace(nn.LayerNorm(8), TOKENS), "rmsnorm", inputs=TOKENS)
    with pytest.raises(CannotRead, match="lazy"):
        ns.swap(nn.Sequential(nn.LazyBatchNorm2d()), "layernorm2d", inputs=IMAGES)


def test_a_torchscript_child_leaves_the_rest_editable() -> None:
    """Its code cannot be edited, and a norm in it is a Skip; nothing else depends on that."""
    inner = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).eval()
    for pre, skipped in ((torch.jit.script(nn.ReLU()), 0), (torch.jit.script(inner), 1)):
        model = nothing_neutral(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval())
        model.insert(0, pre)
        changed, report = ns.swap(model, "groupnorm", inputs=IMAGES)
        assert isinstance(changed[2], nn.GroupNorm)
        assert len(report.plan.skips) == skipped
        assert isinstance(ns.fold(model, inputs=IMAGES)[0][2], nn.Identity)


@pytest.mark.parametrize(
    ("selection", "kept"),
    [
        ({"only": ["1"]}, ["1"]),
        ({"only": ["3"]}, ["3"]),
        ({"only": [1]}, ["3"]),
        ({"only": 0}, ["1"]),
        ({"only": ["0"]}, ["1"]),  # the path of no norm
        ({"exclude": [1]}, ["1"]),
        ({"exclude": ["1"]}, ["3"]),
    ],
)
def test_a_number_is_an_index_and_text_a_path(selection, kept) -> None:
    """In a Sequential the digits of an index are the path of another norm."""
    model = nn.Sequential(*(m for _ in "ab" for m in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))))
    made = plan(ns.find(model, IMAGES), model, "affine", **selection)
    assert [step.site.path for step in made.steps] == kept


def test_an_instance_level_forward_is_a_skip() -> None:
    """accelerate puts a forward on the instance; a new module would not have it."""
    model = nothing_neutral(Parts())
    original = model.plain.forward
    model.plain.forward = lambda x: original(x)
    made = plan(survey_of(model), model, "rmsnorm")
    assert "plain" not in [step.site.path for step in made.steps]
    reasons = {skip.path: skip.reason for skip in made.skips}
    assert reasons["plain"]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.norm.weight


class BySuper(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return super().scaled(self.norm(x))


def decorated(function: Any) -> Any:
    """Without functools.wraps: only its closure tells of what it runs."""

    def run(self: nn.Module, x: Tensor) -> Any:
        return function(self, x)

    return run


class ByDecorator(Scaled):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        layer = self.norm
        return layer(x) * layer.bias


@pytest.mark.parametrize(
    ("cls", "read"), [(BySuper, "self.norm.weight"), (ByDecorator, "self.norm.bias")]
)
def test_a_read_is_seen_through_super_and_a_decorator(cls: type[nn.Module], read: str) -> None:
    """The forward would go on with the old norm's tensors, or fail on a new one without them."""
    with pytest.raises(UsageError, match=f"reads {read}"):
        plan(ns.find(cls(), TOKENS), cls(), "identity")


class RootMeanSquare(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Standardized(RootMeanSquare):
    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return super().forward(x)


class WholeTensor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()


SHAPES = [(1,), (1, 1), (2, 1), (0, 1), (1, 1, 1), (2, 0, 1), (2,), (0, 2)]


@pytest.mark.parametrize("shape", [*SHAPES, ()], ids=str)
def test_degenerate_shapes_are_found_and_swapped_or_refused(shape: tuple[int, ...]) -> None:
    """One feature, one element, none, a scalar: a proof must not divide by their number or take
    an axis that is not there."""
    models: list[nn.Module] = [WholeTensor()]
    if shape:
        norms = (RootMeanSquare, Standardized, nn.LayerNorm, nn.RMSNorm)
        models += [nn.Sequential(norm(shape[-1]), nn.Identity()) for norm in norms]
    for model in models:
        x = torch.randn(shape)
        ns.find(model.eval(), (x,))
        for to in ("layernorm", "rmsnorm", "groupnorm", "batchnorm", "identity"):
            try:
                ns.swap(model, to, inputs=(x,))
            except ns.NormsurgeryError as refusal:
                assert str(refusal).endswith(".")


# Calibration and the report


def test_calibrate_sets_the_running_statistics_of_new_norms() -> None:
    model = nothing_neutral(nn.Sequential(nn.GroupNorm(2, 8)))
    data = [torch.randn(16, 8, 4, 4) * 3 + 5 for _ in range(4)]
    changed, report = ns.swap(model, "batchnorm", calibrate=data, inputs=(data[0],))
    norm = changed[0]
    batches = torch.stack([batch.double().mean((0, 2, 3)) for batch in data]).mean(0)
    assert judge(norm.running_mean, batches).passed
    assert norm.momentum is not None and changed.training == model.training
    assert any("4 batches" in note for note in report.notes)


def test_calibrate_without_running_statistics_is_refused() -> None:
    model = nothing_neutral(Convolutional())
    with pytest.raises(UsageError, match="running statistics"):
        ns.swap(model, "layernorm2d", calibrate=IMAGES, inputs=IMAGES)


def test_the_report_says_first_that_outputs_change(tmp_path: Any) -> None:
    _, report = ns.swap(nothing_neutral(Convolutional()), "layernorm2d", inputs=IMAGES)
    lines = str(report).splitlines()
    assert lines[0] == "outputs change; train or calibrate"
    assert any("relative change" in line for line in lines)
    report.save(tmp_path / "r.json")
    again = Report.load(tmp_path / "r.json")
    assert str(again) == str(report) and again.exit_code == report.exit_code == 0
    assert again.keymap == report.keymap
    assert Plan.load(tmp_path / "r.json").to_json() == report.plan.to_json()
    assert "<table>" in report._repr_html_()


def test_a_report_of_an_exact_swap_does_not_say_that_outputs_change() -> None:
    _, report = ns.swap(nothing_neutral(Convolutional()), "batchnorm", inputs=IMAGES)
    assert "outputs change" not in str(report) and report.passed


def test_a_broken_promise_is_exit_code_one() -> None:
    """The evidence, not the plan, decides."""
    model = nothing_neutral(Convolutional()).eval()
    _, report = ns.swap(model, "affine", inputs=IMAGES)
    assert report.exit_code == 0 and report.evidence is not None
    worse = [*report.evidence.comparisons]
    from dataclasses import replace

    failed = replace(worse[0], verdict=replace(worse[0].verdict, passed=False, reason="planted"))
    broken = replace(report, evidence=replace(report.evidence, comparisons=(failed,)))
    assert broken.exit_code == 1 and "planted" in str(broken)


def test_a_new_norm_trains() -> None:
    for to in ("layernorm2d", "groupnorm", "dyt", "affine", "neuronwise", "weightstandardization"):
        changed, report = ns.swap(Convolutional().eval(), to, inputs=IMAGES)
        before = {name: p.detach().clone() for name, p in changed.named_parameters()}
        changed(*IMAGES).square().sum().backward()
        torch.optim.SGD(changed.parameters(), lr=0.1).step()
        replaced = tuple(f"{step.site.path}." for step in report.plan.steps)
        for name, parameter in changed.named_parameters():
            if name.startswith(replaced):
                assert not torch.equal(before[name], parameter), (to, name)


@pytest.fixture(autouse=True)
def _no_garbage() -> Iterator[None]:
    """Modules of one test must not live on as ids in the next one's fingerprints."""
    yield
    gc.collect()
