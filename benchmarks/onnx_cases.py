"""Judge the pairs of tests/onnx_cases with normsurgery and with torch's own verifier.

    python benchmarks/onnx_cases.py [--only LABEL,LABEL] [--torch]

One line per pair: its right verdict, what `ns.verify` (or `ns.export`) said, what torch says of the
same file today, what torch said when the reference was measured, processor seconds of either. Last
the scores: of normsurgery over all pairs, of torch over those it can be asked about. --torch leaves
normsurgery out.

Torch is asked as `torch.onnx.export(verify=True)` asks itself: the file is run on the example, and
passes where the largest absolute difference is below 5e-3 and the largest relative one below 1e-1.
It is right where it accepts a correct pair or rejects a faulty one, for whatever reason. Two files,
and what `ns.export` wrote, cannot be put to it.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import onnx
import torch
from onnx_cases import CASES, Case, Sides
from onnx_cases.graphs import seeded, silence
from onnx_cases.outcome import outcome
from onnxscript import ir
from torch import nn
from torch.onnx._internal.exporter._onnx_program import ONNXProgram
from torch.onnx._internal.exporter._verification import verify_onnx_program

ABSOLUTE, RELATIVE = 5e-3, 1e-1  # torch/onnx/_internal/exporter/_core.py


def torch_accepts(sides: Sides) -> bool | None:
    """None: it cannot be asked."""
    if sides.file is None or not isinstance(sides.source, nn.Module):
        return None
    source = copy.deepcopy(sides.source).train("train" in sides.options.get("modes", ()))
    try:
        proto = onnx.load(str(sides.file)) if isinstance(sides.file, Path) else sides.file
        inputs = sides.inputs
        if proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16:
            source, inputs = source.half(), tuple(x.half() for x in inputs)  # it knows no master
        traced = torch.export.export(source, inputs, strict=False)
        program = ONNXProgram(ir.from_proto(proto), traced.run_decompositions())
        results = verify_onnx_program(program, inputs)
    except Exception:  # it reports whatever goes wrong as one more reason to reject
        return False
    return not any(r.max_abs_diff >= ABSOLUTE or r.max_rel_diff >= RELATIVE for r in results)


def torch_says(case: Case) -> str:
    with silence(), seeded():
        accepted = torch_accepts(case.sides)
    if accepted is None:
        return ""
    if accepted == case.good:
        return "right"
    return "false pass" if accepted else "false alarm"


def timed(ask: Callable[[], str]) -> tuple[str, float]:
    start = time.process_time()
    answer = ask()
    return answer, time.process_time() - start


def line(case: Case, *, torch_only: bool) -> tuple[str, str]:
    """What normsurgery said ("" if it was left out) and what torch said, both printed."""
    _ = case.sides  # so that no time of the export is counted
    ours, seconds = "", 0.0
    if not torch_only:
        found, seconds = timed_outcome(case)
        ours = "right" if found else "wrong"
    theirs, torch_seconds = timed(lambda: torch_says(case))
    print(
        f"{case.label:28} {case.verdict:17} {ours:6} {theirs:12} {case.torch:12} "
        f"{seconds:6.2f} {torch_seconds:6.2f}  {case.cause[:70]}",
        flush=True,
    )
    return ours, theirs


def timed_outcome(case: Case) -> tuple[bool, float]:
    start = time.process_time()
    with silence():
        found = outcome(case.sides)
    return found.fits(case), time.process_time() - start


def score(name: str, answers: list[str]) -> None:
    asked = [answer for answer in answers if answer]
    wrong = {what: asked.count(what) for what in sorted(set(asked) - {"right"})}
    detail = "".join(f", {count} {what}" for what, count in wrong.items())
    print(f"{name}: {asked.count('right')} of {len(asked)} right{detail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", help="labels, comma separated")
    parser.add_argument("--torch", action="store_true", help="torch's verifier alone")
    chosen = parser.parse_args()
    wanted = set((chosen.only or "").split(",")) - {""}
    cases = [case for case in CASES if not wanted or case.label in wanted]
    unknown = wanted - {case.label for case in cases}
    if unknown:
        parser.error(f"no case is called {', '.join(sorted(unknown))}")
    print("case, right verdict, normsurgery, torch today, torch in the reference, seconds of both")
    answers = [line(case, torch_only=chosen.torch) for case in cases]
    score("normsurgery", [ours for ours, _ in answers])
    score("torch.onnx.export(verify=True)", [theirs for _, theirs in answers])
    known = [theirs for case, (_, theirs) in zip(cases, answers, strict=True) if case.torch]
    score("torch, on the pairs that the reference names", known)


if __name__ == "__main__":
    main()
