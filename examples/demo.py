"""The main job on real input: `make demo`, or `python examples/demo.py [FOLDER]`.

A small ResNet trained on handwritten digits (examples/train_digits.py) has its BatchNorms found and
swapped to GroupNorm from the command line. Its accuracy on held-out digits is measured before,
after the swap, and after a short fine-tune on the training digits. Then the BatchNorms of the
original are folded into its convolutions, and those of the swapped model are refused, with the
reason. Last, the fine-tuned model is exported to ONNX, verified, and run by onnxruntime alone.
Files are left in FOLDER; report.html there shows what was measured.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from digits import Split, accuracy, fit, splits
from torch import Tensor, nn

from normsurgery import artefacts

HERE = Path(__file__).parent


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(HERE / "digits_resnet.pt", folder / "model.pt")
    train, test = splits()
    torch.save(test.images, folder / "held_out.pt")

    command(folder, "normsurgery find model.pt --input held_out.pt")
    command(folder, "normsurgery swap model.pt --to groupnorm --input held_out.pt")

    report = report_of(folder / "model.groupnorm.pt")
    model = artefacts.load(folder / "model.groupnorm.pt").model
    original = artefacts.load(folder / "model.pt").model
    before = accuracy(original, test)
    after = accuracy(model, test)
    fit(model, train, epochs=3, rate=2e-3)
    print(f"\naccuracy on the {len(test.labels)} held-out digits")
    print(f"  BatchNorm, as trained           {before:6.1%}")
    print(f"  GroupNorm, just swapped         {after:6.1%}   {promised_and_measured(report)}")
    print(f"  GroupNorm, 3 epochs fine-tuned  {accuracy(model, test):6.1%}")

    command(folder, "normsurgery fold model.pt --input held_out.pt")
    command(folder, "normsurgery fold model.groupnorm.pt --input held_out.pt")

    folded = artefacts.load(folder / "model.folded.pt").model
    same = int((answers(folded, test) == answers(original, test)).sum())
    print(f"\naccuracy on the {len(test.labels)} held-out digits")
    print(f"  no norm left, just folded       {accuracy(folded, test):6.1%}   ", end="")
    print(f"the same answer as before on {same} of {len(test.labels)}")

    torch.save(model, folder / "tuned.pt")
    command(
        folder,
        "normsurgery export tuned.pt --input 2x1x32x32 --dynamic 0:batch --report report.html",
    )

    answered = answers_of_onnx(folder / "tuned.onnx", test)
    right = float((answered == test.labels).double().mean())
    same = int((answered == answers(model, test)).sum())
    print(f"\naccuracy on the {len(test.labels)} held-out digits")
    print(f"  ONNX, without PyTorch           {right:6.1%}   ", end="")
    print(f"the same answer as fine-tuned on {same} of {len(test.labels)}")
    print(f"\nwhat was measured, to look at: {folder / 'report.html'}")


@torch.no_grad()
def answers(model: nn.Module, split: Split) -> Tensor:
    """The digit that the model sees in each image, (N,) in int64."""
    answered: Tensor = model.eval()(split.images).logits.argmax(dim=-1)
    return answered


def answers_of_onnx(file: Path, split: Split) -> Tensor:
    """The digit that onnxruntime sees in each image, (N,) in int64."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: split.images.numpy()})
    return torch.from_numpy(logits).argmax(dim=-1)


def command(folder: Path, line: str) -> None:
    """Run a `normsurgery` line in the folder, showing it and what it prints."""
    print(f"\n$ {line}", flush=True)
    words = [sys.executable, "-m", "normsurgery.cli.main", *shlex.split(line)[1:]]
    subprocess.run(words, cwd=folder, check=True)


def report_of(file: Path) -> dict[str, Any]:
    """The report that stands beside a written model."""
    text = file.with_name(f"{file.name}.report.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def promised_and_measured(report: dict[str, Any]) -> str:
    """What the report of the swap says, made before anybody knew the labels."""
    promises = {step["fidelity"] for step in report["plan"]["steps"]}
    drift = next(d for d in report["evidence"]["drifts"] if d["case"] == "example")
    return (
        f"promised: {', '.join(promises)}; measured: {drift['output']} moved by "
        f"{drift['relative']:.0%}, top-1 agrees on {drift['top1']:.1%}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "build" / "demo")
