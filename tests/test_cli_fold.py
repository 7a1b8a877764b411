"""`normsurgery fold`: what it writes, what it prints, and what it says where it cannot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import normsurgery as ns
from normsurgery.cli import main, render_fold
from normsurgery.folding.checks import Check
from normsurgery.plans import Plan
from normsurgery.survey import Skip
from normsurgery.verifying import Evidence

INPUT = ("--input", "2x3x16x16")
QUICK = ("--no-verify", "--no-time")
TOKENS = ("--input", "int64[2,5]<32")


def run(*words: object) -> Result:
    return CliRunner().invoke(main.app, [str(word) for word in words])


def far_from_neutral(model: nn.Module) -> nn.Module:
    """All tensors random; what may be a weight or a variance of a norm positive and not near 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(drawn + 1.5 if tensor.ndim == 1 else drawn - 0.5)
    return model


def mixed() -> nn.Module:
    """One norm that is folded, one that becomes an affine, one whose affine is, and one left."""
    layers = {
        "stem": nn.Conv2d(3, 8, 3),
        "norm": nn.BatchNorm2d(8),
        "act": nn.ReLU(),
        "scale": nn.BatchNorm2d(8),
        "again": nn.ReLU(),
        "mix": nn.Conv2d(8, 8, 3),
        "group": nn.GroupNorm(2, 8),
        "out": nn.Conv2d(8, 4, 1),
        "gate": nn.Sigmoid(),
        "last": nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    }
    return far_from_neutral(nn.Sequential(OrderedDict(layers)))


def padded() -> nn.Module:
    return far_from_neutral(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    far_from_neutral(model)
    model[3].weight = model[0].weight
    return model


def nothing_to_fold() -> nn.Module:
    return far_from_neutral(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.InstanceNorm2d(4)))


@pytest.fixture
def file(tmp_path: Path) -> Callable[[nn.Module], Path]:
    def saved(model: nn.Module) -> Path:
        torch.save(model, tmp_path / "model.pt")
        return tmp_path / "model.pt"

    return saved


def loaded(path: Path) -> nn.Module:
    model = torch.load(path, weights_only=False)
    assert isinstance(model, nn.Module)
    return model


def same(original: nn.Module, changed: nn.Module, *inputs: Tensor) -> bool:
    return ns.verify(original.eval(), changed, inputs=inputs).passed


def rows(output: str, header: str) -> list[list[str]]:
    """The cells of the table whose header begins so."""
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(header))
    body = lines[start + 1 :]
    table = body[: body.index("")] if "" in body else body
    return [re.split(r"  +", line) for line in table if line[:1].isdigit()]


def test_a_fold_is_written_beside_the_input_with_its_report(
    file: Callable[[nn.Module], Path],
) -> None:
    path = file(mixed())
    done = run("fold", path, *INPUT)
    assert done.exit_code == 0, done.output
    out = path.with_name("model.folded.pt")
    assert {other.name for other in path.parent.iterdir()} == {
        "model.pt", "model.folded.pt", "model.folded.pt.report.json",
    }  # fmt: skip
    folded = loaded(out)
    assert [type(folded[place]) for place in (1, 9)] == [nn.Identity, nn.BatchNorm2d]
    assert same(mixed(), folded, torch.randn(2, 3, 16, 16))
    report = ns.Report.load(f"{out}.report.json")
    assert report.passed
    assert len(report.plan.steps) == 3
    assert loaded(path)[1].training, "the input file holds the model as it was"


def test_counts_come_first_then_where_each_norm_went_or_why_it_stayed(
    file: Callable[[nn.Module], Path],
) -> None:
    output = run("fold", file(mixed()), *INPUT).stdout
    assert output.splitlines()[0] == (
        "Sequential: 1 folded, 1 affine folded, 1 reduced to an affine, 1 left alone"
    )
    folded = rows(output, "n  where")
    assert [row[:3] for row in folded] == [
        ["1", "norm", "batchnorm"], ["1", "group", "groupnorm"], ["1", "scale", "batchnorm"],
    ]  # fmt: skip
    assert [row[3] for row in folded] == ["folded", "affine folded", "reduced to an affine"]
    assert [row[4:] for row in folded[:2]] == [
        ["into producer", "stem"],
        ["into consumers", "out"],
    ]
    assert folded[2][-1].startswith(Check.NON_LINEAR.value)
    left = rows(output, "n  left alone")
    assert [row[:3] for row in left] == [["1", "last", "batchnorm"]]
    assert left[0][3].startswith(Check.NO_STATISTICS.value)
    assert re.search(r"^passed: promised eval; ", output, re.MULTILINE)


def test_what_was_switched_to_eval_is_listed(file: Callable[[nn.Module], Path]) -> None:
    """A norm in train mode computes with the batch: the file that comes out no longer does."""
    path = file(mixed())
    done = run("fold", path, *INPUT, *QUICK)
    assert "note: switched to eval mode: the model, stem, norm, act, scale and " in done.stdout
    assert not any(module.training for module in loaded(_out(path)).modules())
    quiet = run("fold", file(mixed().eval()), *INPUT, *QUICK, "--force")
    assert "note: switched" not in quiet.stdout


def _out(path: Path) -> Path:
    return path.with_name("model.folded.pt")


def test_norms_before_and_after_and_the_latency_are_told(
    file: Callable[[nn.Module], Path],
) -> None:
    path = file(mixed())
    output = run("fold", path, *INPUT).stdout
    before = "3 batchnorm + 1 groupnorm"
    assert f"norms per forward: {before} -> 1 affine + 1 groupnorm + 1 batchnorm; " in output
    assert re.search(r"^latency: .* ms -> .* ms, ratio \d.* against itself: \d", output, re.M)
    speed = json.loads(path.with_name("model.folded.pt.report.json").read_text())["speed"]
    assert speed["latency"]["rounds"] >= 3
    untimed = run("fold", path, *INPUT, "--no-time", "--force")
    assert "latency" not in untimed.stdout
    assert (
        json.loads(run("fold", path, *INPUT, *QUICK, "--force", "--json").stdout)["speed"] is None
    )


def test_json_is_the_report_and_what_was_written(file: Callable[[nn.Module], Path]) -> None:
    path = file(mixed())
    done = run("fold", path, *INPUT, "--json")
    told = json.loads(done.stdout)
    assert told["written"] == [str(_out(path)), f"{_out(path)}.report.json"]
    assert ns.Report.from_json(told).to_json() == ns.Report.load(told["written"][1]).to_json()


def test_a_pipe_gets_whole_lines_without_escape_codes(
    file: Callable[[nn.Module], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = run("fold", file(mixed()), *INPUT).stdout
    assert "\x1b" not in output
    assert not set("│┃─━╭╰") & set(output)
    assert rows(output, "n  where")[0][-1] == "stem"


def test_selection_reaches_the_fold(file: Callable[[nn.Module], Path]) -> None:
    path = file(mixed())
    words = ["fold", path, *INPUT, *QUICK, "--dry-run", "--json"]

    def folded(*more: str) -> list[str]:
        plan = Plan.from_json(json.loads(run(*words, *more).stdout))
        return [step.site.label for step in plan.steps]

    assert folded("--kind", "gn") == ["group"]
    assert sorted(folded("--only", "norm", "--only", "gr*")) == ["group", "norm"]
    assert sorted(folded("--exclude", "scale")) == ["group", "norm"]
    told = run("fold", path, *INPUT, "--kind", "gn", "--dry-run").stdout
    assert "3 left alone: not selected" in told.splitlines()


def test_a_dry_run_writes_the_plan_alone_and_the_plan_can_be_carried_out(
    file: Callable[[nn.Module], Path],
) -> None:
    path = file(mixed())
    plan = path.with_name("plan.json")
    done = run("fold", path, "--only", "norm", *INPUT, "--dry-run", "--save-plan", plan)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == "Sequential: 1 folded, 3 left alone"
    assert {other.name for other in path.parent.iterdir()} == {"model.pt", "plan.json"}
    carried_out = run("fold", path, "--plan", plan, *INPUT, "--json")
    direct = run("fold", path, "--only", "norm", *INPUT, "--json", "--force")
    steps = [json.loads(result.stdout)["plan"]["steps"] for result in (carried_out, direct)]
    assert steps[0] == steps[1] == json.loads(plan.read_text(encoding="utf-8"))["steps"]
    assert type(loaded(_out(path))[1]) is nn.Identity


def test_zero_padding_is_refused_or_padded_explicitly(file: Callable[[nn.Module], Path]) -> None:
    path = file(padded())
    refused = run("fold", path, *INPUT, "--dry-run").stdout
    assert Check.ZERO_PADDING.value in refused
    assert "--pad explicit" in refused, "a hint names the option, not the parameter"
    done = run("fold", path, *INPUT, "--pad", "explicit")
    assert done.exit_code == 0, done.output
    assert not any(isinstance(module, nn.BatchNorm2d) for module in loaded(_out(path)).modules())


def test_a_tied_weight_is_copied_when_asked_and_the_bytes_are_told(
    file: Callable[[nn.Module], Path],
) -> None:
    path = file(tied())
    refused = run("fold", path, *INPUT, "--dry-run").stdout
    assert Check.TIED.value in refused
    assert "--untie" in refused
    done = run("fold", path, *INPUT, "--untie")
    assert done.exit_code == 0, done.output
    folded = loaded(_out(path))
    assert folded[0].weight is not folded[3].weight
    assert torch.equal(folded[3].weight, tied()[3].weight)
    assert f"{folded[3].weight.nbytes} bytes" in done.stdout


def test_identities_are_pruned_when_asked(file: Callable[[nn.Module], Path]) -> None:
    path = file(mixed())
    assert run("fold", path, *INPUT, *QUICK).exit_code == 0
    assert len(loaded(_out(path))) == 10
    assert run("fold", path, *INPUT, "--prune", "--force").exit_code == 0
    pruned = loaded(_out(path))
    assert not any(isinstance(module, nn.Identity) for module in pruned.modules())
    assert same(mixed(), pruned, torch.randn(2, 3, 16, 16))


MODELS = '''
import torch
from torch import nn


class Block(nn.Module):
    """A pre-norm transformer without its attention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.last = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(self.last(x))


class Features(nn.Module):
    """Hands out what stands between the convolution and its norm, to who asks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x, features=False):
        x = self.conv(x)
        if features:
            return x
        return self.norm(x)
'''


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "fold_models", raising=False)
    (tmp_path / "fold_models.py").write_text(MODELS, encoding="utf-8")
    return tmp_path


def test_layernorms_become_rmsnorms_when_asked(models: Path) -> None:
    kept = run("fold", "fold_models:Block", *TOKENS, "--dry-run").stdout
    assert kept.splitlines()[0] == "Block: 2 affine folded"
    done = run("fold", "fold_models:Block", *TOKENS, "--rmsnorm")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == "Block: 2 turned into rmsnorm"
    assert "norms per forward: 2 layernorm -> 2 rmsnorm" in done.stdout
    out = models / "Block.folded.safetensors"
    found = run("find", "fold_models:Block", "--weights", out, *TOKENS, "--json")
    assert json.loads(found.stdout)["counts"] == {"rmsnorm": 2}, "it is made again with its weights"


def test_another_value_of_a_flag_is_measured_and_may_refuse(models: Path) -> None:
    said = run("fold", "fold_models:Features", *INPUT, "--dry-run").stdout
    assert Check.OUTPUT_USED.value in said
    assert "in the call with features=True" in said


def test_nothing_to_fold_is_no_error_and_writes_nothing_but_what_is_named(
    file: Callable[[nn.Module], Path],
) -> None:
    """A script that goes on with the file it named must find it there."""
    path = file(nothing_to_fold())
    done = run("fold", path, *INPUT)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == "Sequential: 1 left alone"
    assert [row[1:3] for row in rows(done.stdout, "n  left alone")] == [["2", "instancenorm"]]
    assert "nothing was folded, so nothing was written" in done.stderr
    assert [other.name for other in path.parent.iterdir()] == ["model.pt"]
    named = run("fold", path, *INPUT, "-o", path.with_name("out.pt"))
    assert named.exit_code == 0
    assert isinstance(loaded(path.with_name("out.pt"))[2], nn.InstanceNorm2d)
    assert json.loads(run("fold", path, *INPUT, "--json").stdout)["written"] == []


def test_a_model_without_norms_says_so(file: Callable[[nn.Module], Path]) -> None:
    done = run("fold", file(nn.Sequential(nn.Conv2d(3, 4, 1))), *INPUT)
    assert (done.exit_code, done.stdout.splitlines()[0]) == (0, "Sequential: no norms")


def test_folding_again_finds_nothing_to_do(file: Callable[[nn.Module], Path]) -> None:
    path = file(far_from_neutral(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))))
    assert run("fold", path, *INPUT, *QUICK).exit_code == 0
    again = run("fold", _out(path), *INPUT)
    assert (again.exit_code, again.stdout.strip()) == (0, "Sequential: no norms")


def test_a_broken_promise_writes_nothing(
    file: Callable[[nn.Module], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(mixed())
    monkeypatch.setattr(
        import_module("normsurgery.verifying"), "measure", lambda *_, **__: Evidence(seed=0)
    )
    done = run("fold", path, *INPUT, "--no-time")
    assert done.exit_code == 1
    assert "FAILED" in done.stdout
    assert "nothing was written" in done.stderr
    assert [other.name for other in path.parent.iterdir()] == ["model.pt"]
    assert run("fold", path, *INPUT, "--no-time", "--force").exit_code == 1
    assert _out(path).exists()


def test_without_verify_it_is_said_that_nothing_was_measured(
    file: Callable[[nn.Module], Path],
) -> None:
    done = run("fold", file(mixed()), *INPUT, *QUICK)
    assert done.exit_code == 0
    assert "nothing was measured" in done.stdout.splitlines()


WRONG = {
    "no such kind": (["--kind", "batchnrom"], 2, "Did you mean 'batchnorm'?"),
    "no such path": (["--only", "layer9.*", *INPUT], 2, "no site matches 'layer9.*'"),
    "no such pad": (["--pad", "zero"], 2, "'zero' is not one of"),
    "no such plan": (["--plan", "NOWHERE/plan.json"], 2, "cannot read a plan"),
    "a plan and a selection": (["--plan", "PLAN", "--kind", "bn"], 2, "a plan is complete"),
    "a plan of swaps": (["--plan", "SWAPS"], 2, "normsurgery swap --plan"),
    "no folder to write into": (["-o", "NOWHERE/out.pt"], 2, "there is no such directory"),
    "no folder for the plan": (["--save-plan", "NOWHERE/p.json"], 2, "there is no such directory"),
    "drop from a file": (["--drop"], 2, "--drop is for a checkpoint directory"),
    "an input it does not take": (["--input", "2x5x8x8"], 3, "does not run in eval mode"),
    "an argument for a file": (["--arg", "width=2"], 2, "belong to a factory"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_sentence_and_its_exit_code(
    file: Callable[[nn.Module], Path], case: str
) -> None:
    path = file(mixed())
    plan, swaps = path.with_name("plan.json"), path.with_name("swaps.json")
    if "PLAN" in WRONG[case][0]:
        Plan("Sequential", ()).save(plan)
    if "SWAPS" in WRONG[case][0]:
        run("swap", path, "--to", "layernorm2d", *INPUT, "--dry-run", "--save-plan", swaps)
    places = {"NOWHERE": str(path.with_name("nowhere")), "PLAN": str(plan), "SWAPS": str(swaps)}
    words, code, said = WRONG[case]
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    before = {other.name for other in path.parent.iterdir()}
    done = run("fold", path, *words)
    assert done.exit_code == code, done.output
    assert len(re.findall("^(error|Error): ", done.stderr, re.MULTILINE)) == 1
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.output
    assert done.stdout == ""
    assert {other.name for other in path.parent.iterdir()} == before


def test_what_is_there_is_replaced_only_by_force(file: Callable[[nn.Module], Path]) -> None:
    path = file(mixed())
    _out(path).write_text("mine", encoding="utf-8")
    refused = run("fold", path, *INPUT)
    assert refused.exit_code == 2
    assert f"{_out(path)} exists already" in refused.stderr
    assert _out(path).read_text(encoding="utf-8") == "mine"
    assert run("fold", path, *INPUT, *QUICK, "--force").exit_code == 0
    assert isinstance(loaded(_out(path)), nn.Module)


def test_an_exported_program_becomes_one_and_an_onnx_file_is_sent_back(tmp_path: Path) -> None:
    program, network = tmp_path / "model.pt2", tmp_path / "model.onnx"
    x = torch.ones(2, 3, 16, 16)
    torch.export.save(torch.export.export(mixed().eval(), (x,)), program)
    done = run("fold", program, *INPUT)
    assert done.exit_code == 0, done.output
    folded = torch.export.load(tmp_path / "model.folded.pt2")
    assert ns.verify(mixed().eval(), folded, inputs=(x,)).passed
    assert ns.find(folded, (x,)).counts()["batchnorm"] == 1
    network.write_bytes(b"")
    refused = run("fold", network)
    assert (refused.exit_code, refused.stdout) == (3, "")
    assert "package.module:factory" in refused.stderr


def test_a_dict_around_the_model_stays_around_it(tmp_path: Path) -> None:
    torch.save({"model": mixed(), "epoch": 3}, tmp_path / "run.ckpt")
    assert run("fold", tmp_path / "run.ckpt", *INPUT, *QUICK).exit_code == 0
    written = torch.load(tmp_path / "run.folded.ckpt", weights_only=False)
    assert (written["epoch"], type(written["model"][1])) == (3, nn.Identity)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    small = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**small, **heads, tie_word_embeddings=False))
    far_from_neutral(model).save_pretrained(folder)
    return folder


def test_a_checkpoint_directory_becomes_one_that_stock_code_loads(
    checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    done = run("fold", checkpoint, *TOKENS, "-o", out)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == "LlamaForCausalLM: 5 folded to neutral"
    assert [row[:2] for row in rows(done.stdout, "n  where")] == [
        ["2", "model.layers.*.input_layernorm"],
        ["2", "model.layers.*.post_attention_layernorm"],
        ["1", "model.norm"],
    ]
    assert "{q_proj,k_proj,v_proj}" in done.stdout
    assert ns.Report.load(tmp_path / "out.report.json").passed
    old, new = (AutoModelForCausalLM.from_pretrained(path) for path in (checkpoint, out))
    assert same(old, new, torch.randint(0, 32, (2, 5)))
    assert bool((new.model.norm.weight == 1).all())


def test_a_directory_is_written_beside_it_and_what_it_has_no_use_for_is_refused(
    checkpoint: Path,
) -> None:
    from safetensors.torch import load_file

    assert run("fold", f"{checkpoint}/", *TOKENS, "--no-verify", "--drop").exit_code == 0
    out = checkpoint.with_name("llama.folded")
    assert not [name for name in load_file(out / "model.safetensors") if "norm" in name]
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == [
        "llama", "llama.folded", "llama.folded.report.json",
    ]  # fmt: skip
    taken = run("fold", checkpoint, *TOKENS)
    assert taken.exit_code == 2
    assert f"{out} exists already" in taken.stderr
    refused = run("fold", checkpoint, "--prune", "--pad", "explicit", "--trust", "mine")
    assert refused.exit_code == 2
    assert "leave out --pad explicit and --prune and --trust" in refused.stderr


def test_a_checkpoint_is_planned_without_writing(checkpoint: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    words = ["fold", checkpoint, "-o", out]
    done = run(*words, *TOKENS, "--only", "model.norm", "--dry-run", "--save-plan", plan)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == "LlamaForCausalLM: 1 folded to neutral, 4 left alone"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    carried_out = run(*words, "--plan", plan, *TOKENS, "--json")
    steps = json.loads(carried_out.stdout)["plan"]["steps"]
    assert steps == json.loads(plan.read_text(encoding="utf-8"))["steps"]


def test_inferred_inputs_of_a_directory_are_said(checkpoint: Path, tmp_path: Path) -> None:
    done = run("fold", checkpoint, "-o", tmp_path / "out")
    assert re.search(r"^inputs inferred: --input '[^']*int64\[", done.stderr, re.MULTILINE)


BARS = """
import sys, time
from normsurgery.cli.session import bars
with bars("planning") as advance:
    for part in range(4):
        advance("write", part, 4)
        time.sleep(0.05)
print("done")
"""


def test_a_terminal_gets_bars_and_a_pipe_gets_none() -> None:
    import pty

    words = [sys.executable, "-c", BARS]
    piped = subprocess.run(words, check=True, capture_output=True, text=True)
    assert (piped.stdout, piped.stderr) == ("done\n", "")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    shown = subprocess.run(words, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    assert shown.stdout == b"done\n"
    assert b"write" in os.read(ours, 65536)
    os.close(ours)


def skips(count: int, reason: str, hint: str = "") -> tuple[Skip, ...]:
    return tuple(
        Skip(f"layers.{n}.norm", reason.format(n), hint, "batchnorm") for n in range(count)
    )


def test_sites_of_one_kind_and_one_reason_share_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    """Fifty rows that say the same bury the one that does not."""
    padding = skips(20, "zero padding in between: layers.{}.conv of stage 1")
    other = Skip("head.norm", "a hook: head", "Remove it.", "batchnorm")
    render_fold.plan(Plan("Net", (), (*padding[:7], other, *padding[7:])), as_json=False)
    assert rows(capsys.readouterr().out, "n ") == [
        ["20", "layers.*.norm", "batchnorm", "zero padding in between: layers.*.conv of stage 1"],
        ["1", "head.norm", "batchnorm", "a hook: head", "Remove it."],
    ]


def test_a_further_call_counts_with_all_its_outputs(checkpoint: Path) -> None:
    words = ("fold", checkpoint, *TOKENS, "--dry-run")
    assert run(*words).stdout.splitlines()[0] == "LlamaForCausalLM: 5 folded to neutral"
    asked = run(*words, "--call", "output_hidden_states=true")
    assert asked.stdout.splitlines()[0] == "LlamaForCausalLM: 4 folded to neutral, 1 left alone"
    assert "in the call with output_hidden_states=True" in asked.stdout
    wrong = run(*words, "--call", "output_hidden_states")
    assert wrong.exit_code == 2 and "name=value" in wrong.stderr.lower()


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        ("untie=True copies it.", "--untie copies it."),
        ("Use pad='explicit' to write it out.", "Use --pad explicit to write it out."),
        ("eps=1e-5 is too small.", "eps=1e-5 is too small."),
    ],
)
def test_a_hint_names_the_option_as_it_is_typed(
    capsys: pytest.CaptureFixture[str], hint: str, shown: str
) -> None:
    render_fold.plan(Plan("Net", (), skips(1, "a reason", hint)), as_json=False)
    assert rows(capsys.readouterr().out, "n ")[0][-1] == shown


def test_the_report_shows_itself_in_a_notebook() -> None:
    model, x = mixed().eval(), torch.randn(2, 3, 16, 16)
    _, report = ns.fold(model, inputs=(x,), time=True)
    page = report._repr_html_()
    assert all(text in page for text in ("norms per forward", "batchnorm", "left alone"))
