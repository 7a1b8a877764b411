"""Runs saved on one machine and judged on another, which lacks what they were computed on."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.errors import CannotRead, UsageError
from normsurgery.inputs import Inputs
from normsurgery.verifying import hard_inputs
from normsurgery.verifying.elsewhere import digest, record, verify_saved
from normsurgery.verifying.hard_inputs import Case
from normsurgery.verifying.judge import same_bits
from normsurgery.verifying.saved import KEY, SavedCase, SavedRun, is_run
from normsurgery.verifying.sources import TorchCandidate, torch_source


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh()).eval()


def cases(count: int = 3, *, dtype: torch.dtype = torch.float32) -> tuple[Case, ...]:
    torch.manual_seed(1)
    given = hard_inputs(Inputs((torch.randn(4, 8, dtype=dtype),)), seed=0)
    return given[:count]


def saved(path: Path, change: Callable[[Tensor], Tensor] = lambda value: value) -> SavedRun:
    """A run of a copy of the model, said to be of a GPU, its outputs changed, written to `path`."""
    run = record(torch_source(model(), None), TorchCandidate(model()), cases(), ("cpu",), seed=0)

    def on_gpu(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
        return {"cuda": {name: change(value) for name, value in values["cpu"].items()}}

    moved = tuple(
        replace(case, outputs=on_gpu(case.outputs, change), native=on_gpu(case.native, lambda v: v))
        for case in run.cases
    )
    run = replace(run, cases=moved, runners=("cuda",), devices={"cuda": "Imaginary 9000"})
    run.save(path)
    return run


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.randn(2, 3).to(dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)
    }
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    shared = torch.arange(6.0)
    inputs = Inputs(
        (shared[:3], [shared[3:], None, (1, 2.5, "text", True)], {"nested": {"x": odd}}),
        {"kept": torch.empty(0, 4), "dtype": torch.bfloat16, "scalar": torch.tensor(3)},
        ("--input 3",),
    )
    outputs = {"cuda": {**tensors, "transposed": torch.randn(3, 4).T, "view": shared[2:]}}
    first = SavedCase("example", inputs, outputs, {"cuda": {"a.b": odd}}, {"tensorrt": "no"})
    run = SavedRun(
        (first, SavedCase("zeros", Inputs((torch.zeros(2),)))),
        seed=7,
        runners=("cuda", "tensorrt"),
        precision=torch.float16,
        rounded_to=torch.bfloat16,
        everything=True,
        candidate={"name": "m.onnx", "sha256": "ab"},
        devices={"cuda": "Imaginary 9000"},
        versions={"torch": "9"},
    )
    path = tmp_path / "run.safetensors"
    run.save(path)
    assert is_run(path)
    back = SavedRun.load(path)
    for name in ("seed", "runners", "precision", "rounded_to", "everything", "candidate"):
        assert getattr(back, name) == getattr(run, name)
    assert (back.devices, back.versions) == (run.devices, run.versions)
    case = back.cases[0]
    assert (case.label, case.failed, case.inputs.spelling) == (
        "example",
        {"tensorrt": "no"},
        ("--input 3",),
    )
    for name, value in outputs["cuda"].items():
        assert same_bits(case.outputs["cuda"][name], value), name
    assert same_bits(case.native["cuda"]["a.b"], odd)
    args, kwargs = case.inputs.args, case.inputs.kwargs
    assert isinstance(args, tuple) and same_bits(args[0], shared[:3])
    assert same_bits(args[1][0], shared[3:]) and args[1][1:] == [None, (1, 2.5, "text", True)]
    assert same_bits(args[2]["nested"]["x"], odd)
    assert kwargs["kept"].shape == (0, 4) and kwargs["dtype"] is torch.bfloat16
    assert list(kwargs) == ["kept", "dtype", "scalar"]


def test_a_right_run_of_a_gpu_is_judged_right_without_one(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    saved(path)
    evidence = verify_saved(model(), path, require_runner=("cuda",))
    assert evidence.passed, evidence.failures
    assert {c.runner for c in evidence.comparisons} == {"cuda"}
    assert len(evidence.comparisons) == len(cases())
    (note,) = evidence.notes
    assert "Imaginary 9000" in note and "run.safetensors" in note and "torch" in note


def test_the_public_verify_takes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    saved(path)
    assert ns.verify(model(), str(path)).passed
    assert not ns.verify(model(), str(path), require_runner=("tensorrt",)).passed


def lost_digits(value: Tensor) -> Tensor:
    return value.bfloat16().float()


def one_nan(value: Tensor) -> Tensor:
    changed = value.clone()
    changed[0, 0] = float("nan")
    return changed


@pytest.mark.parametrize(
    "fault",
    [
        lost_digits,
        one_nan,
        Tensor.half,
        lambda value: value[:1],
        lambda value: value * (1 + 2**-12),
    ],
    ids=["lost digits", "NaN", "dtype", "shape", "scale"],
)
def test_a_wrong_run_is_judged_wrong(fault: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    saved(path, fault)
    evidence = verify_saved(model(), path)
    assert not evidence.passed
    assert all(c.verdict.passed is False for c in evidence.comparisons)


def test_another_original_fails_and_is_said(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    saved(path)
    evidence = verify_saved(model(seed=5), path)
    assert not evidence.passed
    assert any("its weights differ" in note for note in evidence.notes)


def test_the_same_weights_with_another_eps_are_no_pass(tmp_path: Path) -> None:
    """The bits are those of the saved original, which was not this one."""
    path = tmp_path / "run.safetensors"
    saved(path)
    other = model()
    other[1].eps = 0.1  # type: ignore[operator,union-attr]
    assert not verify_saved(other, path).passed


def test_what_raised_there_is_a_failure_here(tmp_path: Path) -> None:
    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no kernel image is available")

    candidate = TorchCandidate(Refusing())
    path = tmp_path / "run.safetensors"
    record(torch_source(model(), None), candidate, cases(1), ("cpu",), seed=0).save(path)
    evidence = verify_saved(model(), path)
    assert not evidence.passed
    assert "RuntimeError: no kernel image is available" in evidence.failures[0]


def test_half_precision_is_judged_against_rounded_weights(tmp_path: Path) -> None:
    """fp16 beside its fp32 master: the truth has the weights that the candidate has."""
    half = model().half()
    source = torch_source(model(), torch.float16)
    given = cases(2, dtype=torch.float16)
    run = record(source, TorchCandidate(half), given, ("cpu",), seed=0, precision=torch.float16)
    path = tmp_path / "run.safetensors"
    run.save(path)
    back = SavedRun.load(path)
    assert back.rounded_to == back.precision == torch.float16
    assert all(v.dtype == torch.float16 for v in back.cases[0].outputs["cpu"].values())
    evidence = verify_saved(model(), path)
    assert evidence.passed, evidence.failures
    assert not any("its weights differ" in note for note in evidence.notes)


def test_a_graph_is_saved_and_judged(tmp_path: Path) -> None:
    from normsurgery.onnxfile.reading import of_proto
    from normsurgery.verifying.sources import OnnxCandidate, OnnxSource

    x = torch.randn(4, 8)
    written = torch.onnx.export(model(), (x,), dynamo=True, verbose=False)
    assert written is not None
    file = of_proto(written.model_proto, "m.onnx")
    path = tmp_path / "run.safetensors"
    candidate = OnnxCandidate(file, ())
    record(torch_source(model(), None), candidate, cases(2), ("cpu",), seed=0).save(path)
    assert SavedRun.load(path).candidate["name"] == "m.onnx"
    assert SavedRun.load(path).candidate["sha256"] == digest(file)
    assert verify_saved(model(), path).passed
    assert verify_saved(OnnxSource(file).file, path).passed
    file.proto.graph.initializer[0].raw_data = bytes(len(file.proto.graph.initializer[0].raw_data))
    assert not verify_saved(file, path).passed


def damage(case: str, path: Path) -> None:
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if case == "missing":
        path.unlink()
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "truncated":
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif case == "text":
        path.write_text("not a run", encoding="utf-8")
    elif case == "weights":
        save_file(tensors, path)
    elif case == "metadata":
        save_file(tensors, path, {KEY: metadata[KEY][:50]})
    elif case == "format":
        save_file(tensors, path, {KEY: json.dumps({**json.loads(metadata[KEY]), "format": 99})})
    elif case == "tensor gone":
        tensors.popitem()
        save_file(tensors, path, metadata)
    elif case == "field gone":
        content = json.loads(metadata[KEY])
        del content["seed"]
        save_file(tensors, path, {KEY: json.dumps(content)})
    elif case == "no dtype":
        save_file(
            tensors, path, {KEY: json.dumps({**json.loads(metadata[KEY]), "precision": "save"})}
        )


@pytest.mark.parametrize(
    ("case", "says", "a_run"),
    [
        ("missing", "there is no such saved run", False),
        ("empty", "not a saved run, or a truncated one", False),
        ("truncated", "not a saved run, or a truncated one", False),
        ("text", "not a saved run, or a truncated one", False),
        ("weights", "holds tensors but no run", False),
        ("metadata", "is damaged", True),
        ("format", "of format 99", True),
        ("tensor gone", "is damaged", True),
        ("field gone", "is damaged", True),
        ("no dtype", "is damaged", True),
    ],
)
def test_a_bad_file_is_said_in_a_sentence(
    case: str, says: str, a_run: bool, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    saved(path)
    damage(case, path)
    assert is_run(path) is a_run
    with pytest.raises(CannotRead) as caught:
        SavedRun.load(path)
    text = str(caught.value)
    assert says in text and text.startswith(str(path)) and "\n" not in text and text.endswith(".")


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.safetensors"
    run = saved(path)
    before = path.read_bytes()

    def interrupted(source: Any, target: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(UsageError, match="cannot be written"):
        replace(run, seed=1).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(UsageError, match="no such directory"):
        run.save(tmp_path / "nowhere" / "run.safetensors")


def test_what_is_no_plain_data_is_refused(tmp_path: Path) -> None:
    run = SavedRun((SavedCase("example", Inputs((threading.Lock(),))),), seed=0, runners=("cpu",))
    with pytest.raises(UsageError, match="an input is a lock, which a saved run cannot hold"):
        run.save(tmp_path / "run.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_run_without_cases_is_no_pass(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    SavedRun((), seed=0, runners=("cuda",)).save(path)
    with pytest.raises(CannotRead, match="no cases"):
        verify_saved(model(), path)
