"""Loading every form a model is kept in, and saving a changed one in the form it came in."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import transformers_zoo as zoo
from safetensors.torch import load_file, save_file
from torch import nn

import normsurgery as ns
from normsurgery import artefacts
from normsurgery.artefacts import exported
from normsurgery.errors import CannotRead, UsageError

FACTORIES = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)
        self.tied = nn.Linear(width, 5)
        self.tied.weight = self.head.weight

    def forward(self, x):
        y = self.bn(self.conv(x)).relu().mean((2, 3))
        return self.head(y) + self.tied(y)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        return nn.functional.layer_norm(self.inner(x), (8,), self.weight, None, 1e-3)


def breaks():
    raise RuntimeError("no data here")


def not_a_model():
    return 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of factories in the working directory, as a user has it."""
    monkeypatch.chdir(tmp_path)
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    yield name
    sys.modules.pop(name, None)


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
    return model.eval()


def small() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 1)]
    return randomised(nn.Sequential(*layers))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


def refuses(what: Any, *words: str, **options: Any) -> None:
    with pytest.raises((CannotRead, UsageError)) as caught:
        artefacts.load(what, **options)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


# --- forms of MODEL


def test_whole_model(tmp_path: Path) -> None:
    """Same weights, same mode, same requires_grad, same output."""
    model = small()
    model[0].weight.requires_grad_(False)
    model[1].train()
    torch.save(model, tmp_path / "m.pth")
    loaded = artefacts.load(tmp_path / "m.pth")
    assert same_weights(loaded.model, model)
    assert not loaded.model[0].weight.requires_grad
    assert (loaded.model.training, loaded.model[1].training) == (False, True)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(loaded.model.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"epoch": 1, "model": 1}, "model"),
        ({"ema": 2, "epoch": 1}, "ema"),
        ({"ema": 2, "model": 1}, "model"),
        ({"whatever": 2}, "whatever"),
    ],
)
def test_dict_around_a_model(tmp_path: Path, content: dict[str, Any], key: str) -> None:
    """The key that was used is said, and so is a model that was not used."""
    models = {name: small() for name in content if name != "epoch"}
    torch.save({**content, **models}, tmp_path / "m.ckpt")
    loaded = artefacts.load(tmp_path / "m.ckpt")
    assert loaded.key == key
    assert repr(key) in loaded.notes[0]
    assert ("left as they are" in " ".join(loaded.notes)) == (len(models) > 1)


def test_two_models_under_unknown_keys(tmp_path: Path) -> None:
    torch.save({"teacher": small(), "student": small()}, tmp_path / "m.pt")
    refuses(tmp_path / "m.pt", "teacher, student")


def test_ties_survive(tmp_path: Path, factories: str) -> None:
    model = artefacts.load(f"{factories}:Net").model
    torch.save(model, tmp_path / "m.pt")
    found = artefacts.load(tmp_path / "m.pt", trust=(factories,)).model
    assert found.head.weight is found.tied.weight


def test_weights_that_are_not_finite_are_noted(tmp_path: Path) -> None:
    """A model with NaN loads, and the note names the weight."""
    model = small()
    model[1].weight.data[0] = float("nan")
    torch.save(model, tmp_path / "m.pt")
    (note,) = artefacts.load(tmp_path / "m.pt").notes
    assert "1.weight" in note and "NaN" in note


def test_exported_program(tmp_path: Path) -> None:
    model, x = small(), torch.randn(2, 3, 8, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = artefacts.load(tmp_path / "m.pt2")
    assert loaded.kind == "exported"
    wider = torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded.model.module()(wider), program.module()(wider))


def test_factory_and_its_errors(factories: str) -> None:
    assert artefacts.load(f"{factories}:Net", arguments={"width": 6}).model.bn.num_features == 6
    refuses(f"{factories}:Net", "widht", "width", arguments={"widht": 6})
    refuses(f"{factories}:Nett", "Did you mean 'Net'")
    refuses(f"{factories}:breaks", "no data here", "--arg")
    refuses(f"{factories}:not_a_model", "int")
    refuses("no_such_module_here:Net", "no_such_module_here")
    assert str(Path.cwd()) not in sys.path


WRAPPERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "the file is a state_dict": lambda s: s,
    "'state_dict'": lambda s: {"state_dict": s, "epoch": 1},
    "'model'": lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}},
    "'ema.state_dict'": lambda s: {"ema": {"state_dict": s}},
    "prefix 'module.'": lambda s: {f"module.{k}": v for k, v in s.items()},
    "prefix '_orig_mod.'": lambda s: {"state_dict": {f"_orig_mod.{k}": v for k, v in s.items()}},
    "prefix 'module._orig_mod.'": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "prefix 'model.'": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
}


@pytest.mark.parametrize("said", WRAPPERS)
def test_weights_under_usual_keys(tmp_path: Path, factories: str, said: str) -> None:
    """Every usual place of a state_dict is found, and the note says which it was."""
    model = randomised(artefacts.load(f"{factories}:Net").model)
    torch.save(WRAPPERS[said](dict(model.state_dict())), tmp_path / "w.pt")
    loaded = artefacts.load(f"{factories}:Net", weights=tmp_path / "w.pt")
    assert same_weights(loaded.model, model)
    assert any(said in note for note in loaded.notes), loaded.notes


def test_weights_in_other_forms(tmp_path: Path, factories: str) -> None:
    """safetensors without the tied name, the old torch format, and a whole model of that class."""
    model = randomised(artefacts.load(f"{factories}:Net").model)
    state = {k: v for k, v in model.state_dict().items() if k != "tied.weight"}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": model}, tmp_path / "whole.pt")
    for name in ("w.safetensors", "old.pt", "whole.pt"):
        loaded = artefacts.load(f"{factories}:Net", weights=tmp_path / name)
        assert same_weights(loaded.model, model), name


def test_weights_that_do_not_fit(tmp_path: Path, factories: str) -> None:
    """A missing key, an extra key, another shape: errors that name a few, never a partial load."""
    state = dict(artefacts.load(f"{factories}:Net").model.state_dict())
    cases = {
        "conv.bias": {k: v for k, v in state.items() if k != "conv.bias"},
        "surplus": {**state, "surplus": torch.ones(1)},
        "(4, 3, 3, 3)": {**state, "conv.weight": torch.ones(5, 3, 3, 3)},
    }
    for word, content in cases.items():
        torch.save(content, tmp_path / "w.pt")
        refuses(f"{factories}:Net", word, weights=tmp_path / "w.pt")
    refuses(f"{factories}:Net", "no such file", weights=tmp_path / "none.pt")
    torch.save([1], tmp_path / "w.pt")
    refuses(f"{factories}:Net", "list", weights=tmp_path / "w.pt")


# --- files that are no models: one clear sentence each


def foreign_files(tmp_path: Path) -> dict[Path, tuple[str, ...]]:
    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    def saved(name: str, content: Any) -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    whole = saved("whole.pt", small()).read_bytes()
    script = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(small()), script)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a/readme.txt", "hello")
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    (tmp_path / "empty_directory").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    return {
        write("empty.pt", b""): ("empty",),
        write("text.pt", b"hello, world, this is a text"): ("not a model file",),
        write("lfs.pt", b"version https://git-lfs.github.com/spec/v1\n"): ("git lfs pull",),
        write("cut.pt", whole[: len(whole) // 2]): ("damaged or cut off",),
        write("short.pt", whole[:3]): ("not a model file",),
        tmp_path / "zip.pt": ("zip archive",),
        tmp_path / "arrays.npz": ("zip archive",),
        script: ("TorchScript", "torch.save"),
        saved("sd.pt", small().state_dict()): ("state_dict", "package.module:factory --weights"),
        saved("nested.pt", {"state_dict": small().state_dict()}): ("state_dict",),
        saved("list.pt", [1, 2]): ("holds a list",),
        saved("tensor.pt", torch.ones(2)): ("holds a Tensor",),
        saved("mark.pt", {"normsurgery": "0.1", "model": 3}): ("holds no model",),
        write("m.onnx", b"\x08\x07"): ("ONNX", "exported from"),
        tmp_path / "w.safetensors": ("--weights",),
        tmp_path / "empty_directory": ("config.json",),
        tmp_path / "missing.pt": ("no such file",),
    }


def test_foreign_files(tmp_path: Path) -> None:
    for path, words in foreign_files(tmp_path).items():
        refuses(path, *words)


def test_options_of_a_factory_on_a_file(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "m.pt")
    refuses(tmp_path / "m.pt", "factory", arguments={"a": 1})


# --- exported programs that would run code


def poisoned(tmp_path: Path, edit: Callable[[str, bytes], bytes | None], extra: Any = ()) -> Path:
    """A .pt2 file with its records edited."""
    good, path = tmp_path / "good.pt2", tmp_path / "bad.pt2"
    x = torch.randn(4, 3, 8, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.export.save(torch.export.export(small(), (x,), dynamic_shapes=({0: batch},)), good)
    reader = torch._C.PyTorchFileReader(str(good))
    writer = torch._C.PyTorchFileWriter(str(path))
    for name in reader.get_all_records():
        content = edit(name, reader.get_record(name))
        if content is not None and not name.startswith(".data/"):
            writer.write_record(name, content, len(content))
    for name, content in extra:
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return path


POISON = {
    "an operator outside torch.ops": (b"torch.ops.aten.relu.default", b"torch.os.system"),
    "an operator that opens files": (
        b"torch.ops.aten.relu.default",
        b"torch.ops.aten.from_file.default",
    ),
    "code in a name": (b'"name": "relu"', b'"name": "relu=print(1)"'),
    "an enum to import": (b'"as_bool": ', b'"__enum__": true, "as_bool": '),
}


@pytest.mark.parametrize("case", POISON)
def test_poisoned_graph(tmp_path: Path, case: str) -> None:
    """torch.export.load would resolve, import or compile what these strings say."""
    old, new = POISON[case]
    seen = []

    def edit(name: str, content: bytes) -> bytes:
        if name == "models/model.json":
            seen.append(old in content)
            content = content.replace(old, new)
        return content

    path = poisoned(tmp_path, edit)
    if not seen[0]:
        pytest.fail(f"the graph has no {old!r}; the case tests nothing")
    refuses(path, "so nothing was loaded")


def test_poisoned_expression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape expressions are evaluated by sympy, which calls eval: only sizes may stand in them."""
    monkeypatch.setattr(sys, "poisoned", [], raising=False)

    def edit(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        data = json.loads(content)
        count = replace_expressions(data, "__import__('sys').poisoned.append(1)")
        assert count > 0
        return json.dumps(data).encode()

    refuses(poisoned(tmp_path, edit), "evaluated")
    assert sys.poisoned == []  # type: ignore[attr-defined]


def replace_expressions(value: Any, text: str) -> int:
    if isinstance(value, dict):
        count = sum(replace_expressions(item, text) for item in value.values())
        if "expr_str" in value:
            value["expr_str"] = text
            count += 1
        return count
    return sum(replace_expressions(item, text) for item in value) if isinstance(value, list) else 0


@pytest.mark.parametrize("record", ["data/sample_inputs/model.pt", "data/weights/weight_0"])
def test_poisoned_tensors(tmp_path: Path, record: str) -> None:
    """torch.export.load falls back to unrestricted unpickling for inputs and pickled weights."""
    sentinel = tmp_path / "it-ran"
    bad = tmp_path / "bad.bin"
    torch.save({"a": _Opens(sentinel)}, bad)

    def edit(name: str, content: bytes) -> bytes:
        if name == record:
            return bad.read_bytes()
        if name.endswith("weights_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true')
        return content

    refuses(poisoned(tmp_path, edit), "so nothing was loaded")
    assert not sentinel.exists()


class _Opens:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_compiled_library_in_an_archive(tmp_path: Path) -> None:
    """A .so inside the archive would be loaded as a library."""
    extra = [("data/aotinductor/model/a.so", b"\x7fELF")]
    refuses(poisoned(tmp_path, lambda name, content: content, extra), "data/aotinductor")


@pytest.mark.parametrize(
    "text", ["s77", "2*s0 + 1", "Mod(s0, 2)", "Max(1, s3)/4", "FloorDiv(u0, 2)", "1.5*s0"]
)
def test_shape_expressions_pass(text: str) -> None:
    assert exported._is_expression(text)


@pytest.mark.parametrize(
    "text", ["exec(chr(65))", "s0.__class__", "s0.free_symbols", "'a'", "[s0]", "lambda: 0"]
)
def test_code_in_expressions_does_not(text: str) -> None:
    assert not exported._is_expression(text)


# --- saving


class Report:
    """What `save` needs of a report: its JSON."""

    def to_json(self) -> dict[str, Any]:
        return {"plan": None, "evidence": None}


def test_same_dict_around_the_model(tmp_path: Path) -> None:
    """The dict keeps its other entries, the file loads by plain torch.load without normsurgery."""
    torch.save({"epoch": 7, "model": small(), "ema": small()}, tmp_path / "m.ckpt")
    loaded = artefacts.load(tmp_path / "m.ckpt")
    changed, report = ns.swap(loaded.model, to="groupnorm")
    out = loaded.output("groupnorm")
    assert out == tmp_path / "m.groupnorm.ckpt"
    written = artefacts.save(loaded, changed, report, out)
    assert written == (out, tmp_path / "m.groupnorm.ckpt.report.json")
    assert b"normsurgery" not in out.read_bytes()
    content = torch.load(out, weights_only=False)
    assert list(content) == ["epoch", "model", "ema"] and content["epoch"] == 7
    assert type(content["model"][1]) is nn.GroupNorm and type(content["ema"][1]) is nn.BatchNorm2d
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(artefacts.load(out).model(x), changed(x))
    plan = json.loads(json.dumps(report.plan.to_json()))
    assert json.loads(written[1].read_text())["plan"] == plan


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    """Neither the file nor the report beside it; with force both are replaced."""
    torch.save(small(), tmp_path / "m.pt")
    loaded = artefacts.load(tmp_path / "m.pt")
    for name in ("out.pt", "out.pt.report.json"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(UsageError, match="--force"):
            artefacts.save(loaded, loaded.model, Report(), tmp_path / "out.pt")
        assert (tmp_path / name).read_text() == "precious"
        (tmp_path / name).unlink()
    artefacts.save(loaded, loaded.model, Report(), tmp_path / "m.pt", force=True)
    assert same_weights(artefacts.load(tmp_path / "m.pt").model, loaded.model)


def test_a_failed_save_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """A model that cannot be pickled: the old file is whole, and nothing temporary is left."""
    torch.save(small(), tmp_path / "m.pt")
    loaded = artefacts.load(tmp_path / "m.pt")
    before = (tmp_path / "m.pt").read_bytes()
    loaded.model.extra = lambda: 0
    with pytest.raises(UsageError, match="cannot be pickled"):
        artefacts.save(loaded, loaded.model, Report(), tmp_path / "m.pt", force=True)
    assert (tmp_path / "m.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_rewritten_owner(tmp_path: Path, factories: str) -> None:
    """Saved as original classes and the plan: a plain load is no model, ours runs as before."""
    model = randomised(artefacts.load(f"{factories}:Functional").model)
    torch.save(model, tmp_path / "m.pt")
    loaded = artefacts.load(tmp_path / "m.pt", trust=(factories,))
    x = torch.randn(3, 8)
    changed, report = ns.swap(loaded.model, to="rmsnorm", inputs=(x,))
    out = loaded.output("rmsnorm")
    artefacts.save(loaded, changed, report, out)
    content = torch.load(out, weights_only=False)
    assert sorted(content) == ["model", "normsurgery", "plan"]
    with pytest.raises(AttributeError):
        content["model"](x)
    again = artefacts.load(out, trust=(factories,))
    assert torch.equal(again.model(x), changed(x))
    assert not torch.equal(changed(x), model(x))
    third, report = ns.swap(again.model, to="layernorm", inputs=(x,))
    artefacts.save(again, third, report, tmp_path / "third.pt")
    assert torch.equal(artefacts.load(tmp_path / "third.pt", trust=(factories,)).model(x), third(x))


def test_rewritten_owner_in_a_dict(tmp_path: Path, factories: str) -> None:
    """The dict around the model stays, and still no plain load finds a model in it."""
    model = randomised(artefacts.load(f"{factories}:Functional").model)
    torch.save({"epoch": 7, "model": model}, tmp_path / "m.pt")
    loaded = artefacts.load(tmp_path / "m.pt", trust=(factories,))
    x = torch.randn(3, 8)
    changed, report = ns.swap(loaded.model, to="rmsnorm", inputs=(x,))
    artefacts.save(loaded, changed, report, tmp_path / "out.pt")
    content = torch.load(tmp_path / "out.pt", weights_only=False)
    assert content["epoch"] == 7 and not isinstance(content["model"], nn.Module)
    again = artefacts.load(tmp_path / "out.pt", trust=(factories,))
    assert again.key == "model" and torch.equal(again.model(x), changed(x))


def test_factory_to_safetensors(tmp_path: Path, factories: str) -> None:
    """The swapped weights load back through the same factory: the file says how to rebuild."""
    loaded = artefacts.load(f"{factories}:Net", arguments={"width": 16})
    randomised(loaded.model)
    changed, report = ns.swap(loaded.model, to="groupnorm")
    out = loaded.output("groupnorm")
    assert out == Path("Net.groupnorm.safetensors")
    artefacts.save(loaded, changed, report, out)
    assert "tied.weight" not in load_file(out)
    again = artefacts.load(f"{factories}:Net", arguments={"width": 16}, weights=out).model
    assert type(again.bn) is nn.GroupNorm
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.eval()(x), changed.eval()(x))


def test_exported_to_exported(tmp_path: Path) -> None:
    program = torch.export.export(small(), (torch.randn(2, 3, 8, 8),))
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = artefacts.load(tmp_path / "m.pt2")
    out = loaded.output("same")
    artefacts.save(loaded, loaded.model, Report(), out)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(artefacts.load(out).model.module()(x), program.module()(x))


# --- transformers


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
}
AUDIO = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 97,
    "num_mel_bins": 8,
    "max_source_positions": 30,
    "max_target_positions": 30,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
GEMMA = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
HF: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ),
    "convnext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**SMALL, "image_size": 16, "patch_size": 8})
    ),
    "swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(
            embed_dim=8, depths=[1, 1], num_heads=[1, 2], image_size=16, patch_size=2, window_size=4
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=32)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GEMMA)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GEMMA)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            vocab_size=97,
            decoder_start_token_id=0,
        )
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**AUDIO)
    ),
}


def logits(model: nn.Module) -> torch.Tensor:
    from normsurgery.inputs import infer

    with torch.no_grad():
        return infer(model).call(model).logits


@pytest.mark.parametrize("name", HF)
def test_pickled_transformers_model(tmp_path: Path, name: str) -> None:
    """Configs, activations and generation settings need names beyond torch's own list."""
    model = HF[name]().eval()
    torch.save(model, tmp_path / "m.pt")
    loaded = artefacts.load(tmp_path / "m.pt").model
    assert same_weights(loaded, model)
    assert loaded.config.to_dict() == model.config.to_dict()
    assert torch.equal(logits(loaded), logits(model))


def test_bound_method_in_a_pickle_is_answered_with_the_factory(tmp_path: Path) -> None:
    """Mamba pickles a hook that is its own bound method: a call into its code."""
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=97)
    torch.save(transformers.MambaForCausalLM(config), tmp_path / "m.pt")
    refuses(tmp_path / "m.pt", "backbone", "hook", "my_script:make_model", "--weights")


def test_checkpoint_directory(tmp_path: Path) -> None:
    """Same weights as from_pretrained, ties included; on meta no weight is read."""
    model = HF["gpt2"]().eval()
    model.save_pretrained(tmp_path / "gpt2")
    loaded = artefacts.load(tmp_path / "gpt2")
    assert (loaded.kind, type(loaded.model)) == ("directory", type(model))
    assert same_weights(loaded.model, model)
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    empty = artefacts.load(tmp_path / "gpt2", meta=True).model
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert empty.lm_head.weight is empty.transformer.wte.weight
    refuses(tmp_path / "gpt2", "weights cannot be loaded")


def test_directory_with_missing_weights(tmp_path: Path) -> None:
    """from_pretrained would make them up at random."""
    HF["bert"]().save_pretrained(tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    tensors = load_file(file)
    removed = next(name for name in tensors if name.endswith("LayerNorm.weight"))
    save_file({k: v for k, v in tensors.items() if k != removed}, file, metadata={"format": "pt"})
    refuses(tmp_path / "bert", "1 weights", "random")


def test_directory_with_code_is_not_run(tmp_path: Path) -> None:
    """A checkpoint that brings its own modeling file: refused, the file not imported."""
    directory = tmp_path / "remote"
    directory.mkdir()
    (directory / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {
        "architectures": ["MyNet"],
        "model_type": "mynet",
        "auto_map": {"AutoConfig": "modeling.MyConfig", "AutoModel": "modeling.MyNet"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    refuses(directory, "MyNet", "never run")
    (directory / "config.json").write_text("{not json")
    refuses(directory, "JSON")
    assert not (tmp_path / "ran").exists()


def test_swapped_directory(tmp_path: Path) -> None:
    """`from_pretrained` alone would bring the old norms back; `ns.load` rebuilds the new ones."""
    HF["llama"]().save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    loaded = artefacts.load(tmp_path / "llama")
    changed, report = ns.swap(randomised(loaded.model), to="layernorm")
    out = loaded.output("layernorm")
    artefacts.save(loaded, changed, report, out)
    assert (out / "tokenizer.json").exists()
    again = ns.load(out)
    assert type(again) is type(changed)
    assert torch.equal(logits(again), logits(changed))
    # LayerNorm's weight has RMSNorm's name and shape: others would take it without a word.
    _, told = type(changed).from_pretrained(out, output_loading_info=True)
    norms = {name for name, _ in again.named_parameters() if "norm" in name}
    assert {name for name in told["missing_keys"] if "norm" in name} <= norms
    assert norms <= set(told["missing_keys"]) | {n for n in norms if n.endswith("bias")}
    named = json.loads((out / "config.json").read_text())["architectures"]
    assert not any(hasattr(transformers, name) for name in named)
    assert any(isinstance(module, nn.LayerNorm) for module in again.modules())
    assert any(isinstance(module, nn.LayerNorm) for module in ns.load(out, meta=True).modules())
    second = artefacts.load(out)
    twice, report = ns.swap(second.model, to="rmsnorm")
    artefacts.save(second, twice, report, out, force=True)
    assert torch.equal(logits(ns.load(out)), logits(twice))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


FROM_BATCHNORM = [name for name in ns.names() if ns.get(name).conversion("batchnorm") is not None]


@pytest.mark.parametrize("target", FROM_BATCHNORM)
def test_a_swap_to_every_norm_is_saved_and_loaded(tmp_path: Path, target: str) -> None:
    """A parametrized weight or a rewritten forward is nothing that a pickle can hold by itself."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = randomised(transformers.ResNetForImageClassification(config)).eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = artefacts.load(tmp_path / "model.pt")
    changed, report = ns.swap(loaded.model, target, inputs=(x,))
    out, _ = artefacts.save(loaded, changed, report, tmp_path / "out.pt")
    again = artefacts.load(out).model
    assert torch.equal(again.eval()(x).logits, changed.eval()(x).logits)
    names = [name for name, _ in changed.named_parameters()]
    assert names == [name for name, _ in again.named_parameters()]


def test_a_cut_off_file_is_one_sentence_wherever_it_is_cut(tmp_path: Path) -> None:
    """Torch's reader raises RuntimeError for some lengths and OSError for others."""
    whole = tmp_path / "model.pt"
    torch.save(randomised(small()), whole)
    content = whole.read_bytes()
    sizes = {*range(1, 64, 7), *range(64, len(content), len(content) // 40), len(content) - 1}
    for size in sorted(sizes):
        (tmp_path / "cut.pt").write_bytes(content[:size])
        refuses(tmp_path / "cut.pt", "cut.pt")


# Why a model of the find table does not open: its pickle calls into its own code, or torch refuses.
CALLS_ITS_OWN_CODE = ("mamba", "mamba2")
NOT_PICKLED_BY_TORCH = ("wav2vec2",)  # a parametrized weight


@pytest.mark.parametrize("name", zoo.models())
def test_every_model_of_the_find_table_opens_without_trust(tmp_path: Path, name: str) -> None:
    row = zoo.models()[name]
    model, file = row.build(), tmp_path / "model.pt"
    if name in NOT_PICKLED_BY_TORCH:
        with pytest.raises(RuntimeError, match="parametrized"):
            torch.save(model, file)
        return
    torch.save(model, file)
    if name in CALLS_ITS_OWN_CODE:
        refuses(file, "--weights", "model.pt")
        return
    loaded = artefacts.load(file).model
    assert same_weights(loaded, model)
    sites = ns.find(loaded, row.inputs()).sites
    found = {site.kind for site in sites if site.attach == "norm"}
    assert found == set(row.within_forwards(row.sites))


def test_a_model_that_was_built_is_saved_without_being_loaded_first(tmp_path: Path) -> None:
    model = randomised(small())
    inputs = (torch.randn(2, 3, 8, 8),)
    kind = ns.find(model, inputs).sites[0].kind
    changed, report = ns.swap(model, kind, inputs=inputs)
    out, _ = artefacts.save(model, changed, report, tmp_path / "new.pt")
    assert same_weights(artefacts.load(out).model, changed)


def test_python_itself_is_no_package_to_trust(tmp_path: Path) -> None:
    """`--trust builtins` was offered for `builtins.getattr` and `eval`, and then refused."""
    with pytest.raises(CannotRead) as caught:
        config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=97)
        torch.save(transformers.MambaForCausalLM(config), tmp_path / "m.pt")
        artefacts.load(tmp_path / "m.pt")
    assert "--trust" not in str(caught.value) and "--weights" in str(caught.value)


def test_weights_beside_their_factory_are_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a swap of a factory writes is weights alone; the factory is named on the other side."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seeded_factory.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()\n"
    )
    loaded = artefacts.load("seeded_factory:make")
    changed, report = ns.swap(loaded.model, "affine")
    artefacts.save(loaded, changed, report, tmp_path / "out.safetensors")
    evidence = ns.verify("seeded_factory:make", tmp_path / "out.safetensors", hard=False)
    assert evidence.passed
    sys.modules.pop("seeded_factory", None)
