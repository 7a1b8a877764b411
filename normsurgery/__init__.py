"""Model surgery on normalization layers: find them, swap them, and prove what was done.

The public words are loaded when first used, so that importing this package does not import torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normsurgery.artefacts import load_directory as load
    from normsurgery.errors import NormsurgeryError
    from normsurgery.export.exporting import export
    from normsurgery.find import find
    from normsurgery.fold.checkpoint import fold_checkpoint
    from normsurgery.fold.folding import fold
    from normsurgery.inputs import Inputs
    from normsurgery.plan import Plan
    from normsurgery.planning import plan
    from normsurgery.report import Report
    from normsurgery.spec import Fidelity, Law, NormSpec, get, names, register
    from normsurgery.steps import Step
    from normsurgery.surgery import rebuild, swap
    from normsurgery.survey import Site, Skip, Survey
    from normsurgery.verify import Evidence, verify
    from normsurgery.verify.blaming import blame

_HOMES = {
    "Evidence": ("normsurgery.verify", "Evidence"),
    "Fidelity": ("normsurgery.spec", "Fidelity"),
    "Inputs": ("normsurgery.inputs", "Inputs"),
    "Law": ("normsurgery.spec", "Law"),
    "NormSpec": ("normsurgery.spec", "NormSpec"),
    "NormsurgeryError": ("normsurgery.errors", "NormsurgeryError"),
    "Plan": ("normsurgery.plan", "Plan"),
    "Report": ("normsurgery.report", "Report"),
    "Site": ("normsurgery.survey", "Site"),
    "Skip": ("normsurgery.survey", "Skip"),
    "Step": ("normsurgery.steps", "Step"),
    "Survey": ("normsurgery.survey", "Survey"),
    "blame": ("normsurgery.verify.blaming", "blame"),
    "export": ("normsurgery.export.exporting", "export"),
    "find": ("normsurgery.find", "find"),
    "fold": ("normsurgery.fold.folding", "fold"),
    "fold_checkpoint": ("normsurgery.fold.checkpoint", "fold_checkpoint"),
    "get": ("normsurgery.spec", "get"),
    "load": ("normsurgery.artefacts", "load_directory"),
    "names": ("normsurgery.spec", "names"),
    "plan": ("normsurgery.planning", "plan"),
    "rebuild": ("normsurgery.surgery", "rebuild"),
    "register": ("normsurgery.spec", "register"),
    "swap": ("normsurgery.surgery", "swap"),
    "verify": ("normsurgery.verify", "verify"),
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


class _Package(ModuleType):
    """Some public words (`find`, `plan`, `verify`, ...) are also names of submodules. The import
    system would bind the submodule over the word; here the word stays."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'normsurgery' has no attribute {name!r}")
        module, attribute = _HOMES[name]
        value = getattr(import_module(module), attribute)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
