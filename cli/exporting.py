"""The parts of `export` around the verb: its axes, where it writes, what comes next."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normsurgery.errors import UsageError

from .opening import open_model, spelled_or_inferred
from .session import progress

if TYPE_CHECKING:
    from normsurgery.artefacts import Loaded
    from normsurgery.inputs import Inputs
    from normsurgery.report import Report

# As they are typed: "0:batch", or "input_ids.1:sequence" for one input.
AXIS = re.compile(r"(?:(?P<input>.+)\.)?(?P<axis>-?\d+):(?P<name>.+)")


@dataclass(frozen=True)
class Request:
    """One `export` as it was typed. wanted: the keyword arguments of the function."""

    model: str
    wanted: Mapping[str, Any]
    inputs: list[str] | None = None
    out: Path | None = None
    page: Path | None = None
    force: bool = False
    arguments: list[str] | None = None
    weights: Path | None = None
    trust: list[str] | None = None


@dataclass(frozen=True)
class Exported:
    """written: the files, the model first. following: the next command to type."""

    report: Report
    written: tuple[Path, ...]
    following: str


def dynamic_axes(words: Sequence[str] | None) -> dict[Any, Any] | None:
    """`--dynamic` as the function takes it: by axis, or by input and axis.

    Raises UsageError for a word that is no axis, and for two names of one.
    """
    every: dict[int, str] = {}
    by_input: dict[str, dict[int, str]] = {}
    for word in words or ():
        found = AXIS.fullmatch(word)
        if found is None:
            raise UsageError(
                f"--dynamic {word}: write AXIS:NAME for every input, as in 0:batch, or "
                "INPUT.AXIS:NAME for one, as in input_ids.1:sequence."
            )
        axes = by_input.setdefault(found["input"], {}) if found["input"] else every
        if axes.setdefault(int(found["axis"]), found["name"]) != found["name"]:
            raise UsageError(f"--dynamic {word}: axis {found['axis']} is already named otherwise.")
    return {**every, **by_input} or None


def export_model(asked: Request) -> Exported:
    """Export, verify, and write the file with its report beside it."""
    import normsurgery as ns
    from normsurgery.exporting.writing import check_target
    from normsurgery.reporting import check_report, write_report

    if asked.page is not None:
        check_report(asked.page, force=asked.force)
    loaded = open_model(asked.model, asked.arguments, asked.weights, asked.trust)
    target = asked.out or default_output(loaded)
    check_target(target, force=asked.force)
    example = spelled_or_inferred(asked.inputs, loaded.model)
    given: Any = loaded.model
    doing = "exporting and verifying" if asked.wanted["verify"] else "exporting"
    with progress(doing):
        report = ns.export(given, target, example, force=asked.force, **asked.wanted)
    written = _written(report)
    if asked.page is not None:
        page = write_report(
            report,
            asked.page,
            title=f"export {asked.model} to {written[0] if written else target}",
            command=_command("export", [asked.model], asked, example),
            force=asked.force,
        )
        written = (*written, page)
    return Exported(report, written, _following(asked, report, written, example))


def default_output(loaded: Loaded) -> Path:
    """Beside the input: model.pt becomes model.onnx. A factory's is named after the factory."""
    if loaded.kind == "factory":
        return Path(f"{loaded.path.rpartition(':')[2].replace('.', '-')}.onnx")
    path = Path(loaded.path)
    if loaded.kind == "directory":
        path = path.resolve()
        return path.with_name(f"{path.name}.onnx")
    return path.with_suffix(".onnx")


def _written(report: Report) -> tuple[Path, ...]:
    """The files that `export` wrote: the graph, its weights where they are apart, the report."""
    from normsurgery.exporting.writing import data_path, report_path

    if report.onnx is None or not report.onnx.path:
        return ()
    file = Path(report.onnx.path)
    weights = (data_path(file),) if report.onnx.external_data else ()
    return tuple(path for path in (file, *weights, report_path(file)) if path.exists())


def _following(asked: Request, report: Report, written: Sequence[Path], example: Inputs) -> str:
    """Failed: who is to blame. Not verified: verify. Else: try it where it will run."""
    if not written:
        return ""
    words = [asked.model, str(written[0])]
    if not report.passed:
        return _command("verify", [*words, "--blame"], asked, example)
    on = asked.wanted["on"]
    if report.evidence is None or "cuda" in on:
        return _command("verify", words, asked, example)
    return _command("verify", [*words, "--on", "cpu,cuda"], asked, example)


def _command(verb: str, words: Sequence[str], asked: Request, example: Inputs) -> str:
    typed = ["normsurgery", verb, *words]
    if verb == "export":
        typed += _as_typed(asked.wanted)
    return shlex.join([*typed, *source_words(asked, example.spelling)])


def source_words(asked: Any, spelling: Sequence[str]) -> list[str]:
    """The options that open the source model again, and its inputs."""
    words = [word for text in spelling for word in ("--input", text)]
    words += [word for text in asked.arguments or () for word in ("--arg", text)]
    words += ["--weights", str(asked.weights)] if asked.weights is not None else []
    return words + [word for text in asked.trust or () for word in ("--trust", text)]


def _as_typed(wanted: Mapping[str, Any]) -> list[str]:
    """The options of an export that are not the default."""
    words = [word for axis in _axes(wanted["dynamic"] or {}) for word in ("--dynamic", axis)]
    words += ["--opset", str(wanted["opset"])] if wanted["opset"] is not None else []
    words += ["--dtype", wanted["dtype"]] if wanted["dtype"] else []
    words += [f"--no-{name}" for name in ("fold", "verify", "hard") if not wanted[name]]
    words += ["--allow-batch-stats"] if wanted["allow_batch_stats"] else []
    words += ["--on", ",".join(wanted["on"])] if wanted["on"] != ("cpu",) else []
    words += [word for name in wanted["require_runner"] for word in ("--require-runner", name)]
    words += ["--seed", str(wanted["seed"])] if wanted["seed"] else []
    if wanted["external_data"] is not None:
        words.append("--external-data" if wanted["external_data"] else "--no-external-data")
    return words


def _axes(dynamic: Mapping[Any, Any]) -> list[str]:
    return [
        f"{key}:{value}" if isinstance(key, int) else f"{key}.{axis}:{name}"
        for key, value in dynamic.items()
        for axis, name in (value.items() if not isinstance(key, int) else [(key, value)])
    ]
