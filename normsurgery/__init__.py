"""Model surgery on normalization layers: find them, swap them, and prove what was done.

The public words are loaded when first used, so that importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normsurgery.artefacts import load_directory as load
    from normsurgery.blaming import blame
    from normsurgery.errors import NormsurgeryError
    from normsurgery.exporting.exporting import export
    from normsurgery.finding import find
    from normsurgery.folding.checkpoint import fold_checkpoint
    from normsurgery.folding.folding import fold
    from normsurgery.inputs import Inputs
    from normsurgery.planning import plan
    from normsurgery.plans import Plan
    from normsurgery.report import Report
    from normsurgery.rewriting.rebuilding import rebuild
    from normsurgery.spec import Fidelity, Law, NormSpec, get, names, register
    from normsurgery.steps import Step
    from normsurgery.survey import Site, Skip, Survey
    from normsurgery.swapping.swapping import swap
    from normsurgery.verifying import Evidence, verify

_HOMES = {
    "Evidence": ("normsurgery.verifying", "Evidence"),
    "Fidelity": ("normsurgery.spec", "Fidelity"),
    "Inputs": ("normsurgery.inputs", "Inputs"),
    "Law": ("normsurgery.spec", "Law"),
    "NormSpec": ("normsurgery.spec", "NormSpec"),
    "NormsurgeryError": ("normsurgery.errors", "NormsurgeryError"),
    "Plan": ("normsurgery.plans", "Plan"),
    "Report": ("normsurgery.report", "Report"),
    "Site": ("normsurgery.survey", "Site"),
    "Skip": ("normsurgery.survey", "Skip"),
    "Step": ("normsurgery.steps", "Step"),
    "Survey": ("normsurgery.survey", "Survey"),
    "blame": ("normsurgery.blaming", "blame"),
    "export": ("normsurgery.exporting.exporting", "export"),
    "find": ("normsurgery.finding", "find"),
    "fold": ("normsurgery.folding.folding", "fold"),
    "fold_checkpoint": ("normsurgery.folding.checkpoint", "fold_checkpoint"),
    "get": ("normsurgery.spec", "get"),
    "load": ("normsurgery.artefacts", "load_directory"),
    "names": ("normsurgery.spec", "names"),
    "plan": ("normsurgery.planning", "plan"),
    "rebuild": ("normsurgery.rewriting.rebuilding", "rebuild"),
    "register": ("normsurgery.spec", "register"),
    "swap": ("normsurgery.swapping.swapping", "swap"),
    "verify": ("normsurgery.verifying", "verify"),
}

__all__ = [
    "Evidence",
    "Fidelity",
    "Inputs",
    "Law",
    "NormSpec",
    "NormsurgeryError",
    "Plan",
    "Report",
    "Site",
    "Skip",
    "Step",
    "Survey",
    "blame",
    "export",
    "find",
    "fold",
    "fold_checkpoint",
    "get",
    "load",
    "names",
    "plan",
    "rebuild",
    "register",
    "swap",
    "verify",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'normsurgery' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
