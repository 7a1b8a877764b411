"""Rules for the whole run: one thread per worker, no skip that is not on the committed list, and
torch's list of ONNX functions read from their sources once, not at every export."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

APIS = "onnxscript._framework_apis."
ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")

CAMPAIGN = os.environ.get("CAMPAIGN")  # tests/campaign.py says what it is

# `make test` draws the same few examples every time; a campaign many, from the seed it is given.
settings.register_profile("test", deadline=None, derandomize=True, max_examples=25)
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
    """onnxscript parses the sources of its 500 functions again whenever torch asks for the list,
    which is half of the time of a small export. The list is only read."""
    for name, api in list(sys.modules.items()):
        listing = vars(api).get("get_torchlib_ops") if name.startswith(APIS) else None
        if isinstance(listing, FunctionType):
            api.get_torchlib_ops = _once(listing)  # type: ignore[attr-defined]


@cache
def _once(listing: Callable[[], Any]) -> Callable[[], Any]:
    return cache(listing)
