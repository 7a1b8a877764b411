"""Reports as files: everything that was measured is in them, and their JSON is as documented."""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_reports import COUNT, FIRST_BAD, Verdicts, drifting, evidence, facts, report
from torch import nn

import normsurgery as ns
from normsurgery.errors import UsageError
from normsurgery.export.facts import Canonical, EpsFact, OnnxFacts
from normsurgery.fold.speed import Latency, Speed
from normsurgery.plan import Plan
from normsurgery.report import Report
from normsurgery.reporting import content, schema, write_report
from normsurgery.reporting.html import page
from normsurgery.reporting.markdown import markdown
from normsurgery.reporting.plot import points
from normsurgery.reporting.written import eps_line
from normsurgery.steps import TYPES, Step
from normsurgery.surgery.keymap import KeyMap
from normsurgery.survey import Site, Skip
from normsurgery.verify.evidence import Comparison, Drift, Evidence, LeftOut
from normsurgery.verify.judge import Verdict
from normsurgery.verify.stages import Blame, Coverage, InnerValue, Stage

DATACLASSES = (
    Evidence, Verdict, Comparison, LeftOut, Drift, Stage, InnerValue, Coverage, Blame, OnnxFacts,
    EpsFact, Canonical, Plan, Step, Site, Skip, KeyMap, Speed, Latency,
)  # fmt: skip
# Derived values that the JSON tells as well, and fields that stand elsewhere in it.
DERIVED = {
    "Evidence": {"passed", "failures"},
    "Latency": {"ratio", "control"},
    "Step": {"type"} | {field.name for kind in TYPES.values() for field in fields(kind)},
}
ELSEWHERE = {"KeyMap": {"plan"}}


def faults(value: Any, wanted: dict[str, Any], whole: dict[str, Any], at: str = "$") -> list[str]:
    """Where a JSON value is not what a schema says; the part of JSON Schema that ours uses."""
    if "$ref" in wanted:
        return faults(value, whole["$defs"][wanted["$ref"].rpartition("/")[2]], whole, at)
    if "anyOf" in wanted:
        tried = [faults(value, option, whole, at) for option in wanted["anyOf"]]
        return [] if any(not found for found in tried) else min(tried, key=len)
    if "enum" in wanted:
        return [] if value in wanted["enum"] else [f"{at}: {value!r} is none of {wanted['enum']}"]
    kinds = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
        "boolean": bool, "null": type(None),
    }  # fmt: skip
    kind = wanted.get("type")
    is_truth = isinstance(value, bool) and kind in ("integer", "number")
    if kind is not None and (is_truth or not isinstance(value, kinds[kind])):
        return [f"{at}: {value!r} is no {kind}"]
    if kind == "array":
        return [
            fault
            for index, item in enumerate(value)
            for fault in faults(item, wanted["items"], whole, f"{at}[{index}]")
        ]
    return _object_faults(value, wanted, whole, at) if kind == "object" else []


def _object_faults(
    value: dict[str, Any], wanted: dict[str, Any], whole: dict[str, Any], at: str
) -> list[str]:
    known = wanted.get("properties", {})
    found = [f"{at}: {name} is missing" for name in wanted.get("required", ()) if name not in value]
    others = wanted.get("additionalProperties", {})
    for name, item in value.items():
        if name in known:
            found += faults(item, known[name], whole, f"{at}.{name}")
        elif others is False:
            found.append(f"{at}: {name} is not in the schema")
        else:
            found += faults(item, others, whole, f"{at}.{name}")
    return found


def as_json(value: Any) -> Any:
    """Through text, as a reader gets it; text that holds NaN is no JSON."""
    return json.loads(json.dumps(value, allow_nan=False))


@pytest.mark.parametrize("kind", DATACLASSES, ids=lambda kind: kind.__name__)
def test_every_field_is_in_the_schema(kind: type) -> None:
    """A field that was added and not documented cannot be relied on by any reader."""
    name = kind.__name__
    wanted = {field.name for field in fields(kind)} | DERIVED.get(name, set())
    assert set(schema.DEFINITIONS[name]["properties"]) == wanted - ELSEWHERE.get(name, set())


def test_every_field_of_a_report_is_in_the_schema() -> None:
    derived, kept_in_memory = {"passed", "changes_outputs"}, {"journal"}
    beside = {"title", "command", "written"}
    wanted = {field.name for field in fields(Report)} | derived | beside
    assert set(schema.REPORT["properties"]) == wanted - kept_in_memory


def test_every_reference_of_the_schema_is_defined() -> None:
    for whole in (schema.REPORT, schema.EVIDENCE):
        named = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(whole)))
        assert named <= set(whole["$defs"])


@pytest.mark.parametrize("bad", [False, True])
def test_the_json_of_a_report_is_as_the_schema_says(bad: bool) -> None:
    made = report(bad=bad)
    assert faults(as_json(made.to_json()), schema.REPORT, schema.REPORT) == []
    measured = as_json(made.to_json())["evidence"]
    assert faults(measured, schema.EVIDENCE, schema.EVIDENCE) == []


def test_the_json_of_real_reports_is_as_the_schema_says() -> None:
    """Plans with sites, skips and edits, promises kept and outputs that move, a timed fold."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8))
    inputs = (torch.randn(2, 3, 8, 8),)
    _, swapped = ns.swap(model, "groupnorm", kind="batchnorm", inputs=inputs)
    _, folded = ns.fold(model.eval(), inputs=inputs, time=True)
    assert folded.plan.steps and folded.speed is not None and swapped.evidence is not None
    for made in (swapped, folded):
        assert faults(as_json(made.to_json()), schema.REPORT, schema.REPORT) == []


def test_the_check_sees_what_is_wrong() -> None:
    """A check that finds nothing in whatever it is given would pass every test above."""
    right = as_json(report().to_json())
    wrong: dict[str, Any] = {
        "missing": {key: right[key] for key in right if key != "plan"},
        "unknown": {**right, "colour": "red"},
        "of another type": {**right, "notes": "one"},
        "no such verb": {**right, "verb": "melt"},
        "inside": {**right, "evidence": {**right["evidence"], "seed": "7"}},
        "a truth for a number": {**right, "evidence": {**right["evidence"], "seed": True}},
    }
    for what, data in wrong.items():
        assert len(faults(data, schema.REPORT, schema.REPORT)) >= 1, what


def test_evidence_comes_back_from_its_json() -> None:
    made = evidence(bad=True)
    again = Evidence.from_json(as_json(made.to_json()))
    assert repr(again) == repr(made)  # NaN equals nothing, but is written the same


@pytest.mark.parametrize("form", [markdown, page], ids=["markdown", "page"])
def test_whatever_was_measured_is_told(form: Any) -> None:
    text = form(report(bad=True), command="normsurgery export model.pt").replace("\\", "")
    wanted = [
        "failed", "val_40", "node_40", "epsilon 1e-06, the source has 1e-05", "tiny variance",
        "optimised graph", "SkipLayerNormalization", "8 LayerNormalization",
        "last_hidden_state", "this machine has no CUDA device", "opset", "1.23 MB",
        "float32[batch, 3, 224, 224]", "4 of 4 are in the file", "vit.dropout", "stem.norm",
        "it is unsafe as one operator", "normsurgery export model.pt", "--input 2x3x224x224",
        "float16 on this provider", f"{COUNT} of {COUNT + 2} floating values compared",
        "modeling_vit.py:123",
    ]  # fmt: skip
    assert [words for words in wanted if words not in text] == []


@pytest.mark.parametrize("form", [markdown, page], ids=["markdown", "page"])
def test_what_went_well_is_short(form: Any) -> None:
    """Nobody reads a page of failures that did not happen."""
    text = form(report())
    assert "What failed" not in text and "diverges" not in text and 'alarm"' not in text


@pytest.mark.parametrize("form", [markdown, page], ids=["markdown", "page"])
def test_nothing_measured_is_no_pass(form: Any) -> None:
    text = form(report(evidence=None))
    assert "not verified" in text and "passed" not in text.partition("<body>")[2]
    assert "nothing is known of what it computes" in text


@pytest.mark.parametrize("form", [markdown, page], ids=["markdown", "page"])
def test_evidence_alone_and_outputs_that_move_are_told(form: Any) -> None:
    assert "output pooler_output" in form(evidence(bad=False)).replace("\\", "")
    assert "97.0%" in form(drifting())


def with_names(name: str) -> Evidence:
    inner = evidence(bad=True).inner
    named = tuple(replace(value, module=name, source=name, value=name) for value in inner)
    return evidence(bad=True, inner=named)


def test_names_cannot_break_out_of_the_report() -> None:
    """A model may have any names; a report of it is opened by somebody who trusts reports."""
    nasty = "</svg><script>alert(1)</script>|`x`\n# heading"
    told = {"title": nasty, "command": nasty}
    assert "<script>alert" not in page(with_names(nasty), **told)
    lines = markdown(with_names(nasty), **told).splitlines()
    assert not [line for line in lines if line.startswith("# heading")]
    outside_code = [re.sub(r"(`+).*?\1(?!`)", "", line.replace("\\`", "")) for line in lines]
    assert not [line for line in outside_code if re.search(r"(?<!\\)<", line)]


def test_a_markdown_table_has_the_same_cells_in_every_row() -> None:
    table: list[int] = []
    for line in markdown(report(bad=True)).splitlines():
        if not line.startswith("|"):
            table = []
            continue
        table.append(len(re.findall(r"(?<!\\)\|", line)))
        assert table[0] == table[-1], line


def test_an_eps_that_is_missing_is_named() -> None:
    missing = facts(eps=(EpsFact("a", 1e-5, "node"), EpsFact("b.norm", 1e-12, "")))
    assert eps_line(missing) == "1 of 2 are in the file; missing: b.norm (1e-12)"


def test_what_is_allowed_is_in_the_unit_of_the_error() -> None:
    """The two are drawn on one axis: an error as large as allowed must lie on the line."""
    verdict = Verdicts().off_by(1e-5)
    limit = content.allowed_ulps(verdict)
    assert math.isclose(verdict.ulps / limit, verdict.factor, rel_tol=1e-9)


def test_norms_are_marked_by_operator_and_by_module() -> None:
    """A norm that is decomposed has no operator that says so."""
    inner = evidence(bad=False).inner

    def marked(norms: set[str]) -> set[str]:
        return {mark.value.operator for mark in points(inner, norms, None) if mark.is_norm}

    assert marked(set()) == {"LayerNormalization"}
    assert marked({"vit.layers.0.mlp.act"}) == {"LayerNormalization", "Gelu"}


def test_the_sentence_counts_what_failed_by_sort() -> None:
    told = content.sentence(content.subject(evidence(bad=True, required=("cuda",))))
    inside = COUNT - FIRST_BAD
    assert told == (
        f"Failed: 2 of 12 comparisons of outputs, 2 of 4 stages, {inside} of {COUNT} values "
        "inside, runner cuda was required and did not run."
    )


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    made = report()
    for suffix in (".html", ".md", ".json"):
        path = tmp_path / f"out{suffix}"
        assert write_report(made, path, title="mine", command="do it") == path
        with pytest.raises(UsageError, match="exists already"):
            write_report(made, path)
        write_report(made, path, force=True)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".json", ".md"]
    unknown = facts(eps=(EpsFact("a", math.inf, ""),))
    write_report(report(onnx=unknown), tmp_path / "out.json", force=True)
    data = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert data["onnx"]["eps"][0]["eps"] == "inf"
    assert faults(data, schema.REPORT, schema.REPORT) == []
    with pytest.raises(UsageError, match=r"\.html"):
        write_report(made, tmp_path / "out.pdf")
    with pytest.raises(UsageError, match="no such directory"):
        write_report(made, tmp_path / "nowhere" / "out.md")


def test_the_files_of_the_page_are_installed() -> None:
    """What package-data does not name is in a checkout and missing from the wheel."""
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    named = project["tool"]["setuptools"]["package-data"]["normsurgery.reporting"]
    folder = root / "normsurgery" / "reporting"
    kept = {path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert set(named) == kept
