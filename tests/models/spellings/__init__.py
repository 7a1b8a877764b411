"""Small models, one for every way a norm is written, and some that only look like one.

`SPELLINGS` says of each what a correct survey holds; the counts and settings are literals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.spellings import by_hand, in_forwards, lookalikes, structure
from models.spellings.by_hand import settled
from torch import nn

TOKENS = (2, 5, 12)
MAPS = (3, 8, 6, 5)


@dataclass(frozen=True)
class Expected:
    """The facts of one Site. A setting that is None is not compared."""

    kind: str
    paths: tuple[str, ...]
    form: str = "module"
    calls: int = 1
    eps: float | None = None
    channel_axis: int = -1
    features: int | None = None
    weight_offset: float = 0.0
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Spelling:
    """A model, the shape of its one input, and its norms. `skips` are paths that must be Skips."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sites: tuple[Expected, ...]
    skips: tuple[str, ...] = ()


def _tokens(norm: Callable[[], nn.Module], kind: str, eps: float, **facts: Any) -> Spelling:
    expected = Expected(kind, ("norm",), eps=eps, features=12, **facts)
    return Spelling(lambda: by_hand.Tokens(norm()), TOKENS, (expected,))


def _maps(norm: Callable[[], nn.Module], kind: str, eps: float, **facts: Any) -> Spelling:
    expected = Expected(kind, ("norm",), eps=eps, channel_axis=1, features=8, **facts)
    return Spelling(lambda: by_hand.Maps(norm()), MAPS, (expected,))


def _token_call(
    build: Callable[[], nn.Module], kind: str, eps: float | None, **facts: Any
) -> Spelling:
    expected = Expected(kind, ("",), **{"form": "call", "eps": eps, "features": 12, **facts})
    return Spelling(build, TOKENS, (expected,))


def _map_call(build: Callable[[], nn.Module], kind: str) -> Spelling:
    expected = Expected(kind, ("",), form="call", eps=1e-3, channel_axis=1, features=8)
    return Spelling(build, MAPS, (expected,))


def _none(build: Callable[[], nn.Module], shape: tuple[int, ...] = TOKENS) -> Spelling:
    return Spelling(build, shape, ())


OUTSIDE = (("eps_outside", True),)
SPELLINGS: dict[str, Spelling] = {
    "rms by rsqrt": _tokens(lambda: by_hand.RmsByRsqrt(12), "rmsnorm", 1e-5),
    "rms by sqrt and divide": _tokens(
        lambda: by_hand.RmsBySqrtAndDivide(12, 1e-6), "rmsnorm", 1e-6
    ),
    "rms by pow(-0.5) of square": _tokens(lambda: by_hand.RmsByPower(12), "rmsnorm", 1e-5),
    "rms by x*x": _tokens(lambda: by_hand.RmsByProduct(12), "rmsnorm", 1e-5),
    "rms by reciprocal": _tokens(lambda: by_hand.RmsByReciprocal(12, 1e-3), "rmsnorm", 1e-3),
    "rms with eps outside": _tokens(
        lambda: by_hand.RmsOutside(12), "rmsnorm", 1e-5, settings=OUTSIDE
    ),
    "rms in float32": _tokens(
        lambda: by_hand.RmsUpcast(12), "rmsnorm", 1e-5, settings=(("cast", "float32"),)
    ),
    "rms of 1 + weight": _tokens(
        lambda: by_hand.RmsOfOnePlusWeight(12),
        "rmsnorm",
        1e-5,
        weight_offset=1.0,
        settings=(("cast", "float32_weight"),),
    ),
    "rms without weight": _tokens(by_hand.RmsWithoutWeight, "rmsnorm", 1e-6),
    "rms in place": _tokens(lambda: by_hand.RmsInPlace(12), "rmsnorm", 1e-5),
    "pixel norm": _maps(lambda: by_hand.PixelNorm(8, 1e-8), "rmsnorm", 1e-8),
    "rms by autograd function": _tokens(lambda: by_hand.RmsByAutogradFunction(12), "rmsnorm", 1e-5),
    "torch rms": _tokens(lambda: settled(nn.RMSNorm(12, 1e-4)), "rmsnorm", 1e-4),
    "layer by var": _tokens(lambda: by_hand.LayerByVariance(12, bias=True), "layernorm", 1e-5),
    "layer by centred squares": _tokens(
        lambda: by_hand.LayerByCentredSquares(12), "layernorm", 1e-5
    ),
    "layer by var_mean": _tokens(
        lambda: by_hand.LayerByVarMean(12, 1e-6, bias=True), "layernorm", 1e-6
    ),
    "layer by mean, std + eps": _tokens(
        lambda: by_hand.LayerByStd(12, 1e-6, bias=True),
        "layernorm",
        1e-6,
        settings=(*OUTSIDE, ("unbiased", True)),
    ),
    "layer in float32": _tokens(lambda: by_hand.LayerUpcast(12, bias=True), "layernorm", 1e-5),
    "torch layer": _tokens(lambda: settled(nn.LayerNorm(12, 1e-4)), "layernorm", 1e-4),
    "torch layer without bias": _tokens(
        lambda: settled(nn.LayerNorm(12, bias=False)), "layernorm", 1e-5
    ),
    "layer over channels": _maps(
        lambda: by_hand.LayerOverChannels(8, bias=True), "layernorm2d", 1e-5
    ),
    "layer permuted": _maps(lambda: by_hand.LayerPermuted(8, 1e-6, bias=True), "layernorm2d", 1e-6),
    "group by hand": _maps(
        lambda: by_hand.GroupByHand(8, bias=True), "groupnorm", 1e-5, settings=(("num_groups", 4),)
    ),
    "instance by hand": _maps(lambda: by_hand.InstanceByHand(8, bias=True), "instancenorm", 1e-5),
    "frozen batch norm by hand": _maps(lambda: by_hand.FrozenByHand(8), "batchnorm", 1e-5),
    "torch layer over three axes": Spelling(
        lambda: by_hand.Maps(settled(nn.LayerNorm((8, 4, 3)))),
        MAPS,
        (Expected("layernorm", ("norm",), eps=1e-5, settings=(("normalized_shape", [8, 4, 3]),)),),
    ),
    "torch instance without weight": _maps(lambda: nn.InstanceNorm2d(8), "instancenorm", 1e-5),
    "torch batch": _maps(lambda: settled(nn.BatchNorm2d(8, 1e-3)), "batchnorm", 1e-3),
    "torch sync batch": _maps(lambda: settled(nn.SyncBatchNorm(8, 1e-3)), "batchnorm", 1e-3),
    "torch group": _maps(
        lambda: settled(nn.GroupNorm(4, 8)), "groupnorm", 1e-5, settings=(("num_groups", 4),)
    ),
    "torch instance": _maps(
        lambda: settled(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
        "instancenorm",
        1e-5,
    ),
    "batch norm with activation": _maps(
        lambda: settled(in_forwards.NormThenActivation(8)), "batchnorm", 1e-5, form="call"
    ),
    "batch norm with activation, written out": _maps(
        lambda: settled(in_forwards.OwnBatchNormThenActivation(8)), "batchnorm", 1e-5, form="call"
    ),
    "F.layer_norm": _token_call(in_forwards.CallsLayerNorm, "layernorm", 1e-3),
    "F.rms_norm": _token_call(in_forwards.CallsRmsNorm, "rmsnorm", 1e-4),
    "F.normalize": _token_call(in_forwards.CallsNormalize, "l2norm", None),
    "division by the length": _token_call(
        in_forwards.DividesByLength, "l2norm", None, form="formula"
    ),
    "formula over several statements": _token_call(
        in_forwards.WritesLayerNorm, "layernorm", 1e-3, form="formula"
    ),
    "F.layer_norm in a function": _token_call(in_forwards.CallsWrapper, "layernorm", 1e-5),
    "F.layer_norm in a loop": _token_call(in_forwards.CallsTwice, "layernorm", 1e-3, calls=3),
    "adaptive layer norm": _token_call(in_forwards.Modulated, "layernorm", 1e-6),
    "F.batch_norm": _map_call(in_forwards.CallsBatchNorm, "batchnorm"),
    "F.group_norm": _map_call(in_forwards.CallsGroupNorm, "groupnorm"),
    "F.instance_norm": _map_call(in_forwards.CallsInstanceNorm, "instancenorm"),
    "called twice": Spelling(
        structure.CalledTwice,
        TOKENS,
        (Expected("layernorm", ("norm",), calls=2, eps=1e-5, features=12),),
    ),
    "tied under two names": Spelling(
        structure.Tied,
        TOKENS,
        (Expected("layernorm", ("first", "second"), calls=2, eps=1e-5, features=12),),
    ),
    "forward called, not the module": Spelling(
        lambda: structure.CallsForward(settled(nn.LayerNorm(12))),
        TOKENS,
        (Expected("layernorm", ("norm",), eps=1e-5, features=12),),
    ),
    "two norms with one weight": Spelling(
        structure.SharesWeight,
        TOKENS,
        (
            Expected("layernorm", ("first",), eps=1e-5, features=12),
            Expected("layernorm", ("second",), eps=1e-5, features=12),
        ),
    ),
    "two norms on one line": Spelling(
        in_forwards.CallsOnOneLine,
        TOKENS,
        (
            Expected("layernorm", ("",), form="call", eps=1e-5, features=12),
            Expected("layernorm", ("",), form="call", eps=1e-5, features=12),
        ),
    ),
    "list of norms": Spelling(
        structure.ListOfNorms,
        TOKENS,
        (
            Expected("layernorm", ("norms.0",), eps=1e-5, features=12),
            Expected("rmsnorm", ("norms.1",), eps=1e-6, features=12),
        ),
    ),
    "forward FX cannot trace": Spelling(
        structure.TakesAnything, TOKENS, (Expected("rmsnorm", ("norm",), eps=1e-5, features=12),)
    ),
    "forward that cannot be exported": Spelling(
        structure.LeavesTorch, TOKENS, (Expected("rmsnorm", ("norm",), eps=1e-5, features=12),)
    ),
    "a LayerNorm alone": Spelling(
        lambda: settled(nn.LayerNorm(12)),
        TOKENS,
        (Expected("layernorm", ("",), eps=1e-5, features=12),),
    ),
    "a hand-written norm alone": Spelling(
        lambda: by_hand.RmsUpcast(12), TOKENS, (Expected("rmsnorm", ("",), eps=1e-5, features=12),)
    ),
    "squeeze and excite": _none(lookalikes.SqueezeAndExcite, MAPS),
    "global response": _none(lookalikes.GlobalResponse, MAPS),
    "softmax attention": _none(lookalikes.Attention),
    "sum to one": _none(lookalikes.SumToOne),
    "feed-forward named LayerNorm": _none(lookalikes.LayerNorm),
    "input standardised by buffers": _none(lookalikes.StandardisesInput, MAPS),
    "distances": _none(lookalikes.Distances),
    "gelu and dropout": _none(lambda: nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Dropout())),
    "partial rms": Spelling(
        lambda: by_hand.Tokens(lookalikes.PartialRms(12)), TOKENS, (), skips=("norm",)
    ),
    "division by the deviation": Spelling(
        lambda: by_hand.Tokens(lookalikes.DividesByDeviation(12)), TOKENS, (), skips=("norm",)
    ),
    "mixed moments": Spelling(
        lambda: by_hand.Tokens(lookalikes.CubicMean(12)), TOKENS, (), skips=("norm",)
    ),
}
