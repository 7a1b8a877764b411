"""Rules for the whole run: one thread per worker, no skip that is not on the committed list, and
what torch reads from its sources at every export or every seed is read once."""

from __future__ import annotations

import os
import sys
import typing
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

APIS = "onnxscript._framework_apis."
ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")

CAMPAIGN = os.environ.get("CAMPAIGN")  # tests/campaign.py says what it is

# `make test` draws the same examples every time; a campaign ten times as many, from its seed.
settings.register_profile("test", deadline=None, derandomize=True)
settings.register_profile("campaign", deadline=None, max_examples=1000)
settings.load_profile("test" if CAMPAIGN is None else "campaign")


def pytest_report_header() -> str | None:
    return CAMPAIGN and f"campaign of the seeds from {CAMPAIGN} on: make campaign SEED={CAMPAIGN}"


@cache
def allowed_skips() -> dict[str, str]:
    """Node id (with or without parameters) -> the reason it may be skipped with."""
    lines = ALLOWED_SKIPS.read_text(encoding="utf-8").splitlines()
    entries = (line.split("|", 1) for line in lines if line.strip() and not line.startswith("#"))
    return {name.strip(): reason.strip() for name, reason in entries}


def is_allowed(node_id: str, reason: str) -> bool:
    listed = allowed_skips().get(node_id) or allowed_skips().get(node_id.split("[", 1)[0])
    return listed is not None and listed in reason


def reason_of(report: pytest.CollectReport | pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return str(getattr(report, "wasxfail", report.longrepr))


def fail_unlisted(report: pytest.CollectReport | pytest.TestReport) -> None:
    if not report.skipped or is_allowed(report.nodeid, reason_of(report)):
        return
    report.outcome = "failed"
    report.longrepr = (
        f"{report.nodeid} was skipped or xfailed ({reason_of(report)}) and is not in "
        f"tests/{ALLOWED_SKIPS.name} with that reason"
    )
    report.__dict__.pop("wasxfail", None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    fail_unlisted(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    fail_unlisted(report)
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_setup() -> None:
    """What torch and onnxscript make anew at every call, though it never changes, is made once."""
    for name, module in list(sys.modules.items()):
        wrap = ONCE.get(name) or (_kept("get_torchlib_ops") if name.startswith(APIS) else None)
        if wrap is not None:
            wrap(module)


def _kept(function: str) -> Callable[[ModuleType], None]:
    """Gives the module's function a cache."""

    def wrap(module: ModuleType) -> None:
        found = vars(module).get(function)
        if isinstance(found, FunctionType):
            setattr(module, function, cache(found))

    return wrap


def _unseen(module: ModuleType) -> None:
    """Takes the call stack away that the module writes down at every `torch.manual_seed` until its
    device is first used, for an error message."""
    module.traceback = STACKLESS  # type: ignore[attr-defined]


def _cheaply_annotated(module: ModuleType) -> None:
    """Two annotations are evaluated at every decomposition of every export, 10,000 times each:
    `typing` remembers what `collections.abc` makes anew."""
    module.Callable = typing.Callable  # type: ignore[attr-defined]


STACKLESS = SimpleNamespace(format_stack=list)
ONCE: dict[str, Callable[[ModuleType], None]] = {
    "torch._ops": _cheaply_annotated,
    "torch.onnx._internal.exporter._schemas": _kept("op_signature_from_function"),
    "torch.cuda": _unseen,
    "torch.mtia": _unseen,
    "torch.xpu": _unseen,
}
