"""The list of checks, by name, and how pytest is given them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from normsurgery.spec import Law, NormSpec
from normsurgery.testing import (
    conversions,
    documentation,
    exports,
    finding,
    formulas,
    inference,
    invariances,
    modules,
)


@dataclass(frozen=True)
class Check:
    """One named check of one norm; call it."""

    norm: str
    name: str
    run: Callable[[], None]

    @property
    def label(self) -> str:
        return f"{self.norm}:{self.name}"

    def __call__(self) -> None:
        self.run()


def norm_checks(spec: NormSpec) -> tuple[Check, ...]:
    """Every check that applies to `spec`, in the order a newcomer would want them to fail."""
    checks: list[tuple[str, Callable[[NormSpec], None]]] = [
        ("documentation", documentation.check_documentation),
        ("documented example", documentation.check_documented_example),
        ("reading", formulas.check_reading),
        ("formula", formulas.check_formula),
        ("nothing neutral", formulas.check_nothing_neutral),
        ("low precision", formulas.check_low_precision),
        ("gradients", formulas.check_gradients),
        ("batch sizes", modules.check_batch_sizes),
        ("constant input", modules.check_constant_input),
        ("dtype", modules.check_dtype),
        ("memory format", modules.check_memory_format),
        ("copies", modules.check_copies),
        ("wrong shape", modules.check_wrong_shape),
        ("inference form", inference.check_inference_form),
        ("conversions", conversions.check_conversions),
    ]
    if spec.attach == "norm":
        checks.append(("one position", modules.check_one_position))
    if spec.update is not None:
        checks.append(("state update", formulas.check_update))
    if spec.inputs:
        checks.append(("further inputs", formulas.check_further_inputs))
    if spec.hypotheses is not None:
        checks.append(("hypotheses", finding.check_hypotheses))
    if spec.strip is not None:
        checks.append(("strip", inference.check_strip))
    checks += [(f"law {law.name.lower()}", invariances.law_check(law)) for law in Law]
    checks += [("compile", exports.check_compile), ("export", exports.check_export)]
    checks += [(f"onnx opset {opset}", exports.onnx_check(opset)) for opset in exports.OPSETS]
    return tuple(Check(spec.name, name, _bound(check, spec)) for name, check in checks)


def parametrize_with_norm_checks(
    norms: Iterable[NormSpec], *, expected_failures: Mapping[str, str] | None = None
) -> Any:
    """A pytest decorator: the test gets every check of every norm as its argument `check`.

    expected_failures: "norm:check" -> the reason it fails today; such a check must fail (strict).
    Raises KeyError for one that names no check.
    """
    import pytest

    known = dict(expected_failures or {})
    parameters = []
    for check in (check for spec in norms for check in norm_checks(spec)):
        reason = known.pop(check.label, None)
        marks = () if reason is None else (pytest.mark.xfail(reason=reason, strict=True),)
        parameters.append(pytest.param(check, id=check.label.replace(" ", "-"), marks=marks))
    if known:
        raise KeyError(f"expected_failures names no such check: {', '.join(known)}")
    return pytest.mark.parametrize("check", parameters)


def _bound(check: Callable[[NormSpec], None], spec: NormSpec) -> Callable[[], None]:
    return lambda: check(spec)
