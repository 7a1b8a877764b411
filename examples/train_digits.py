"""Train the small ResNet that the demo operates on: `python examples/train_digits.py [OUT]`.

A ResNet with BatchNorm after every convolution, trained on scikit-learn's digits in under a minute
on one core, and saved whole (`torch.save(model, ...)`), as `examples/digits_resnet.pt` was.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from digits import accuracy, fit, splits
from transformers import ResNetConfig, ResNetForImageClassification

SHIPPED = Path(__file__).with_name("digits_resnet.pt")


def make_model() -> ResNetForImageClassification:
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 48],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=10,
    )
    return ResNetForImageClassification(config)


def main(out: Path) -> None:
    torch.manual_seed(0)
    train, test = splits()
    model = make_model()
    fit(model, train, epochs=12, rate=4e-3)
    print(f"test accuracy: {100 * accuracy(model, test):.1f} %")
    torch.save(model, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED)
