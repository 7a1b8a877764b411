"""Faults planted in a copy of the package: the unchanged laws must catch every one of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import normsurgery

PACKAGE = Path(normsurgery.__file__).parent

# Imports torch once, then for each copy it is told of forks a child, which imports that copy of
# normsurgery. The compiler is what the first `manual_seed` of a process imports, so it comes first.
RUNNER = """
import contextlib, json, os, pathlib, sys
import torch._dynamo
for job in sys.stdin:
    folder, norm = json.loads(job)
    child = os.fork()
    if child == 0:
        said = open(pathlib.Path(folder, "said.txt"), "w", buffering=1)
        sys.path.insert(0, folder)
        code = 1
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                import normsurgery
                from normsurgery import spec, testing
                assert pathlib.Path(normsurgery.__file__).is_relative_to(folder)
                code = 0
                for check in testing.norm_checks(spec.get(norm)):
                    if not check.name.startswith(("onnx", "compile", "export")):
                        check()
            except AssertionError as error:
                code = 7
                print(check.name, error)
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KILLED = 7


@dataclass(frozen=True)
class Mutant:
    """A fault in the file of one norm, as a replacement of text that occurs once."""

    fault: str
    norm: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant(
        "eps outside the root",
        "rmsnorm",
        "rmsnorm.py",
        "y = wide * (mean_square + self.eps).rsqrt()",
        "y = wide / (mean_square.sqrt() + self.eps)",
    ),
    Mutant(
        "eps inside the root",
        "layernorm",
        "moments.py",
        "deviation = wide.std(over, unbiased=self.unbiased, keepdim=True) + self.eps",
        "deviation = (wide.var(over, unbiased=self.unbiased, keepdim=True) + self.eps).sqrt()",
    ),
    Mutant(
        "the other variance",
        "layernorm2d",
        "moments.py",
        "wide.std(over, unbiased=self.unbiased, keepdim=True)",
        "wide.std(over, unbiased=not self.unbiased, keepdim=True)",
    ),
    Mutant(
        "variance in one pass",
        "layernorm_chw",
        "moments.py",
        "wide.std(over, unbiased=self.unbiased, keepdim=True) + self.eps",
        "((wide**2).mean(over, keepdim=True) - wide.mean(over, keepdim=True) ** 2)"
        ".mul(x[:1].numel() / max(x[:1].numel() - 1, 1)).sqrt() + self.eps",
    ),
    Mutant(
        "a dropped bias",
        "affine",
        "carry.py",
        "y + along(cast(Tensor, bias), y, axis)",
        "y",
    ),
    Mutant(
        "a dropped weight offset",
        "rmsnorm",
        "rmsnorm.py",
        "weight = weight + self.weight_offset if self.weight_offset else weight",
        "weight = weight",
    ),
    Mutant(
        "the wrong axis",
        "rmsnorm",
        "rmsnorm.py",
        "wide.square().mean(self.channel_axis, keepdim=True)",
        "wide.square().mean(-1, keepdim=True)",
    ),
    Mutant(
        "positions mixed",
        "groupnorm",
        "groupnorm.py",
        "positions = input.reshape(-1, self.num_channels)",
        "positions = input.movedim(-1, 1)",
    ),
    Mutant(
        "an inference form without eps",
        "batchnorm",
        "batchnorm.py",
        '(tensors["running_var"].reshape(-1) + settings["eps"]).rsqrt()',
        'tensors["running_var"].reshape(-1).rsqrt()',
    ),
    Mutant(
        "an inference form without the mean",
        "affine",
        "batchnorm.py",
        'shift = shift - tensors["running_mean"].reshape(-1) * scale',
        "shift = torch.zeros_like(scale)",
    ),
    Mutant(
        "statistics that ignore eval mode",
        "batchnorm",
        "batchnorm.py",
        "return super().forward(input.reshape(-1, self.num_features)).reshape(input.shape)",
        "return F.batch_norm(input.reshape(-1, self.num_features), None, None, self.weight, "
        "self.bias, True, 0.0, self.eps).reshape(input.shape)",
    ),
    Mutant(
        "learned values not carried",
        "affine",
        "carry.py",
        'if init == "copy" and value is not None:',
        'if init == "never" and value is not None:',
    ),
    Mutant(
        "another eps carried",
        "instancenorm",
        "carry.py",
        "return default if of_a_length or eps == 0.0 else eps",
        "return 10 * eps",
    ),
    Mutant(
        "a promise too high",
        "groupnorm",
        "groupnorm.py",
        '"*": Conversion(from_any, Fidelity.RETRAIN, _resolve)',
        '"*": Conversion(from_any, Fidelity.EVAL, _resolve)',
    ),
    Mutant(
        "a promise too low",
        "layernorm2d",
        "layernorm2d.py",
        '"layernorm": Conversion(from_any, _standard)',
        '"layernorm": Conversion(from_any, Fidelity.RETRAIN)',
    ),
    Mutant(
        "a law that is not declared",
        "l2norm",
        "l2norm.py",
        "            Law.ROTATION_EQUIVARIANT,\n",
        "",
    ),
    Mutant(
        "a law that does not hold",
        "identity",
        "identity.py",
        "            Law.BATCH_INDEPENDENT,\n",
        "            Law.BATCH_INDEPENDENT,\n            Law.SHIFT_INVARIANT,\n",
    ),
    Mutant(
        "the float32 upcast left out",
        "layernorm_chw",
        "moments.py",
        "wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x",
        "wide = x.to(torch.bfloat16) if x.dtype != torch.float64 else x",
    ),
    Mutant(
        "a reading that forgets a role",
        "layernorm2d",
        "moments.py",
        '(("weight", "bias"), ("weight",), ("bias",), ())',
        '(("weight",), ("bias",), ())',
    ),
    Mutant(
        "memory format lost",
        "layernorm2d",
        "layernorm2d.py",
        "return y.contiguous() if x.is_contiguous() else y",
        "return y",
    ),
)


SAME = Mutant(
    "nothing",
    "layernorm2d",
    "layernorm2d.py",
    "return y.contiguous() if x.is_contiguous() else y",
    "return y.contiguous() if x.is_contiguous() else y  #",
)


@pytest.fixture(scope="module")
def runner() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", RUNNER],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def outcome(mutant: Mutant, folder: Path, runner: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code of the laws on a copy with that fault, and what they said."""
    assert runner.stdin is not None
    assert runner.stdout is not None
    shutil.copytree(PACKAGE, folder / "normsurgery", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "normsurgery" / "norms" / mutant.file
    text = file.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} no longer has once: {mutant.old}"
    file.write_text(text.replace(mutant.old, mutant.new))
    runner.stdin.write(json.dumps([str(folder), mutant.norm]) + "\n")
    runner.stdin.flush()
    code = runner.stdout.readline()
    return int(code), (folder / "said.txt").read_text()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_a_planted_fault_is_caught(
    mutant: Mutant, tmp_path: Path, runner: subprocess.Popen[str]
) -> None:
    code, said = outcome(mutant, tmp_path, runner)
    assert code == KILLED, f"survived or crashed ({code}): {said}"


def test_a_patch_that_changes_nothing_passes(tmp_path: Path, runner: subprocess.Popen[str]) -> None:
    """Else the mutants might die of being copied."""
    code, said = outcome(SAME, tmp_path, runner)
    assert code == 0, said
