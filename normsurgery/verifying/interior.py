"""The values inside a graph and those inside its source, brought together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor
from torch.export import ExportedProgram

from normsurgery.errors import NormsurgeryError
from normsurgery.inputs import Inputs
from normsurgery.onnxfile.reading import OnnxFile
from normsurgery.verifying.compare import one_line
from normsurgery.verifying.comparing import Comparing
from normsurgery.verifying.forced import forced_norms, values_of_graph
from normsurgery.verifying.hard_inputs import Case
from normsurgery.verifying.inside import Inside, look_inside
from normsurgery.verifying.sources import (
    OnnxCandidate,
    OnnxSource,
    Tensors,
    TorchSource,
    as_taken,
    fed,
)
from normsurgery.verifying.stages import InnerValue
from normsurgery.verifying.values import SourceValues

if TYPE_CHECKING:
    pass


def inside_of(this: Comparing, runners: Sequence[str], cases: Sequence[Case]) -> Inside:
    nothing = Inside((), None)
    if not this.options.intermediates or not runners:
        return nothing
    if not isinstance(this.candidate, OnnxCandidate):
        return nothing
    file, given = this.candidate.file, this.example.inputs
    try:
        inside = look_inside(
            file,
            as_taken(file, given),
            order=this.source.order,
            runner=runners[0],
            seed=this.options.seed,
            source=_source_values(this),
        )
    except NormsurgeryError as error:
        this.notes.append(f"the values inside the graph were not compared: {error}")
        return nothing
    return Inside((*inside.values, *_forced(this, file, cases)), inside.coverage)


def _forced(this: Comparing, file: OnnxFile, cases: Sequence[Case]) -> list[InnerValue]:
    """What only shows where the norms inside are fed with hard values."""
    others = [case.inputs for case in cases if case.label in ("random", "random ids")]
    if not others:
        return []
    if isinstance(this.source, OnnxSource):
        values = values_of_graph(this.source.file, this.source.order)
    else:
        program = program_of(this)
        if program is None:
            return []
        values = partial(_of_program, SourceValues(program))
    inputs = [this.example.inputs, others[-1]]
    try:
        return forced_norms(file, values, inputs, this.source.order, seed=this.options.seed)
    except NormsurgeryError as error:
        this.notes.append(f"norms inside were not fed with hard values: {one_line(error)}")
        return []


def _of_program(
    values: SourceValues, inputs: Inputs, instead: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return values.float64(inputs, instead=instead)


def _source_values(this: Comparing) -> Tensors | None:
    """Every value that the source computes in float64, by name, where that can be had."""
    given = this.example.inputs
    if isinstance(this.source, OnnxSource):
        return this.source.graph.run(fed(this.source.file, given, this.source.order), "all")
    program = program_of(this)
    if program is None:
        return None
    try:
        return SourceValues(program).float64(given, seed=this.options.seed)
    except NormsurgeryError as error:
        this.notes.append(f"the values inside the original are not known: {error}")
        return None


def program_of(this: Comparing) -> ExportedProgram | None:
    """The traced source; traced once, if it was not given."""
    if this.program is None:
        this.program = this.traced
    if this.program is None and not this.untraceable:
        assert isinstance(this.source, TorchSource)
        from normsurgery.exporting.tracing import trace

        try:
            this.program = trace(this.source.module, this.example.inputs)
        except NormsurgeryError as error:
            this.untraceable = one_line(error)
            this.notes.append(f"the values inside the original are not known: {this.untraceable}")
    return this.program
