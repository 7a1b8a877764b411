"""Inputs: given, spelled, inferred; and outputs by name."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from normsurgery.errors import CannotRead, CannotTrace, UsageError
from normsurgery.inputs import Inputs, as_inputs, flatten_outputs, infer, parse


class Recorder(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


def test_as_inputs_takes_every_way_of_giving_them() -> None:
    x, y = torch.ones(1), torch.zeros(1)
    model = Recorder()
    assert as_inputs((x, y)).call(model) == ((x, y), {})
    assert as_inputs({"a": x}).call(model) == ((), {"a": x})
    assert as_inputs(x).call(model) == ((x,), {})
    assert as_inputs(None).call(model) == ((), {})
    given = Inputs((x,), {"b": y})
    assert as_inputs(given) is given
    with pytest.raises(UsageError, match="str"):
        as_inputs("1x3")  # type: ignore[arg-type]


def test_to_moves_floats_and_leaves_integers() -> None:
    """Token ids turned into float64 would not index an embedding; nested tensors move as well."""
    given = Inputs((torch.ones(2), [torch.ones(1)]), {"ids": torch.ones(2, dtype=torch.int64)})
    moved = given.to(dtype=torch.float64)
    assert moved.args[0].dtype == moved.args[1][0].dtype == torch.float64
    assert moved.kwargs["ids"].dtype == torch.int64
    assert given.args[0].dtype == torch.float32
    assert given.to(device="meta").kwargs["ids"].is_meta


@pytest.mark.parametrize(
    ("text", "dtype", "shape"),
    [
        ("1x3x22x24", torch.float32, (1, 3, 22, 24)),
        ("float16[2,3]", torch.float16, (2, 3)),
        ("bfloat16[4]", torch.bfloat16, (4,)),
        ("int64[1,16]<30522", torch.int64, (1, 16)),
        ("int32[7]", torch.int32, (7,)),
        ("bool[2,5]", torch.bool, (2, 5)),
        ("complex64[3]", torch.complex64, (3,)),
        ("float64[]", torch.float64, ()),
    ],
)
def test_spelled_tensors(text: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    (value,) = parse([text]).args
    assert (value.dtype, tuple(value.shape)) == (dtype, shape)


def test_integers_stay_below_their_bound_and_reach_it() -> None:
    (value,) = parse(["int64[1000]<5"]).args
    assert sorted(value.unique().tolist()) == [0, 1, 2, 3, 4]


def test_values_repeat_and_differ_from_each_other() -> None:
    """The same text gives the same numbers, two tensors of one call never the same ones."""
    texts = ["2x8", "2x8", "mask=float32[2,8]"]
    before = torch.random.get_rng_state()
    first, second = parse(texts), parse(texts)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.args[0], second.args[0])
    assert torch.equal(first.kwargs["mask"], second.kwargs["mask"])
    assert not torch.equal(first.args[0], first.args[1])
    assert not torch.equal(first.args[1], first.kwargs["mask"])
    assert first.spelling == tuple(texts)


def test_names_and_constants() -> None:
    found = parse(["a=1x2", "use_cache=False", "n=3", "scale=0.5", "mask=None", "2x2"])
    assert list(found.kwargs) == ["a", "use_cache", "n", "scale", "mask"]
    assert [found.kwargs[k] for k in ("use_cache", "n", "scale", "mask")] == [False, 3, 0.5, None]
    assert found.args[0].shape == (2, 2)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("banana", "Known forms"),
        ("16", "Known forms"),
        ("float33[2]", "float33"),
        ("save[2]", "save"),
        ("float32[2]<5", "integer dtype"),
        ("a=banana", "banana"),
    ],
)
def test_wrong_spellings(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        parse([text])


def test_a_name_twice() -> None:
    with pytest.raises(UsageError, match="twice"):
        parse(["a=1x2", "a=1x2"])


def test_files(tmp_path: Path) -> None:
    """Tensor files of every kind; one with names gives keyword arguments."""
    x = torch.randn(2, 3)
    torch.save(x, tmp_path / "x.pt")
    torch.save({"a": x, "b": x + 1}, tmp_path / "named.pt")
    np.save(tmp_path / "x.npy", x.numpy())
    save_file({"a": x}, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.npy"):
        assert torch.equal(parse([str(tmp_path / name)]).args[0], x)
    assert torch.equal(parse([f"q={tmp_path / 'x.pt'}"]).kwargs["q"], x)
    assert torch.equal(parse([str(tmp_path / "x.safetensors")]).kwargs["a"], x)
    assert torch.equal(parse([str(tmp_path / "named.pt")]).kwargs["b"], x + 1)


def test_files_that_are_no_inputs(tmp_path: Path) -> None:
    """Objects in a .npy or .pt are not unpickled."""
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    torch.save({"a": [1]}, tmp_path / "list.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00")
    for name in ("objects.npy", "list.pt", "cut.safetensors", "missing.pt"):
        with pytest.raises(CannotRead, match=name):
            parse([str(tmp_path / name)])


# --- inference


class Flat(nn.Module):
    """Only one image size fits."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(2 * (side - 2) ** 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 4)
        self.image = nn.Conv2d(3, 4, 3)

    def forward(self, ids: Tensor, image: Tensor, scale: float = 1.0) -> Tensor:
        return self.words(ids).mean(1) + scale * self.image(image).mean((2, 3))


class HandWritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x.pow(2).mean(-1, keepdim=True).rsqrt()


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


PLAIN: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "2-d convolution": (lambda: nn.Sequential(nn.Conv2d(5, 2, 3)), ("2x5x64x64",)),
    "1-d convolution": (lambda: nn.Sequential(nn.Conv1d(5, 2, 3)), ("2x5x64",)),
    "3-d convolution": (lambda: nn.Sequential(nn.Conv3d(5, 2, 3)), ("2x5x16x16x16",)),
    "linear": (lambda: nn.Sequential(nn.Linear(9, 2), nn.BatchNorm1d(2)), ("2x9",)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(13, 4)), ("int64[2,16]<13",)),
    "recurrent": (lambda: nn.LSTM(6, 4, batch_first=True), ("2x16x6",)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 2, 2), ("2x4x64x64",)),
    "one size fits": (lambda: Flat(28), ("2x1x28x28",)),
    "two kinds": (TwoInputs, ("int64[2,16]<11", "2x3x64x64")),
    "attention": (lambda: nn.MultiheadAttention(8, 2), ("2x16x8",) * 3),
    "batchnorm1d": (lambda: nn.BatchNorm1d(6), ("2x6x16",)),
    "batchnorm2d": (lambda: nn.BatchNorm2d(6), ("2x6x8x8",)),
    "batchnorm2d, not affine": (lambda: nn.BatchNorm2d(6, affine=False), ("2x6x8x8",)),
    "instancenorm3d": (lambda: nn.InstanceNorm3d(6), ("2x6x4x4x4",)),
    "groupnorm": (lambda: nn.GroupNorm(2, 6), ("2x6x8x8",)),
    "layernorm": (lambda: nn.LayerNorm((3, 5)), ("2x16x3x5",)),
    "rmsnorm": (lambda: nn.RMSNorm(5), ("2x16x5",)),
    "hand-written norm": (HandWritten, ("2x16x7",)),
    "no layers": (nn.ReLU, ("2x3x64x64",)),
    "no layers, two inputs": (Sum, ("2x3x64x64", "2x3x64x64")),
    "half precision": (lambda: nn.Linear(9, 2).bfloat16(), ("bfloat16[2,9]",)),
    "on meta": (lambda: nn.Linear(9, 2, device="meta"), ("2x9",)),
    "flattened": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)),
        ("2x3072",),
    ),
}


@pytest.mark.parametrize("case", PLAIN)
def test_inferred_from_layers(case: str) -> None:
    """What is found runs, is spelled, and its spelling repeats it bit for bit."""
    make, spelling = PLAIN[case]
    model = make().eval()
    found = infer(model)
    assert found.spelling == spelling
    found.call(model)
    for tensor, again in zip(found.args, parse(found.spelling).args, strict=True):
        assert tensor.is_meta or torch.equal(tensor, again)


def test_timm_configuration() -> None:
    """`default_cfg` is asked before the usual sizes."""
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    model.default_cfg = {"input_size": (3, 48, 40)}
    assert infer(model).spelling == ("float32[2,3,48,40]",)
    model.pretrained_cfg = SimpleNamespace(input_size=(3, 24, 40))
    assert infer(model).spelling == ("float32[2,3,24,40]",)


def test_exported_program_carries_its_own() -> None:
    model = TwoInputs().eval()
    ids, image = torch.randint(11, (3, 4)), torch.randn(3, 3, 9, 9)
    program = torch.export.export(model, (ids,), {"image": image})
    found = infer(program)
    assert torch.equal(found.args[0], ids) and torch.equal(found.kwargs["image"], image)
    assert found.spelling == (f"int64[3,4]<{int(ids.max()) + 1}", "image=float32[3,3,9,9]")
    assert torch.equal(found.call(program), model(ids, image))


class Stateful(nn.Module):
    """Everything a trial run could dirty."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.calls = 0
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.bn(self.conv(x)) * torch.rand(1)
        return self.seen


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    model = Stateful().train()
    weights = copy.deepcopy(model.state_dict())
    before = torch.random.get_rng_state()
    infer(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (model.calls, model.seen, model.training, model.bn.training) == (0, None, True, True)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, graph: Any, edges: Any) -> Tensor:
        raise ValueError("wants a graph\nwith edges")


def test_nothing_fits() -> None:
    """The error says what was tried, what forward needs, and how to give inputs, in one line."""
    with pytest.raises(CannotTrace) as caught:
        infer(Picky())
    text = str(caught.value)
    for word in ("Picky", "2x4", "wants a graph", "graph, edges", "--input"):
        assert word in text
    assert "\n" not in text


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 97,
}
IMAGE = {**{k: v for k, v in TEXT.items() if k != "vocab_size"}, "image_size": 16, "patch_size": 8}
SPEECH = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "d_model": 32,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
HF: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "text": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
        {"input_ids", "use_cache"},
    ),
    "encoder-decoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=97
            )
        ),
        {"input_ids", "decoder_input_ids", "use_cache"},
    ),
    "image": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**IMAGE, num_channels=2)),
        {"pixel_values"},
    ),
    "image and text": (
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16)
        ),
        {"input_ids", "pixel_values"},
    ),
    "spectrogram to text": (
        lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                **SPEECH, num_mel_bins=8, max_source_positions=30, max_target_positions=20
            )
        ),
        {"input_features", "decoder_input_ids", "use_cache"},
    ),
    "wave": (
        lambda: transformers.Wav2Vec2Model(
            transformers.Wav2Vec2Config(
                **TEXT,
                conv_dim=(16, 16),
                conv_stride=(5, 2),
                conv_kernel=(10, 3),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
            )
        ),
        {"input_values"},
    ),
}


@pytest.mark.parametrize("case", HF)
def test_transformers_configurations(case: str) -> None:
    """Asked for by signature, sized by configuration; no cache in the output."""
    make, names = HF[case]
    model = make().eval()
    found = infer(model)
    assert set(found.kwargs) == names and found.args == ()
    with torch.no_grad():
        outputs = flatten_outputs(found.call(model))
    assert outputs and not any("past_key_values" in name for name in outputs)
    assert next(iter(outputs.values())).shape[0] == 2
    again = parse(found.spelling)
    assert all(
        torch.equal(value, again.kwargs[name])
        for name, value in found.kwargs.items()
        if isinstance(value, Tensor)
    )


def test_token_ids_fit_a_short_model() -> None:
    """No position beyond the last one the model has."""
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=97, n_positions=6)
    assert infer(transformers.GPT2LMHeadModel(config)).kwargs["input_ids"].shape == (2, 6)


# --- outputs


@dataclass
class Result:
    score: Tensor
    parts: tuple[Tensor, dict[str, Tensor]]
    note: str = "x"


Pair = namedtuple("Pair", ["left", "right"])


def test_outputs_by_name() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    named = {
        "output": a,
    }
    assert flatten_outputs(a) == named
    assert list(flatten_outputs((a, [b, None], 3))) == ["0", "1.0"]
    assert list(flatten_outputs({"logits": a, "hidden_states": (b, c)})) == [
        "logits",
        "hidden_states.0",
        "hidden_states.1",
    ]
    found = flatten_outputs(Result(a, (b, {"x": c})))
    assert list(found) == ["score", "parts.0", "parts.1.x"] and found["parts.1.x"] is c
    assert list(flatten_outputs(Pair(a, b))) == ["left", "right"]


def test_caches_are_no_results() -> None:
    output = transformers.modeling_outputs.CausalLMOutputWithPast(
        logits=torch.ones(1), past_key_values=((torch.ones(1),),), hidden_states=(torch.ones(2),)
    )
    assert list(flatten_outputs(output)) == ["logits", "hidden_states.0"]
