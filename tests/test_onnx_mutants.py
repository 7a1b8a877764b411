"""Planted faults: verify catches each, and blame, given two files, names the node it sits on.

What is a fault is decided by onnx_mutants, in float64, without the verifier. The same graphs
written in another way must pass. `make test` draws five faults of each graph, always the same;
`make campaign` six others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import campaign
import numpy as np
import onnx
import pytest
import torch
from onnx_mutants.drawing import MAIN, differs, draw, is_visible
from onnx_mutants.evaluate import Arrays, evaluate
from onnx_mutants.faults import Mutant, lose_upcast, plant, swap_graph_outputs
from onnx_mutants.rewrites import rewrite
from onnx_mutants.sources import NORMS_OF_STACK, sources

import normsurgery as ns
from normsurgery import artefacts
from normsurgery.verifying.judge import judge

SEED = 4 if campaign.SEED is None else campaign.SEED
EACH = 5 if campaign.SEED is None else 6


@dataclass(frozen=True)
class Exported:
    """One graph that gets faults: `source` exported with `fold`, and how many mutants of it are
    drawn.

    whole: blame is given the `.pt` file, from before the fold, and not the traced `.pt2`, which
    cannot be folded.
    """

    source: str
    fold: bool
    opset: int | None
    drawn: int = 0
    whole: bool = False


GRAPHS = {
    "resnet": Exported("resnet", False, None, EACH),
    "resnet folded": Exported("resnet", True, None, EACH),
    "gpt2": Exported("gpt2", False, None, EACH),
    "gpt2 folded": Exported("gpt2", True, None, EACH, whole=True),
    # Norms in single steps, and as one operator.
    "llama": Exported("llama", False, 20, EACH),
    "llama folded": Exported("llama", True, None, EACH, whole=True),
    "stack": Exported("stack", False, None),
    "loud llama": Exported("loud llama", False, 20),
}
DRAWN = sum(graph.drawn for graph in GRAPHS.values())

# Each rewrite on a graph that it changes: the least number of nodes is a literal.
REWRITTEN = [
    ("other names", "gpt2", 100),
    ("divided by a power of two", "gpt2", 2),
    ("gemm written out", "gpt2 folded", 8),
    ("constants as nodes", "resnet", 50),
    ("another order", "llama folded", 80),
    ("identities", "llama folded", 20),
    ("norms written out", "gpt2", 5),
    ("norms written out", "llama folded", 5),
    ("batch norm as affine", "resnet", 11),
    ("operands commuted", "llama", 30),
    ("unused nodes", "resnet folded", 12),
    ("turned twice", "resnet folded", 11),
    ("own constants", "llama", 50),
    ("relu as maximum", "resnet", 9),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutants")


@pytest.fixture(scope="module")
def exported(folder: Path) -> Callable[[str], Path]:
    """The file of a graph, exported when it is first asked for."""

    @cache
    def export(name: str) -> Path:
        graph = GRAPHS[name]
        source = sources()[graph.source]
        path = folder / f"{name.replace(' ', '_')}.onnx"
        ns.export(
            source.build(),
            path,
            source.inputs(),
            dynamic=source.axes,
            opset=graph.opset,
            fold=graph.fold,
            verify=False,
        )
        return path

    return export


@pytest.fixture(scope="module")
def traced(folder: Path) -> Callable[[str], Path]:
    """The source of a graph as a `.pt2` file."""

    @cache
    def trace(name: str) -> Path:
        path = folder / f"{GRAPHS[name].source.replace(' ', '_')}.pt2"
        if not path.exists():
            torch.export.save(sources()[GRAPHS[name].source].program(), path)
        return path

    return trace


@pytest.fixture(scope="module")
def mutants(exported: Callable[[str], Path]) -> Callable[[str], list[Mutant]]:
    """What is drawn of a graph."""

    @cache
    def made(name: str) -> list[Mutant]:
        model = onnx.load(exported(name))
        graph = GRAPHS[name]
        suite = sources()[graph.source].suite()
        return draw(name, model, suite, graph.drawn, SEED + list(GRAPHS).index(name))

    return made


def drawn_places() -> list[tuple[str, int]]:
    return [(name, number) for name, graph in GRAPHS.items() for number in range(graph.drawn)]


@cache
def program(traced: Path) -> Any:
    """The traced model, read once: reading it takes as long as judging a file against it."""
    return artefacts.load(traced).model


def saved(mutant: Mutant, folder: Path) -> Path:
    words = re.sub(r"\W+", "_", f"{mutant.graph} {mutant.fault} {min(mutant.blamed, default='')}")
    path = folder / f"{words}.onnx"
    onnx.save(mutant.model, path)
    return path


def source_of(name: str, traced: Path) -> Path:
    """The file that blame is given beside the mutant."""
    graph = GRAPHS[name]
    if not graph.whole:
        return traced
    path = traced.with_suffix(".pt")
    if not path.exists():
        torch.save(sources()[graph.source].build(), path)
    return path


def is_caught(source: Any, path: Path) -> bool:
    """On the example already, which is the first of the hard inputs, or on one of those."""
    return any(not ns.verify(source, path, hard=hard).passed for hard in (False, True))


def require_caught(mutant: Mutant, original: Path, traced: Path, folder: Path) -> None:
    """Verify fails, and blame names the node: against the traced model, and against the graph."""
    path = saved(mutant, folder)
    assert is_caught(program(traced), path), f"not caught: {mutant.label}"
    if not mutant.blamed:
        return
    for source in (source_of(mutant.graph, traced), original):
        blamed = ns.blame(source, path)
        assert blamed is not None, f"nothing blamed against {source.name}: {mutant.label}"
        assert blamed.node in mutant.blamed, f"{mutant.label}, against {source.name}: {blamed}"


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.campaign
@pytest.mark.parametrize(("name", "number"), drawn_places())
def test_a_drawn_fault_is_caught_and_its_node_named(
    name: str,
    number: int,
    exported: Callable[[str], Path],
    traced: Callable[[str], Path],
    mutants: Callable[[str], list[Mutant]],
    folder: Path,
) -> None:
    require_caught(mutants(name)[number], exported(name), traced(name), folder)


def test_what_is_drawn(mutants: Callable[[str], list[Mutant]]) -> None:
    """At least 30, half of them late, two thirds on norms, matrices and casts; many kinds."""
    drawn = [mutant for name, graph in GRAPHS.items() if graph.drawn for mutant in mutants(name)]
    assert len(drawn) == DRAWN >= 30
    assert 2 * sum(mutant.late for mutant in drawn) >= len(drawn)
    assert 3 * sum(mutant.operator in MAIN for mutant in drawn) >= 2 * len(drawn)
    kinds = Counter(mutant.fault for mutant in drawn)
    assert len(kinds) >= 12, kinds
    assert len({mutant.label for mutant in drawn}) == len(drawn)


def test_one_epsilon_of_fifty(
    exported: Callable[[str], Path], traced: Callable[[str], Path], folder: Path
) -> None:
    model = onnx.load(exported("stack"))
    norms = [i for i, n in enumerate(model.graph.node) if n.op_type == "LayerNormalization"]
    assert len(norms) == NORMS_OF_STACK
    random = np.random.default_rng(SEED)
    index = int(random.choice(norms))
    mutant = plant("epsilon times 10", "stack", model, index, random)
    assert mutant is not None
    require_visible(mutant, model)
    require_caught(mutant, exported("stack"), traced("stack"), folder)


def test_two_outputs_of_the_graph_swapped(
    exported: Callable[[str], Path], traced: Callable[[str], Path], folder: Path
) -> None:
    model = onnx.load(exported("stack"))
    mutant = swap_graph_outputs("stack", model)
    require_visible(mutant, model)
    require_caught(mutant, exported("stack"), traced("stack"), folder)


def test_a_norm_that_lost_its_cast_to_float32(
    exported: Callable[[str], Path], traced: Callable[[str], Path], folder: Path
) -> None:
    """In float64 nothing changes: the fault is that squares overflow half precision.

    Of the five norms it is the last that shows: what the layers add is small beside the residual.
    """
    model = onnx.load(exported("loud llama"))
    suite = sources()["loud llama"].suite()
    truths = [evaluate(model, feeds) for feeds in suite]
    made = lose_upcast("loud llama", model)
    assert len(made) == 5
    assert not shows_in_half(model, suite, truths)
    assert shows_in_half(made[-1].model, suite, truths)
    require_caught(made[-1], exported("loud llama"), traced("loud llama"), folder)


def shows_in_half(model: onnx.ModelProto, suite: list[Arrays], truths: list[Arrays]) -> bool:
    """Computed in the types that the graph says, is any output farther off than rounding?"""
    found = [evaluate(model, feeds, lift=False) for feeds in suite]
    pairs = zip(found, truths, strict=True)
    return any(differs(one, truth, torch.float16) for one, truth in pairs)


def test_a_change_that_shows_nowhere_is_not_drawn() -> None:
    """Half as much again of next to nothing is nothing; of 1e-5 it is seen at a tiny variance."""
    feeds = {"x": 3e-3 * np.random.default_rng(SEED).standard_normal((4, 8)).astype(np.float32)}
    shown = {}
    for epsilon in (1e-30, 1e-5):
        model = one_norm(epsilon)
        mutant = plant("epsilon times 1.5", "one norm", model, 0, np.random.default_rng(SEED))
        assert mutant is not None and mutant.blamed == {"norm"}
        truths = [evaluate(model, feeds)]
        assert not is_visible(model, [feeds], truths)
        shown[epsilon] = is_visible(mutant.model, [feeds], truths)
    assert shown == {1e-30: False, 1e-5: True}


def one_norm(epsilon: float) -> onnx.ModelProto:
    float32 = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node(
        "LayerNormalization", ["x", "w"], ["y"], name="norm", axis=-1, epsilon=epsilon
    )
    graph = onnx.helper.make_graph(
        [node],
        "one_norm",
        [onnx.helper.make_tensor_value_info("x", float32, ["batch", 8])],
        [onnx.helper.make_tensor_value_info("y", float32, ["batch", 8])],
        [onnx.numpy_helper.from_array(np.linspace(0.3, 0.9, 8, dtype=np.float32), "w")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])


def require_visible(mutant: Mutant, model: onnx.ModelProto) -> None:
    suite = sources()[GRAPHS[mutant.graph].source].suite()
    truths = [evaluate(model, feeds) for feeds in suite]
    assert is_visible(mutant.model, suite, truths), mutant.label


# --- the same in another way ----------------------------------------------------------------------


def test_ten_rewrites() -> None:
    assert len({name for name, _, _ in REWRITTEN}) >= 10


@pytest.mark.parametrize(("name", "graph", "least"), REWRITTEN)
def test_the_same_graph_written_in_another_way_passes(
    name: str,
    graph: str,
    least: int,
    exported: Callable[[str], Path],
    traced: Callable[[str], Path],
    folder: Path,
) -> None:
    model = onnx.load(exported(graph))
    rewritten, count = rewrite(name, model)
    assert count >= least
    for feeds in sources()[GRAPHS[graph].source].suite():
        found, truth = evaluate(rewritten, feeds), evaluate(model, feeds)
        for output, value in truth.items():
            verdict = judge(torch.from_numpy(found[output]).float(), torch.from_numpy(value))
            assert verdict.passed, f"the rewrite computes something else: {verdict}"
    path = folder / f"rewritten_{name.replace(' ', '_')}_{graph.replace(' ', '_')}.onnx"
    onnx.save(rewritten, path)
    evidence = ns.verify(program(traced(graph)), path)
    assert evidence.passed, evidence.failures
