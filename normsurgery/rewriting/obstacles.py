"""Why a site must be left alone: what else depends on the very module that would be replaced."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from normsurgery.rewriting.references import ModuleReferences
from normsurgery.rewriting.source import module_at
from normsurgery.survey import Site


def obstacle(
    model: nn.Module, site: Site, *, copies: bool, around: ModuleReferences | None = None
) -> str | None:
    """The reason why the module at `site` cannot be replaced, or None.

    copies: it is replaced by a copy of itself, of which any attribute may be read. around: of the
    model, where many sites are asked about.
    """
    if site.form != "module":
        return None
    module = module_at(model, site.path)
    around = around or ModuleReferences(model)
    holder = around.holder_of(module)
    if holder is not None:
        return (
            f"it is also held by {holder}, outside the module tree, "
            "where a replacement would not reach it"
        )
    if copies:
        return None
    if "forward" in vars(module):
        return (
            "its forward was replaced on the instance (by accelerate or another tool), and a new "
            "module would not have that; remove that hook first"
        )
    computed = _computed_tensor(module)
    if computed is not None:
        return (
            f"its {computed} is recomputed by a hook before each forward (old-style weight_norm, "
            "spectral_norm or pruning); remove that first"
        )
    # A weight that is standardised by a parametrization stays right wherever it is read.
    if site.attach == "weight":
        return None
    read = next((read for read in around.reads_of(module) if not read.fact), None)
    if read is not None:
        return f"{read}, so it would not compute with a replacement"
    return None


def lost_fact(
    model: nn.Module, site: Site, new: nn.Module, around: ModuleReferences | None = None
) -> str | None:
    """The reason why `new` lacks an attribute whose dtype, device or shape a parent asks for."""
    if site.form != "module":
        return None
    for read in (around or ModuleReferences(model)).reads_of(module_at(model, site.path)):
        if read.fact and getattr(new, read.attribute, None) is None:
            return f"{read}, and the replacement has no {read.attribute}"
    return None


def _computed_tensor(module: nn.Module) -> str | None:
    """The name of a weight or bias that is a plain attribute beside its real parameters."""
    if parametrize.is_parametrized(module):
        return None
    for name in ("weight", "bias"):
        if name in vars(module) and f"{name}_g" in module._parameters:
            return name
        if name in vars(module) and f"{name}_orig" in module._parameters:
            return name
    return None
