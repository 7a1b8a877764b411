"""What a normalization *is*, with no model around it, and the registry of all of them.

This module imports no torch at run time, so that names and documentation are there at once.
"""

from __future__ import annotations

import enum
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from normsurgery.errors import NormsurgeryError, UnknownName, UsageError
from normsurgery.optiontypes import wanted_instead

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from normsurgery.norms import Row

Attach = Literal["norm", "weight", "layer"]
ENTRY_POINT_GROUP = "normsurgery.norms"


class Fidelity(enum.IntEnum):
    """What a step promises; a higher value promises more, so `a >= b` reads "at least"."""

    RETRAIN = 0  # another function: train it or calibrate it
    EVAL = 1  # the same outputs in eval mode
    FORWARD = 2  # the same outputs in both modes, gradients differ by design
    IDENTICAL = 3  # the same outputs and gradients in both modes

    @classmethod
    def parse(cls, text: str) -> Fidelity:
        if text.upper() not in cls.__members__:
            raise UnknownName("fidelity", text, (name.lower() for name in cls.__members__))
        return cls[text.upper()]


class Law(enum.Enum):
    """A property that tests check; an undeclared one must fail. In train mode, for eps -> 0."""

    SHIFT_INVARIANT = "norm(x + c) == norm(x) for a scalar c"
    SCALE_INVARIANT = "norm(a x) == norm(x) for a > 0; hence <w, dL/dw> = 0 for a weight w upstream"
    BATCH_INDEPENDENT = "the output for one sample does not depend on the others"
    PERMUTATION_EQUIVARIANT = "permuting the batch permutes the output"
    ROTATION_EQUIVARIANT = (
        "without its affine parameters it commutes with rotations of the channels"
    )
    AFFINE_IN_EVAL = "in eval mode it is one scale and one shift per channel"


@dataclass(frozen=True)
class Reading:
    """One norm as plain values: which local tensors play which role, and its settings.

    Roles: `weight`, `bias`, `running_mean`, `running_var`, `num_batches_tracked`, or a norm's own.
    Settings every reading of an activation norm has: `eps` (float), `channel_axis` (int: 1 for
    (N, C, ...), -1 for tokens), `features` (size of that axis; for a norm over several last
    dimensions `normalized_shape` stands beside it). Others belong to the kind: `num_groups`,
    `momentum`, `weight_offset`, `cast`, ... All settings are JSON values.
    """

    tensors: Mapping[str, str]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """The norm (weight, layer) that is being replaced, as values, however it was written.

    `tensors` are by role and are the model's own objects (a conversion clones what it keeps).
    `shape` is the smallest input shape any recorded call had, or None if no call was recorded.
    `module` is the object replaced, or None where the site is a call or a formula in a forward.
    """

    kind: str
    where: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    shape: tuple[int, ...] | None = None
    module: nn.Module | None = None
    training: bool = True
    dtype: torch.dtype | None = None  # of the norm's own parameters, else of its input
    device: torch.device | None = None

    @property
    def channel_axis(self) -> int:
        return int(self.settings["channel_axis"])

    @property
    def features(self) -> int:
        return int(self.settings["features"])

    @property
    def eps(self) -> float:
        return float(self.settings["eps"])


# (scale, shift) per channel, either None where it is neutral; None where it is no such thing.
ScaleAndShift = tuple["Tensor | None", "Tensor | None"] | None
AffineOf = Callable[[Mapping[str, "Tensor"], Mapping[str, Any]], ScaleAndShift]

FidelityOf = Callable[[Source, Mapping[str, Any]], Fidelity]


Companions = Callable[
    [Source, "nn.Module", Mapping[str, Any]],
    Mapping[str, Callable[["nn.Module"], "nn.Module"]],
]


@dataclass(frozen=True)
class Conversion:
    """How a norm is made from another kind.

    `build(source, *, init="copy", **options) -> nn.Module` returns a new module in the dtype, on
    the device and in the mode of the source; its keyword-only parameters are the options of
    `--set`. It raises `CannotConvert` where the result would be constant or have no gradient.
    `fidelity` is what the result promises; a function where it depends on source or options.
    `resolve` fills in what the build would choose (num_groups), without building: plan shows it.
    `companions(source, built, options)` gives, for a norm that takes in or listens to another
    module (the activation after it), that module's path in the model and what replaces it: a
    function from the module found there to the new one, called after `build`; {} where nothing
    else changes.
    """

    build: Callable[..., nn.Module]
    fidelity: Fidelity | FidelityOf
    resolve: Callable[[Source, Mapping[str, Any]], Mapping[str, Any]] | None = None
    companions: Companions | None = None

    def promise(self, source: Source, options: Mapping[str, Any]) -> Fidelity:
        return self.fidelity(source, options) if callable(self.fidelity) else self.fidelity

    def option_names(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.build).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "init")

    def check_options(self, options: Mapping[str, Any], to: str) -> None:
        """Raises UsageError for a name that is no option, or a value of the wrong type."""
        valid = self.option_names()
        for name, value in options.items():
            if name not in valid:
                raise UsageError(
                    f"{to} has no option {name!r}. Valid here: {', '.join(valid) or 'none'}."
                )
            wanted = wanted_instead(self.build, name, value)
            if wanted is not None:
                raise UsageError(f"{to}: {name} must be {wanted}, not {value!r}.")


@dataclass(frozen=True)
class Example:
    """A module with random parameters far from 0 and 1, and inputs it accepts, for the laws.

    further: for an input, the named further inputs of the norm.
    """

    label: str
    module: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    further: Callable[[Tensor], Mapping[str, Tensor]] | None = None

    def named(self, x: Tensor) -> Mapping[str, Tensor]:
        return {} if self.further is None else self.further(x)


@dataclass(frozen=True)
class OnnxForm:
    """Operators (in graph order, as `export` writes them in float32, the batch dynamic where there
    is one) that the norm's first example becomes, by lowest opset."""

    operators: Mapping[int, tuple[str, ...]]

    def at(self, opset: int) -> tuple[str, ...]:
        return self.operators[max(known for known in self.operators if known <= opset)]


@dataclass(frozen=True)
class Spelling:
    """Functions of torch, and operators of ATen, that compute a norm.

    calls: the functions; an operator by its name (`aten::native_layer_norm`), for all overloads.
    read: what a call says, of its arguments by their names (those that were left out as they are by
        default) and the shape and dtype of its input. `Reading.tensors` maps roles to the names of
        arguments. A text instead says why this call is not known.
    """

    calls: tuple[Callable[..., Any] | str, ...]
    read: Callable[[Mapping[str, Any], tuple[int, ...], torch.dtype], Reading | str]


@dataclass(frozen=True)
class NormSpec:
    """One normalization: everything the tool knows about it, in one value.

    also: further names that look-up knows.
    formula: float64 truth, `formula(x, tensors, settings, training) -> y`, in plain torch; it never
        mutates. With `training` it uses batch statistics where the norm has any.
        A norm with further `inputs` takes them by name.
    inputs: the names of the further tensors that a call is given (a gate, a mask, a condition), in
        order; the modules take them under these names.
    update: the state after a call in training, by role: `update(x, tensors, settings)`, float64.
    gradient: where backward is not the derivative of the formula: the float64 gradients that
        `gradient(x, g, tensors, settings, training)` gives for the gradient g of the output, of
        "input" and of every learned role.
    read: the Reading of one of the norm's own modules (`classes`); `Reading.tensors` maps roles to
        attribute names of that module.
    sample_rank: of a module that also takes a single sample, without a batch axis: the rank of that
        sample, whose first axis is that of the channels; None of any other.
    hypotheses: the Readings (without `eps`) that a hand-written module could have, given its input
        shape and its tensors' shapes by name; the proof of `find` tries each. None: never proven.
    conversions: by source kind; "*" stands for every kind that has no entry of its own.
    affine: what it is in eval, of its float64 tensors by role and its settings: a scale and a shift
        of shape (features,) or of one element, either None where it is neutral; None where with
        these tensors it is no scale and shift. It is also called with vectors of ones, only to
        learn which of the two there are and which settings it reads. Where there is no `affine`,
        `why_not_affine` says why.
    spellings: the functions and operators that compute it.
    casts: the orders of casts that half precision knows, as options `cast` of the conversion to
        itself; told apart bit for bit.
    operator: the ONNX operator (as the newest opset calls it) that computes a Reading in eval.
        Raises NoOperator with the reason where there is none; without it there never is.
    centre: the role of the statistic that is subtracted from the input before anything else in
        eval, so that it can take up a shift of the input.
    without_mean: the norm that it is where the mean over its channels is zero already.
    tail: its weight and bias (roles of these names) come last, per channel, so that they can be
        folded into whatever reads the output.
    bake: of a norm that acts on a weight, the weight that is used, of the tensors by role that it
        is computed from (float64) and the settings.
    idle: of a model, what `strip` leaves behind elsewhere in it and nothing waits for any more, and
        what stands in its place.
    strip: the plain module that computes the same forward, for `fold`, or None.
    found_by_class: False where a module of these classes is no norm by itself (`nn.Identity`).
    """

    name: str
    summary: str
    paper: str
    classes: tuple[type, ...]
    read: Callable[[nn.Module], Reading]
    formula: Callable[..., Tensor]
    examples: Callable[[], tuple[Example, ...]]
    conversions: Mapping[str, Conversion]
    laws: frozenset[Law]
    onnx: OnnxForm | None
    attach: Attach = "norm"
    also: tuple[str, ...] = ()
    why_not_onnx: str = ""
    sample_rank: Callable[[nn.Module], int | None] | None = None
    hypotheses: (
        Callable[[tuple[int, ...], Mapping[str, tuple[int, ...]]], Iterator[Reading]] | None
    ) = None
    affine: AffineOf | None = None
    why_not_affine: str = ""
    inputs: tuple[str, ...] = ()
    update: (
        Callable[[Tensor, Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Tensor]] | None
    ) = None
    gradient: Callable[..., Mapping[str, Tensor]] | None = None
    spellings: tuple[Spelling, ...] = ()
    casts: tuple[str, ...] = ()
    operator: Callable[[Reading], str] | None = None
    centre: str = ""
    without_mean: str = ""
    tail: bool = False
    bake: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Tensor] | None = None
    idle: Callable[[nn.Module], list[tuple[nn.Module, nn.Module]]] | None = None
    strip: Callable[[nn.Module], nn.Module] | None = None
    random: bool = False
    found_by_class: bool = True
    owner: str = "normsurgery"

    def reference(self, module: nn.Module, x: Tensor, **inputs: Tensor) -> Tensor:
        """The float64 output the module should have for `x`, by the formula alone."""
        tensors, settings = self.values(module)
        further = {name: tensor.double() for name, tensor in inputs.items()}
        return self.formula(x.double(), tensors, settings, module.training, **further)

    def values(self, module: nn.Module) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """The float64 tensors of one of its own modules by role, and its settings."""
        reading = self.read(module)
        tensors = {
            role: tensor.detach().double()
            for role, name in reading.tensors.items()
            if (tensor := _attribute(module, name)) is not None
        }
        return tensors, reading.settings

    def scale_and_shift(
        self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> ScaleAndShift:
        """What it is in eval, else what comes last in it; None where that is neither."""
        whole = None if self.affine is None else self.affine(tensors, settings)
        if whole is None and self.tail:
            return weight_and_bias(tensors, settings)
        return whole

    def conversion(self, kind: str) -> Conversion | None:
        """None where there is none, or where the other is given what this cannot take."""
        if kind in _registry.specs and not set(_registry.specs[kind].inputs) <= set(self.inputs):
            return None
        return self.conversions.get(kind, self.conversions.get("*"))


def weight_and_bias(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """`weight + weight_offset` and `bias`, each None where there is no such tensor."""
    weight = tensors.get("weight")
    if weight is not None:
        weight = weight + settings.get("weight_offset", 0.0)
    return weight, tensors.get("bias")


def _attribute(module: nn.Module, dotted: str) -> Any:
    value: Any = module
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


@dataclass
class _Registry:
    specs: dict[str, NormSpec] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)  # plugin name -> why it did not load
    plugins_loaded: bool = False


_registry = _Registry()


def names() -> tuple[str, ...]:
    """Canonical names of all registered norms, built-in ones first, without importing torch."""
    from normsurgery.norms import NAMES

    load_plugins()
    return NAMES + tuple(name for name in _registry.specs if name not in NAMES)


def canonical(name: str) -> str:
    """The canonical name for any accepted spelling: `GN`, `GroupNorm`, `group_norm`."""
    known, plain = names(), _plain(name)
    for candidate in known:
        if plain in (_plain(candidate), _plain(candidate.removesuffix("norm"))):
            return candidate
    for candidate in known:
        if plain in map(_plain, row(candidate).also):
            return candidate
    raise UnknownName("norm", name, known)


def row(name: str) -> Row:
    """What a norm says of itself in short, of a canonical name, without importing torch."""
    from normsurgery import norms

    if name in norms.NAMES:
        return norms.row(name)
    third = _registry.specs[name]
    return norms.Row(third.summary, third.attach, third.also)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def get(name: str) -> NormSpec:
    """The spec of a norm, by any accepted spelling. Raises UnknownName."""
    from normsurgery.norms import file_of

    found = canonical(name)
    if found not in _registry.specs:
        module = importlib.import_module(f"normsurgery.norms.{file_of(found).stem}")
        _registry.specs[found] = module.NORM
    return _registry.specs[found]


def specs() -> tuple[NormSpec, ...]:
    """All registered specs (imports torch)."""
    return tuple(get(name) for name in names())


def register(spec: NormSpec, *, owner: str = "register()") -> NormSpec:
    """Add a third party's norm. Raises UsageError naming both owners if the name is taken."""
    from normsurgery.norms import NAMES

    plain = _plain(spec.name)
    for taken in (*NAMES, *_registry.specs):
        if _plain(taken) == plain:
            holder = "normsurgery" if taken in NAMES else _registry.specs[taken].owner
            raise UsageError(
                f"the norm name {spec.name!r} is defined twice: by {holder} and by {owner}. "
                "Rename one of them."
            )
    from dataclasses import replace

    _registry.specs[spec.name] = replace(spec, owner=owner)
    return _registry.specs[spec.name]


def load_plugins() -> None:
    """Register every norm of installed packages; one that fails is kept in `broken_plugins()`."""
    if _registry.plugins_loaded:
        return
    _registry.plugins_loaded = True
    for point in entry_points(group=ENTRY_POINT_GROUP):
        owner = point.dist.name if point.dist else point.value
        try:
            loaded = point.load()
            for spec in loaded if isinstance(loaded, (tuple, list)) else (loaded,):
                register(spec, owner=owner)
        except NormsurgeryError as error:
            _registry.broken[owner] = str(error)
        except Exception as error:  # a third party's import may fail in any way
            _registry.broken[owner] = f"{type(error).__name__}: {error}"


def broken_plugins() -> Mapping[str, str]:
    """Plugins that did not load, with the reason."""
    load_plugins()
    return MappingProxyType(_registry.broken)
