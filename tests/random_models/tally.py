"""What came of many random models, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .trial import Outcome

# What must come up often: the label of a fold that was made, or of a hazard in a model.
RULES = (
    "rule: into producer",
    "rule: into consumers",
    "rule: standalone affine",
    "rule: parallel branches",
    *(f"into a producer: conv{d}d" for d in (1, 2, 3)),
    *(f"into a producer: convtranspose{d}d" for d in (1, 2, 3)),
    "into a producer: linear",
    "into a producer: embedding",
    "into a producer: grouped",
    "into a producer: depthwise",
    "into a producer: no bias",
    "into a producer: a functional call",
    *(f"into a consumer: conv{d}d" for d in (1, 2, 3)),
    "into a consumer: linear",
    "into a consumer: grouped",
    "into a consumer: depthwise",
    "into a consumer: no bias",
    "into a consumer: a functional call",
    *(f"into a consumer: padding {mode}" for mode in ("reflect", "replicate", "circular")),
    "through avg pooling",
    "through adaptive pooling",
    "through upsampling (nearest)",
    "through upsampling (linear)",
    "through cat",
    "through shuffle",
    "through slice",
    "through dropout",
    "through identity",
    "through flatten",
    "through transpose",
    "through channels_last",
    "through channels_first",
    *(f"norm: {kind}" for kind in ("batchnorm", "syncbatchnorm", "frozenbatchnorm")),
    *(f"norm: {kind}" for kind in ("instancenorm_statistics", "instancenorm", "groupnorm")),
    *(f"norm: {kind}" for kind in ("layernorm", "rmsnorm", "rmsnorm_hand", "rmsnorm_one")),
    "norm: batchnorm (call)",
)
HAZARDS = (
    "second consumer",
    "called twice",
    "tied",
    "hook",
    "hidden branch",
    "weight read elsewhere",
    "in place",
    "train mode",
    "no statistics",
    "norm after norm",
    "zero padding",
    "non-linear",
    "concatenation",
    "sum",
    "output of the model",
    "half precision",
    "functional call",
    "nested block",
)


@dataclass
class Tally:
    """Outcomes added up."""

    models: int = 0
    norms: int = 0
    folded: int = 0
    foldable: int = 0
    foldable_folded: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    hazards: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    half: int = 0
    unproven: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.models += bool(outcome.norms)
        self.norms += outcome.norms
        self.folded += outcome.folded
        self.foldable += outcome.foldable
        self.foldable_folded += outcome.foldable_folded
        self.rules.update(outcome.rules)
        self.hazards.update(outcome.hazards)
        self.failed += [f"seed {outcome.seed}: {text}" for text in outcome.wrong]
        self.left += outcome.left
        self.half += outcome.half
        self.unproven += outcome.unproven

    @property
    def share(self) -> float:
        """Of the norms that the oracle can fold, the share that was folded."""
        return self.foldable_folded / self.foldable

    def rarer_than(self, least: int) -> dict[str, int]:
        """The labels that must come up, and came up less often."""
        counts = {label: self.rules[label] for label in RULES}
        counts |= {label: self.hazards[label] for label in HAZARDS}
        return {label: count for label, count in counts.items() if count < least}


def tally(outcomes: Iterable[Outcome]) -> Tally:
    counted = Tally()
    for outcome in outcomes:
        counted.add(outcome)
    return counted
