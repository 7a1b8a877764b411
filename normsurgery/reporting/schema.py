"""The JSON of reports and evidence, as JSON Schema (draft 2020-12).

`REPORT` is what `--json` prints for swap, fold and export, what stands in `<out>.report.json`, and
what `--report out.json` writes for them; `EVIDENCE` is what verify gives. A number that JSON has no
word for is a string: "nan", "inf" or "-inf". New properties may be added; those that are here keep
their names and meanings within a major version.

    python -m normsurgery.reporting.schema > report.schema.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

from normsurgery.steps import TYPES

Schema = dict[str, Any]

DRAFT = "https://json-schema.org/draft/2020-12/schema"

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
TRUTH: Schema = {"type": "boolean"}
ANYTHING: Schema = {}
NUMBER: Schema = {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}
TEXTS: Schema = {"type": "array", "items": TEXT}


def _said(schema: Schema, meaning: str) -> Schema:
    return {**schema, "description": meaning}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _map(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def _one_of(*words: str) -> Schema:
    return {"enum": list(words)}


def _a(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _object(meaning: str, optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {
        "type": "object",
        "description": meaning,
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


VERDICT = _object(
    "One tensor, judged: it passes if its largest error is at most `allowed`.",
    passed=_said(_or_null(TRUTH), "null: undecided, the native run is too far from the truth"),
    reason=_said(TEXT, "why it failed or is undecided, where the numbers do not say it"),
    compared=_said(WHOLE, "number of elements"),
    max_error=_said(NUMBER, "largest |candidate - truth| where both are finite"),
    ulps=_said(NUMBER, "max_error in units in the last place of scale"),
    scale=_said(NUMBER, "largest |truth|"),
    allowed=_said(NUMBER, "the largest max_error that passes"),
    factor=_said(NUMBER, "the smallest multiple of allowed that would pass"),
    native_error=_said(_or_null(NUMBER), "largest error of torch itself in that precision"),
    worst=_said(_or_null(_list(WHOLE)), "index of the largest error or the first set difference"),
    worst_candidate=_said(NUMBER, "the value there"),
    worst_reference=_said(NUMBER, "the truth there"),
    nonfinite=_said(_or_null(_map(WHOLE)), "positions that differ, by set: nan, +inf, -inf"),
    same_bits=_said(TRUTH, "bit for bit what native torch computes"),
    median_error=_said(NUMBER, "median of |candidate - truth|"),
    p99_error=_said(NUMBER, "its 99% quantile"),
    row_ulps=_said(NUMBER, "largest error in ulp of the largest |truth| of its own row"),
    snr_db=_said(NUMBER, "10 log10 of sum(truth^2) / sum(error^2), in dB"),
    cosine=_said(NUMBER, "cosine of the angle between candidate and truth"),
)

COMPARISON = _object(
    "One quantity of one run.",
    case=_said(TEXT, "label of the input; with the seed it can be made again"),
    runner=_said(TEXT, "cpu, cuda, tensorrt"),
    mode=_one_of("eval", "train"),
    run=_said(TEXT, "plain, grad, backward, or the level of onnxruntime"),
    quantity=_said(TEXT, "as in `output logits` or `gradient of fc.weight`"),
    verdict=_a("Verdict"),
    where=_said(TEXT, "path of the module that was run on its own; empty for the whole model"),
)

LEFT_OUT = _object(
    "Something that was not compared, which is never a pass.",
    kind=_one_of("not applicable", "not run"),
    case=TEXT,
    runner=TEXT,
    mode=TEXT,
    reason=TEXT,
    where=TEXT,
)

DRIFT = _object(
    "How far one output moved where it was promised to move.",
    case=TEXT,
    output=TEXT,
    relative=_said(NUMBER, "|changed - original| / |original|, Euclidean"),
    top1=_said(_or_null(NUMBER), "share of samples whose largest logit is the same"),
)

STAGE = _object(
    "One form of the model on its way, judged by its outputs.",
    name=_said(TEXT, "as in `exported program`, `raw graph`, `onnxruntime all`"),
    runner=TEXT,
    verdict=_a("Verdict"),
    operators=_said(_map(WHOLE), "norm operators, name -> count"),
    nodes=_said(WHOLE, "nodes of the graph, 0 where unknown"),
)

INNER_VALUE = _object(
    "One floating value inside the graph, in graph order.",
    value=_said(TEXT, "name in the ONNX file"),
    node=_said(TEXT, "name of the node that makes it"),
    operator=TEXT,
    module=_said(TEXT, "path in the source model, empty where unknown"),
    source=_said(TEXT, "file:line in the function: the code"),
    against=_said(_one_of("source", "graph"), "whose float64 value it was held against"),
    verdict=_a("Verdict"),
    total_ulps=_said(NUMBER, "its error with what it inherited, in ulp"),
)

COVERAGE = _object(
    "How much of a graph was compared.",
    floating=_said(WHOLE, "floating values of the graph"),
    compared=_said(WHOLE, "those compared with a float64 truth"),
    corresponding=_said(WHOLE, "those of them that the source model has too"),
)

BLAME = _object(
    "The first operation that diverges.",
    kind=_one_of("graph", "kernel", "input"),
    node=TEXT,
    operator=TEXT,
    value=TEXT,
    fx_node=_said(TEXT, "node of the traced source"),
    module=TEXT,
    source=TEXT,
    verdict=_said(_a("Verdict"), "its local error, fed with the reference's own inputs"),
    inherited=_said(NUMBER, "largest relative error that its inputs had"),
    case=TEXT,
    detail=_said(TEXT, "one sentence on what differs"),
)

_EVIDENCE_PROPERTIES: Schema = {
    "passed": TRUTH,
    "failures": _said(TEXTS, "why it is no pass, a sentence each; empty if it passed"),
    "seed": _said(WHOLE, "from which the inputs were drawn"),
    "comparisons": _list(_a("Comparison")),
    "left_out": _list(_a("LeftOut")),
    "drifts": _list(_a("Drift")),
    "promise": _said(TEXT, "the fidelity that was measured, empty for a plain verify"),
    "inputs": _said(TEXT, "the --input that repeats the example"),
    "required": _said(TEXTS, "runners that must have run"),
    "notes": TEXTS,
    "stages": _list(_a("Stage")),
    "inner": _list(_a("InnerValue")),
    "coverage": _or_null(_a("Coverage")),
    "blamed": _or_null(_a("Blame")),
}

# What a report file says beside what it reports.
_FILE_PROPERTIES: Schema = {
    "title": _said(TEXT, "what was compared or exported"),
    "command": _said(TEXT, "the line that repeats it"),
    "written": _said(TEXTS, "the files written, where --json prints"),
}

EPS_FACT = _object(
    "One eps of the traced graph and where the file has it.",
    site=_said(TEXT, "module path, or node of the trace"),
    eps=NUMBER,
    node=_said(TEXT, "the ONNX node that holds it, empty where it is missing"),
)

CANONICAL = _object(
    "One norm as it is written.",
    site=TEXT,
    kind=_said(TEXT, "the registered norm"),
    operator=_said(TEXT, "the one ONNX operator, empty for a decomposition"),
    note=_said(TEXT, "why it is decomposed, or stayed as it is"),
)

ONNX_FACTS = _object(
    "The written ONNX file.",
    path=TEXT,
    opset=WHOLE,
    opset_reason=TEXT,
    dtype=TEXT,
    nodes=WHOLE,
    bytes=WHOLE,
    inputs=_said(_map(TEXT), "name -> as in `float32[batch, 3, 224, 224]`"),
    outputs=_map(TEXT),
    operators=_said(_map(WHOLE), "norm operators, name -> count"),
    external_data=_said(TEXT, "the file of the weights, empty where they are inside"),
    switched=_said(TEXTS, "modules that were in train mode"),
    norms=_list(_a("Canonical")),
    eps=_list(_a("EpsFact")),
)

SITE = _object(
    "One normalization in one model.",
    index=WHOLE,
    kind=TEXT,
    paths=_said(TEXTS, "every path that binds it; empty text is the model itself"),
    form=_one_of("module", "call", "formula"),
    class_name=TEXT,
    parameters=_said(_map(TEXT), "role -> name in the state_dict"),
    settings=_said(_map(ANYTHING), "eps, channel_axis, features and more"),
    shape=_said(_or_null(_list(WHOLE)), "smallest input shape that was seen"),
    dtype=_or_null(TEXT),
    calls=_or_null(WHOLE),
    attach=_one_of("norm", "weight", "layer"),
    call=_said(_or_null(_map(ANYTHING)), "where in which forward a call or a formula stands"),
    producer=_or_null(TEXT),
    consumers=TEXTS,
    found_by=_one_of("type", "graph", "run", "proof"),
    proof_error=_said(_or_null(NUMBER), "largest relative error against the float64 formula"),
    notes=TEXTS,
)

SKIP = _object(
    "What looks like a norm and is none, or was left alone.",
    path=TEXT,
    reason=TEXT,
    hint=TEXT,
    kind=TEXT,
)

STEP = _object(
    "One site and what is done to it.",
    ("where", "lead", "owner", "branches", "places", "source", "size"),
    site=_a("Site"),
    type=_one_of(*TYPES),
    to=TEXT,
    options=_map(ANYTHING),
    fidelity=_one_of("identical", "forward", "eval", "retrain"),
    notes=TEXTS,
    child=TEXT,
    changes=TEXTS,
    edits=_said(_list(_map(ANYTHING)), "tensor algebra with names: `edit` names the kind"),
    where=_said(TEXT, "of a fold: where the norm went"),
    lead=_said(WHOLE, "index of the site whose step has the edits"),
    owner=_said(TEXT, "of a merge: the module that adds the branches up"),
    branches=TEXTS,
    places=_said(TEXTS, "of a merge: the modules that give nothing from now on"),
    source=_said(TEXT, "of an untie: the shared module"),
    size=_said(WHOLE, "of an untie: the bytes that are copied"),
)

PLAN = _object(
    "Ordered steps, and a skip with its reason for everything else that normalises.",
    model=_said(TEXT, "class of the model"),
    init=_one_of("copy", "reset"),
    steps=_list(_a("Step")),
    skips=_list(_a("Skip")),
    versions=_map(TEXT),
    calls=_said(_list(_map(ANYTHING)), "of a fold: the calls that it was planned on"),
)

KEYMAP = _object(
    "Old state_dict keys to new ones.",
    moved=_list(_map(ANYTHING)),
    made=_list(_map(ANYTHING)),
    dropped=TEXTS,
    unsaved=_map(_list(WHOLE)),
    aliases=_map(TEXTS),
)

LATENCY = _object(
    "Median seconds of one forward, the two models by turns.",
    before=NUMBER,
    after=NUMBER,
    again=_said(NUMBER, "of the original in every other turn"),
    rounds=WHOLE,
    device=TEXT,
    threads=WHOLE,
    ratio=NUMBER,
    control=NUMBER,
)

SPEED = _object(
    "One forward before and after a fold.",
    norms_before=_map(WHOLE),
    norms_after=_map(WHOLE),
    operators_before=WHOLE,
    operators_after=WHOLE,
    latency=_a("Latency"),
)

DEFINITIONS: dict[str, Schema] = {
    "Evidence": _object("What was measured.", **_EVIDENCE_PROPERTIES),
    "Verdict": VERDICT,
    "Comparison": COMPARISON,
    "LeftOut": LEFT_OUT,
    "Drift": DRIFT,
    "Stage": STAGE,
    "InnerValue": INNER_VALUE,
    "Coverage": COVERAGE,
    "Blame": BLAME,
    "OnnxFacts": ONNX_FACTS,
    "EpsFact": EPS_FACT,
    "Canonical": CANONICAL,
    "Plan": PLAN,
    "Step": STEP,
    "Site": SITE,
    "Skip": SKIP,
    "KeyMap": KEYMAP,
    "Speed": SPEED,
    "Latency": LATENCY,
}

EVIDENCE: Schema = {
    "$schema": DRAFT,
    "title": "evidence of a verification",
    **_object(
        "What was measured.",
        optional=tuple(_FILE_PROPERTIES),
        **_EVIDENCE_PROPERTIES,
        **_FILE_PROPERTIES,
    ),
    "$defs": DEFINITIONS,
}

REPORT: Schema = {
    "$schema": DRAFT,
    "title": "report of swap, fold or export",
    **_object(
        "What was done to a model: the plan, what was measured, how its keys moved.",
        optional=tuple(_FILE_PROPERTIES),
        verb=_one_of("swap", "fold", "export"),
        passed=_said(TRUTH, "whether what was measured is what was promised"),
        changes_outputs=TRUTH,
        plan=_a("Plan"),
        evidence=_said(_or_null(_a("Evidence")), "null where nothing was measured"),
        speed=_said(_or_null(_a("Speed")), "of a fold that was timed"),
        onnx=_said(_or_null(_a("OnnxFacts")), "of an export"),
        keymap=_a("KeyMap"),
        versions=_said(_map(TEXT), "of the libraries"),
        notes=TEXTS,
        **_FILE_PROPERTIES,
    ),
    "$defs": DEFINITIONS,
}


if __name__ == "__main__":
    json.dump({"report": REPORT, "evidence": EVIDENCE}, sys.stdout, indent=1)
    sys.stdout.write("\n")
