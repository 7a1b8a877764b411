"""Random models: a fold preserves the function or is refused, and few that could be are.

`make test` takes fixed seeds, so many that every rule and every hazard comes up; `make campaign`
more, and fresh ones. benchmarks/fold_random.py does the same, and prints what it counted.
"""

from __future__ import annotations

from dataclasses import replace

import campaign
import pytest
import torch
from random_models.grow import grow
from random_models.interpret import Call, run
from random_models.oracle import judge_norm
from random_models.program import Layer, Node, Program
from random_models.render import built
from random_models.tally import tally
from random_models.trial import calls, outputs, tells, try_fold

FOLDED = campaign.seeds(range(400, 700), 2400)
PARTS = [FOLDED[first : first + 600] for first in range(0, len(FOLDED), 600)]
EVERY = 10  # of so many models, one is also folded again
JUDGED = campaign.seeds(range(500_000, 500_100), 1200)  # those whose every norm the oracle judges
SHARE = 0.99
LEAST = 1  # how often every rule and every hazard comes up in each part
BOUND = 1e-10  # what a formula is held to, in float64


@pytest.mark.campaign
@pytest.mark.parametrize("seeds", PARTS, ids=str)
def test_a_fold_preserves_the_function_or_is_refused(seeds: range) -> None:
    """Zero wrong folds, and every rule and every hazard comes up."""
    outcomes = [try_fold(seed, oracle=False, again=seed % EVERY == 0) for seed in seeds]
    failed = [outcome.describe() for outcome in outcomes if outcome.wrong]
    assert not failed, f"{len(failed)} of {len(seeds)} failed; the first: {failed[0]}"
    assert not tally(outcomes).rarer_than(LEAST)


@pytest.mark.campaign
def test_what_the_oracle_can_fold_is_folded() -> None:
    outcomes = [try_fold(seed, oracle=True, again=False) for seed in JUDGED]
    failed = [outcome.describe() for outcome in outcomes if outcome.wrong]
    assert not failed, f"{len(failed)} of {len(JUDGED)} failed; the first: {failed[0]}"
    counted = tally(outcomes)
    assert counted.foldable > len(JUDGED) and counted.share >= SHARE, "\n".join(counted.left)


@pytest.mark.campaign
def test_the_structure_computes_what_the_model_computes() -> None:
    """The oracle judges a structure; it must be that of the model which is folded."""
    for seed in campaign.seeds(range(100), 1000):
        program = replace(grow(seed), dtype="float64")
        with built(program) as model, torch.no_grad():
            tensors = {name: t.clone() for name, t in model.state_dict().items()}
            if tells(program, tensors):
                for call in calls(program):
                    assert _error(program, model, tensors, call) < BOUND, seed


def _error(
    program: Program, model: torch.nn.Module, tensors: dict[str, torch.Tensor], call: Call
) -> float:
    values = run(program, tensors, call)
    got = outputs(model, call)
    errors = [
        float((value - values[name]).abs().max() / values[name].abs().max())
        for name, value in zip(program.outputs, got, strict=True)
    ]
    return max(errors)


def _conv(name: str, padding: int, mode: str) -> Layer:
    make = f"self.{name} = nn.Conv2d(3, 3, 3, padding={padding}, padding_mode={mode!r})"
    settings = {"dims": 2, "channels": 3, "transposed": False, "groups": 1, "kernel": 3}
    settings |= {"stride": 1, "dilation": 1, "padding": padding, "mode": mode, "bias_size": 3}
    return Layer(name, "conv2d", (make,), ("weight", "bias"), settings)


NORM = Layer(
    "norm",
    "batchnorm",
    ("self.norm = nn.BatchNorm2d(3)",),
    ("weight", "bias", "running_mean", "running_var"),
    {"after": 2, "eps": 1e-5},
)


def _program(layers: list[Layer], nodes: list[Node], *outputs: str) -> Program:
    return Program(
        seed=0,
        shape=(3, 6, 6),
        ids=False,
        layers={layer.name: layer for layer in layers},
        nodes=tuple(nodes),
        outputs=outputs or (nodes[-1].name,),
        ties={},
        hooks={},
        hazards=frozenset(),
    )


def _call(name: str, of: str, layer: str) -> Node:
    return Node(name, "layer", (of,), f"self.{layer}({{0}})", layer)


A, B = _conv("a", 1, "zeros"), _conv("b", 1, "zeros")
AFTER_A = [_call("y", "x", "a"), _call("z", "y", "norm")]
RELU = Node("r", "relu", ("y",), "F.relu({0})")
KNOWN = {
    "after a convolution": (_program([A, NORM], AFTER_A), True),
    "whose output is returned": (_program([A, NORM], AFTER_A, "z", "y"), False),
    "behind a relu": (_program([A, NORM], [AFTER_A[0], RELU, _call("z", "r", "norm")]), False),
    "of a convolution called twice": (
        _program([A, NORM], [*AFTER_A, _call("w", "z", "a")]),
        False,
    ),
    "before zero padding": (
        _program([NORM, B], [_call("y", "x", "norm"), _call("z", "y", "b")]),
        False,
    ),
    "before reflected padding": (
        _program([NORM, _conv("b", 1, "reflect")], [_call("y", "x", "norm"), _call("z", "y", "b")]),
        True,
    ),
    "before no padding": (
        _program([NORM, _conv("b", 0, "zeros")], [_call("y", "x", "norm"), _call("z", "y", "b")]),
        True,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_oracle_on_what_is_known(name: str) -> None:
    program, foldable = KNOWN[name]
    with built(program) as model:
        assert judge_norm(program, dict(model.state_dict()), "norm").foldable is foldable
