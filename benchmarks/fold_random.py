"""Fold random models, judge each fold, and count.

    python benchmarks/fold_random.py [--examples 20000] [--first 0] [--jobs N] [--least 200]

Every model (tests/random_models) is folded in float64 and compared with the original on batches of
1, 2 and 3; it is folded again, and then there must be nothing to do; each of its norms is judged by
the oracle, which solves for the neighbours' weights by least squares and imports nothing of
normsurgery. Printed: how often each rule and each hazard came up, the share of the foldable norms
that were folded, wrong folds and errors with their seeds. Exit code 1 if anything is wrong, a label
is rarer than --least, or the share is below 99%.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from random_models.tally import HAZARDS, RULES, Tally
from random_models.trial import Outcome, try_fold

SHARE = 0.99
SHOWN = 40  # failures and norms left that are printed


def judged(seed: int) -> Outcome:
    torch.set_num_threads(1)
    return try_fold(seed, oracle=True, again=True)


def outcomes(seeds: range, jobs: int) -> Iterator[Outcome]:
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=20) as pool:
        yield from pool.imap_unordered(judged, seeds, chunksize=20)


def show(counted: Tally, seconds: float) -> None:
    print(f"{counted.models} models, {counted.norms} norms, {seconds:.0f} s")
    for title, counts, named in (
        ("rules (of folds made)", counted.rules, RULES),
        ("hazards (of models)", counted.hazards, HAZARDS),
    ):
        print(f"\n{title}")
        for label in (*named, *sorted(set(counts) - set(named))):
            print(f"  {counts[label]:7d}  {label}")
    print(f"\n{counted.folded} norms folded")
    print(
        f"{counted.foldable} foldable by the oracle, {counted.foldable_folded} of them folded: ",
        end="",
    )
    print(f"{counted.share:.2%}")
    print(f"{len(counted.failed)} wrong folds and errors")
    for text in counted.failed[:SHOWN]:
        print(f"  {text[:300]}")
    print(f"{counted.half} folded in half precision, {len(counted.unproven)} of them not proven")
    for text in counted.unproven[:SHOWN]:
        print(f"  {text}")
    if counted.left:
        print(f"{len(counted.left)} left though foldable, by reason:")
    for reason, count in Counter(text.split(": ", 2)[2] for text in counted.left).most_common(15):
        print(f"  {count:5d}  {reason[:160]}")
    for text in counted.left[:SHOWN]:
        print(f"  {text[:240]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--least", type=int, default=200, help="how often each label must come up")
    arguments = parser.parse_args()
    started = time.monotonic()
    counted = Tally()
    seeds = range(arguments.first, arguments.first + arguments.examples)
    for number, outcome in enumerate(outcomes(seeds, arguments.jobs), 1):
        counted.add(outcome)
        if number % 200 == 0:
            print(f"{number} models, {len(counted.failed)} wrong", file=sys.stderr)
    show(counted, time.monotonic() - started)
    rare = counted.rarer_than(arguments.least)
    if rare:
        print(f"rarer than {arguments.least}: {rare}")
    return int(bool(counted.failed or rare or counted.share < SHARE))


if __name__ == "__main__":
    raise SystemExit(main())
