"""Folding transformers checkpoints shard by shard: right, in little memory, or refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.artefacts.checkpoints import load_directory
from normsurgery.errors import CannotRead, CannotTrace, PromiseBroken, UsageError
from normsurgery.fold.checkpoint import (
    fold_checkpoint,
    folding,
    plan_checkpoint,
    proving,
    reading,
    streaming,
)
from normsurgery.fold.checkpoint.keys import read_names
from normsurgery.fold.checkpoint.layout import read_layout
from normsurgery.fold.checkpoint.lazy import Lazy, Source
from normsurgery.fold.checkpoint.pieces import Composite, NotPlacement
from normsurgery.fold.edits import AddProduct, Centre, Copy, Create, Edit, Fill, Scale, Vector
from normsurgery.fold.ground import Choices
from normsurgery.plan import Plan
from normsurgery.spec import Fidelity
from normsurgery.steps import Fold
from normsurgery.survey import Site
from normsurgery.verify import judge

BOUND = 1e-9  # relative, float64 against float64
WORDS = 64
IDS = torch.arange(14).reshape(2, 7) % WORDS
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": WORDS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA = {**COMMON, "num_key_value_heads": 2}


def scale(norm: str) -> Vector:
    return Vector("scale", {"weight": f"{norm}.weight"}, {})


def shift(norm: str) -> Vector:
    return Vector("shift", {"bias": f"{norm}.bias"}, {})


def into(norm: str, *consumers: str, axis: int = 1) -> list[Edit]:
    """The gain of an RMSNorm into the weights that read it."""
    return [*(Scale(name, scale(norm), axis) for name in consumers), Fill(f"{norm}.weight", 1.0)]


def llama_layers(experts: bool = False) -> list[Edit]:
    edits: list[Edit] = []
    for layer in range(2):
        at = f"model.layers.{layer}"
        reading_them = (f"{at}.self_attn.{name}_proj.weight" for name in "qkv")
        edits += into(f"{at}.input_layernorm", *reading_them)
        norm = f"{at}.post_attention_layernorm"
        if experts:
            edits.append(Scale(f"{at}.mlp.experts.gate_up_proj", scale(norm), 2))
            edits += into(norm, f"{at}.mlp.gate.weight")
        else:
            edits += into(norm, f"{at}.mlp.gate_proj.weight", f"{at}.mlp.up_proj.weight")
    return edits


HEAD = into("model.norm", "lm_head.weight")
UNTIED = [Copy("lm_head.weight", "model.embed_tokens.weight"), *HEAD]


def gpt2_edits() -> list[Edit]:
    """LayerNorm weights and biases into (in, out) matrices, and a centred residual stream."""
    edits: list[Edit] = []
    for layer in range(2):
        at = f"transformer.h.{layer}"
        for norm, reader in ((f"{at}.ln_1", "attn.c_attn"), (f"{at}.ln_2", "mlp.c_fc")):
            name = f"{at}.{reader}"
            edits.append(AddProduct(f"{name}.bias", f"{name}.weight", shift(norm), 0, 1))
            edits += [*into(norm, f"{name}.weight", axis=0), Fill(f"{norm}.bias", 0.0)]
        for writer in ("attn.c_proj", "mlp.c_proj"):
            edits.append(Centre(f"{at}.{writer}.weight", 1))
            edits.append(Centre(f"{at}.{writer}.bias", 0))
    return [*edits, Centre("transformer.wpe.weight", 1)]


def bert_edits() -> list[Edit]:
    """The last norm into the decoder, which is tied to the embedding until it is copied."""
    norm, decoder = "cls.predictions.transform.LayerNorm", "cls.predictions.decoder.weight"
    return [
        Copy(decoder, "bert.embeddings.word_embeddings.weight"),
        AddProduct("cls.predictions.bias", decoder, shift(norm), 1),
        *into(norm, decoder),
        Fill(f"{norm}.bias", 0.0),
    ]


Case = tuple[type[Any], type[Any], dict[str, Any], Callable[[], Sequence[Edit]]]
MIXTRAL = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
QWEN3MOE = {
    **LLAMA,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, "n_positions": 40} | {
    name: COMMON[name] for name in ("bos_token_id", "eos_token_id")
}
CASES: dict[str, Case] = {
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        LLAMA,
        lambda: [*llama_layers(), *HEAD],
    ),
    "llama tied": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        {**LLAMA, "tie_word_embeddings": True},
        llama_layers,
    ),
    "llama untied": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        {**LLAMA, "tie_word_embeddings": True},
        lambda: [*llama_layers(), *UNTIED],
    ),
    "mixtral": (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        MIXTRAL,
        lambda: [*llama_layers(experts=True), *HEAD],
    ),
    "qwen3 moe": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        QWEN3MOE,
        lambda: [*llama_layers(experts=True), *HEAD],
    ),
    "gpt2 from the hub": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        GPT2,
        gpt2_edits,
    ),
    "bert with gamma and beta": (
        transformers.BertForMaskedLM,
        transformers.BertConfig,
        COMMON,
        bert_edits,
    ),
}


def randomise(model: nn.Module) -> None:
    """Gains in 0.3..2, everything else of order one: nothing neutral."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.rand(parameter.shape, generator=generator)
            norm = "norm" in name.lower() or ".ln_" in name
            gain = norm and name.endswith("weight")
            parameter.copy_(0.3 + 1.7 * draw if gain else (draw - 0.5) / (1 if norm else 2))


def saved(
    name: str, directory: Path, dtype: torch.dtype = torch.float64, shard: str = "20KB"
) -> Path:
    """A sharded checkpoint as save_pretrained writes it, with the keys that hubs have."""
    model_class, config_class, settings, _ = CASES[name]
    torch.manual_seed(0)
    model = model_class(config_class(**settings)).to(dtype)
    randomise(model)
    model.save_pretrained(directory, max_shard_size=shard)
    if name.startswith("gpt2"):
        rename_keys(directory, lambda key: key.removeprefix("transformer."))
    if name.startswith("bert"):
        rename_keys(
            directory,
            lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ),
        )
    return directory


def rename_keys(directory: Path, change: Callable[[str], str]) -> None:
    for path in directory.glob("*.safetensors"):
        tensors = {change(key): tensor for key, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {change(key): name for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))


def plan_of(edits: Sequence[Edit]) -> Plan:
    """A plan whose only step holds these edits."""
    site = Site(0, "rmsnorm", ("norm",), "module", "RMSNorm", {}, {"eps": 1e-6})
    step = Fold(site, "rmsnorm", {"affine": False}, Fidelity.EVAL, edits=tuple(edits))
    return Plan("test", (step,))


def folded(name: str, source: Path, out: Path, **options: Any) -> Any:
    return fold_checkpoint(source, out, plan=plan_of(CASES[name][3]()), **options)


def logits(name: str, directory: Path) -> Tensor:
    model = CASES[name][0].from_pretrained(directory).eval()
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(IDS, use_cache=False).logits if "bert" not in name else model(IDS).logits


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def tensors(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def hashes(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    """Checkpoints by name and dtype, each made once; never written to."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float64) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = saved(name, tmp_path_factory.mktemp("source") / "model", dtype)
        return made[name, dtype]

    return get


@pytest.fixture
def llama(sources: Any) -> Path:
    return Path(sources("llama"))


@pytest.fixture
def own(llama: Path, tmp_path: Path) -> Path:
    """A copy of the Llama checkpoint that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "own"))


# --- right -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_stock_class_loads_the_result_and_agrees(name: str, sources: Any, tmp_path: Path) -> None:
    source = sources(name)
    report = folded(name, source, tmp_path / "out")
    assert report.evidence.passed and len(report.evidence.comparisons) == 3
    assert distance(logits(name, tmp_path / "out"), logits(name, source)) < BOUND
    before, after = tensors(source), tensors(tmp_path / "out")
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) >= 3


@pytest.mark.parametrize("name", CASES)
def test_the_planned_fold_is_proven_and_agrees(name: str, sources: Any, tmp_path: Path) -> None:
    source = sources(name)
    choices = Choices(untie="untied" in name or "bert" in name)
    report = fold_checkpoint(source, tmp_path / "out", choices=choices)
    if not report.plan.steps:
        assert not (tmp_path / "out").exists()
        assert all(skip.reason for skip in report.plan.skips)
        return
    assert report.evidence.passed
    assert distance(logits(name, tmp_path / "out"), logits(name, source)) < BOUND


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2 from the hub"])
def test_a_low_precision_result_is_as_near_the_truth_as_the_original(
    name: str, sources: Any, tmp_path: Path
) -> None:
    source = sources(name, torch.bfloat16)
    folded(name, source, tmp_path / "out")
    exact = shutil.copytree(source, tmp_path / "exact")
    for path in exact.glob("*.safetensors"):
        save_file({k: t.double() for k, t in load_file(path).items()}, path, {"format": "pt"})
    config = json.loads((exact / "config.json").read_text())
    (exact / "config.json").write_text(json.dumps({**config, "dtype": "float64"}))
    verdict = judge(logits(name, tmp_path / "out"), logits(name, exact), logits(name, source))
    assert verdict.passed, verdict


def test_files_keep_their_layout(sources: Any, tmp_path: Path) -> None:
    source = shutil.copytree(sources("llama", torch.bfloat16), tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "sub" / "deep").mkdir(parents=True)
    (source / "sub" / "deep" / "notes.txt").write_text("kept")
    out = tmp_path / "out"
    report = folded("llama", source, out)
    before, after = hashes(source), hashes(out)
    assert set(after) == {*before, "normsurgery.json"}
    for name in before:
        if not name.endswith((".safetensors", ".index.json")):
            assert after[name] == before[name], name
    for old in sorted(source.glob("*.safetensors")):
        with safe_open(old, "pt") as a, safe_open(out / old.name, "pt") as b:
            assert list(a.keys()) == list(b.keys()) and a.metadata() == b.metadata()
        assert old.stat().st_size == (out / old.name).stat().st_size
    name = "model.safetensors.index.json"
    assert json.loads((source / name).read_text()) == json.loads((out / name).read_text())
    assert report.keymap.dropped == ()


def test_what_no_edit_changes_keeps_every_byte(llama: Path, tmp_path: Path) -> None:
    folded("llama", llama, tmp_path / "out")
    before, after = tensors(llama), tensors(tmp_path / "out")
    written = {edit.target for edit in CASES["llama"][3]()}
    for key in before:
        assert torch.equal(before[key], after[key]) == (key not in written), key


@pytest.mark.parametrize("block", [64, 1000])
def test_the_size_of_blocks_changes_nothing(
    block: int, sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "gpt2 from the hub"
    source = sources(name, torch.bfloat16)
    folded(name, source, tmp_path / "whole")
    monkeypatch.setattr(reading, "BLOCK", block)
    folded(name, source, tmp_path / "blocks")
    whole, blocks = tensors(tmp_path / "whole"), tensors(tmp_path / "blocks")
    assert all(torch.equal(whole[key], blocks[key]) for key in whole)


@pytest.mark.parametrize("block", [40, 1 << 19])
def test_centring_over_rows_that_blocks_and_files_cut(
    block: int, sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the experts, too, each of which lies in a file tensor of its own."""
    monkeypatch.setattr(reading, "BLOCK", block)
    names = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(2)]
    experts = "model.layers.0.mlp.experts.down_proj"
    edits = [*(Centre(name, 0) for name in names), Centre(experts, 0), Centre(experts, 2)]
    source = sources("mixtral")
    fold_checkpoint(source, tmp_path / "out", plan=plan_of(edits), verify=False)
    model = transformers.MixtralForCausalLM
    before = model.from_pretrained(source).state_dict()
    after = model.from_pretrained(tmp_path / "out").state_dict()
    for name in names:
        wanted = before[name] - before[name].mean(0, keepdim=True)
        assert distance(after[name], wanted) < BOUND
    centred = before[experts] - before[experts].mean(0, keepdim=True)
    assert distance(after[experts], centred - centred.mean(2, keepdim=True)) < BOUND


def test_a_system_that_cannot_copy_between_files(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded("llama", llama, tmp_path / "plain")

    def refuse(*args: Any) -> int:
        raise OSError("not here")

    monkeypatch.setattr(os, "sendfile", refuse)
    folded("llama", llama, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "plain")


def test_untying_says_what_it_costs(sources: Any, tmp_path: Path) -> None:
    source, out = sources("llama untied"), tmp_path / "out"
    report = folded("llama untied", source, out)
    assert f"{WORDS * 32 * 8} bytes more" in " ".join(report.notes)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["lm_head.weight"] == max(index["weight_map"].values())
    stored = tensors(out)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_a_tied_tensor_that_the_files_hold_twice(sources: Any, tmp_path: Path) -> None:
    """Both keys are folded alike; with other values under one of them the config is wrong."""
    source = shutil.copytree(sources("llama tied"), tmp_path / "source")
    add_tensor(source, "lm_head.weight", tensors(source)["model.embed_tokens.weight"].clone())
    edits = [*llama_layers(), Centre("model.embed_tokens.weight", 0)]
    report = fold_checkpoint(source, tmp_path / "out", plan=plan_of(edits), verify=False)
    stored = tensors(tmp_path / "out")
    assert report.evidence is None
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    add_tensor(source, "lm_head.weight", torch.randn(WORDS, 32, dtype=torch.float64))
    with pytest.raises(CannotRead, match="different values"):
        fold_checkpoint(source, tmp_path / "other", plan=plan_of(edits))


def add_tensor(directory: Path, key: str, tensor: Tensor) -> None:
    """Add (or replace) a tensor in the first shard and in the index."""
    path = sorted(directory.glob("*.safetensors"))[0]
    save_file({**load_file(path), key: tensor}, path, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][key] = path.name
    index.write_text(json.dumps(content))


def test_dropped_tensors_are_gone_and_neutral_on_load(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = folded("llama", llama, out, drop=True)
    gone = set(tensors(llama)) - set(tensors(out))
    assert gone == {edit.target for edit in CASES["llama"][3]() if isinstance(edit, Fill)}
    assert set(report.keymap.dropped) == gone
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(out))
    assert distance(logits("llama", out), logits("llama", llama)) < BOUND


def test_keys_that_the_model_does_not_know_are_copied_and_listed(own: Path, tmp_path: Path) -> None:
    extra = torch.arange(5)
    add_tensor(own, "model.layers.0.self_attn.masked_bias", extra)
    report = folded("llama", own, tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["model.layers.0.self_attn.masked_bias"], extra)
    assert any("masked_bias" in note for note in report.notes)


def test_a_checkpoint_in_one_file(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source", shard="1GB")
    assert (source / "model.safetensors").is_file()
    folded("llama", source, tmp_path / "out")
    assert distance(logits("llama", tmp_path / "out"), logits("llama", source)) < BOUND


def test_folding_again_finds_the_record_and_loads_plainly(llama: Path, tmp_path: Path) -> None:
    folded("llama", llama, tmp_path / "once")
    folded("llama", tmp_path / "once", tmp_path / "twice")
    once, twice = tensors(tmp_path / "once"), tensors(tmp_path / "twice")
    assert all(torch.equal(once[key], twice[key]) for key in once)
    record = json.loads((tmp_path / "twice" / "normsurgery.json").read_text())
    assert len(record["folds"]) == 2 and record["folds"][0]["evidence"]["passed"]
    loaded = ns.load(tmp_path / "twice")
    with torch.no_grad():
        assert distance(loaded(IDS).logits, logits("llama", llama)) < BOUND


@pytest.mark.parametrize(("name", "rmsnorm"), [("llama", False), ("gpt2 from the hub", True)])
def test_planning_again_finds_nothing_to_do(
    name: str, rmsnorm: bool, sources: Any, tmp_path: Path
) -> None:
    choices = Choices(rmsnorm=rmsnorm)
    source = sources(name, torch.bfloat16)
    first = fold_checkpoint(source, tmp_path / "once", choices=choices)
    again = fold_checkpoint(tmp_path / "once", tmp_path / "twice", choices=choices)
    assert first.plan.steps and first.evidence.passed
    assert not again.plan.steps and not (tmp_path / "twice").exists()
    neutral = [skip for skip in again.plan.skips if "neutral already" in skip.reason]
    assert len(neutral) == len(first.plan.steps)


def test_values_next_to_nothing_may_lose_bits_in_fp16(sources: Any, tmp_path: Path) -> None:
    """Halving a subnormal rounds it; next to the rounding of the others that is nothing."""
    source = shutil.copytree(sources("llama", torch.float16), tmp_path / "source")
    spoil(source, "lm_head.weight", 5 * 2.0**-24)
    folded("llama", source, tmp_path / "out")


def test_nothing_to_fold_writes_nothing(llama: Path, tmp_path: Path) -> None:
    report = fold_checkpoint(llama, tmp_path / "out", plan=Plan("test", ()))
    assert report.exit_code == 0 and "was not written" in report.notes[-1]
    assert list(tmp_path.iterdir()) == []


def test_progress_covers_writing_and_the_proof(llama: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    folded("llama", llama, tmp_path / "out", progress=lambda *step: told.append(step))
    for what, total in (("write", sum(t.nbytes for t in tensors(llama).values())), ("verify", 4)):
        steps = [step for step in told if step[0] == what]
        assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
        assert steps[-1] == (what, total, total)


# --- proven ----------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", range(0, len(CASES["llama"][3]()), 3))
def test_a_missing_edit_is_found_and_nothing_is_put_in_place(
    left_out: int, sources: Any, tmp_path: Path
) -> None:
    edits = list(CASES["llama"][3]())
    del edits[left_out]
    with pytest.raises(PromiseBroken, match="does not compute") as raised:
        fold_checkpoint(sources("llama", torch.bfloat16), tmp_path / "out", plan=plan_of(edits))
    assert raised.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_value_that_was_written_wrongly_is_found(
    key: str, sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows of the embedding that the proof's inputs do not read, too."""
    written = streaming.write_shard

    def faulty(path: Path, *args: Any) -> None:
        written(path, *args)
        stored = load_file(path)
        if key in stored:
            stored[key][40:] += 0.5
            save_file(stored, path, metadata={"format": "pt"})

    monkeypatch.setattr(folding, "write_shard", faulty)
    source = sources("llama", torch.bfloat16)
    with pytest.raises(PromiseBroken):
        folded("llama", source, tmp_path / "out", inputs={"input_ids": IDS})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_run_block_by_block_is_not_put_in_place(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(folding, "prove", fails)
    with pytest.raises(CannotTrace, match=r"block by block \(RuntimeError: no such kernel\)"):
        folded("llama", llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    folded("llama", llama, tmp_path / "out", verify=False)


def test_planning_alone_reads_headers_and_writes_nothing(own: Path) -> None:
    """Weights that are all NaN change no plan."""
    plan = plan_checkpoint(own)
    before = hashes(own)
    for path in own.glob("*.safetensors"):
        stored = {key: torch.full_like(tensor, torch.nan) for key, tensor in tensors(own).items()}
        save_file({key: stored[key] for key in load_file(path)}, path, {"format": "pt"})
    assert plan.steps and plan_checkpoint(own).to_json() == plan.to_json()
    assert set(hashes(own)) == set(before)


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert with gamma and beta"])
def test_the_proof_runs_with_the_buffers_that_loading_gives(name: str, sources: Any) -> None:
    source = sources(name)
    model: Any = load_directory(source, meta=True)
    proving._compute_buffers(model)
    wanted = dict(CASES[name][0].from_pretrained(source).named_buffers())
    found = dict(model.named_buffers())
    assert found and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_fault_in_one_layer_is_told_of_that_layer_alone(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next layer gets random activations, not what the wrong one gave."""
    proofs: list[Any] = []
    monkeypatch.setattr(
        folding, "prove", lambda *a, **k: proofs.append(proving.prove(*a, **k)) or proofs[0]
    )
    with pytest.raises(PromiseBroken):
        fold_checkpoint(llama, tmp_path / "out", plan=plan_of(CASES["llama"][3]()[1:]))
    failed = [item.where for item in proofs[0].comparisons if not item.verdict.passed]
    assert failed == ["model.layers.0"]


# --- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "dtype", "said"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", torch.float32, "LoRA"),
        ("model.layers.0.self_attn.q_proj.g_idx", torch.int32, "GPTQ"),
        ("model.layers.0.self_attn.q_proj.qweight", torch.int32, "AWQ"),
        ("model.layers.0.self_attn.q_proj.qzeros", torch.int32, "AWQ"),
        ("model.layers.0.mlp.up_proj.weight.absmax", torch.float32, "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", torch.uint8, "bitsand"),
        ("model.layers.0.mlp.up_proj.SCB", torch.float32, "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.float32, "fp8"),
        ("model.layers.0.mlp.up_proj.float8", torch.float8_e4m3fn, "fp8"),
        ("model.layers.0.mlp.up_proj.weight_packed", torch.int32, "compressed-tensors"),
    ],
)
def test_foreign_weights_are_refused_by_name(
    key: str, dtype: torch.dtype, said: str, own: Path, tmp_path: Path
) -> None:
    add_tensor(own, key, torch.zeros(4, dtype=dtype))
    message = refusal(CannotRead, own, tmp_path)
    assert key in message and said in message and message.endswith(".")


def refusal(error: type[Exception], source: Path, tmp_path: Path, **options: Any) -> str:
    """The message of a fold that must be refused, leaving nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error) as raised:
        folded("llama", source, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before
    return str(raised.value)


def only(directory: Path, *names: str) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    for name in names:
        (directory / name).write_bytes(b"weights")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("model-Q4_K_M.gguf",), "GGUF"),
        (("pytorch_model.bin",), "safe_serialization=True"),
        (("pytorch_model-00001-of-00002.bin",), "safe_serialization=True"),
        ((), "save_pretrained"),
    ],
)
def test_directories_without_safetensors(
    names: tuple[str, ...], said: str, own: Path, tmp_path: Path
) -> None:
    only(own, *names)
    assert said in refusal(CannotRead, own, tmp_path)


def test_an_adapter_is_refused(own: Path, tmp_path: Path) -> None:
    (own / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in refusal(CannotRead, own, tmp_path)


def test_no_directory(tmp_path: Path) -> None:
    assert "is no directory" in refusal(CannotRead, tmp_path / "nowhere", tmp_path)


def shard_of(directory: Path, number: int = 0) -> Path:
    return sorted(directory.glob("*.safetensors"))[number]


def truncate(directory: Path) -> str:
    path = shard_of(directory)
    os.truncate(path, path.stat().st_size - 5)
    return f"{path.name}: not a whole safetensors file: it is truncated"


def lengthen(directory: Path) -> str:
    path = shard_of(directory)
    path.write_bytes(path.read_bytes() + b"more")
    return f"{path.name}: not a whole safetensors file: it is too long"


def garble(directory: Path) -> str:
    path = shard_of(directory)
    path.write_bytes(path.read_bytes()[:8] + b"x" + path.read_bytes()[9:])
    return f"{path.name}: not a whole safetensors file: its header is not JSON"


def empty(directory: Path) -> str:
    shard_of(directory).write_bytes(b"")
    return f"{shard_of(directory).name}: not a whole safetensors file"


def lose(directory: Path) -> str:
    path = shard_of(directory)
    path.unlink()
    return f"{path.name} is missing"


def lie(directory: Path) -> str:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.extra"] = shard_of(directory).name
    index.write_text(json.dumps(content))
    return "model.norm.extra"


def lose_tensor(directory: Path) -> str:
    key = "model.layers.1.mlp.up_proj.weight"
    for path in directory.glob("*.safetensors"):
        stored = load_file(path)
        if stored.pop(key, None) is not None:
            save_file(stored, path, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][key]
    index.write_text(json.dumps(content))
    return f"no file holds {key}"


def resize(directory: Path) -> str:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    return "wants"


def forget_config(directory: Path) -> str:
    (directory / "config.json").unlink()
    return "has no config.json"


@pytest.mark.parametrize(
    "damage",
    [truncate, lengthen, garble, empty, lose, lie, lose_tensor, resize, forget_config],
)
def test_broken_checkpoints_are_refused_by_file_and_what(
    damage: Callable[[Path], str], own: Path, tmp_path: Path
) -> None:
    said = damage(own)
    assert said in refusal(CannotRead, own, tmp_path)


def test_code_of_a_checkpoint_never_runs(own: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (own / "modeling_mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((own / "config.json").read_text())
    mine = {"AutoConfig": "modeling_mine.C", "AutoModelForCausalLM": "modeling_mine.M"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": mine}
    (own / "config.json").write_text(json.dumps(config))
    assert "code from a checkpoint is never run" in refusal(CannotRead, own, tmp_path)
    assert not marker.exists()


def test_a_swapped_checkpoint_is_refused(own: Path, tmp_path: Path) -> None:
    record = {"normsurgery": "0", "plan": [{"model": "x"}]}
    (own / "normsurgery.json").write_text(json.dumps(record))
    assert "swapped" in refusal(UsageError, own, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_values_that_are_not_finite_are_refused(
    key: str, value: float, own: Path, tmp_path: Path
) -> None:
    spoil(own, key, value)
    message = refusal(CannotRead, own, tmp_path)
    assert key in message and "not finite" in message


def spoil(directory: Path, key: str, value: float) -> None:
    for path in directory.glob("*.safetensors"):
        stored = load_file(path)
        if key in stored:
            stored[key].view(-1)[3] = value
            save_file(stored, path, metadata={"format": "pt"})


def test_a_value_that_no_edit_reads_may_be_anything(own: Path, tmp_path: Path) -> None:
    spoil(own, "model.layers.1.mlp.down_proj.weight", float("nan"))
    folded("llama", own, tmp_path / "out", verify=False)
    assert tensors(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"].isnan().sum() == 1


def test_a_dtype_that_cannot_hold_the_result_is_refused(sources: Any, tmp_path: Path) -> None:
    source = shutil.copytree(sources("llama", torch.float16), tmp_path / "source")
    spoil(source, "model.norm.weight", 6e4)
    spoil(source, "lm_head.weight", 6e4)
    message = refusal(UsageError, source, tmp_path)
    assert "lm_head.weight" in message and "1 of 2048 values are too large for fp16" in message
    assert "fp32 holds them" in message


def test_a_tensor_that_the_stock_class_lacks_is_refused(llama: Path, tmp_path: Path) -> None:
    edits = [Create("lm_head.bias", (WORDS,), "lm_head.weight"), *HEAD]
    with pytest.raises(UsageError, match=r"lm_head\.bias would be a new tensor"):
        fold_checkpoint(llama, tmp_path / "out", plan=plan_of(edits))


def test_a_plan_for_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the plan names transformer"):
        fold_checkpoint(llama, tmp_path / "out", plan=plan_of(gpt2_edits()))


def test_a_plan_that_changes_one_of_two_tied_names_is_refused(sources: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lm_head\.weight alone, which is tied"):
        fold_checkpoint(sources("llama tied"), tmp_path / "out", plan=plan_of(HEAD))


def test_space_is_asked_for_first(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match=r"needs .* GB, and .* has .* left"):
        folded("llama", llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_the_source_is_never_the_place(place: str, own: Path) -> None:
    before = hashes(own)
    with pytest.raises(UsageError, match="the source"):
        folded("llama", own, own / place, force=True)
    assert hashes(own) == before


def test_what_stands_there_is_replaced_only_if_asked(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        folded("llama", llama, out)
    with pytest.raises(UsageError, match="holds something that is no checkpoint"):
        folded("llama", llama, out, force=True)
    (out / "config.json").write_text("{}")
    folded("llama", llama, out, force=True)
    assert not (out / "mine.txt").exists() and (out / "model.safetensors.index.json").is_file()
    assert list(tmp_path.iterdir()) == [out]


# --- a hub cache, a kill, memory ---------------------------------------------------------------


def test_links_are_read_through_and_never_written_through(llama: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number, path in enumerate(sorted(llama.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    before = hashes(blobs)
    folded("llama", snapshot, tmp_path / "out")
    assert hashes(blobs) == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert distance(logits("llama", tmp_path / "out"), logits("llama", llama)) < BOUND


def killed_at(source: Path, out: Path, share: float) -> None:
    """Fold in a process that kills itself with -9 once `share` of the bytes is written."""
    child = os.fork()
    if child == 0:

        def progress(what: str, done: int, total: int) -> None:
            if what == "verify" or done >= share * total:
                os.kill(os.getpid(), signal.SIGKILL)

        folded("llama", source, out, progress=progress)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("shares", [(0.1, 0.1, 0.5), (0.3, 0.6, 0.9), (0.01, 0.99, 2.0)])
def test_a_killed_run_leaves_nothing_half_valid_and_resumes(
    shares: tuple[float, ...], llama: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    folded("llama", llama, whole)
    for share in shares:
        killed_at(llama, out, share)
        assert sorted(tmp_path.iterdir()) == [tmp_path / "out.partial", whole]
        with pytest.raises(ValueError, match="Unrecognized model"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out.partial")
    folded("llama", llama, out)
    assert hashes(out) == hashes(whole)
    assert sorted(tmp_path.iterdir()) == [out, whole]


def test_finished_shards_are_not_written_again(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_at(llama, out, 0.6)
    finished = {p.name: p.stat().st_mtime_ns for p in shards(out)}
    assert len(finished) >= 2
    folded("llama", llama, out)
    now = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert all(now[name] == finished[name] for name in finished)


def test_a_finished_shard_that_was_damaged_is_written_again(llama: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    folded("llama", llama, whole, verify=False)
    killed_at(llama, out, 0.6)
    os.truncate(shards(out)[0], 100)
    folded("llama", llama, out, verify=False)
    assert hashes(out) == hashes(whole)


def shards(out: Path) -> list[Path]:
    return sorted((out.with_name("out.partial") / "files").glob("*.safetensors"))


def test_another_task_is_not_mixed_with_what_was_left(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_at(own, out, 0.5)
    with pytest.raises(UsageError, match="another options"):
        folded("llama", own, out, drop=True)
    with pytest.raises(UsageError, match="another plan"):
        fold_checkpoint(own, out, plan=plan_of(HEAD))
    spoil(own, "model.layers.1.mlp.down_proj.weight", 0.5)
    with pytest.raises(UsageError, match="another source"):
        folded("llama", own, out)
    folded("llama", own, out, force=True)
    assert distance(logits("llama", out), logits("llama", own)) < BOUND


def test_two_runs_do_not_write_to_one_place(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def second(what: str, done: int, total: int) -> None:
        with pytest.raises(UsageError, match="another run is writing there"):
            folded("llama", llama, out)

    folded("llama", llama, out, progress=second)


MEMORY = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_fold_checkpoint import folded

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

folded("llama", Path(sys.argv[2]), Path(sys.argv[3]) / "small")
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
folded("llama", Path(sys.argv[4]), Path(sys.argv[3]) / "large")
print(json.dumps(resident("VmHWM") - before))
"""


def large_llama(directory: Path) -> int:
    """A checkpoint of some 300 MB in bf16; returns the bytes of its largest tensor."""
    config = transformers.LlamaConfig(
        **{**LLAMA, "hidden_size": 1024, "intermediate_size": 12000, "vocab_size": 32000},
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    values = {
        key: torch.full(tensor.shape, 0.75 if tensor.dim() == 1 else 0.01, dtype=torch.bfloat16)
        for key, tensor in state.items()
    }
    save_file(values, directory / "model.safetensors", metadata={"format": "pt"})
    return max(tensor.nbytes for tensor in values.values())


def test_memory_is_bounded_by_the_largest_group(llama: Path, tmp_path: Path) -> None:
    """Proof included; far less than the checkpoint, and than 1.5 times its largest tensor."""
    largest = large_llama(tmp_path / "large source")
    total = (tmp_path / "large source" / "model.safetensors").stat().st_size
    assert total > 4 * largest
    folders = (Path(__file__).parent, llama, tmp_path, tmp_path / "large source")
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, folders)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) < 1.5 * largest


# --- the parts ---------------------------------------------------------------------------------


def materialised(composite: Composite, files: dict[str, Tensor]) -> Tensor:
    whole = torch.full(composite.shape, float("nan"), dtype=torch.float64)
    for piece in composite.pieces:
        spans = zip(piece.starts, piece.shape, strict=True)
        whole[tuple(slice(start, start + n) for start, n in spans)] = piece.view(files[piece.key])
    return whole


MOVES: list[Callable[[Any, Any], Any]] = [
    lambda a, b: torch.cat([a, b], dim=1),
    lambda a, b: torch.stack([a, b], dim=0),
    lambda a, b: torch.stack([a, b, a], dim=-1),
    lambda a, b: torch.chunk(torch.cat([a, b], dim=0), 3, dim=0)[1],
    lambda a, b: torch.split(torch.cat([a, b], dim=-1), [3, 5, 2], dim=-1)[1],
    lambda a, b: torch.transpose(torch.cat([a, b], dim=0), dim0=0, dim1=1),
    lambda a, b: torch.chunk(torch.transpose(torch.stack([a, b]), 1, 2), 5, dim=1)[3],
    lambda a, b: torch.chunk(a, 4, dim=0)[2].squeeze(0).contiguous(),
    lambda a, b: torch.cat([torch.stack([a, a]), torch.stack([b, b])], dim=1),
    lambda a, b: torch.chunk(torch.cat([torch.stack([a, b])] * 2, dim=2), 2, dim=0)[1],
]


@pytest.mark.parametrize("move", MOVES)
def test_pieces_lie_where_the_operation_puts_them(move: Callable[[Any, Any], Any]) -> None:
    files = {"a": torch.randn(4, 5).double(), "b": torch.randn(4, 5).double()}
    symbolic = {key: Composite.of_file(key, tensor.shape) for key, tensor in files.items()}
    made = move(symbolic["a"], symbolic["b"])
    assert torch.equal(materialised(made, files), move(files["a"], files["b"]))


@pytest.mark.parametrize(
    "operation", [lambda a: a.reshape(-1), lambda a: torch.flip(a, [0]), lambda a: a * 2]
)
def test_what_does_more_than_move_is_refused(operation: Callable[[Any], Any]) -> None:
    with pytest.raises((NotPlacement, TypeError)):
        operation(Composite.of_file("a", (2, 4)))


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_names_hold_what_from_pretrained_loads(name: str, sources: Any) -> None:
    source = sources(name)
    model_class, config_class, settings, _ = CASES[name]
    with torch.device("meta"):
        model = model_class(config_class(**settings))
    names = read_names(model, read_layout(source))
    stored = tensors(source)
    wanted = model_class.from_pretrained(source).state_dict()
    for key, pieces in names.pieces.items():
        whole = materialised(Composite(names.shapes[key], pieces), stored)
        assert torch.equal(whole, wanted[key]), key


def test_lazy_parameters_compute_what_plain_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", 16)
    values, ids = torch.randn(6, 5, dtype=torch.float64), IDS[:, :5] % 6
    read: list[int] = []

    def fetch(box: Any) -> Tensor:
        part = values
        for axis, (start, length) in enumerate(zip(box.starts, box.shape, strict=True)):
            part = part.narrow(axis, start, length)
        read.append(part.numel())
        return part.clone()

    lazy = Lazy.of(Source((6, 5), torch.float64, fetch))
    bias, x = torch.randn(6).double(), torch.randn(3, 5).double()
    z = torch.randn(2, 6).double()
    with torch.no_grad():
        pairs = [
            (nn.functional.linear(x, lazy), nn.functional.linear(x, values)),
            (nn.functional.linear(x, lazy, bias), nn.functional.linear(x, values, bias)),
            (z @ lazy, z @ values),
            (
                nn.functional.embedding(ids, lazy),
                nn.functional.embedding(ids, values),
            ),
            (lazy[4] * 2, values[4] * 2),
        ]
        assert max(read) <= 16
        pairs.append((lazy.sum(0), values.sum(0)))
    for found, wanted in pairs:
        assert distance(found, wanted) < BOUND
