"""Mutants drawn by seed, and only those that compute something else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import torch

from normsurgery.verifying.judge import judge
from onnx_mutants.evaluate import Arrays, evaluate
from onnx_mutants.faults import FAULTS, MATMULS, NORMS, Mutant, plant

# Nodes of which at least two in three mutants are drawn.
MAIN = NORMS | MATMULS | {"Cast", "Attention", "ReduceMean", "Sqrt", "Add", "Pow"}


def differs(mutant: Arrays, original: Arrays, dtype: torch.dtype = torch.float32) -> bool:
    """Is any output farther from the original's, both in float64, than rounding alone may put it?

    Args:
        mutant, original: outputs by name, float64.
        dtype: the type that the graph computes in.
    """
    for name, truth in original.items():
        found = torch.from_numpy(np.asarray(mutant[name]))
        reference = torch.from_numpy(np.asarray(truth))
        if judge(found.to(dtype), reference).passed is False:
            return True
    return False


def is_visible(mutant: onnx.ModelProto, suite: list[Arrays], truths: list[Arrays]) -> bool:
    """Does it run on all of the suite, and differ on some?"""
    try:
        found = [evaluate(mutant, feeds) for feeds in suite]
        onnx.checker.check_model(mutant, full_check=True)
    except Exception:  # a graph that does not run is no interesting mutant
        return False
    return any(differs(one, truth) for one, truth in zip(found, truths, strict=True))


def draw(
    graph: str, model: onnx.ModelProto, suite: list[Arrays], count: int, seed: int
) -> list[Mutant]:
    """`count` different faults of one graph, at least half of them in its second half.

    Raises AssertionError where the graph has not so many that show.
    """
    random = np.random.default_rng(seed)
    truths = [evaluate(model, feeds) for feeds in suite]
    drawn: list[Mutant] = []
    early = count // 2
    seen: Counter[str] = Counter()
    for name, index in _candidates(model, truths_of(model, suite[0]), random):
        if len(drawn) == count:
            break
        if seen[name] or (_is_early(model, index) and early == 0):
            continue
        mutant = plant(name, graph, model, index, random)
        if mutant is None or not is_visible(mutant.model, suite, truths):
            continue
        early -= not mutant.late
        seen[name] += 1
        drawn.append(mutant)
    assert len(drawn) == count, f"{graph} has only {len(drawn)} faults that show"
    return drawn


def truths_of(model: onnx.ModelProto, feeds: Arrays) -> dict[str, np.ndarray]:
    return evaluate(model, feeds, inner=True)


def _is_early(model: onnx.ModelProto, index: int) -> bool:
    return 2 * index < len(model.graph.node)


def _candidates(
    model: onnx.ModelProto, values: Mapping[str, np.ndarray], random: np.random.Generator
) -> Iterator[tuple[str, int]]:
    """Faults and nodes with a floating result, at random; norms, matrices and casts first."""
    floating = [
        index
        for index, node in enumerate(model.graph.node)
        if any(np.asarray(values[name]).dtype.kind == "f" for name in node.output if name)
    ]
    main = [i for i in floating if model.graph.node[i].op_type in MAIN]
    pairs = [(name, index) for name in FAULTS for index in floating]
    order = random.permutation(len(pairs)).tolist()
    # Two of norms, matrices and casts, then one of any.
    first = (pairs[i] for i in order if pairs[i][1] in main)
    anything = (pairs[i] for i in order)
    while True:
        batch = [next(first, None), next(first, None), next(anything, None)]
        if batch == [None, None, None]:
            return
        yield from (pair for pair in batch if pair is not None)
