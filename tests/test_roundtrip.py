"""Save, load, rebuild, resume: a swapped model is the same model on the other side."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.traps import Convolutional, Tied, nothing_neutral
from torch import Tensor, fx, nn
from torch.nn import functional as F

import normsurgery as ns
from normsurgery.errors import CannotRead, UsageError
from normsurgery.numerics.precision import float64_copy
from normsurgery.report import Report
from normsurgery.rewriting.rebuilding import rebuild, restore_originals, restore_rewrites
from normsurgery.verifying import judge

IMAGES = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)),)


class Functional(nn.Module):
    """A functional norm and a hand-written one in one forward, and a module norm. Input (N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.ones(8))
        self.shift = nn.Parameter(torch.zeros(8))
        self.norm = nn.LayerNorm(8)
        self.calls = 0

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        self.calls += 1
        h = F.layer_norm(self.linear(x), (8,), self.gain, self.shift)
        if self.training:
            h = F.dropout(h, 0.5, self.training)
        if scale is not None:
            h = h * scale
        return self.norm(h)


class Graphed(nn.Module):
    """A functional and a module norm, without control flow. Input (N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.ones(8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.layer_norm(self.linear(x), (8,), self.gain))


VECTORS = (torch.randn(4, 8, generator=torch.Generator().manual_seed(6)),)
CASES = [
    (Convolutional, "groupnorm", IMAGES),
    (Convolutional, "affine", IMAGES),
    (Convolutional, "batchnorm", IMAGES),
    (Convolutional, "weightstandardization", IMAGES),
    (Convolutional, "neuronwise", IMAGES),
    (Convolutional, "randomaggregation", IMAGES),
    (Functional, "rmsnorm", VECTORS),
    (Functional, "layernorm", VECTORS),
    (Functional, "dyt", VECTORS),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("make", "to", "inputs"), CASES)
def test_a_fresh_model_takes_the_swapped_structure_without_inputs(
    make: Any, to: str, inputs: Any, device: str, tmp_path: Path
) -> None:
    changed, report = ns.swap(nothing_neutral(make()), to, inputs=inputs)
    report.save(tmp_path / "report.json")
    with torch.device(device):
        fresh = make()
    rebuilt = rebuild(fresh, Report.load(tmp_path / "report.json"))
    rebuilt.load_state_dict(changed.state_dict(), strict=True, assign=device == "meta")
    assert torch.equal(rebuilt.eval()(*inputs), changed.eval()(*inputs))
    ours = [(name, type(m).__qualname__) for name, m in rebuilt.named_modules()]
    assert ours == [(name, type(m).__qualname__) for name, m in changed.named_modules()]


def test_rebuild_refuses_another_model() -> None:
    _, report = ns.swap(nothing_neutral(Convolutional()), "groupnorm", inputs=IMAGES)
    with pytest.raises(UsageError, match=r"Convolutional.*Tied"):
        rebuild(Tied(), report)


def test_rebuild_refuses_a_forward_that_is_written_differently_now() -> None:
    """The old position in a new source would put the norm somewhere else."""
    _, report = ns.swap(nothing_neutral(Functional()), "rmsnorm", inputs=VECTORS)

    class Changed(Functional):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return self.norm(F.layer_norm(self.linear(x) + 1, (8,), self.gain, self.shift))

    Changed.__name__ = "Functional"
    with pytest.raises(CannotRead, match="versions"):
        rebuild(Changed(), report)


def test_a_swap_to_torch_norms_is_pickled_without_normsurgery() -> None:
    changed, _ = ns.swap(nothing_neutral(Convolutional()), "groupnorm", inputs=IMAGES)
    file = io.BytesIO()
    torch.save(changed, file)
    assert b"normsurgery" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded.eval()(*IMAGES), changed.eval()(*IMAGES))


@pytest.mark.parametrize("to", ["rmsnorm", "layernorm"])
def test_a_rewritten_owner_is_saved_as_its_own_class_and_rewritten_again(to: str) -> None:
    model = nothing_neutral(Functional())
    changed, report = ns.swap(model, to, inputs=VECTORS)
    with pytest.raises(UsageError, match="plan"):
        torch.save(changed, io.BytesIO())
    original = restore_originals(changed)
    assert type(original) is Functional and type(changed) is not Functional
    with pytest.raises(AttributeError):  # a plain load cannot be mistaken for the old model
        original(*VECTORS)
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    loaded = restore_rewrites(torch.load(file, weights_only=False), report)
    assert list(loaded.state_dict()) == list(changed.state_dict())
    assert torch.equal(loaded.eval()(*VECTORS), changed.eval()(*VECTORS))
    scale = torch.full((8,), 3.0)
    assert torch.equal(loaded(*VECTORS, scale=scale), changed(*VECTORS, scale=scale))


def test_a_rewritten_owner_keeps_class_attributes_and_its_own_copy() -> None:
    changed, _ = ns.swap(nothing_neutral(Functional()), "rmsnorm", inputs=VECTORS)
    assert isinstance(changed, Functional) and changed.calls == 0
    twin = copy.deepcopy(changed).eval()
    assert torch.equal(twin(*VECTORS), changed.eval()(*VECTORS))
    assert (twin.calls, changed.calls) == (1, 1)
    assert "gain" not in changed.state_dict() and "norm_0.weight" in changed.state_dict()


def test_an_old_checkpoint_loads_into_a_rewritten_owner() -> None:
    model, trained = nothing_neutral(Functional(), 1), nothing_neutral(Functional(), 2)
    changed, report = ns.swap(model, "rmsnorm", inputs=VECTORS)
    changed.load_state_dict(report.keymap.load(trained.state_dict()))
    direct, _ = ns.swap(trained, "rmsnorm", inputs=VECTORS)
    ours, theirs = changed.state_dict(), direct.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_undo_of_a_rewritten_owner_restores_class_and_tensors() -> None:
    model = nothing_neutral(Functional())
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    attributes = set(vars(model))
    _, report = ns.swap(model, "rmsnorm", inputs=VECTORS, inplace=True)
    assert type(model) is not Functional
    report.undo()
    assert type(model) is Functional and set(vars(model)) == attributes
    now = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert list(now.items()) == list(tensors.items())


def test_training_resumes_with_identical_steps_after_a_save(tmp_path: Path) -> None:
    """Swap, train, save model, report and optimizer, rebuild, load, go on: the same losses."""
    torch.manual_seed(0)
    changed, report = ns.swap(Convolutional(), "groupnorm", inputs=IMAGES)
    optimizer = torch.optim.AdamW(changed.parameters(), lr=1e-2)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(*IMAGES).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    steps(changed, optimizer)
    torch.save(changed.state_dict(), tmp_path / "model.pt")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    report.save(tmp_path / "report.json")
    resumed = rebuild(Convolutional(), Report.load(tmp_path / "report.json"))
    resumed.load_state_dict(torch.load(tmp_path / "model.pt"))
    again = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    ours, theirs = steps(changed, optimizer), steps(resumed, again)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_graph_module_comes_back_as_one() -> None:
    model = nothing_neutral(Graphed())
    traced = fx.symbolic_trace(model)
    changed, report = ns.swap(traced, "rmsnorm", inputs=VECTORS)
    assert isinstance(changed, fx.GraphModule) and len(report.plan.steps) == 2
    direct, _ = ns.swap(model, "rmsnorm", inputs=VECTORS)
    assert torch.equal(changed(*VECTORS), direct(*VECTORS))
    changed.load_state_dict(report.keymap.load(traced.state_dict()))
    assert "F.layer_norm" not in changed.code and "gain" not in changed.state_dict()


def test_an_exported_program_comes_back_as_one_with_its_dynamic_shapes(tmp_path: Path) -> None:
    model = nothing_neutral(Graphed()).eval()
    batch = {"x": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(model, VECTORS, dynamic_shapes=batch)
    before = dict(program.state_dict)
    changed, report = ns.swap(program, "rmsnorm", inputs=VECTORS)
    assert isinstance(changed, torch.export.ExportedProgram) and len(report.plan.steps) == 2
    assert all(program.state_dict[name] is tensor for name, tensor in before.items())
    direct, _ = ns.swap(model, "rmsnorm", inputs=VECTORS)
    torch.export.save(changed, tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    for rows in (2, 7):
        x = torch.randn(rows, 8)
        assert judge(loaded(x), float64_copy(direct)(x.double()).detach(), direct(x)).passed
    assert set(report.keymap.load(program.state_dict)) == set(changed.state_dict)
    with pytest.raises(UsageError, match="in place"):
        ns.swap(program, "rmsnorm", inputs=VECTORS, inplace=True)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def test_a_transformers_model_is_rebuilt_from_its_config_and_report(tmp_path: Path) -> None:
    """`from_pretrained` alone would silently bring the old norms back."""
    ids = {"input_ids": torch.arange(12).reshape(2, 6), "use_cache": False}
    model = llama()
    changed, report = ns.swap(model, "dyt", inputs=ids)
    assert type(changed) is type(model)
    assert changed.lm_head.weight is changed.model.embed_tokens.weight  # type: ignore[union-attr]
    changed.save_pretrained(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(report.plan.to_json()))
    from safetensors.torch import load_file

    rebuilt = rebuild(llama(), ns.Plan.load(tmp_path / "plan.json"))
    missing, unexpected = rebuilt.load_state_dict(
        load_file(tmp_path / "model.safetensors"), strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    with torch.no_grad():
        assert torch.equal(rebuilt(**ids).logits, changed(**ids).logits)
        generated = rebuilt.generate(ids["input_ids"], max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 9)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[Tensor]:
    losses = []
    for number in range(count):
        ids = torch.arange(number, number + 12).reshape(2, 6)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("target", ["groupnorm", "layernorm", "randomaggregation"])
def test_save_pretrained_alone_keeps_the_swap_and_training_resumes(
    tmp_path: Path, target: str
) -> None:
    """The plan travels in config.json: nothing but `save_pretrained` and `ns.load` is needed."""
    ids = {"input_ids": torch.arange(12).reshape(2, 6), "use_cache": False}
    changed, _ = ns.swap(llama(), target, inputs=ids)
    optimizer = torch.optim.AdamW(changed.train().parameters(), lr=1e-3)
    steps(changed, optimizer, 2)
    changed.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = ns.load(tmp_path)
    assert type(loaded) is type(changed)
    assert torch.equal(loaded(**ids).logits, changed.eval()(**ids).logits)
    resumed = torch.optim.AdamW(loaded.train().parameters(), lr=1e-3)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert steps(loaded, resumed, 3) == steps(changed.train(), optimizer, 3)


def test_the_users_config_is_left_alone_and_undo_forgets() -> None:
    ids = {"input_ids": torch.arange(12).reshape(2, 6), "use_cache": False}
    model = llama()
    before = model.config.to_dict()
    ns.swap(model, "dyt", inputs=ids)
    assert model.config.to_dict() == before
    _, report = ns.swap(model, "dyt", inputs=ids, inplace=True)
    assert model.config.to_dict() != before
    report.undo()
    assert model.config.to_dict() == before


def test_a_plan_takes_no_options_besides() -> None:
    """They would be ignored: the plan holds the options of every step."""
    ids = {"input_ids": torch.arange(12).reshape(2, 6), "use_cache": False}
    model = llama()
    plan = ns.plan(ns.find(model, ids), model, "groupnorm")
    with pytest.raises(UsageError, match="complete"):
        ns.swap(model, plan=plan, options={"num_groups": 2}, inputs=ids)
    with pytest.raises(UsageError, match="complete"):
        ns.swap(model, plan=plan, init="reset", inputs=ids)
