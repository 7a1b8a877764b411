"""The rounding of a model to half precision, as a stage: before any kernel, in float64."""

from __future__ import annotations

from torch import nn

from normsurgery.inputs import Inputs
from normsurgery.verifying.compare import one_line
from normsurgery.verifying.judge import Verdict, judge
from normsurgery.verifying.sources import TorchSource
from normsurgery.verifying.stages import Stage
from normsurgery.verifying.trials import most_telling


def conversion(master: nn.Module, source: TorchSource, inputs: Inputs, seed: int) -> Stage:
    """How far the model with rounded weights (`source`) is from the one they were rounded from.

    Both are run in float64. It may be as far off as one rounding of every weight and input at
    random, times four, plus 8 ulp: the criterion of `judge`. Integers are left out: a rounding may
    well turn an argmax.
    """
    assert source.rounded_to is not None
    original = TorchSource(master, source.order, source.rounding, everything=source.everything)
    name = f"conversion to {str(source.rounded_to).removeprefix('torch.')}"
    try:
        truth, rounded = original.truth(inputs, seed), source.truth(inputs, seed)
        moved = original.moved(inputs, seed)
    except Exception as error:  # an operation may lack float64
        return Stage(name, "float64", Verdict(None, f"no float64 reference: {one_line(error)}"))
    verdicts = [
        judge(rounded[output], exact, None, moved[output], source.rounded_to)
        for output, exact in truth.items()
        if exact.is_floating_point()
    ]
    return Stage(name, "float64", most_telling(verdicts))
