"""What stands in the docstring of a norm's file, and that its example is true."""

from __future__ import annotations

import doctest
import inspect
import io
import re
import sys

import torch

from normsurgery.spec import NormSpec

HEADINGS = (
    "What it computes",
    "Use it when",
    "From other norms",
    "Inference",
    "ONNX",
    "Example",
    "Reference",
)


def check_documentation(spec: NormSpec) -> None:
    """The docstring of the norm's file has every heading, in order, each with text."""
    sections = documentation_sections(spec)
    missing = [heading for heading in HEADINGS if not sections.get(heading, "").strip()]
    assert not missing, f"{spec.name}: no text under {missing} in its file's docstring"
    assert list(sections) == list(HEADINGS), f"{spec.name}: headings are {list(sections)}"


def check_documented_example(spec: NormSpec) -> None:
    """The code under Example runs and prints what it says."""
    text = documentation_sections(spec)["Example"]
    test = doctest.DocTestParser().get_doctest(text, {}, spec.name, None, 0)
    assert test.examples, f"{spec.name}: Example has no line that starts with >>>"
    report = io.StringIO()
    torch.manual_seed(0)
    outcome = doctest.DocTestRunner(verbose=False).run(test, out=report.write)
    assert outcome.failed == 0, f"{spec.name}: {report.getvalue()}"


def documentation_sections(spec: NormSpec) -> dict[str, str]:
    """Heading -> text, of the docstring of the file that defines the norm."""
    text = inspect.getdoc(sys.modules[spec.formula.__module__]) or ""
    pieces = re.split(rf"^({'|'.join(HEADINGS)})\s*$", text, flags=re.MULTILINE)
    return {
        heading: inspect.cleandoc("\n" + body)
        for heading, body in zip(pieces[1::2], pieces[2::2], strict=True)
    }
