"""Export twelve small transformers models, and time the proof beside torch's own.

    python benchmarks/export_models.py [--only NAME,NAME] [--dtype fp32,fp16] [--rounds N]

A Markdown table, one line per model and type. In every round the five are run one after another, in
an order that turns; what stands in the table is the median over rounds. Seconds are processor time
of one thread, so that other work on the machine counts little.

- export: `normsurgery.export(verify=False, fold=False)`, in seconds.
- inside: `normsurgery.verify(hard=False)`, every stage and every intermediate value on the example,
  as a multiple of that export.
- all: the same on the whole suite of hard inputs and sizes.
- torch export: `torch.onnx.export(dynamo=True)`, as a multiple of our export.
- torch verify: `torch.onnx.export(dynamo=True, verify=True)` (outputs only, on the example) as a
  multiple of `torch export`.
- compared: the share of the floating values of our graph that were judged.
- ours, torch's: what each of the two verifications says of its own file.

The models, their dynamic axes and their inputs are those of tests/test_export_models.py.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from test_export_models import EXPECTED
from torch import Tensor, nn
from torch.export import Dim
from transformers_zoo import models

import normsurgery as ns

HEAD = (
    "model",
    "type",
    "export s",
    "inside",
    "all",
    "torch export",
    "torch verify",
    "compared",
    "ours",
    "torch's",
)


def seconds(job: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.process_time()
    result = job()
    return time.process_time() - start, result


class Subject:
    """One model in one type, and the five things that are timed."""

    def __init__(self, name: str, dtype: str, folder: Path) -> None:
        self.row, self.axes = models()[name], EXPECTED[name].axes
        self.dtype, self.path = dtype, folder / f"{name}_{dtype}.onnx"
        self.folder = folder

    def model(self) -> nn.Module:
        model = self.row.build()
        return model.half() if self.dtype == "fp16" else model

    def inputs(self) -> dict[str, Tensor]:
        half = self.dtype == "fp16"
        given = self.row.inputs()
        return {k: v.half() if half and v.is_floating_point() else v for k, v in given.items()}

    def export(self) -> Any:
        return ns.export(
            self.model(),
            self.path,
            self.inputs(),
            dynamic=self.axes,
            fold=False,
            verify=False,
            force=True,
        )

    def inside(self) -> Any:
        return ns.verify(self.model(), self.path, self.inputs(), hard=False)

    def everything(self) -> Any:
        return ns.verify(self.model(), self.path, self.inputs())

    def torch_export(self, verify: bool = False) -> str:
        """What it says of the accuracy: "passed", "failed", or the error it raised."""
        shapes = {k: dict.fromkeys(axes, Dim.DYNAMIC) for k, axes in self.axes.items()}
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), torch.no_grad():
                torch.onnx.export(
                    self.model(),
                    (),
                    kwargs=self.inputs(),
                    dynamo=True,
                    dynamic_shapes=shapes,
                    verify=verify,
                    verbose=True,
                    artifacts_dir=self.folder,
                )
        except Exception as error:  # any exporter may raise anything
            return type(error).__name__
        lines = [line for line in said.getvalue().splitlines() if "accuracy" in line]
        if any("✅" in line for line in lines):
            return "passed"
        return "failed" if verify else ""

    def torch_verify(self) -> str:
        return self.torch_export(verify=True)


def measured(subject: Subject, rounds: int) -> dict[str, str]:
    subject.export()  # warm, and what `inside` and `everything` read
    jobs = {
        "export": subject.export,
        "inside": subject.inside,
        "all": subject.everything,
        "torch": subject.torch_export,
        "verify": subject.torch_verify,
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    results: dict[str, Any] = {}
    for number in range(rounds):
        names = list(jobs)[number % len(jobs) :] + list(jobs)[: number % len(jobs)]
        for name in names:
            taken, results[name] = seconds(jobs[name])
            times[name].append(taken)

    def over(a: str, b: str) -> str:
        return f"{statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)):.2f}"

    evidence = results["all"]
    return {
        "export s": f"{statistics.median(times['export']):.2f}",
        "inside": over("inside", "export"),
        "all": over("all", "export"),
        "torch export": over("torch", "export"),
        "torch verify": over("verify", "torch"),
        "compared": f"{evidence.coverage.share:.0%}",
        "ours": "passed" if evidence.passed else f"failed ({len(evidence.failures)})",
        "torch's": results["verify"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(EXPECTED))
    parser.add_argument("--dtype", default="fp32,fp16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in options.dtype.split(","):
            for name in options.only.split(","):
                cells = measured(Subject(name, dtype, Path(folder)), options.rounds)
                cells |= {"model": name, "type": dtype}
                print(f"| {' | '.join(cells[key] for key in HEAD)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
