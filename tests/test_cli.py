"""The command line: options that match the functions, clean pipes, exit codes, a quick start."""

from __future__ import annotations

import inspect
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import normsurgery as ns
from normsurgery.cli import catalog, main, render
from normsurgery.cli.session import progress
from normsurgery.errors import UsageError
from normsurgery.plan import Plan
from normsurgery.survey import Skip
from normsurgery.verify import Comparison, Evidence
from normsurgery.verify.evidence import LeftOut
from normsurgery.verify.judge import Verdict

LOADING = {"arguments", "weights", "trust"}
SHOWING = {"as_json", "debug"}
WRITING = {"out", "force", "dry_run", "save_plan"}

# A program should not wait for what it did not ask for; who types `fold` wants to see what it gave.
OTHER_DEFAULTS = {("fold", "time")}

VERBS: dict[str, tuple[Callable[..., Any], set[str], set[str]]] = {
    # verb: (function, what only the command has, what only the function has)
    "find": (ns.find, LOADING | SHOWING, set()),
    "swap": (ns.swap, LOADING | SHOWING | WRITING, {"inplace"}),
    "fold": (ns.fold, LOADING | SHOWING | WRITING | {"drop"}, {"inplace", "eval"}),
    "export": (ns.export, LOADING | SHOWING | {"out", "report"}, {"path"}),
    "verify": (ns.verify, LOADING | SHOWING | {"report", "force"}, set()),
    "blame": (ns.blame, LOADING | SHOWING, set()),
}


def two_norms() -> nn.Module:
    """Two norms of different kinds, all parameters random."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)
    )
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.normal_(generator=generator)
    return model


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    torch.save(two_norms(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


INPUT = ("--input", "2x3x8x8")


def run(*words: object) -> Result:
    return CliRunner().invoke(main.app, [str(word) for word in words])


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_has_the_options_of_its_function(verb: str) -> None:
    """A parameter that only one of the two has is a feature half the users cannot reach."""
    function, only_command, only_function = VERBS[verb]
    command = parameters(getattr(main, verb))
    assert set(command) - only_command == set(parameters(function)) - only_function
    assert only_command <= set(command)


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_has_the_defaults_of_its_function(verb: str) -> None:
    """A default that differs makes the same call mean two things."""
    function, _, _ = VERBS[verb]
    command = parameters(getattr(main, verb))
    for name, parameter in parameters(function).items():
        if name not in command or parameter.default is inspect.Parameter.empty:
            continue
        if (verb, name) in OTHER_DEFAULTS:
            continue
        assert _as_words(command[name].default) == _as_words(parameter.default), name


def _as_words(default: Any) -> Any:
    """A default of either side: nothing given is None, a tuple of words is them with commas."""
    if default is None or (hasattr(default, "__len__") and len(default) == 0):
        return None
    return ",".join(default) if isinstance(default, tuple) else default


START = """
import sys
sys.argv[1:] = {words!r}
from normsurgery.cli.main import run
try:
    run()
finally:
    heavy = {{"torch", "numpy", "rich", "onnx", "onnxruntime", "transformers"}} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.mark.parametrize("words", [["--help"], ["export", "--help"], ["norms"], ["explain", "gn"]])
def test_what_needs_no_model_imports_no_torch(words: list[str]) -> None:
    """`--help` that imports torch takes seconds."""
    start(words)


def test_help_is_there_in_half_a_second() -> None:
    """Processor time, since the machine that runs the tests does other things as well."""
    assert min(processor_seconds(["--help"]) for _ in range(3)) < 0.5


def start(words: list[str]) -> None:
    program = START.format(words=words)
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def processor_seconds(words: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start(words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_installed_script_runs() -> None:
    script = Path(sys.executable).with_name("normsurgery")
    done = subprocess.run([script, "--help"], check=True, capture_output=True, text=True)
    assert set(re.findall(r"^  (\w+)  ", done.stdout, re.MULTILINE)) == {
        "find", "swap", "fold", "export", "verify", "blame", "norms", "explain",
    }  # fmt: skip


def test_find_lists_every_norm(model_file: Path) -> None:
    done = run("find", model_file, *INPUT)
    assert done.exit_code == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1:3] for line in lines if line and line[0].isdigit()] == [
        ["1", "batchnorm"],
        ["3", "groupnorm"],
    ]


@pytest.mark.parametrize("verb", ["find", "swap", "fold", "verify"])
def test_json_is_all_that_is_on_stdout(model_file: Path, verb: str) -> None:
    """A note on stdout makes the JSON unreadable."""
    torch.save(two_norms(), model_file.with_name("same.pt"))
    words: dict[str, list[object]] = {
        "find": [],
        "swap": ["--to", "layernorm2d"],
        "fold": [],
        "verify": [model_file.with_name("same.pt")],
    }
    done = run(verb, model_file, *words[verb], "--json")
    assert done.exit_code == 0
    assert isinstance(json.loads(done.stdout), dict)
    assert "inputs inferred: --input" in done.stderr


def test_inferred_inputs_are_said_as_the_option_that_repeats_them(model_file: Path) -> None:
    inferred = run("find", model_file)
    options = re.findall(r"--input '([^']+)'", inferred.stderr)
    repeated = [word for option in options for word in ("--input", option)]
    assert run("find", model_file, *repeated).stdout == inferred.stdout


def test_a_pipe_gets_no_escape_codes_and_whole_lines(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table wrapped at 80 columns, or coloured, is no table to grep and awk."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = run("norms").stdout + run("swap", model_file, "--to", "groupnorm", *INPUT).stdout
    assert "\x1b" not in output
    assert not set("│┃─━╭╰") & set(output)
    rows = [line for line in run("norms").stdout.splitlines() if line.startswith("groupnorm")]
    assert len(rows) == 1
    assert rows[0].endswith("over groups of channels and space of each sample")


def test_a_reader_that_stops_early_is_no_error() -> None:
    """`normsurgery norms | head -1` must neither complain nor exit as if a promise was broken."""
    words = [sys.executable, "-m", "normsurgery.cli.main", "norms"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == -signal.SIGPIPE
    assert done.stderr == b""


def test_a_terminal_gets_a_table_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain columns of a pipe would run past the edge of a window."""
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "60", "TERM": "xterm"}
    words = [sys.executable, "-m", "normsurgery.cli.main", "norms"]
    with subprocess.Popen(words, stdout=theirs, env=environment) as process:
        os.close(theirs)
        output = b""
        while chunk := _read(ours):
            output += chunk
    os.close(ours)
    assert process.returncode == 0
    plain = re.sub(r"\x1b\[[\d;]*m", "", output.decode())
    assert "groupnorm" in plain
    assert max(len(line) for line in plain.splitlines()) <= 60


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # the other end is closed
        return b""


def test_swap_writes_beside_the_input_and_says_first_that_outputs_change(model_file: Path) -> None:
    done = run("swap", model_file, "--to", "groupnorm", "--kind", "bn", *INPUT)
    assert done.exit_code == 0
    lines = done.stdout.strip().splitlines()
    assert lines[0] == "outputs change; train or calibrate"
    out = model_file.with_name("model.groupnorm.pt")
    assert {path.name for path in model_file.parent.iterdir()} == {
        "model.pt", "model.groupnorm.pt", "model.groupnorm.pt.report.json",
    }  # fmt: skip
    swapped = torch.load(out, weights_only=False)
    assert type(swapped[1]) is nn.GroupNorm
    assert torch.equal(swapped[1].weight, two_norms()[1].weight)
    assert str(out) in lines[-1]


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_the_last_line_after_a_swap_runs_as_it_stands(model_file: Path, suffix: str) -> None:
    """Its last line is the next command to type: typed, it opens the new model for training."""
    file = model_file.with_suffix(suffix)
    if suffix == ".pt2":
        exported = torch.export.export(two_norms().eval(), (torch.ones(2, 3, 8, 8),))
        torch.export.save(exported, file)
    done = run("swap", file, "--to", "groupnorm", "--kind", "bn", *INPUT)
    line = done.stdout.strip().splitlines()[-1]
    assert line.startswith("python -i -c ")
    typed = line.replace("python -i", sys.executable, 1).removesuffix("'")
    asked = "import normsurgery, torch; x = torch.ones(2, 3, 8, 8)"
    shown = "print(normsurgery.find(model, (x,)).counts())"
    program = f"{typed}; {asked}; {shown}'"
    output = subprocess.run(program, shell=True, check=True, capture_output=True, text=True).stdout
    assert output.strip() == "{'groupnorm': 2}"


def test_the_options_reach_the_swap(model_file: Path) -> None:
    words = ["swap", model_file, "--to", "gn", "--kind", "batchnorm", "--set", "num_groups=4"]
    done = run(*words, "--init", "reset", "--out", model_file.with_name("out.pt"), *INPUT)
    assert done.exit_code == 0
    norm = torch.load(model_file.with_name("out.pt"), weights_only=False)[1]
    assert norm.num_groups == 4
    assert torch.equal(norm.weight, torch.ones(8))


def test_rules_make_a_mixed_swap(model_file: Path) -> None:
    rules = ["--rule", "batchnorm -> layernorm2d", "--rule", "groupnorm -> groupnorm num_groups=8"]
    assert run("swap", model_file, *rules, *INPUT).exit_code == 0
    changed = ns.find(torch.load(model_file.with_name("model.swapped.pt"), weights_only=False))
    assert [site.kind for site in changed.sites] == ["layernorm2d", "groupnorm"]
    assert changed.sites[1].settings["num_groups"] == 8


def test_what_was_not_selected_is_counted_and_other_reasons_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Twenty rows that say what was asked for bury the one that does not."""
    skips = [Skip(f"layers.{index}", "not selected", kind="batchnorm") for index in range(20)]
    skips.insert(7, Skip("head", "its owner cannot be rewritten", kind="rmsnorm"))
    render.plan(Plan("Net", (), tuple(skips)), as_json=False)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "left alone  kind     why",
        "head        rmsnorm  its owner cannot be rewritten",
        "20 left alone: not selected",
    ]


def test_a_swap_tells_which_tensors_vanish_and_which_are_new(model_file: Path) -> None:
    words = ["swap", model_file, *INPUT, "--out", model_file.with_name("out.pt"), "--force"]
    merged = run(*words, "--to", "affine", "--kind", "bn").stdout.splitlines()
    told = "5 tensors dropped (1.bias, 1.num_batches_tracked, 1.running_mean, ...); "
    assert told + "2 tensors computed from old ones" in merged
    moved = run(*words, "--to", "bn", "--kind", "gn").stdout
    assert "3 tensors created" in moved.splitlines()
    assert "nothing was promised to stay the same; measured:" in moved.splitlines()
    assert " tensors " not in run(*words, "--to", "gn", "--kind", "gn").stdout


def test_a_dry_run_writes_the_plan_alone_and_the_plan_can_be_carried_out(model_file: Path) -> None:
    plan = model_file.with_name("plan.json")
    words = ["swap", model_file, "--to", "groupnorm", "--only", "1", *INPUT]
    done = run(*words, "--dry-run", "--save-plan", plan)
    assert done.exit_code == 0
    assert {path.name for path in model_file.parent.iterdir()} == {"model.pt", "plan.json"}
    direct = run(*words, "--json", "--out", model_file.with_name("direct.pt"))
    planned = run("swap", model_file, "--plan", plan, *INPUT, "--json")
    steps = [json.loads(result.stdout)["plan"]["steps"] for result in (direct, planned)]
    assert steps[0] == steps[1] == json.loads(plan.read_text(encoding="utf-8"))["steps"]


def test_a_plan_and_a_target_together_are_refused(model_file: Path) -> None:
    """Which of the two counts would be a guess."""
    plan = model_file.with_name("plan.json")
    run("swap", model_file, "--to", "groupnorm", *INPUT, "--dry-run", "--save-plan", plan)
    for extra in ([], ["--dry-run"]):
        done = run("swap", model_file, "--plan", plan, "--to", "layernorm2d", *INPUT, *extra)
        assert done.exit_code == 2
        assert "a plan is complete" in done.stderr


def test_what_is_there_is_replaced_only_by_force(model_file: Path) -> None:
    out = model_file.with_name("model.groupnorm.pt")
    out.write_text("mine", encoding="utf-8")
    words = ["swap", model_file, "--to", "groupnorm", *INPUT]
    refused = run(*words)
    assert refused.exit_code == 2
    assert f"{out} exists already" in refused.stderr
    assert out.read_text(encoding="utf-8") == "mine"
    assert run(*words, "--force").exit_code == 0
    assert isinstance(torch.load(out, weights_only=False), nn.Module)


IN_VAIN = {
    "no folder to write into": (
        ["--to", "gn", "-o", "NOWHERE/out.pt"],
        "NOWHERE: there is no such",
    ),
    "no folder for the plan": (
        ["--to", "gn", "--save-plan", "NOWHERE/p.json"],
        "NOWHERE: there is",
    ),
    "a wrong option": (
        ["--to", "gn", "--set", "groups=2"],
        "no option 'groups'. Valid: num_groups",
    ),
    "a wrong option of a rule": (["--rule", "bn -> gn groups=2"], "no option 'groups'"),
    "no target": (["--kind", "bn"], "give a target norm, rules, or a plan"),
    "two targets": (["--to", "gn", "--rule", "bn -> ln2d"], "not both"),
    "no such kind": (["--to", "gn", "--kind", "batchnrom"], "Did you mean 'batchnorm'?"),
    "no such promise": (["--to", "gn", "--require", "exact"], "exact"),
    "no such plan": (["--plan", "NOWHERE/plan.json"], "plan.json"),
}


@pytest.mark.parametrize("case", IN_VAIN)
def test_wrong_words_are_told_before_the_work_and_before_what_is_there(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Minutes of work for nothing; or --force given to what would have been refused anyway."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("inputs were inferred or norms swapped before the words were read")

    monkeypatch.setattr(ns, "swap", work)
    monkeypatch.setattr("normsurgery.inputs.infer", work)
    model_file.with_name("model.groupnorm.pt").touch()
    words, said = IN_VAIN[case]
    nowhere = str(model_file.with_name("nowhere"))
    done = run("swap", model_file, *(word.replace("NOWHERE", nowhere) for word in words))
    assert done.exit_code == 2
    assert done.stderr.count("error: ") == 1
    assert said.replace("NOWHERE", nowhere) in done.stderr


def test_without_a_target_no_model_is_loaded() -> None:
    done = run("swap", "nowhere.pt")
    assert done.exit_code == 2
    assert "give a target norm, rules, or a plan" in done.stderr


def test_a_report_that_is_there_is_not_replaced_either(model_file: Path) -> None:
    report = model_file.with_name("model.groupnorm.pt.report.json")
    report.write_text("mine", encoding="utf-8")
    done = run("swap", model_file, "--to", "groupnorm")
    assert done.exit_code == 2
    assert f"{report} exists already" in done.stderr
    assert "inputs inferred" not in done.stderr


@pytest.fixture(scope="module")
def swapped_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    small = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**small, **heads)).save_pretrained(folder)
    assert run("swap", folder, "--to", "layernorm", "--input", "int64[1,4]<32").exit_code == 0
    return folder.with_name("llama.layernorm")


def test_a_swapped_directory_loads_without_a_word_about_its_files(swapped_directory: Path) -> None:
    done = run("find", swapped_directory, "--input", "int64[1,4]<32")
    assert done.stdout.splitlines()[0] == "LlamaForCausalLM: 3 layernorm"
    dry = run("swap", swapped_directory, "--to", "rms", "--input", "int64[1,4]<32", "--dry-run")
    assert dry.exit_code == 0
    assert done.stderr + dry.stderr == ""


def test_weights_of_another_swap_are_told_as_that(swapped_directory: Path, tmp_path: Path) -> None:
    """A directory has no factory and no arguments to give."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(swapped_directory, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["normsurgery.model.norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    done = run("swap", broken, "--to", "rms", "--input", "int64[1,4]<32", "--dry-run")
    assert done.exit_code == 3
    assert "1 missing (model.norm.weight)" in done.stderr
    assert "swap again" in done.stderr
    assert "factory" not in done.stderr
    assert "state_dict" not in done.stderr


@pytest.mark.parametrize("form", ["program", "directory"])
def test_only_what_is_ours_is_on_stderr(
    tmp_path: Path, form: str, request: pytest.FixtureRequest
) -> None:
    """torch warns its own developers about an exported program, transformers draws a bar."""
    if form == "program":
        file, words = tmp_path / "model.pt2", ["--to", "groupnorm", *INPUT]
        exported = torch.export.export(two_norms().eval(), (torch.ones(2, 3, 8, 8),))
        torch.export.save(exported, file)
    else:
        file = request.getfixturevalue("swapped_directory").with_name("llama")
        words = ["--to", "layernorm", "--input", "int64[1,4]<32"]
    script = Path(sys.executable).with_name("normsurgery")
    out = tmp_path / f"out{file.suffix}"
    typed = [script, "swap", file, *words, "--out", out]
    done = subprocess.run(typed, check=True, capture_output=True, text=True)
    ours = re.compile(r"(loading|finding|swapping) .* \.\.\. \(\d+ s\)|transformers alone .*")
    assert [line for line in done.stderr.splitlines() if not ours.fullmatch(line)] == []


def test_a_factory_with_arguments_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def make(width=2):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))\n",
        encoding="utf-8",
    )
    torch.save(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)).state_dict(), "weights.pt")
    words = ["find", "my_models:make", "--arg", "width=6", "--weights", "weights.pt", *INPUT]
    done = run(*words, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["sites"][0]["settings"]["features"] == 6


def test_a_trusted_package_may_lie_in_the_current_folder(tmp_path: Path) -> None:
    """The command does not run from where `python` would look, so a user's own module is told to
    be missing. Without the word of trust a file that lies there is not imported."""
    (tmp_path / "own_layers.py").write_text(
        "from torch import nn\nprint('imported')\nclass Net(nn.Sequential): pass\n",
        encoding="utf-8",
    )
    save = "import torch, own_layers as own; "
    save += "torch.save(own.Net(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)), 'model.pt')"
    subprocess.run([sys.executable, "-c", save], cwd=tmp_path, check=True, capture_output=True)
    script = Path(sys.executable).with_name("normsurgery")
    swap = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    words = [script, "swap", "model.pt", "--to", "gn", "--set", "num_groups=2", *INPUT]
    refused = swap(words)
    assert refused.returncode == 3
    assert "imported" not in refused.stdout
    assert "--trust own_layers" in refused.stderr
    done = swap([*words, "--trust", "own_layers"])
    assert done.returncode == 0, done.stderr
    typed = done.stdout.splitlines()[-1].replace("python -i", sys.executable, 1)
    again = subprocess.run(
        f"{typed.removesuffix(chr(39))}; print(model[1])'",
        shell=True, check=True, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert "GroupNorm(2, 4" in again.stdout


def test_verify_tells_the_same_from_another(model_file: Path) -> None:
    same, other = model_file.with_name("same.pt"), model_file.with_name("other.pt")
    torch.save(two_norms(), same)
    moved = two_norms()
    with torch.no_grad():
        moved[1].weight[3] *= 1.01
    torch.save(moved, other)
    assert run("verify", model_file, same, *INPUT).exit_code == 0
    done = run("verify", model_file, other, *INPUT)
    assert done.exit_code == 1
    assert done.stdout.startswith("FAILED")


def test_why_a_comparison_failed_is_said_where_no_table_shows_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A FAILED above a table in which everything passed leaves its reader to guess."""
    left_out = LeftOut("not applicable", "example", "cpu", "eval", "the original raises")
    render.evidence(Evidence(seed=0, required=("cuda",), left_out=(left_out,)), as_json=False)
    assert capsys.readouterr().out.splitlines()[:4] == [
        "FAILED: 0 passed",
        "failed: runner cuda was required and did not run",
        "failed: nothing was compared on cpu in eval mode: the original raises",
        "failed: nothing was compared",
    ]


def gradient(index: int, factor: float, case: str = "example", **told: Any) -> Comparison:
    verdict = Verdict(**{"passed": True, "reason": "", "factor": factor, **told})
    return Comparison(case, "cpu", "eval", "backward", f"gradient of {index}", verdict)


def rows(capsys: pytest.CaptureFixture[str], *comparisons: Comparison) -> list[str]:
    render.evidence(Evidence(seed=0, comparisons=comparisons), as_json=False)
    table = [line for line in capsys.readouterr().out.splitlines() if " eval " in line]
    return [re.split(r"  +", line)[0] for line in table]


def test_many_passed_comparisons_share_a_row_and_the_others_keep_theirs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Among a hundred rows that say the same nobody sees the one that does not."""
    same = [gradient(index, 0.0, same_bits=True) for index in range(20)]
    near = [gradient(index, 0.5 if index == 33 else 0.1) for index in range(30, 40)]
    failed = [gradient(index, 2.0, passed=False) for index in (50, 51)]
    unknown = [gradient(index, 2.0, passed=None) for index in (60, 61)]
    once_other = gradient(0, 0.0, "zeros")
    alone = ["gradient of 50", "gradient of 51", "gradient of 60", "gradient of 61"]
    assert rows(capsys, *same, *near, *failed, *unknown) == [
        "20 gradients: bit for bit", "10 gradients: at worst gradient of 33", *alone,
    ]  # fmt: skip
    assert rows(capsys, *same, *near, once_other) == [
        "11 gradients: at worst gradient of 33", "19 gradients: bit for bit",
    ]  # fmt: skip
    assert rows(capsys, *same[:12], *failed)[:2] == ["gradient of 0", "gradient of 1"]


def test_what_the_table_shows_is_not_said_twice(model_file: Path) -> None:
    other = two_norms()
    with torch.no_grad():
        other[0].bias += 1.0
    torch.save(other, model_file.with_name("other.pt"))
    done = run("verify", model_file, model_file.with_name("other.pt"), *INPUT)
    assert done.stdout.startswith("FAILED")
    assert "failed: " not in done.stdout


@pytest.mark.parametrize("verb", [ns.find, partial(ns.swap, to="groupnorm")])
@pytest.mark.parametrize("model", ["model.pt", {"weight": torch.ones(2)}, nn.LayerNorm])
def test_what_is_no_model_is_refused_in_one_sentence(verb: Callable[..., Any], model: Any) -> None:
    with pytest.raises(UsageError, match=f"the model is a {type(model).__name__}"):
        verb(model)


def test_verify_refuses_a_file_against_itself(model_file: Path) -> None:
    done = run("verify", model_file, model_file.parent / "." / "model.pt", *INPUT)
    assert done.exit_code == 2
    assert "proves nothing" in done.stderr


def test_a_promise_that_is_required_and_not_given_exits_1(model_file: Path) -> None:
    done = run("swap", model_file, "--to", "groupnorm", "--require", "eval", *INPUT)
    assert done.exit_code == 1
    assert not model_file.with_name("model.groupnorm.pt").exists()


def test_a_broken_promise_writes_nothing(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does not do what was promised must not lie there as if it did."""
    verifying = import_module("normsurgery.verify")
    monkeypatch.setattr(verifying, "measure", lambda *_, **__: Evidence(seed=0))
    words = ["swap", model_file, "--to", "groupnorm", "--kind", "bn", *INPUT]
    done = run(*words)
    assert done.exit_code == 1
    assert "nothing was written" in done.stderr
    assert [path.name for path in model_file.parent.iterdir()] == ["model.pt"]
    assert run(*words, "--force").exit_code == 1
    assert model_file.with_name("model.groupnorm.pt").exists()


WRONG = {
    "no such verb": (["melt"], 2, "No such command"),
    "no such option": (["find", "MODEL", "--colour"], 2, "No such option"),
    "no such norm": (["swap", "MODEL", "--to", "grupnorm"], 2, "Did you mean 'groupnorm'?"),
    "no such norm to explain": (["explain", "layer_nrom"], 2, "Did you mean 'layernorm'?"),
    "no target": (["swap", "MODEL"], 2, "give a target norm, rules, or a plan"),
    "no such setting": (["swap", "MODEL", "--to", "gn", "--set", "groups=2"], 2, "num_groups"),
    "no site selected": (
        ["swap", "MODEL", "--to", "groupnorm", "--kind", "rmsnorm"],
        2,
        "Kinds present: batchnorm (1), groupnorm (1)",
    ),
    "no such path": (["swap", "MODEL", "--to", "gn", "--only", "layer9.*"], 2, "no site matches"),
    "no such file": (["find", "nowhere.pt"], 3, "nowhere.pt"),
    "not a model": (["find", "FOREIGN"], 3, "foreign.pt"),
    "a directory as output": (["fold", "MODEL", "-o", "."], 2, "model.pt"),
    "the name of another kind": (
        ["swap", "MODEL", "--to", "gn", "-o", "swapped.onnx"],
        2,
        "what is written is a pickled model, no .onnx file",
    ),
    "a name without a suffix": (["fold", "MODEL", "-o", "folded"], 2, "without a suffix"),
    "a name that is not ONNX's": (["export", "MODEL", "-o", "model.pth"], 2, "end in .onnx"),
    "inputs it does not take": (["find", "MODEL", "--input", "2x5x8x8"], 3, "Give inputs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_sentence_and_its_exit_code(model_file: Path, case: str) -> None:
    words, code, said = WRONG[case]
    foreign = model_file.with_name("foreign.pt")
    foreign.write_bytes(b"these bytes are no model")
    names = {"MODEL": str(model_file), "FOREIGN": str(foreign)}
    done = run(*(names.get(word, word) for word in words))
    assert done.exit_code == code
    assert said in done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""


def test_an_unexpected_error_is_one_sentence_and_a_traceback_only_with_debug(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(ns, "find", broken)
    done = run("find", model_file, *INPUT)
    assert done.exit_code == 3
    assert done.stderr.splitlines()[-1].startswith("error: ZeroDivisionError: planted")
    assert "--debug" in done.stderr
    debugged = run("find", model_file, *INPUT, "--debug")
    assert isinstance(debugged.exception, ZeroDivisionError)


def test_norms_lists_the_registry_and_broken_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normsurgery.spec.broken_plugins", lambda: {"bad": "ImportError: gone"})
    listed = json.loads(run("norms", "--json").stdout)
    assert [entry["name"] for entry in listed["norms"]] == list(ns.names())
    assert listed["broken_plugins"] == {"bad": "ImportError: gone"}
    assert "ImportError: gone" in run("norms").stdout


@pytest.mark.parametrize("name", ns.names())
def test_explain_shows_the_documentation_of_every_norm(name: str) -> None:
    """A heading that a norm's file lacks is a question `explain` leaves open."""
    documentation = catalog.documentation(name)
    headings = ["What it computes", "Use it when", "From other norms", "Inference", "ONNX"]
    for heading in [*headings, "Example", "Reference"]:
        assert re.search(f"^{heading}$", documentation, re.MULTILINE), heading
    assert run("explain", name.upper()).stdout.strip() == documentation.strip()


def test_what_takes_long_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from time import sleep

    monkeypatch.setattr("normsurgery.cli.session.PATIENCE", 0.05)
    with progress("counting"):
        sleep(0.2)
    assert capsys.readouterr().err.startswith("counting ... (")
    with progress("a moment"):
        pass
    assert capsys.readouterr().err == ""
