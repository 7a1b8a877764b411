"""Surveys written out by hand, for tests of what comes after `find`."""

from __future__ import annotations

from torch import nn

from normsurgery.survey import Site, Survey

ROLES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def survey_of(model: nn.Module, shapes: dict[str, tuple[int, ...]] | None = None) -> Survey:
    """Every torch.nn batch, layer, group and RMS norm; `shapes` by path (default: none known)."""
    sites: list[Site] = []
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module, where in paths.items():
        described = _describe(module)
        if described is None:
            continue
        kind, settings = described
        shape = (shapes or {}).get(where[0])
        names = {role: _name(model, module, where[0], role) for role in ROLES}
        parameters = {role: name for role, name in names.items() if name is not None}
        cls = type(module).__name__
        sites.append(
            Site(len(sites), kind, tuple(where), "module", cls, parameters, settings, shape)
        )
    return Survey(type(model).__name__, tuple(sites), ())


def _name(model: nn.Module, module: nn.Module, path: str, role: str) -> str | None:
    """The first name the tensor has anywhere in the model, as a state_dict with ties lists it."""
    tensor = getattr(module, role, None)
    if tensor is None:
        return None
    named = (*model.named_parameters(), *model.named_buffers())
    own = f"{path}.{role}" if path else role
    return next((name for name, held in named if held is tensor), own)


def _describe(module: nn.Module) -> tuple[str, dict[str, object]] | None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        common = {"eps": module.eps, "channel_axis": 1, "features": module.num_features}
        return "batchnorm", {**common, "momentum": module.momentum}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        kind = "layernorm" if isinstance(module, nn.LayerNorm) else "rmsnorm"
        shape = list(module.normalized_shape)
        settings = {"eps": module.eps, "channel_axis": -1, "features": shape[-1]}
        return kind, {**settings, "normalized_shape": shape}
    if isinstance(module, nn.GroupNorm):
        settings = {"eps": module.eps, "channel_axis": 1, "features": module.num_channels}
        return "groupnorm", {**settings, "num_groups": module.num_groups}
    return None
