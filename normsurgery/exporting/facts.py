"""What is known of a written ONNX file, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class EpsFact:
    """One eps of the traced graph and where the written graph has it.

    site: module path, or the node of the traced graph. node: the ONNX node that holds it (as an
    attribute, or reads it as a constant); "" where it is missing, which makes the export fail.
    """

    site: str
    eps: float
    node: str

    @property
    def found(self) -> bool:
        return bool(self.node)


@dataclass(frozen=True)
class Canonical:
    """One norm as it is written: `operator` is the one ONNX operator, or "" for a decomposition.

    kind: registered norm. note: why it is decomposed, or why a hand-written norm stayed as it is.
    """

    site: str
    kind: str
    operator: str
    note: str = ""


@dataclass(frozen=True)
class OnnxFacts:
    """The written file.

    inputs, outputs: name -> "float32[batch, 3, 224, 224]". operators: norm operators, name ->
    count. switched: modules that were in train mode and were exported in eval mode.
    """

    path: str
    opset: int
    opset_reason: str
    dtype: str
    nodes: int
    bytes: int
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    operators: Mapping[str, int] = field(default_factory=dict)
    external_data: str = ""
    switched: tuple[str, ...] = ()
    norms: tuple[Canonical, ...] = ()
    eps: tuple[EpsFact, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OnnxFacts:
        return cls(
            **{
                **data,
                "switched": tuple(data["switched"]),
                "norms": tuple(Canonical(**item) for item in data["norms"]),
                "eps": tuple(EpsFact(**item) for item in data["eps"]),
            }
        )
