"""Fold transformers models with random weights, and measure what came of it.

    python benchmarks/fold_models.py [--only NAME,NAME] [--runs N]
    python benchmarks/fold_models.py --plan-70b

One line per model: norms found; folded (gone, or left without weight and bias); reduced (to one
multiplication and addition, or to a weight of ones); refused, by the check that failed; the largest
error of the folded model in float64, relative to the largest output; the error of the folded fp32
model against the float64 run of the original, as a multiple of the original's own; seconds to fold;
operators that normalise in one forward, before and after, and all operators; the processor time of
a forward after, over before, and the same for the original measured against itself. Below it the
same of torch.fx.experimental.optimization.fuse, or what it raised.

`untie` is on. The small models are those of tests/test_fold_models.py; those
that are named with a size are large enough for their time to mean something. One thread.

--plan-70b plans the fold of a Llama with 70 billion parameters on the meta device.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
import transformers as hf
from test_fold_models import (
    ACCOUNTS,
    builders,
    check,
    in_float64,
    left,
    lively,
    relative_error,
    run,
)
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils._python_dispatch import TorchDispatchMode

import normsurgery as ns
from normsurgery.folding.ground import Choices
from normsurgery.folding.planning import plan_fold
from normsurgery.inputs import as_inputs
from normsurgery.plans import Plan
from normsurgery.verifying.runners import run_native

Inputs = dict[str, Tensor]
Build = tuple[Callable[[], nn.Module], Callable[[], Inputs]]

# Every one of them stands for one norm that runs; rsqrt for an RMSNorm that is written out.
NORM_OPERATORS = ("batch_norm", "layer_norm", "group_norm", "rms_norm", "aten::rsqrt")
COLUMNS = (
    ("model", 16),
    ("found", 5),
    ("folded", 6),
    ("reduced", 7),
    ("f64 error", 9),
    ("x own fp32", 10),
    ("seconds", 7),
    ("norms run", 9),
    ("operators", 11),
    ("latency", 7),
    ("control", 7),
    ("refused", 0),
)


# --- the models -----------------------------------------------------------------------------------


class Block(nn.Module):
    """Convolution, norm, ReLU, twice, with a residual: what torch's tracer can read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + x)


def plain_network() -> nn.Module:
    torch.manual_seed(20)
    stem = (nn.Conv2d(3, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    blocks = (Block(32) for _ in range(8))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return lively(nn.Sequential(*stem, *blocks, *head).eval())


def of_size(model_class: type[nn.Module], config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(20)
        config.use_cache = False
        return lively(model_class(config).eval())

    return build


def pixels(name: str = "pixel_values", size: int = 224) -> Callable[[], Inputs]:
    return lambda: {name: torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))}


def tokens(length: int = 64) -> Callable[[], Inputs]:
    return lambda: {
        "input_ids": torch.randint(3, 900, (1, length), generator=torch.Generator().manual_seed(1))
    }


def sized() -> dict[str, Build]:
    """Models of a size at which the time of a forward means something."""
    decoder = {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    return {
        "plain @96": (plain_network, pixels("input", 96)),
        "resnet50 @224": (of_size(hf.ResNetForImageClassification, hf.ResNetConfig()), pixels()),
        "mobilenet_v2 @224": (
            of_size(hf.MobileNetV2ForImageClassification, hf.MobileNetV2Config()),
            pixels(),
        ),
        "gpt2 6x384": (
            of_size(
                hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=4096, n_embd=384, n_layer=6, n_head=6)
            ),
            tokens(),
        ),
        "llama 6x512": (of_size(hf.LlamaForCausalLM, hf.LlamaConfig(**decoder)), tokens()),
    }


def chosen(only: str) -> dict[str, Build]:
    every = {**sized(), **{name: builders()[name] for name in ACCOUNTS}}
    names = only.split(",") if only else list(every)
    return {name: every[name] for name in names}


# --- measuring ------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts the ATen operators that run inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def norms(self) -> int:
        return sum(n for name, n in self.names.items() if any(k in name for k in NORM_OPERATORS))


def operators(model: nn.Module, inputs: Inputs) -> Operators:
    with torch.no_grad(), Operators() as counted:
        model(**inputs)
    return counted


def latencies(models: list[nn.Module], inputs: Inputs, runs: int) -> list[float]:
    """Median processor time of a forward of each, the models taking turns."""
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(runs + 2):
            for model, found in zip(models, times, strict=True):
                started = time.thread_time()
                model(**inputs)
                found.append(time.thread_time() - started)
    return [statistics.median(found[2:]) for found in times]


def fp32(model: nn.Module, inputs: Inputs) -> Mapping[str, Tensor]:
    return run_native(model, as_inputs(inputs), "eval", seed=0).outputs


def error_of(model: nn.Module, inputs: Inputs, truth: Mapping[str, Tensor]) -> float:
    outputs = fp32(model, inputs)
    return relative_error({name: value.double() for name, value in outputs.items()}, truth)


@dataclass(frozen=True)
class Result:
    """What came of one model; a cell each, by the heads of COLUMNS."""

    cells: Mapping[str, str]

    def line(self) -> str:
        return "  ".join(f"{self.cells.get(head, ''):<{width}}" for head, width in COLUMNS)


def measured(
    name: str, model: nn.Module, made: nn.Module, inputs: Inputs, runs: int
) -> dict[str, str]:
    """The cells that both folds have."""
    truth = run(model, inputs)
    own, changed = (error_of(each, inputs, truth) for each in (model, made))
    before, after = operators(model, inputs), operators(made, inputs)
    first, second, again = latencies([model, made, model], inputs, runs)
    return {
        "model": name,
        "x own fp32": f"{changed / own:.2f}" if own else "-",
        "norms run": f"{before.norms} -> {after.norms}",
        "operators": f"{before.names.total()} -> {after.names.total()}",
        "latency": f"{second / first:.2f}",
        "control": f"{again / first:.2f}",
    }


def folded(name: str, model: nn.Module, inputs: Inputs, runs: int) -> Result:
    started = time.perf_counter()
    made, report = ns.fold(model, inputs=inputs, untie=True, verify=False)
    seconds = time.perf_counter() - started
    double, doubly_made = in_float64(model, report.plan, inputs)
    cells = measured(name, model, made, inputs, runs)
    error = relative_error(run(doubly_made, inputs), run(double, inputs))
    return Result(
        {**cells, **counts(report.plan), "f64 error": f"{error:.1e}", "seconds": f"{seconds:.2f}"}
    )


def counts(plan: Plan) -> dict[str, str]:
    outcomes = Counter(left(step).split(": ")[1] for step in plan.steps)
    refused = Counter(check(skip.reason) for skip in plan.skips)
    reduced = outcomes["affine"] + outcomes["neutral"]
    return {
        "found": str(len(plan.steps) + len(plan.skips)),
        "folded": str(len(plan.steps) - reduced),
        "reduced": str(reduced),
        "refused": ", ".join(f"{count} {reason}" for reason, count in refused.most_common()),
    }


def fused(model: nn.Module, inputs: Inputs, runs: int) -> Result:
    """The same of torch's own."""
    name = "  torch fuse"
    started = time.perf_counter()
    try:
        made = fuse(model)
        seconds = time.perf_counter() - started
        cells = measured(name, model, made, inputs, runs)
    except Exception as error:
        text = " ".join(str(error).split())[:90]
        return Result({"model": name, "refused": f"raised {type(error).__name__}: {text}"})
    gone = batch_norms(model) - batch_norms(made)
    error64 = relative_error(run(fuse(model.double()), inputs), run(model, inputs))
    model.float()
    return Result(
        {
            **cells,
            "folded": str(gone),
            "f64 error": f"{error64:.1e}",
            "seconds": f"{seconds:.2f}",
        }
    )


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


# --- 70 billion parameters ------------------------------------------------------------------------


def plan_70b() -> None:
    config = hf.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config).eval()
        inputs = {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    wall, own = time.perf_counter(), time.process_time()
    plan = plan_fold(model, as_inputs(inputs), choices=Choices())
    wall, own = time.perf_counter() - wall, time.process_time() - own
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{parameters / 1e9:.1f}e9 parameters: {len(plan.steps)} norms folded, {len(plan.skips)} "
        f"left; {wall:.1f} s ({own:.1f} s of CPU), peak {peak / 1e9:.2f} GB resident"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="models, comma separated")
    parser.add_argument("--runs", type=int, default=15, help="forwards of each model to time")
    parser.add_argument("--plan-70b", action="store_true", help="plan a large one, and no more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.plan_70b:
        plan_70b()
        return 0
    print("  ".join(f"{head:<{width}}" for head, width in COLUMNS))
    for name, (build, inputs) in chosen(options.only).items():
        model, given = build(), inputs()
        print(folded(name, model, given, options.runs).line(), flush=True)
        print(fused(model, given, options.runs).line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
