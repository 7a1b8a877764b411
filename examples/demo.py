"""The main job on real input: `make demo`, or `python examples/demo.py [FOLDER]`.

A small ResNet trained on handwritten digits (examples/train_digits.py) has its BatchNorms found and
swapped to GroupNorm from the command line. Its accuracy on held-out digits is measured before,
after the swap, and after a short fine-tune on the training digits. Files are left in FOLDER.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from digits import accuracy, fit, splits

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

    report = json.loads((folder / "model.groupnorm.pt.report.json").read_text(encoding="utf-8"))
    model = artefacts.load(folder / "model.groupnorm.pt").model
    before = accuracy(artefacts.load(folder / "model.pt").model, test)
    after = accuracy(model, test)
    fit(model, train, epochs=3, rate=2e-3)
    print(f"\naccuracy on the {len(test.labels)} held-out digits")
    print(f"  BatchNorm, as trained           {before:6.1%}")
    print(f"  GroupNorm, just swapped         {after:6.1%}   {promised_and_measured(report)}")
    print(f"  GroupNorm, 3 epochs fine-tuned  {accuracy(model, test):6.1%}")


def command(folder: Path, line: str) -> None:
    """Run a `normsurgery` line in the folder, showing it and what it prints."""
    print(f"\n$ {line}", flush=True)
    words = [sys.executable, "-m", "normsurgery.cli.main", *shlex.split(line)[1:]]
    subprocess.run(words, cwd=folder, check=True)


def promised_and_measured(report: dict[str, Any]) -> str:
    """In the report that stands beside the swapped model: before anybody knew the labels."""
    promises = {step["fidelity"] for step in report["plan"]["steps"]}
    drift = next(d for d in report["evidence"]["drifts"] if d["case"] == "example")
    return (
        f"promised: {', '.join(promises)}; measured: {drift['output']} moved by "
        f"{drift['relative']:.0%}, top-1 agrees on {drift['top1']:.1%}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "build" / "demo")
