"""The example model is real: trained on real data, and its accuracy is its own."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from normsurgery import artefacts

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SHIPPED = EXAMPLES / "digits_resnet.pt"


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module("digits")
    finally:
        sys.path.remove(str(EXAMPLES))


def test_the_shipped_model_reads_digits_it_never_saw(digits: ModuleType) -> None:
    train, test = digits.splits()
    seen = {image.numpy().tobytes() for image in train.images}
    unseen = [
        index for index, image in enumerate(test.images) if image.numpy().tobytes() not in seen
    ]
    held_out = digits.Split(test.images[unseen], test.labels[unseen])
    assert len(unseen) > 400
    assert digits.accuracy(artefacts.load(SHIPPED).model, held_out) > 0.95


def test_without_its_classifier_the_model_guesses(digits: ModuleType) -> None:
    """An accuracy that survives a zeroed classifier was never measured on the model's outputs."""
    model = artefacts.load(SHIPPED).model
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.zero_()
    _, test = digits.splits()
    most_common = test.labels.bincount().max().item() / len(test.labels)
    assert digits.accuracy(model, test) <= most_common


def test_the_shipped_file_is_small() -> None:
    assert SHIPPED.stat().st_size < 400_000


def test_training_again_reaches_the_shipped_accuracy(digits: ModuleType, tmp_path: Path) -> None:
    again = tmp_path / "again.pt"
    words = [sys.executable, str(EXAMPLES / "train_digits.py"), str(again)]
    subprocess.run(words, check=True, capture_output=True)
    _, test = digits.splits()
    shipped = digits.accuracy(artefacts.load(SHIPPED).model, test)
    assert abs(digits.accuracy(artefacts.load(again).model, test) - shipped) <= 0.02


def test_the_demo_shows_the_loss_and_the_recovery(tmp_path: Path) -> None:
    """The demo's numbers are this run's: the swap costs accuracy, the fine-tune brings it back."""
    demo = [sys.executable, str(EXAMPLES / "demo.py"), str(tmp_path / "demo")]
    output = subprocess.run(demo, check=True, capture_output=True, text=True).stdout
    shown = re.findall(r"^  \w+Norm.*?(\d+\.\d)%", output, re.MULTILINE)
    before, swapped, tuned = map(float, shown)
    assert swapped < before - 10
    assert tuned > before - 2
    assert "outputs change; train or calibrate" in output
    assert re.search(r"the same answer as fine-tuned on (\d+) of \1$", output, re.MULTILINE)
    assert {"tuned.onnx", "tuned.onnx.report.json", "report.html"} <= {
        path.name for path in (tmp_path / "demo").iterdir()
    }
