"""export, verify and blame on the command line: what is written, said, and returned."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from made_reports import evidence, report
from onnx import numpy_helper
from test_reporting import faults
from torch import nn
from typer.testing import CliRunner, Result

import normsurgery as ns
from normsurgery.cli import exporting, main, render, render_onnx
from normsurgery.errors import UsageError
from normsurgery.onnxfile.sessions import missing_provider
from normsurgery.report import Report
from normsurgery.reporting import schema


def network() -> nn.Module:
    """A norm that can be folded, one with an operator of its own, one that is decomposed."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.LayerNorm(288),
        nn.Linear(288, 4),
    )
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.normal_(generator=generator)
        model[1].running_var.uniform_(0.5, 2.0, generator=generator)
    return model


INPUT = ("--input", "2x3x8x8")
DYNAMIC = ("--dynamic", "0:batch")


def run(*words: object) -> Result:
    return CliRunner().invoke(main.app, [str(word) for word in words])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder with model.pt exported in it, and what that printed."""
    folder = tmp_path_factory.mktemp("exported")
    torch.save(network(), folder / "model.pt")
    page = ("--report", folder / "out.html")
    return folder, run("export", folder / "model.pt", *INPUT, *DYNAMIC, *page)


@pytest.fixture
def folder(exported: tuple[Path, Result], tmp_path: Path) -> Path:
    """A copy of that folder, to change."""
    shutil.copytree(exported[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def damaged(path: Path) -> Path:
    """The file with the scale of its LayerNormalization off by a hundredth."""
    proto = onnx.load(path)
    node = next(n for n in proto.graph.node if n.op_type == "LayerNormalization")
    scale = next(t for t in proto.graph.initializer if t.name == node.input[1])
    changed = numpy_helper.to_array(scale) * 1.01
    scale.CopyFrom(numpy_helper.from_array(changed.astype("float32"), scale.name))
    other = path.with_name("damaged.onnx")
    onnx.save(proto, other)
    return other


def test_an_export_is_written_beside_the_input_with_its_report(
    exported: tuple[Path, Result],
) -> None:
    folder, done = exported
    assert done.exit_code == 0, done.output
    names = {"model.pt", "model.onnx", "model.onnx.report.json", "out.html"}
    assert {path.name for path in folder.iterdir()} == names
    saved = Report.load(folder / "model.onnx.report.json")
    assert saved.passed and saved.evidence is not None and saved.evidence.comparisons
    assert saved.onnx is not None and saved.onnx.inputs["input"] == "float32[batch, 3, 8, 8]"
    onnx.checker.check_model(folder / "model.onnx", full_check=True)


def test_an_export_tells_what_a_reader_asks_first(exported: tuple[Path, Result]) -> None:
    """The file, why this opset, what is dynamic, what became of the norms, and the verdict."""
    out = exported[1].stdout
    wanted = [
        r"^  opset +\d+: \w+", r"^  input +input  float32\[batch, 3, 8, 8\]$",
        r"^  folded before +1 batchnorm", r"^  norm operators +.*1 LayerNormalization",
        r"^  eps +2 of 2 are in the file$", r"^  switched to eval +\(the model itself\)",
        r"^passed: \d+ passed", r"^1 +layernorm +LayerNormalization",
        r"^onnxruntime all +cpu +\d+ .*passed", r"floating values compared \(\d+%\)",
    ]  # fmt: skip
    assert [pattern for pattern in wanted if not re.search(pattern, out, re.MULTILINE)] == []


def test_the_last_lines_say_what_was_written_and_what_to_type_next(
    exported: tuple[Path, Result],
) -> None:
    folder, done = exported
    wrote, following = done.stdout.splitlines()[-2:]
    names = ["model.onnx", "model.onnx.report.json", "out.html"]
    assert wrote == "wrote " + ", ".join(str(folder / name) for name in names)
    words = shlex.split(following)
    assert words[:4] == ["normsurgery", "verify", str(folder / "model.pt"), str(folder / names[0])]
    again = run(*words[1:])
    assert again.exit_code == 0, again.output
    assert re.search("^not run: cuda: ", again.stdout, re.MULTILINE) or torch.cuda.is_available()


def test_the_page_of_an_export_shows_its_inside(exported: tuple[Path, Result]) -> None:
    text = (exported[0] / "out.html").read_text(encoding="utf-8")
    assert 'id="error-plot"' in text and 'class="mark' in text
    assert "LayerNormalization" in text and "normsurgery export" in text


def test_json_is_all_that_is_on_stdout_and_as_documented(folder: Path) -> None:
    words = ["export", folder / "model.pt", *INPUT, "-o", folder / "b.onnx", "--json", "--no-hard"]
    data = json.loads(run(*words).stdout)
    assert faults(data, schema.REPORT, schema.REPORT) == []
    assert data["written"] == [str(folder / "b.onnx"), str(folder / "b.onnx.report.json")]
    words = ["verify", folder / "model.pt", folder / "b.onnx", *INPUT, "--json", "--no-hard"]
    measured = json.loads(run(*words).stdout)
    assert faults(measured, schema.EVIDENCE, schema.EVIDENCE) == []
    assert measured["passed"] and measured["stages"] and measured["inner"]


AXES = {
    (): None,
    ("0:batch",): {0: "batch"},
    ("0:batch", "-1:width"): {0: "batch", -1: "width"},
    ("ids.0:batch", "ids.1:sequence"): {"ids": {0: "batch", 1: "sequence"}},
    ("0:batch", "ids.1:sequence"): {0: "batch", "ids": {1: "sequence"}},
    ("a.b.0:batch", "c.0:batch"): {"a.b": {0: "batch"}, "c": {0: "batch"}},
}


@pytest.mark.parametrize("words", AXES, ids=" ".join)
def test_axes_are_typed_as_the_function_takes_them(words: tuple[str, ...]) -> None:
    assert exporting.dynamic_axes(words) == AXES[words]
    typed = exporting._axes(AXES[words] or {})
    assert tuple(typed) == words


@pytest.mark.parametrize(
    "words",
    [["batch"], ["0"], ["0:"], ["x:batch"], ["0:a", "0:b"], ["i.0:a", "i.0:b"]],
    ids=" ".join,
)
def test_words_that_are_no_axes_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^--dynamic"):
        exporting.dynamic_axes(words)


def test_options_reach_the_function_and_the_command_that_repeats_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report whose command leaves an option out repeats another export."""
    calls: list[dict[str, Any]] = []

    def noted(model: Any, path: Path, inputs: Any, **options: Any) -> Report:
        calls.append(options)
        return report(onnx=None)

    monkeypatch.setattr(ns, "export", noted)
    typed = [
        "--dynamic", "input.0:batch", "--opset", "18", "--dtype", "fp16", "--no-fold",
        "--allow-batch-stats", "--no-verify", "--on", "cpu,cuda", "--require-runner", "cuda",
        "--no-hard", "--seed", "5", "--external-data", *INPUT, "--force",
    ]  # fmt: skip
    page = folder / "repeat.json"
    assert run("export", folder / "model.pt", *typed, "--report", page).exit_code == 0
    command = json.loads(page.read_text(encoding="utf-8"))["command"]
    assert run(*shlex.split(command)[1:], "--force").exit_code == 0
    wanted = {
        "dynamic": {"input": {0: "batch"}}, "opset": 18, "dtype": "fp16", "fold": False,
        "allow_batch_stats": True, "verify": False, "on": ("cpu", "cuda"),
        "require_runner": ("cuda",), "hard": False, "seed": 5, "external_data": True, "force": True,
    }  # fmt: skip
    assert calls == [wanted, wanted]


def test_a_damaged_file_fails_and_is_blamed(folder: Path) -> None:
    other = damaged(folder / "model.onnx")
    page = folder / "bad.html"
    words = ["verify", folder / "model.pt", other, *INPUT, "--blame", "--report", page]
    done = run(*words)
    assert done.exit_code == 1
    assert done.stdout.startswith("FAILED")
    assert re.search(r"^  operation +\S+ \(LayerNormalization\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^  module +5$", done.stdout, re.MULTILINE)
    assert "failed: value" not in done.stdout and "failed: stage" not in done.stdout
    assert done.stdout.splitlines()[-1] == f"wrote {page}"
    text = page.read_text(encoding="utf-8")
    assert "The first operation that diverges" in text
    assert text.count(">diverges here<") == 1 and text.count('class="halo"') == 1
    named = run("blame", folder / "model.pt", other, *INPUT)
    assert named.exit_code == 1
    assert "(LayerNormalization)" in named.stdout
    assert run("blame", folder / "model.pt", folder / "model.onnx", *INPUT).exit_code == 0


def test_the_steps_of_a_plan_that_break_their_promise_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A swap that changes outputs by design broke nothing; a fold that is wrong did."""
    swapped, folded = folder / "swap.json", folder / "fold.json"
    run("swap", folder / "model.pt", "--to", "dyt", "--dry-run", "--save-plan", swapped, *INPUT)
    done = run("blame", folder / "model.pt", swapped, *INPUT)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == "every promise holds"
    run("fold", folder / "model.pt", "--dry-run", "--save-plan", folded, *INPUT)
    assert run("blame", folder / "model.pt", folded, *INPUT).exit_code == 0
    data = json.loads(folded.read_text(encoding="utf-8"))
    scaled = data["steps"][0]["edits"][0]
    assert (scaled["edit"], scaled["target"]) == ("Scale", "0.weight")
    scaled["by"]["settings"]["eps"] = 0.5
    folded.write_text(json.dumps(data), encoding="utf-8")
    wrong = run("blame", folder / "model.pt", folded, *INPUT)
    assert wrong.exit_code == 1, wrong.output
    assert re.search(r"^0 +1 +batchnorm -> identity +", wrong.stdout, re.MULTILINE)
    listed = json.loads(run("blame", folder / "model.pt", folded, *INPUT, "--json").stdout)
    assert [step["where"] for step in listed["blamed"]["steps"]] == ["1"]


def test_every_mix_of_forms_is_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().eval()
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),))
    torch.export.save(program, folder / "model.pt2")
    shutil.copy(folder / "model.onnx", folder / "copy.onnx")
    monkeypatch.chdir(folder)
    (folder / "made.py").write_text(
        "import torch\ndef model():\n    return torch.load('model.pt', weights_only=False)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    quick = ("--no-hard", "--no-intermediates")
    for a in ("model.pt2", "made:model", "copy.onnx"):
        done = run("verify", a, "model.onnx", *INPUT, *quick)
        assert done.exit_code == 0, (a, done.output)
        wrong = run("verify", a, damaged(folder / "model.onnx"), *INPUT, *quick)
        assert wrong.exit_code == 1, (a, wrong.output)


def test_a_run_is_saved_and_judged_elsewhere(folder: Path) -> None:
    good, bad = folder / "good.safetensors", folder / "bad.safetensors"
    words = ["verify", folder / "model.pt", folder / "model.onnx", *INPUT, "--save", good]
    assert run(*words).stdout.splitlines()[-1] == f"wrote {good}"
    again = run(*words)
    assert again.exit_code == 2 and "exists already" in again.stderr
    other = damaged(folder / "model.onnx")
    assert run("verify", folder / "model.pt", other, *INPUT, "--save", bad).exit_code == 1
    assert run("verify", folder / "model.pt", good).exit_code == 0
    assert run("verify", folder / "model.pt", bad).exit_code == 1


def test_a_runner_that_is_missing_is_said_and_fails_where_it_is_required(folder: Path) -> None:
    missing = next(name for name in ("tensorrt", "cuda") if missing_provider(name))
    words = ["verify", folder / "model.pt", folder / "model.onnx", *INPUT, "--no-hard"]
    done = run(*words, "--on", f"cpu,{missing}")
    assert done.exit_code == 0
    assert re.search(f"^not run: {missing}: ", done.stdout, re.MULTILINE)
    required = run(*words, "--require-runner", missing)
    assert required.exit_code == 1
    assert f"failed: runner {missing} was required and did not run" in required.stdout


WRONG: dict[str, tuple[list[str], int, str]] = {
    "an axis without a name": (["export", "PT", "--dynamic", "0"], 2, "AXIS:NAME"),
    "an axis that is not there": (["export", "PT", "--dynamic", "7:batch"], 2, "no axis 7"),
    "an input that is not there": (["export", "PT", "--dynamic", "ids.0:batch"], 2, "'ids'"),
    "an opset that is not there": (["export", "PT", "--opset", "99"], 2, "opset"),
    "a runner that nobody knows": (["verify", "PT", "ONNX", "--on", "gpu"], 2, "'gpu'"),
    "a report of no kind": (["export", "PT", "--report", "out.pdf"], 2, ".html"),
    "a file that is there": (["export", "PT", "-o", "ONNX"], 2, "exists already"),
    "a report that is there": (["verify", "PT", "ONNX", "--report", "HTML"], 2, "exists already"),
    "a run of no kind": (["verify", "PT", "ONNX", "--save", "run.pt"], 2, ".safetensors"),
    "itself": (["verify", "ONNX", "ONNX"], 2, "itself"),
    "a truncated file": (["verify", "PT", "HALF"], 3, "truncated"),
    "an empty file": (["verify", "PT", "EMPTY"], 3, "empty"),
    "no such file": (["verify", "PT", "nowhere.onnx"], 3, "no such"),
    "no source to change": (["swap", "ONNX", "--to", "gn"], 3, "exported from"),
    "no source to export": (["export", "ONNX"], 3, "exported from"),
    "norms of a truncated file": (["find", "HALF"], 3, "truncated"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_sentence_and_its_exit_code(folder: Path, case: str) -> None:
    words, code, said = WRONG[case]
    half, empty = folder / "half.onnx", folder / "empty.onnx"
    half.write_bytes((folder / "model.onnx").read_bytes()[:-200])
    empty.write_bytes(b"")
    files = {
        "PT": folder / "model.pt", "ONNX": folder / "model.onnx", "HALF": half, "EMPTY": empty,
        "HTML": folder / "out.html",
    }  # fmt: skip
    typed: list[Any] = [files.get(word, word) for word in words]
    if words[0] == "export" and "-o" not in words:
        typed += ["-o", folder / "fresh.onnx"]
    before = sorted(path.name for path in folder.iterdir())
    done = run(*typed, *(INPUT if words[0] in ("export", "verify") else ()))
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert "Traceback" not in done.output and done.stdout == ""
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_norms_of_a_file_are_found(folder: Path) -> None:
    done = run("find", folder / "model.onnx")
    assert done.exit_code == 0
    first, *_, last = done.stdout.splitlines()
    assert "1 LayerNormalization" in first
    assert re.split(" {2,}", last)[1:4] == ["LayerNormalization", "1e-05", "5"]
    listed = json.loads(run("find", folder / "model.onnx", "--json").stdout)
    assert listed["counts"]["LayerNormalization"] == 1
    assert [norm["module"] for norm in listed["norms"]][-1] == "5"


def test_an_export_that_is_not_verified_says_how_to(folder: Path) -> None:
    words = ["export", folder / "model.pt", *INPUT, "-o", folder / "b.onnx", "--no-verify"]
    done = run(*words)
    assert done.exit_code == 0
    assert "nothing was measured" in done.stdout
    following = done.stdout.splitlines()[-1]
    assert following.startswith("normsurgery verify ") and "--on" not in following


def test_an_export_that_failed_is_not_under_its_name_and_names_who_is_to_blame(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = folder / "model.failed.onnx"

    def failing(*_: Any, **__: Any) -> Report:
        shutil.copy(folder / "model.onnx", failed)
        made = report(bad=True)
        assert made.onnx is not None
        return report(bad=True, onnx=made.onnx.__class__(str(failed), 20, "", "float32", 1, 1))

    monkeypatch.setattr(ns, "export", failing)
    done = run("export", folder / "model.pt", *INPUT, "--force")
    assert done.exit_code == 1
    wrote, following = done.stdout.splitlines()[-2:]
    assert wrote == f"wrote {failed}"
    assert following.startswith(f"normsurgery verify {folder / 'model.pt'} {failed} --blame")


def test_what_failed_inside_is_counted_and_the_first_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Behind a value that is wrong hundreds of others are, and nobody reads them."""
    render.evidence(evidence(bad=True), as_json=False)
    out = capsys.readouterr().out
    assert "24 values inside failed, the first:" in out
    assert out.count("val_") == 11  # ten in the table, one that is blamed
    assert not [line for line in out.splitlines() if line.startswith("failed: ")]
    assert re.search(r"^  detail +epsilon 1e-06, the source has 1e-05$", out, re.MULTILINE)


def test_what_went_well_is_told_in_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    done = exporting.Exported(report(), (Path("model.onnx"),), "normsurgery verify a b")
    render_onnx.exported(done, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 32
    assert lines[-2:] == ["wrote model.onnx", "normsurgery verify a b"]
