"""A transformers model tells what was done to it through its config, which is saved with it."""

from __future__ import annotations

from typing import Any

from torch import nn

from normsurgery.artefacts.checkpoints import CONFIG_KEY
from normsurgery.plans import Plan


def config_of(model: nn.Module) -> Any | None:
    """The config that `save_pretrained` writes beside the weights, or None."""
    config = getattr(model, "config", None)
    return config if callable(getattr(model, "save_pretrained", None)) else None


def record_plan(model: nn.Module, plan: Plan) -> None:
    """Note the plan in the model's config, if it has one, so that `ns.load` makes it again.

    `from_pretrained` knows nothing of it and would bring the old norms back.
    """
    config = config_of(model)
    if config is None:
        return
    known = list(getattr(config, CONFIG_KEY, []))
    if plan.to_json() not in known:
        setattr(config, CONFIG_KEY, [*known, plan.to_json()])
