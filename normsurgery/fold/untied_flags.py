"""What a model says of its ties, made true again after a fold has cut some of them.

A transformers model ties its weights again on its own word: `tie_weights()` and `from_pretrained`
believe `config.tie_word_embeddings` and the model's map of tied keys.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from normsurgery.fold.edits import Copy
from normsurgery.plan import Plan

TIED = "tie_word_embeddings"
KEYS = "all_tied_weights_keys"


def correct_ties(model: nn.Module, plan: Plan) -> None:
    """Take what is tied no more out of the maps of tied keys, and the flag of the configuration.

    In place; maps and configurations are replaced by copies, never written to.
    """
    if not any(isinstance(edit, Copy) for step in plan.steps for edit in step.edits):
        return
    cut = [module for module in model.modules() if _is_cut(module)]
    configs = {id(vars(module).get("config")): vars(module).get("config") for module in cut}
    untied = {key: _without_flag(config) for key, config in configs.items()}
    for module in cut:
        vars(module)[KEYS] = {t: s for t, s in vars(module)[KEYS].items() if _same(module, t, s)}
    for module in model.modules():
        config = vars(module).get("config")
        if config is not None and id(config) in untied:
            vars(module)["config"] = untied[id(config)]


def _is_cut(module: nn.Module) -> bool:
    tied = vars(module).get(KEYS)
    named = tied.items() if isinstance(tied, Mapping) else ()
    return any(not _same(module, target, source) for target, source in named)


def _same(module: nn.Module, target: str, source: str) -> bool:
    return _tensor(module, target) is _tensor(module, source)


def _tensor(module: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(module.get_submodule(path), last)


def _without_flag(config: Any) -> Any:
    if not getattr(config, TIED, False):
        return config
    changed = copy.deepcopy(config)
    for part in (changed, changed.get_text_config()):
        setattr(part, TIED, False)
    return changed
