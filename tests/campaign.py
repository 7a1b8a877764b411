"""Long campaigns: a fixed sample in `make test`; whole, with fresh seeds, in `make campaign`.

`make campaign` runs the tests that are marked `campaign`, and those of hypothesis, with the
variable CAMPAIGN set to the first seed, which every run prints; `make campaign SEED=n` is that run
again. What a campaign finds becomes a fixed case of the tests.
"""

from __future__ import annotations

import os

SEED = int(os.environ["CAMPAIGN"]) if "CAMPAIGN" in os.environ else None


def seeds(fixed: range, whole: int) -> range:
    """The fixed seeds, or in a campaign `whole` fresh ones, from SEED on."""
    return fixed if SEED is None else range(SEED, SEED + whole)
