"""Parallel branches become one layer, or stay with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from models.branches import (
    IMAGE,
    MERGED,
    RepVGGBlock,
    Summed,
    conv_bn,
    example,
)
from torch import Tensor, fx, nn

import normsurgery as ns
from normsurgery.find import locate
from normsurgery.fold.checks import Check
from normsurgery.fold.edits import AddIdentity, AddKernel, Drop, Edit
from normsurgery.fold.ground import Choices, Ground, Refused
from normsurgery.fold.merging import apply_merges, merge_steps
from normsurgery.fold.parallel_branches import BranchSum, branch_sums
from normsurgery.fold.rules import into_producer
from normsurgery.fold.running import run
from normsurgery.graph import record
from normsurgery.graph.nodes import inputs_of, operator
from normsurgery.inputs import Inputs
from normsurgery.norms.examples import randomised
from normsurgery.steps import Merge, Step
from normsurgery.surgery.calls import recorded_calls
from normsurgery.surgery.owner import OwnerCall
from normsurgery.surgery.source import module_at
from normsurgery.surgery.tree import replace_everywhere
from normsurgery.treecopy import tree_copy

torch.set_num_threads(1)


def grounded(model: nn.Module, x: Tensor) -> tuple[Ground, list[Edit], list[str]]:
    """The ground after the batch norms behind a layer were planned into it."""
    ground = Ground(locate(model, Inputs((x,))), Choices())
    edits: list[Edit] = []
    gone: list[str] = []
    for site in ground.located.survey:
        try:
            edits += into_producer(ground, site, ground.runs[site.index]).agreed.edits
        except Refused:
            continue
        gone.append(site.path)
        ground.gone.update({r.end: r.start for r in ground.runs[site.index]})
    return ground, edits, gone


def folded(model: nn.Module, edits: Sequence[Edit], gone: Sequence[str]) -> nn.Module:
    """A copy with these norms gone into their layers."""
    done = tree_copy(model, clone=True)
    tensors = dict(done.state_dict())
    run(edits, tensors)
    for path in gone:
        done = replace_everywhere(done, module_at(done, path), nn.Identity().eval())
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        module = done.get_submodule(path)
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            setattr(module, attribute, nn.Parameter(tensor))
    return done


def planned(model: nn.Module, x: Tensor) -> tuple[nn.Module, list[BranchSum], list[Step]]:
    ground, edits, gone = grounded(model, x)
    sums, skips = branch_sums(ground)
    assert not skips, skips
    return folded(model, edits, gone), sums, merge_steps(ground, sums, edits)


@cache
def _prepared(name: str) -> tuple[nn.Module, Tensor, nn.Module, list[BranchSum], list[Step]]:
    model, x = example(name)
    return (model, x, *planned(model, x))


def prepared(name: str) -> tuple[nn.Module, Tensor, nn.Module, list[BranchSum], list[Step]]:
    """The model, its input, a copy with the norms folded into their layers, the sums and steps."""
    model, x, done, sums, steps = _prepared(name)
    return model, x, tree_copy(done, clone=True), sums, steps


def calls(model: nn.Module, steps: Sequence[Step], x: Tensor) -> Mapping[str, Sequence[OwnerCall]]:
    owners = [step.owner for step in steps if isinstance(step, Merge)]
    return recorded_calls(model, owners, Inputs((x,)))


def merge(model: nn.Module, steps: Sequence[Step], x: Tensor) -> dict[str, str]:
    """As a fold does it: the edits are run on what the norms have left, and then bound."""
    values = dict(model.state_dict())
    for step in steps:
        run(step.edits, values)
    changed = {e.target for s in steps for e in s.edits if not isinstance(e, Drop)}
    return apply_merges(model, steps, calls(model, steps, x), {n: values[n] for n in changed})


def error(made: Tensor, wanted: Tensor) -> float:
    return float(((made - wanted).abs().max() / wanted.abs().max()).detach())


def layers_run(model: nn.Module, x: Tensor) -> list[str]:
    """Convolutions and products with a weight that a run of the model shows."""
    names = [str(node.target) for node in record(model, Inputs((x,))).operations]
    return [n for n in names if n.startswith(("aten.convolution", "aten.mm", "aten.addmm"))]


@pytest.mark.parametrize("name", MERGED)
def test_a_sum_of_branches_becomes_one_layer(name: str) -> None:
    model, x, merged, sums, steps = prepared(name)
    branches = MERGED[name][2]
    assert sorted(len(found.branches) for found in sums) == sorted(branches)
    extra = sum(isinstance(m, nn.Linear) for m in model.modules()) if "Mobile" in name else 0
    assert merge(merged, steps, x) == {}
    assert error(merged(x), model(x)) < 1e-9
    assert len(layers_run(merged, x)) == len(branches) + extra
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in merged.modules())


@pytest.mark.parametrize("name", MERGED)
def test_only_the_merged_layer_is_left_in_the_state_dict_and_the_edits_say_so(name: str) -> None:
    _, x, merged, _, steps = prepared(name)
    tensors = dict(merged.state_dict())
    for step in steps:
        run(step.edits, tensors)
    merge(merged, steps, x)
    after = merged.state_dict()
    assert set(tensors) == set(after)
    assert all(torch.equal(tensors[name], after[name]) for name in after)
    assert all(name in after for step in steps for name in made(step))


def made(step: Step) -> list[str]:
    return [edit.target for edit in step.edits if isinstance(edit, (AddKernel, AddIdentity))]


@pytest.mark.parametrize("name", MERGED)
def test_no_operation_is_left_of_the_branches(name: str) -> None:
    _, x, merged, sums, steps = prepared(name)
    merge(merged, steps, x)
    ran = record(merged, Inputs((x,))).operations
    # A forward may begin its sum with the number 0, and still does.
    additions = [op for op in ran if operator(op) == "aten::add" and len(inputs_of(op)) == 2]
    assert len(additions) == (1 if name == "a residual" else 0)
    assert [found.label for found in sums] == [s.site.label for s in steps if s.edits]


@pytest.mark.parametrize("name", ["RepVGG", "MobileOne", "ACNet", "linears"])
def test_the_norm_of_the_input_is_a_step_of_its_own_and_steps_survive_json(name: str) -> None:
    model, x, merged, sums, steps = prepared(name)
    identities = [site.path for found in sums for site in found.identities]
    own = [step for step in steps if not step.edits]
    assert [step.site.path for step in own] == identities
    assert all((s.to, s.rule, s.action) == ("identity", "parallel branches", "fold") for s in steps)
    again = [Step.from_json(json.loads(json.dumps(step.to_json()))) for step in steps]
    assert [step.edits for step in again] == [step.edits for step in steps]
    merge(merged, again, x)
    assert error(merged(x), model(x)) < 1e-9


def test_a_merge_is_made_again_without_inputs_and_takes_the_saved_tensors() -> None:
    _, x, merged, _, steps = prepared("MobileOne")
    fresh = tree_copy(merged, clone=True)
    merge(merged, steps, x)
    apply_merges(fresh, steps)
    fresh.load_state_dict(merged.state_dict(), strict=True)
    assert torch.equal(fresh(x), merged(x))


def test_the_merged_layer_keeps_dtype_gradient_and_mode() -> None:
    _, x, merged, _, steps = prepared("RepVGG")
    layer = merged[0].rbr_dense.conv
    merged.requires_grad_(False)
    merge(merged, steps, x)
    assert merged[0].rbr_dense.conv is layer
    assert not layer.training
    assert not layer.weight.requires_grad


def test_a_meta_model_is_planned_as_a_real_one() -> None:
    for name in ("RepVGG", "MobileOne depthwise", "ACNet dilated"):
        model, x, _, _, steps = prepared(name)
        meta = tree_copy(model, clone=True).to("meta")
        ground, edits, _ = grounded(meta, x.to("meta"))
        sums, skips = branch_sums(ground)
        assert not skips
        assert [s.edits for s in merge_steps(ground, sums, edits)] == [s.edits for s in steps]


def test_on_the_meta_device_a_merge_is_made_again_and_never_for_the_first_time() -> None:
    _, x, merged, _, steps = prepared("RepVGG")
    meta = merged.to("meta")
    refused = apply_merges(meta, steps, calls(meta, steps, x.to("meta")))
    assert "no values" in refused["0.rbr_dense.conv"]
    apply_merges(meta, steps)
    assert list(meta.state_dict()) == ["0.rbr_dense.conv.weight", "0.rbr_dense.conv.bias"]


def test_a_wrong_place_of_a_kernel_is_seen() -> None:
    """The proof can fail: the 1x1 kernel in a corner is another function."""
    _, x, merged, _, steps = prepared("RepVGG")
    first = steps[0]
    edits = (replace(e, at=(0, 0)) if isinstance(e, AddKernel) else e for e in first.edits)
    wrong = replace(first, edits=tuple(edits))
    before = list(merged.state_dict())
    refused = merge(merged, [wrong], x)
    assert refused["0.rbr_dense.conv"] == "with its branches in one layer its output differs"
    assert list(merged.state_dict()) == before


class Plain(nn.Module):
    """x + conv(x): a residual, and no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Sides(Summed):
    """The first branch is also returned."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.branches[0](x)
        return first + self.branches[1](x), first


class OtherInput(Summed):
    def forward(self, x: Tensor) -> Tensor:
        return self.branches[0](x) + self.branches[1](x.relu())


def apart(first: nn.Module, second: nn.Module) -> Callable[[], nn.Module]:
    return lambda: Summed(first, second)


ALONE: dict[str, Callable[[], nn.Module]] = {
    "a plain residual": Plain,
    "a branch that is returned": lambda: Sides(conv_bn(4, 4, 3), conv_bn(4, 4, 1)),
    "two inputs": lambda: OtherInput(conv_bn(4, 4, 3), conv_bn(4, 4, 1)),
    "a nonlinear branch": lambda: Summed(
        conv_bn(4, 4, 3), nn.Sequential(conv_bn(4, 4, 1), nn.ReLU())
    ),
    "no norm": lambda: Summed(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)),
    "a transposed branch": lambda: Summed(conv_bn(4, 4, 3), nn.ConvTranspose2d(4, 4, 1)),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_is_no_sum_of_branches_is_left_alone(name: str) -> None:
    model = nn.Sequential(randomised(ALONE[name]())).double().eval()
    ground, _, _ = grounded(model, torch.randn(IMAGE, dtype=torch.float64))
    assert branch_sums(ground) == ([], [])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = RepVGGBlock(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


def tied() -> nn.Module:
    block = Summed(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    block.branches[1].weight = block.branches[0].weight
    return block


def hooked() -> nn.Module:
    block = Summed(conv_bn(4, 4, 3), nn.Conv2d(4, 4, 1))
    block.branches[1].register_forward_hook(lambda *_: None)
    return block


def hooked_around() -> nn.Module:
    block = RepVGGBlock(4, 4)
    block.rbr_dense.register_forward_pre_hook(lambda *_: None)
    return block


def shared() -> nn.Module:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    return Summed(layer, layer, nn.BatchNorm2d(4))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Check]] = {
    "called twice": (Twice, Check.CALLED_AGAIN),
    "one layer twice": (shared, Check.CALLED_AGAIN),
    "tied": (tied, Check.CALLED_AGAIN),
    "a hook": (hooked, Check.HOOK),
    "a hook around a layer": (hooked_around, Check.HOOK),
    "two dilations": (
        apart(conv_bn(4, 4, 3), nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
        Check.AXIS,
    ),
    "two centres": (
        apart(nn.Conv2d(4, 4, 4, 2, padding=1), conv_bn(4, 4, 1, 2)),
        Check.ZERO_PADDING,
    ),
    "groups": (
        apart(conv_bn(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1)),
        Check.AXIS,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_branches_that_must_stay_apart_have_a_reason(name: str) -> None:
    make, check = REFUSED[name]
    model = nn.Sequential(randomised(make())).double().eval()
    ground, _, _ = grounded(model, torch.randn(2, 4, 8, 8, dtype=torch.float64))
    sums, skips = branch_sums(ground)
    assert not sums
    assert skips
    assert all(skip.reason.startswith(f"{check.value}: ") for skip in skips), skips


class Asks(Summed):
    """A branch is asked for more than a number can give."""

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[0](x) + self.branches[1](x).contiguous()


def test_a_forward_that_asks_more_of_its_branches_keeps_them() -> None:
    model = nn.Sequential(randomised(Asks(conv_bn(4, 4, 3), conv_bn(4, 4, 1)))).double().eval()
    x = torch.randn(IMAGE, dtype=torch.float64)
    merged, _, steps = planned(model, x)
    wanted, names = merged(x), list(merged.state_dict())
    refused = merge(merged, steps, x)
    assert "'Zero' object has no attribute 'contiguous'" in refused["0.branches.0.conv"]
    assert torch.equal(merged(x), wanted)
    assert list(merged.state_dict()) == names


class Logging(Summed):
    """The loop does something besides."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__(*branches)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        out = 0
        for branch in self.branches:
            self.seen.append(len(self.seen))
            out = out + branch(x)
        return out


def test_what_else_a_forward_does_it_does_still() -> None:
    model = nn.Sequential(randomised(Logging(conv_bn(4, 4, 3), conv_bn(4, 4, 1)))).double().eval()
    x = torch.randn(IMAGE, dtype=torch.float64)
    merged, _, steps = planned(model, x)
    assert merge(merged, steps, x) == {}
    before = len(merged[0].seen)
    assert error(merged(x), model(x)) < 1e-9
    assert len(merged[0].seen) == before + 2


def test_a_graph_that_calls_its_branches_is_merged_as_a_forward_is() -> None:
    model = fx.symbolic_trace(randomised(RepVGGBlock(4, 4)).double().eval())
    x = torch.randn(IMAGE, dtype=torch.float64)
    done, report = ns.fold(model, inputs=(x,))
    assert report.passed
    assert error(done(x), model(x)) < 1e-9
    assert list(done.state_dict()) == ["rbr_dense.conv.weight", "rbr_dense.conv.bias"]


def test_drops_name_every_tensor_of_the_branches() -> None:
    *_, steps = prepared("RepVGG")
    dropped = {edit.target for edit in steps[0].edits if isinstance(edit, Drop)}
    assert {name.split(".")[1] for name in dropped} == {"rbr_1x1", "rbr_identity"}
    assert "0.rbr_identity.running_var" in dropped


def test_a_block_that_is_the_model_itself_is_merged() -> None:
    model = randomised(RepVGGBlock(4, 4)).double().eval()
    x = torch.randn(IMAGE, dtype=torch.float64)
    merged, _, steps = planned(model, x)
    assert merge(merged, steps, x) == {}
    assert error(merged(x), model(x)) < 1e-9
    assert list(merged.state_dict()) == ["rbr_dense.conv.weight", "rbr_dense.conv.bias"]
