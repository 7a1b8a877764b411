"""Random normalization aggregation: an ensemble of norms, one drawn per layer and batch.

What it computes
    Several candidate norms stand at one place, each with its own affine parameters and statistics;
    everything around them is shared. In training each call draws one candidate with equal
    probability and computes just that one; all samples of the batch take the same path. With K
    candidates at L places the network is an ensemble of K^L.

    The draw is a hash of the layer's seed and of how many draws came before. Both are in the
    state_dict, so resuming repeats the draws, and ranks that start from the same state take the
    same path without talking to each other. Candidates that were not drawn take part in the
    backward pass with a gradient of zero, so DDP needs no `find_unused_parameters`, and training
    on one device and on many is the same. A call inside a backward pass is a recomputation by
    activation checkpointing: it repeats the last draw.

Use it when
    Adversarial robustness is wanted: an attack computed on one path transfers badly to another.
    Judge such a defence with attacks that average over paths. Also to compare norms at one place
    under the same weights (`set_path`). Under torch.compile each candidate of each layer is a graph
    of its own; raise `torch._dynamo.config.recompile_limit` above their number, or the rest runs
    uncompiled.

From other norms
    From any norm. One candidate is the source itself, the old layer bit for bit. By default the
    other is a group norm on maps (a layer norm over all channels and space where the source has
    groups itself), an RMS norm on tokens (a layer norm where the source is an RMS norm). In eval
    mode the path is fixed to the source unless told otherwise, so eval outputs are unchanged
    (`EVAL`; else `RETRAIN`). The other candidates are untrained until trained or calibrated.
    Options `candidates` ("batchnorm,groupnorm"), `granularity` ("layer", or "network": all layers
    draw alike), `seed`, `eval_path` (a candidate or "random").

Inference
    `strip` gives the fixed path's plain norm, and `affine` is that norm's. `set_path(model,
    "random")` keeps it random in eval.

ONNX
    The fixed path's own form: for batch norm one BatchNormalization.

Example
    >>> import torch
    >>> from normsurgery.norms.randomaggregation import RandomAggregation, fixed_path
    >>> norms = {"batchnorm": torch.nn.BatchNorm2d(8), "groupnorm": torch.nn.GroupNorm(2, 8)}
    >>> layer = RandomAggregation(norms)
    >>> with fixed_path(layer, "groupnorm"):
    ...     y = layer(torch.randn(4, 8, 5, 5))
    >>> y.shape
    torch.Size([4, 8, 5, 5])

Reference
    Dong, Chen, Wang, Xu, "Random Normalization Aggregation for Adversarial Defense", NeurIPS 2022,
    section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from normsurgery import spec
from normsurgery.errors import CannotConvert, UnknownName, UsageError
from normsurgery.norms.carry import refusal, require_channels
from normsurgery.norms.examples import randomised
from normsurgery.norms.seeded_draws import SeededDraws, hashed
from normsurgery.spec import (
    Conversion,
    Example,
    Fidelity,
    Law,
    NormSpec,
    OnnxForm,
    Reading,
    ScaleAndShift,
    Source,
)
from normsurgery.treecopy import tree_copy

RANDOM = "random"
Path = int | str | None


class _TakePart(torch.autograd.Function):
    """`x` unchanged; in backward the parameters that were not used get a gradient of zero.

    It stands at the input of a norm, so that an in-place activation may overwrite the output. The
    zeros are written, not computed as 0 times something, which would turn inf into nan.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *unused: Tensor) -> Tensor:
        ctx.unused = unused  # leaves whose values are not needed: an optimizer may have moved them
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        return g, *(torch.zeros_like(parameter) for parameter in ctx.unused)


class RandomAggregation(SeededDraws):
    """Candidate norms of which each call in training uses one, drawn from a seeded sequence.

    candidates: registered name -> module, in the order that integer paths count. eval_path: the
    candidate that eval mode uses, the first by default, or "random". Input and output are the
    candidates'. The buffer `generator`, int64 (2,), is the seed and the number of draws so far.
    Raises UsageError without candidates, UnknownName for a path that is not one of them; the
    forward raises WrongShape for another number of channels.
    """

    def __init__(
        self, candidates: Mapping[str, nn.Module], *, seed: int = 0, eval_path: str | None = None
    ) -> None:
        super().__init__(seed)
        if not candidates:
            raise UsageError("randomaggregation needs at least one candidate norm")
        self.names = tuple(candidates)
        self.candidates = nn.ModuleDict(candidates)
        self.eval_path = self.named(eval_path if eval_path is not None else 0)
        self.forced: str | None = None
        first = spec.get(self.names[0])
        settings = first.read(self.candidates[first.name]).settings
        self.channel_axis = int(settings.get("channel_axis", 1))
        self.features = settings.get("features")

    def named(self, path: int | str) -> str:
        """The name of a path given by name or index, or "random"."""
        if isinstance(path, int) and 0 <= path < len(self.names):
            return self.names[path]
        if path in self.names or path == RANDOM:
            return str(path)
        raise UnknownName("path", str(path), (*self.names, RANDOM))

    def set_path(self, path: Path) -> None:
        """Use one candidate, or "random", in both modes; None: draw in training, not in eval."""
        self.forced = None if path is None else self.named(path)

    def policy(self) -> str:
        """The path that the next call takes: a candidate's name, or "random"."""
        if self.forced is not None:
            return self.forced
        return RANDOM if self.training else self.eval_path

    def forward(self, x: Tensor) -> Tensor:
        if self.features is not None:
            require_channels("randomaggregation", x, self.channel_axis, self.features)
        path = self.policy()
        if path == RANDOM:
            path = self.draw(self.names)
        if self.training and torch.is_grad_enabled():
            x = self._with_all_taking_part(x, path)
        return cast(Tensor, self.candidates[path](x))

    def _with_all_taking_part(self, x: Tensor, path: str) -> Tensor:
        unused = [
            parameter
            for name in self.names
            if name != path
            for parameter in self.candidates[name].parameters()
            if parameter.requires_grad
        ]
        if not unused:
            return x
        return cast(Tensor, _TakePart.apply(x, *unused))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"path={self.policy()}, eval_path={self.eval_path}"


def layers(model: nn.Module) -> tuple[RandomAggregation, ...]:
    """The random aggregations of a model, each once, in the order of its modules."""
    return tuple(m for m in model.modules() if isinstance(m, RandomAggregation))


def set_path(model: nn.Module, path: Path | Sequence[Path]) -> None:
    """Set the path of every layer: one for all, or a sequence with one for each.

    Raises UsageError where the model has no such layer or the sequence another length, UnknownName
    where a layer has no such candidate; then no path is changed.
    """
    found = layers(model)
    if not found:
        raise UsageError("the model has no randomaggregation layer; swap to it first")
    single = path is None or isinstance(path, (int, str))
    paths = [cast(Path, path)] * len(found) if single else list(cast("Sequence[Path]", path))
    if len(paths) != len(found):
        raise UsageError(f"{len(paths)} paths were given for {len(found)} randomaggregation layers")
    for layer, wanted in zip(found, paths, strict=True):
        if wanted is not None:
            layer.named(wanted)
    for layer, wanted in zip(found, paths, strict=True):
        layer.set_path(wanted)


@contextmanager
def fixed_path(model: nn.Module, path: Path | Sequence[Path]) -> Iterator[None]:
    """`set_path` for a while; afterwards every layer has the path it had."""
    before = [layer.forced for layer in layers(model)]
    set_path(model, path)
    try:
        yield
    finally:
        set_path(model, before)


def formula(
    x: Tensor, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], training: bool
) -> Tensor:
    """Float64 truth: the formula of the candidate that `settings["path"]` names."""
    return spec.get(settings["path"]).formula(x, tensors, settings, training)


def read(module: nn.Module) -> Reading:
    """The reading of the path that inference takes, or of the last one drawn if that is random."""
    assert isinstance(module, RandomAggregation)
    path = module.forced or module.eval_path
    random = path == RANDOM
    if random:
        path = module.last_drawn(module.names)
    reading = spec.get(path).read(module.candidates[path])
    tensors = {role: f"candidates.{path}.{name}" for role, name in reading.tensors.items()}
    return Reading(tensors, {**reading.settings, "path": path, "random": random})


def fixed(module: nn.Module) -> str:
    """The name of the one path that inference takes; raises CannotConvert if it stays random."""
    assert isinstance(module, RandomAggregation)
    path = module.forced or module.eval_path
    if path != RANDOM:
        return path
    raise CannotConvert(
        "",
        "randomaggregation",
        "one norm",
        "its path stays random in eval",
        f"Choose one with set_path: {', '.join(module.names)}.",
    )


def affine(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> ScaleAndShift:
    """The fixed path's scale and shift; none where the path stays random."""
    norm = spec.get(settings["path"])
    if settings["random"] or norm.affine is None:
        return None
    return norm.affine(tensors, settings)


def strip(module: nn.Module) -> nn.Module:
    """A copy of the fixed path's norm, in the mode of the whole."""
    chosen = cast(RandomAggregation, module).candidates[fixed(module)]
    return tree_copy(chosen, clone=True).train(module.training)


def underlying(source: Source) -> Source:
    """An ensemble that is converted again stands for the norm on its fixed path."""
    if not isinstance(source.module, RandomAggregation):
        return source
    path = str(source.settings["path"])
    return replace(source, kind=path, module=source.module.candidates[path])


def names_for(source: Source, wanted: str | Sequence[str] | None) -> tuple[str, ...]:
    """Canonical names of the candidates; by default the source and one that suits its place."""
    if wanted is None:
        return source.kind, _partner(source)
    listed = wanted.split(",") if isinstance(wanted, str) else wanted
    names = tuple(spec.canonical(name.strip()) for name in listed)
    if len(set(names)) != len(names) or len(names) < 2:
        raise UsageError(
            f"randomaggregation: candidates={wanted!r} must name at least two different norms"
        )
    for name in names:
        if spec.get(name).attach != "norm" or name == "randomaggregation":
            raise UsageError(f"randomaggregation: {name} cannot be a candidate at a norm's place")
    return names


def _partner(source: Source) -> str:
    if source.channel_axis == 1:  # a group of one channel is an instance norm: no ensemble
        grouped = source.kind in ("groupnorm", "instancenorm")
        return "layernorm_chw" if grouped else "groupnorm"
    return "layernorm" if source.kind == "rmsnorm" else "rmsnorm"


def candidate(source: Source, name: str, init: str) -> nn.Module:
    """The source itself for its own kind, and what its conversion to `name` builds otherwise.

    A norm written by hand is built anew as the registered class, whose settings can be read.
    """
    target = spec.get(name)
    own = source.module
    if name == source.kind and own is not None and isinstance(own, target.classes):
        return tree_copy(own, clone=True)
    conversion = target.conversion(source.kind)
    if conversion is None:
        raise refusal(
            source,
            "randomaggregation",
            f"there is no conversion from {source.kind} to the candidate {name}",
            "Choose other candidates.",
        )
    return conversion.build(source, init=init)


def stream(source: Source, seed: int, granularity: str) -> int:
    """The seed of one layer: its own by its path, or the whole network's."""
    if granularity not in ("layer", "network"):
        raise UsageError(
            f"randomaggregation has no granularity {granularity!r}. Valid: layer, network."
        )
    where = source.where if granularity == "layer" else ""
    return hashed(f"{seed}/{granularity}/{where}") % 2**63


def build(
    source: Source,
    *,
    init: str = "copy",
    candidates: str | Sequence[str] | None = None,
    granularity: str = "layer",
    seed: int = 0,
    eval_path: str | None = None,
) -> nn.Module:
    """The ensemble at the source's place; `init` is for the candidates that are not the source."""
    source = underlying(source)
    names = names_for(source, candidates)
    norms = {name: candidate(source, name, init) for name in names}
    path = evaluated(source, names, eval_path)
    aggregation = RandomAggregation(
        norms, seed=stream(source, int(seed), granularity), eval_path=path
    )
    return aggregation.train(source.training)


def evaluated(source: Source, names: Sequence[str], wanted: str | None) -> str:
    """The path in eval: the wanted one, else the source's own norm, else the first candidate."""
    if wanted == RANDOM:
        return RANDOM
    if wanted is None:
        return source.kind if source.kind in names else names[0]
    path = spec.canonical(wanted)
    if path not in names:
        raise UnknownName("path", wanted, (*names, RANDOM))
    return path


def resolve(source: Source, options: Mapping[str, Any]) -> Mapping[str, Any]:
    source = underlying(source)
    names = names_for(source, options.get("candidates"))
    return {
        "granularity": "layer",
        "seed": 0,
        **options,
        "candidates": ",".join(names),
        "eval_path": evaluated(source, names, options.get("eval_path")),
    }


def fidelity(source: Source, options: Mapping[str, Any]) -> Fidelity:
    """What the path in eval keeps there; more only if all candidates keep it in training too."""
    source = underlying(source)
    names = names_for(source, options.get("candidates"))
    promises = {name: _kept_by(source, name) for name in names}
    path = evaluated(source, names, options.get("eval_path"))
    least = min(promises.values())
    if path == RANDOM or promises[path] == Fidelity.RETRAIN:
        return least
    return max(Fidelity.EVAL, least)


def _kept_by(source: Source, name: str) -> Fidelity:
    conversion = spec.get(name).conversion(source.kind)
    if name == source.kind or conversion is None:
        return Fidelity.IDENTICAL if name == source.kind else Fidelity.RETRAIN
    resolved = conversion.resolve(source, {}) if conversion.resolve else {}
    return conversion.promise(source, resolved)


def _example(norm: nn.Module, groups: int) -> RandomAggregation:
    norms = {"batchnorm": norm, "groupnorm": nn.GroupNorm(groups, 2 * groups)}
    aggregation = randomised(RandomAggregation(norms, seed=7))
    aggregation.set_path("batchnorm")
    return aggregation


def examples() -> tuple[Example, ...]:
    """On the batch-norm path, so that a law has one answer."""
    return (
        Example("maps", lambda: _example(nn.BatchNorm2d(6), 3), ((4, 6, 5, 3), (2, 6, 1, 1))),
        Example("sequences", lambda: _example(nn.BatchNorm1d(4), 2), ((3, 4, 7),)),
    )


NORM = NormSpec(
    name="randomaggregation",
    also=("rna",),
    summary="an ensemble of norms, one drawn per layer and batch",
    paper="NeurIPS 2022",
    classes=(RandomAggregation,),
    read=read,
    formula=formula,
    examples=examples,
    conversions={"*": Conversion(build, fidelity, resolve)},
    laws=frozenset(
        {
            Law.SHIFT_INVARIANT,
            Law.SCALE_INVARIANT,
            Law.PERMUTATION_EQUIVARIANT,
            Law.AFFINE_IN_EVAL,
        }
    ),
    onnx=OnnxForm({18: ("BatchNormalization",)}),
    affine=affine,
    strip=strip,
    random=True,
)
