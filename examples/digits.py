"""Real data for the examples: scikit-learn's handwritten digits, as 1 x 32 x 32 images."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


class Split(NamedTuple):
    """Images (N, 1, 32, 32) in float32, about zero mean and unit variance; labels (N,) in int64."""

    images: Tensor
    labels: Tensor


def splits() -> tuple[Split, Split]:
    """The training split (1347 digits) and the test split (450), always the same."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate((images - 5.0) / 6.0, size=(32, 32), mode="bilinear")
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=0.25, stratify=digits.target, random_state=0
    )
    return Split(images[train], labels[train]), Split(images[test], labels[test])


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """The share of digits that the model names rightly, in eval mode."""
    model.eval()
    predicted = model(split.images).logits.argmax(dim=-1)
    return (predicted == split.labels).double().mean().item()


def fit(model: nn.Module, split: Split, *, epochs: int, rate: float, seed: int = 0) -> None:
    """Train in place: AdamW on shuffled batches of 64, the rate falling to zero along a cosine."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(split.labels), generator=order).split(64):
            loss = F.cross_entropy(model(split.images[batch]).logits, split.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
