"""Random choices that a checkpoint resumes, ranks share without talking, recomputation repeats."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def hashed(text: str) -> int:
    """64 bits of a hash of the text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


class SeededDraws(nn.Module):
    """A module that draws; a draw is a hash of its seed and of how many came before.

    The buffer `generator`, int64 (2,), is the seed and the number of draws so far, so both are in
    the state_dict.
    """

    generator: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.register_buffer("generator", torch.tensor([seed % 2**63, 0]))
        self._read: tuple[Tensor, float, int, int] | None = None

    def state(self) -> tuple[int, int]:
        """The seed and the number of draws so far.

        The buffer is the truth. Reading it waits for its device, so it is read only after somebody
        else has written it: a checkpoint, a broadcast, a move to another device.
        """
        known = self._read
        if known is not None and known[0] is self.generator and known[1] == _version(known[0]):
            return known[2], known[3]
        seed, draws = self.generator.tolist()
        return seed, draws

    def last_drawn(self, choices: Sequence[str]) -> str:
        """What the last draw chose, or before the first what that one will."""
        seed, draws = self.state()
        return choices[hashed(f"{seed}/{max(draws, 1)}") % len(choices)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # each choice is its own graph
    def draw(self, choices: Sequence[str]) -> str:
        """The next choice, or the last one again if this is a recomputation."""
        # A forward inside a backward pass is activation checkpointing repeating what it did.
        if torch._C._current_graph_task_id() == -1:
            seed, draws = self.state()
            with torch.no_grad():
                self.generator[1] += 1
            self._read = (self.generator, _version(self.generator), seed, draws + 1)
        return self.last_drawn(choices)


def _version(buffer: Tensor) -> float:
    """How often a tensor has been written; unequal to itself where torch does not count."""
    return float("nan") if buffer.is_inference() else buffer._version
