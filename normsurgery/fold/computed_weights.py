"""Which weights of a module are computed from other tensors, by which norm, and whether the plain
layer that holds the result may take its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.edits import Bake, Drop
from normsurgery.fold.inference_forms import strippable
from normsurgery.fold.plain_layers import HookOfWeight, hooks_of_weight, make_plain, plain_class
from normsurgery.fold.standardized_forwards import (
    computes_its_weight,
    example_inputs,
    read_standardization,
)
from normsurgery.fold.weight_formulas import RELATIVE, baked, relative_error
from normsurgery.norms.weightstandardization import (
    NORM,
    WeightStandardization,
    standardization_settings,
)
from normsurgery.precision import float64_copy, lifted
from normsurgery.surgery.inherit import HOOKS, tensor_in
from normsurgery.surgery.references import ModuleReferences
from normsurgery.treecopy import tree_copy


@dataclass(frozen=True)
class ComputedWeight:
    """One tensor of the module at `path` that is computed from others.

    tensors: role -> local name. in_forward: the module's forward computes it, and its stored tensor
    has the same name. refusal: why it cannot be baked in, where that is already known.
    """

    module: nn.Module
    path: str
    attribute: str
    kind: str
    tensors: Mapping[str, str]
    settings: Mapping[str, Any]
    in_forward: bool = False
    refusal: NoMatch | None = None

    @property
    def target(self) -> str:
        return self.named(self.attribute)

    @property
    def parameters(self) -> dict[str, str]:
        return {role: self.named(local) for role, local in self.tensors.items()}

    @property
    def edits(self) -> tuple[Bake | Drop, ...]:
        gone = [name for name in self.parameters.values() if name != self.target]
        bake = Bake(self.target, self.kind, self.parameters, self.settings)
        return (bake, *(Drop(name) for name in gone))

    def named(self, local: str) -> str:
        return f"{self.path}.{local}" if self.path else local

    def refused(self, check: Check, where: str, hint: str = "") -> ComputedWeight:
        return replace(self, refusal=NoMatch(check, where, hint))


def computed_weights(module: nn.Module, path: str) -> Iterator[ComputedWeight]:
    """Every weight of `module` itself that is computed, known how or not."""
    for attribute in dict(getattr(module, "parametrizations", {})):
        yield _of_parametrization(module, path, attribute)
    for hook in hooks_of_weight(module):
        yield _of_hook(module, path, hook)
    if _has_own_forward(module):
        found = _of_forward(module, path)
        if found is not None:
            yield found


def _of_parametrization(module: nn.Module, path: str, attribute: str) -> ComputedWeight:
    held: Any = module.parametrizations[attribute]  # type: ignore[index]
    prefix = f"parametrizations.{attribute}."
    tensors = {role: prefix + role for role, _ in held.named_parameters(recurse=False)}
    found = ComputedWeight(module, path, attribute, "parametrization", tensors, {})
    one = held[0]
    if len(held) != 1:
        where = f"{found.target} has {len(held)} parametrizations, one on the other"
        return found.refused(Check.COMPUTED_WEIGHT, where)
    if isinstance(one, _WeightNorm):
        roles = {"g": prefix + "original0", "v": prefix + "original1"}
        return replace(found, kind="weightnorm", tensors=roles, settings={"dim": one.dim})
    if isinstance(one, _SpectralNorm) and held.original.dim() > 1:
        roles = {"weight": prefix + "original", "u": prefix + "0._u", "v": prefix + "0._v"}
        return replace(found, kind="spectralnorm", tensors=roles, settings={"dim": one.dim})
    if isinstance(one, WeightStandardization):
        settings = standardization_settings(one.eps, output_axis=one.output_axis, groups=one.groups)
        return replace(
            found,
            kind=NORM.name,
            tensors={"weight": prefix + "original"},
            settings=settings,
        )
    return found.refused(
        Check.COMPUTED_WEIGHT,
        f"{found.target} by {type(one).__name__}, which no rule bakes in",
        f"torch.nn.utils.parametrize.remove_parametrizations(module, {attribute!r}) does.",
    )


def _of_hook(module: nn.Module, path: str, hook: HookOfWeight) -> ComputedWeight:
    name = hook.name
    if isinstance(hook, WeightNorm):
        kind, roles = "weightnorm", {"g": f"{name}_g", "v": f"{name}_v"}
    else:
        kind = "spectralnorm"
        roles = {"weight": f"{name}_orig", "u": f"{name}_u", "v": f"{name}_v"}
    found = ComputedWeight(module, path, name, kind, roles, {"dim": hook.dim})
    own = {**module._parameters, **module._buffers}
    if all(own.get(local) is not None for local in roles.values()):
        return found
    tensors = {local: local for local in own if local.startswith(f"{name}_")}
    found = replace(found, kind="parametrization", tensors=tensors)
    return found.refused(
        Check.COMPUTED_WEIGHT, f"{found.target} by several hooks, one on the other"
    )


def _has_own_forward(module: nn.Module) -> bool:
    """Whether it is a layer of torch's in a subclass that computes by itself."""
    plain = plain_class(module)
    if plain is None or parametrize.is_parametrized(module) or strippable(module):
        return False
    if module._parameters.get("weight") is None:
        return False
    names = ("forward", "_conv_forward")
    return any(getattr(type(module), n, None) is not getattr(plain, n, None) for n in names)


def _of_forward(module: nn.Module, path: str) -> ComputedWeight | None:
    found = ComputedWeight(
        module, path, "weight", NORM.name, {"weight": "weight"}, {}, in_forward=True
    )
    try:
        if not computes_its_weight(_without_hooks(tree_copy(module))):
            return None
        tensors, settings = read_standardization(_alone(module, random=True))
    except LookupError as error:
        return found.refused(Check.COMPUTED_WEIGHT, f"{found.target}: {error}")
    except Exception as error:  # a user's forward, run alone, may raise anything
        why = f"{path} does not run by itself ({type(error).__name__}: {error})"
        return found.refused(Check.NOT_REWRITABLE, why)
    return replace(found, tensors=tensors, settings=settings)


def refusal_of(model: nn.Module, found: ComputedWeight) -> NoMatch | None:
    """The check that fails, or None where the weight may be baked in."""
    tensors = {role: tensor_in(found.module, local) for role, local in found.tensors.items()}
    if found.kind == "spectralnorm" and _is_training(found):
        where = f"the power iteration of {found.target}"
        return NoMatch(Check.TRAIN_MODE, where, "Call eval() on the model first.")
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors.values()):
        return NoMatch(Check.FOREIGN_WEIGHT, found.target)
    if "forward" in vars(found.module) and found.in_forward:
        return NoMatch(Check.NOT_REWRITABLE, f"{found.path} has a forward of its own instance")
    return (
        _tied(model, found)
        or _not_holdable(found, tensors)
        or _unproven(found)
        or _read_by_others(model, found)
    )


def _is_training(found: ComputedWeight) -> bool:
    held: Any = getattr(found.module, "parametrizations", None)
    return any(part.training for part in held[found.attribute]) if held else found.module.training


def _tied(model: nn.Module, found: ComputedWeight) -> NoMatch | None:
    """A tensor the weight is made of has another place in the model too."""
    for local in found.tensors.values():
        owner, _, name = local.rpartition(".")
        holder, tensor = found.module.get_submodule(owner), tensor_in(found.module, local)
        for path, module in model.named_modules():
            for other, value in (*module._parameters.items(), *module._buffers.items()):
                if value is tensor and not (module is holder and other == name):
                    place = f"{path}.{other}" if path else other
                    return NoMatch(Check.TIED, f"{found.named(local)} is also {place}")
    return None


def _not_holdable(found: ComputedWeight, tensors: Mapping[str, Tensor]) -> NoMatch | None:
    if any(tensor.is_meta for tensor in tensors.values()):
        return None
    doubles = {role: tensor.detach().double() for role, tensor in tensors.items()}
    weight = baked(found.edits[0], doubles)  # type: ignore[arg-type]
    if not torch.isfinite(weight).all():
        return NoMatch(Check.NOT_FINITE, f"{found.target} as it is computed")
    dtype = next(iter(tensors.values())).dtype
    if not torch.isfinite(weight.to(dtype)).all():
        size = f"{found.target} of size {float(weight.abs().max()):.3g} in {dtype}"
        return NoMatch(Check.DTYPE, size, "Convert the model to float32 first.")
    return None


def _unproven(found: ComputedWeight) -> NoMatch | None:
    """The layer with the baked weight is not, in float64, the layer as it is."""
    before = _alone(found.module, random=any(p.is_meta for p in found.module.parameters()))
    after = float64_copy(before)
    make_plain(after, found.edits, found.path)
    try:
        error = _difference(before, after, found.attribute)
    except Exception as failure:  # a user's forward, run alone, may raise anything
        why = f"{found.path} does not run by itself ({type(failure).__name__}: {failure})"
        return NoMatch(Check.NOT_REWRITABLE, why)
    if error <= RELATIVE:
        return None
    plain = plain_class(found.module)
    what = plain.__name__ if plain else "layer"
    return NoMatch(
        Check.NOT_REWRITABLE,
        f"{found.path} does more than a plain {what} with its weight baked in would",
    )


def _difference(before: nn.Module, after: nn.Module, attribute: str) -> float:
    """The largest relative error of the layer's outputs, or of the weight of what is no layer."""
    with torch.no_grad(), lifted():
        if plain_class(after) is None:
            for hook in hooks_of_weight(before):
                hook(before, ())
            return relative_error(getattr(after, attribute), getattr(before, attribute))
        return max(relative_error(after(x), before(x)) for x in example_inputs(after))


def _read_by_others(model: nn.Module, found: ComputedWeight) -> NoMatch | None:
    """A parent's forward reads an attribute that the plain layer does not have."""
    plain = _alone(found.module, random=True)
    make_plain(plain, found.edits, found.path)
    for read in ModuleReferences(model).reads_of(found.module):
        if not hasattr(plain, read.attribute):
            return NoMatch(Check.NOT_REWRITABLE, f"{read}, which the plain layer does not have")
    return None


def _alone(module: nn.Module, *, random: bool) -> nn.Module:
    """A float64 copy on the CPU without the user's hooks; with random tensors if `random`."""
    copied = _without_hooks(float64_copy(module))
    if not random:
        return copied.cpu()
    copied.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return copied


def _without_hooks(copied: nn.Module) -> nn.Module:
    """Without what was put on the instance, other than a hook that computes the weight."""
    for registry in HOOKS:
        held = vars(copied).get(registry) or {}
        for key in [key for key, hook in held.items() if not isinstance(hook, HookOfWeight)]:
            del held[key]
    vars(copied).pop("forward", None)
    return copied
