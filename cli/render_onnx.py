"""What `export`, `verify`, `blame` and `find` print of ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .render import evidence as render_evidence
from .render import notes, print_json
from .render_graph import pairs
from .tables import table

if TYPE_CHECKING:
    from normsurgery.blaming import StepsBlame
    from normsurgery.exporting.facts import OnnxFacts
    from normsurgery.verifying import Evidence
    from normsurgery.verifying.stages import Blame

    from .exporting import Exported


def exported(done: Exported, as_json: bool) -> None:
    """Print what is known of the written file and what was measured; last, what to type next."""
    report, written = done.report, [str(path) for path in done.written]
    if as_json:
        return print_json({**report.to_json(), "written": written})
    if report.onnx is not None:
        print(f"{report.plan.model} as ONNX")
        from normsurgery.reporting.written import file_rows

        pairs(file_rows(report.onnx, report.plan))
        _norms(report.onnx)
        print()
    if report.evidence is None:
        print("nothing was measured")
    else:
        render_evidence(report.evidence, as_json=False)
    notes(report.notes)
    if written:
        print("wrote " + ", ".join(written))
    else:
        print("nothing was written")
    if done.following:
        print(done.following)
    return None


def verified(measured: Evidence, as_json: bool, written: Sequence[Path]) -> None:
    """Print the verdict on two models, and what was written."""
    if as_json:
        return print_json({**measured.to_json(), "written": [str(path) for path in written]})
    render_evidence(measured, as_json=False)
    if written:
        print("wrote " + ", ".join(map(str, written)))
    return None


def blamed(found: Blame | StepsBlame | None, as_json: bool) -> bool:
    """Print the first operation that diverges, or the steps of a plan that break their promise.

    Returns whether there is any.
    """
    from normsurgery.reporting.content import blame_rows
    from normsurgery.verifying.stages import Blame

    if as_json:
        print_json({"blamed": _blame_json(found)})
    elif found is None:
        print("nothing diverges")
    elif isinstance(found, Blame):
        print("the first operation that diverges")
        pairs(blame_rows(found))
    else:
        _broken_steps(found)
    return isinstance(found, Blame) or (found is not None and bool(found.steps))


def _broken_steps(found: StepsBlame) -> None:
    if found.steps:
        print("steps that break their promise")
        table(("step", "where", "norm", "why"), [tuple(row.values()) for row in _steps(found)])
    else:
        print("every promise holds")
    if found.unpromised:
        numbers = ", ".join(map(str, found.unpromised))
        print(f"steps that promise nothing, and change the outputs by design: {numbers}")


def _blame_json(found: Blame | StepsBlame | None) -> Any:
    from normsurgery.verifying.stages import Blame

    if isinstance(found, Blame):
        from normsurgery.verifying import Evidence

        return Evidence(seed=0, blamed=found).to_json()["blamed"]
    if found is None:
        return None
    return {"steps": _steps(found), "unpromised": list(found.unpromised)}


def _steps(found: StepsBlame) -> list[dict[str, Any]]:
    return [
        {
            "step": blamed.number,
            "where": blamed.step.site.label,
            "norm": f"{blamed.step.site.kind} -> {blamed.step.to}",
            "why": blamed.reason,
        }
        for blamed in found.steps
    ]


def norms(path: str, as_json: bool) -> None:
    """Print the norm operators of an ONNX file, each with the module that it comes from."""
    from normsurgery.onnxfile.reading import NORM_OPERATORS, all_nodes, norm_operators, read

    file = read(path)
    counts = norm_operators(file.proto)
    nodes = [node for node in all_nodes(file.proto) if node.op_type in NORM_OPERATORS]
    rows = [_node(node) for node in nodes]
    headers = ("node", "operator", "eps", "module", "source")
    if as_json:
        listed = [dict(zip(headers, row, strict=True)) for row in rows]
        return print_json({"model": path, "opset": file.opset, "counts": counts, "norms": listed})
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{path} (opset {file.opset}): {told or 'no norm operators'}")
    if rows:
        print()
        table(headers, rows)
    return None


def _node(node: Any) -> tuple[str, str, float | None, str, str]:
    from normsurgery.onnxfile.reading import origin

    come_from = origin(node)
    eps = next((a.f for a in node.attribute if a.name == "epsilon"), None)
    return node.name, node.op_type, eps, come_from.module, come_from.source


def _norms(facts: OnnxFacts) -> None:
    from normsurgery.reporting.written import norm_table

    if facts.norms:
        print()
        shown = norm_table(facts)
        table(shown.headers, shown.rows)
