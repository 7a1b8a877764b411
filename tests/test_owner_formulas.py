"""Rewriting norms that are spread over a forward: formulas, batch norms by hand, CLIP's ends."""

from __future__ import annotations

import ast
import copy

import pytest
import torch
from models.owner_sites import (
    close_to,
    converted,
    formula_site,
    inner_forward,
    refusal,
    same,
    site,
    source_of_forward,
    swap_to_itself,
    unsettled,
)
from models.owners import ONE, Affine, C, Formula, InPlace, Rebound, x
from torch import nn
from torch.nn import functional as F

from normsurgery.flow import positions
from normsurgery.rewriting.owner import OwnerCall, Placement, rewrite_owner


def test_formula_over_statements_leaves_nothing_behind():
    """A rewrite that keeps the old statements computes every statistic twice."""
    owner = unsettled(Formula()).double()
    expected = owner(x().double())
    found = formula_site(owner)
    norm = converted(owner, found).double()
    rewrite_owner(owner, [Placement(found, "norm_0", norm)], ONE)
    close_to(expected, owner(x().double()))
    text = source_of_forward(owner)
    assert "mean" not in text
    assert "var" not in text
    assert "self.norm_0(h)" in text


def test_rebound_name_is_kept_under_a_fresh_one():
    """`self.norm_0(x)` at the last line would normalise what is normalised already."""
    owner = unsettled(Rebound()).double()
    found = site(
        owner,
        "x * self.weight",
        name="x",
        kind="rmsnorm",
        parameters={"weight": "weight"},
        region=(
            "x.pow(2)",
            "x.pow(2).mean(-1, keepdim=True)",
            "torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)",
            "x * scale",
        ),
        normalized_shape=[C],
        cast="none",
        weight_offset=0.0,
    )
    seen = []
    norm = nn.Identity()
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    given = x().double()
    wanted = owner.fc(given)
    rewrite_owner(owner, [Placement(found, "norm_0", norm)], ONE)
    owner(given)
    assert torch.equal(seen[0], wanted)


def test_value_overwritten_in_place_is_cloned_first():
    """LayerNorm of x and of x - mean agree: only another norm shows which of them it is given."""
    owner = unsettled(InPlace())
    found = site(
        owner,
        "h + self.bias",
        name="h",
        region=(
            "h.mean(-1, keepdim=True)",
            "h.var(-1, unbiased=False, keepdim=True)",
            "h -= mean",
            "torch.sqrt(var + 1e-5)",
            "h /= torch.sqrt(var + 1e-5)",
            "h *= self.weight",
        ),
    )
    seen = []
    norm = nn.Identity()
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    wanted = owner.fc(x())
    rewriting = rewrite_owner(owner, [Placement(found, "norm_0", norm)], ONE)
    assert torch.equal(owner(x()), wanted)
    assert torch.equal(seen[0], wanted)
    # `h *= self.weight` would be an orphan that no gradient reaches.
    assert rewriting.moved == ("weight", "bias")
    assert "mean" not in source_of_forward(owner)


def test_value_changed_by_a_statement_that_stays_is_cloned():
    """`h.sub_(mean)` may be seen by others, so it stays; the new norm is given h as it was."""

    class ByMethod(Affine):
        def forward(self, x):
            h = self.fc(x)
            mean = h.mean(-1, keepdim=True)
            h.sub_(mean)
            scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
            return h * scale * self.weight + self.bias

    owner = unsettled(ByMethod())
    region = ("h.mean(-1, keepdim=True)", "h.sub_(mean)", "h * scale")
    found = site(owner, "h * scale * self.weight + self.bias", name="h", region=region)
    wanted = owner.fc(x())
    rewrite_owner(owner, [Placement(found, "norm_0", nn.Identity())], ONE)
    assert torch.equal(owner(x()), wanted)


def test_update_in_place_that_others_see_is_refused():
    """`h -= mean` also changes `kept`: without it the forward returns something else."""

    class Seen(Affine):
        def forward(self, x):
            h = self.fc(x)
            kept = h.view(-1)
            h -= h.mean(-1, keepdim=True)
            y = h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
            return y * self.weight + self.bias, kept

    owner = unsettled(Seen())
    found = site(
        owner,
        "y * self.weight + self.bias",
        name="h",
        region=(
            "h.mean(-1, keepdim=True)",
            "h -= h.mean(-1, keepdim=True)",
            "h.pow(2)",
            "h.pow(2).mean(-1, keepdim=True)",
            "torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)",
            "h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)",
        ),
    )
    assert "output" in refusal(owner, found)


def test_value_without_a_name_gets_one():
    """The value normalised stands inside an earlier expression and is bound to no name."""

    class Nested(Affine):
        def forward(self, x):
            total = (self.fc(x), 2)
            return F.layer_norm(total[0], (C,), self.weight, self.bias, 1e-5) * total[1]

    owner = unsettled(Nested())
    found = site(
        owner,
        "F.layer_norm(total[0], (C,), self.weight, self.bias, 1e-5)",
        origin="self.fc(x)",
    )
    swapped = swap_to_itself(owner, [found], ONE)
    assert ":= self.fc(x)" in source_of_forward(swapped)


def test_two_norms_in_one_forward():
    """The second expression's position must not move when the first is replaced."""

    class Two(Affine):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(C))

        def forward(self, x):
            return F.layer_norm(
                self.fc(F.layer_norm(x, (C,), self.weight, self.bias, 1e-5)), (C,), self.gain
            )

    owner = unsettled(Two())
    inner = "F.layer_norm(x, (C,), self.weight, self.bias, 1e-5)"
    outer = f"F.layer_norm(self.fc({inner}), (C,), self.gain)"
    sites = [
        site(owner, inner, name="x"),
        site(owner, outer, origin=f"self.fc({inner})", parameters={"weight": "gain"}),
    ]
    swapped = swap_to_itself(owner, sites, ONE)
    assert [n for n, _ in swapped.named_children()] == ["fc", "norm_0", "norm_1"]


# ---------------------------------------------------------------- batch norm with its activation


class BatchNormAct(nn.BatchNorm2d):
    """As model zoos write it: torch's forward by hand, then the activation."""

    def __init__(self, features: int, momentum: float | None = 0.1) -> None:
        super().__init__(features, momentum=momentum)
        self.act = nn.ReLU()

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4D")
        if self.momentum is None:  # noqa: SIM108
            factor = 0.0
        else:
            factor = self.momentum
        if self.training and self.track_running_stats:  # noqa: SIM102
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if self.momentum is None:
                    factor = 1.0 / float(self.num_batches_tracked)
                else:
                    factor = self.momentum
        if self.training:  # noqa: SIM108
            batch = True
        else:
            batch = (self.running_mean is None) and (self.running_var is None)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            batch,
            factor,
            self.eps,
        )
        return self.act(x)


class SuperBatchNormAct(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def batchnorm_site(owner, output):
    return site(
        owner,
        output,
        name="x",
        kind="batchnorm",
        parameters={role: role for role in STATE},
        shape=(4, 6, 3, 3),
        channel_axis=1,
        features=6,
        momentum=owner.momentum,
    )


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("cls", [BatchNormAct, SuperBatchNormAct])
def test_batchnorm_with_activation(cls, momentum):
    """Prototype A1: traced in eval, such a class never updated its statistics again."""
    owner = cls(6)
    owner.momentum = momentum
    unsettled(owner)
    output = "super().forward(x)"
    if cls is BatchNormAct:
        call = next(
            node
            for node in ast.walk(positions.syntax_of(cls.forward))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "F.batch_norm"
        )
        output = ast.unparse(call)
    found = batchnorm_site(owner, output)
    calls = [OwnerCall((x(4, 6, 3, 3),))]
    swapped = swap_to_itself(owner, [found], calls)
    assert sorted(swapped.state_dict()) == sorted(f"norm_0.{role}" for role in STATE)
    for model in (owner, swapped):
        model.train()
        for _ in range(3):
            model(x(4, 6, 3, 3))
    for role in STATE:
        assert torch.equal(owner.state_dict()[role], swapped.state_dict()[f"norm_0.{role}"])
    text = source_of_forward(swapped)
    assert "running_mean" not in text
    assert "num_batches" not in text
    fresh = copy.deepcopy(swapped)
    fresh.load_state_dict(dict(swapped.state_dict()))  # without metadata: an old format to torch
    same(fresh.eval()(x(4, 6, 3, 3)), swapped.eval()(x(4, 6, 3, 3)))


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize("which", ["image_embeds", "text_embeds"])
def test_clip_final_normalisation(which):
    """Prototype A1: CLIP's root can neither be traced nor its decorated source be run again."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision = {**text, "image_size": 16, "patch_size": 8, "num_attention_heads": 2}
    text |= {"vocab_size": 50, "num_attention_heads": 2, "max_position_embeddings": 12}
    text |= {"eos_token_id": 49, "bos_token_id": 0, "pad_token_id": 1}
    torch.manual_seed(0)
    owner = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    function = inner_forward(type(owner))
    assigned = next(
        node.value
        for node in ast.walk(positions.syntax_of(function))
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == which
        and "/" in ast.unparse(node.value)
    )
    found = site(
        owner,
        ast.unparse(assigned),
        name=which,
        kind="l2norm",
        parameters={},
        shape=(2, 8),
        features=8,
        dim=-1,
        eps=0.0,
        eps_clamp=True,
    )
    inputs = {"input_ids": torch.tensor([[0, 5, 6, 49], [0, 7, 49, 1]])}
    inputs["pixel_values"] = x(2, 3, 16, 16)
    calls = [OwnerCall((), {**inputs, "return_dict": flag}) for flag in (True, False)]
    swapped = copy.deepcopy(owner)
    rewrite_owner(swapped, [Placement(found, "norm_0", converted(swapped, found))], calls)
    owner.double(), swapped.double()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    close_to(owner(**inputs).logits_per_image, swapped(**inputs).logits_per_image)
    assert type(swapped(**inputs)) is type(owner(**inputs))
    assert isinstance(swapped(**inputs, return_dict=False), tuple)
    assert isinstance(swapped, CLIPModel)

    class Zero(nn.Module):
        def forward(self, value):
            return value * 0

    swapped.norm_0 = Zero()
    assert not swapped(**inputs).logits_per_image.any()
