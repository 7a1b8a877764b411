"""Control flow, and what must not run in a float64 truth."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from normsurgery.errors import CannotRun

Array = np.ndarray[Any, Any]


class Loop(OpRun):
    """With scan outputs stacked along a new first axis, as the standard has it."""

    body: Any

    def need_context(self) -> bool:
        return True

    def _run(
        self,
        limit: Array | None,
        condition: Array | None,
        *carried: Array,
        context: dict[str, Any] | None = None,
        body: Any = None,
        attributes: Any = None,
    ) -> tuple[Any, ...]:
        names = self.body.input_names
        state: list[Any] = list(carried)
        collected: list[list[Array]] = [
            [] for _ in range(len(self.body.output_names) - 1 - len(state))
        ]
        step = 0
        going = condition is None or bool(np.all(condition))
        while going and (limit is None or step < int(np.asarray(limit).item())):
            given = [np.array(step, np.int64), np.array(True), *state]
            local = {**(context or {}), **dict(zip(names, given, strict=True))}
            found = self.body.run(None, local, attributes=attributes)
            going = bool(np.all(found[0]))
            state = list(found[1 : 1 + len(state)])
            for values, value in zip(collected, found[1 + len(state) :], strict=True):
                values.append(value)
            step += 1
        stacked = [np.stack(values) if values else np.empty((0,)) for values in collected]
        return (*state, *stacked)


def _refused(name: str, why: str) -> type[OpRun]:
    def run(self: OpRun, *values: Any, **attributes: Any) -> Any:
        raise CannotRun(f"{name} {why}")

    return type(name, (OpRun,), {"_run": run, "op_domain": ""})


_RANDOM = "draws random numbers, so the graph has no one truth. Export the model in eval mode."
_FLOAT32 = "has no float64 formula here. Export with an opset below 26."
OPERATORS: list[type[OpRun]] = [
    Loop,
    *(
        _refused(name, _RANDOM)
        for name in (
            "Bernoulli",
            "Multinomial",
            "RandomNormal",
            "RandomNormalLike",
            "RandomUniform",
            "RandomUniformLike",
        )
    ),
    *(_refused(name, _FLOAT32) for name in ("LinearAttention", "CausalConvWithState")),
]
