"""The checks of a fold: every reason for which a norm is left where it is, under a fixed name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Check(Enum):
    """What must hold for a fold. The value is how a refusal begins."""

    OUTPUT_USED = "what it would be folded into is used elsewhere too"
    CALLED_AGAIN = "a module is called more than once, and not always with this norm"
    TIED = "a weight is tied"
    NO_STATISTICS = "it has no running statistics"
    TRAIN_MODE = "it uses the statistics of the batch"
    ZERO_PADDING = "zero padding in between"
    NON_LINEAR = "a non-linear operation in between"
    UNKNOWN = "an operation in between that is not known to commute with a scale and a shift"
    AXIS = "its channels are not the channels of its neighbour"
    NO_NEIGHBOUR = "no weight on either side to fold it into"
    COMPUTES = "it has no scale or shift to fold away, only the statistics it computes"
    UNRUN = "code that no measured call ran"
    DATA_DEPENDENT = "control flow that depends on data"
    OTHER_EDITS = "another call of the model would need other weights"
    ADDED = "its output is added to another value"
    RETURNED = "its output is returned by the model"
    FOREIGN_WEIGHT = "a quantized, sharded or offloaded weight"
    COMPUTED_WEIGHT = "a weight that is computed from others"
    HOOK = "a hook"
    DTYPE = "a dtype that cannot hold the folded weight"
    NOT_FINITE = "a value that is not finite"
    NO_BIAS = "no place for a bias"
    ON_WEIGHT = "it acts on a weight and not on an activation"
    NOT_RUN = "it did not run on these inputs"
    NOT_REWRITABLE = "its forward cannot be rewritten"
    RESIDUAL = "what it reads is no centrable residual stream"


@dataclass(frozen=True)
class NoMatch:
    """Why a rule does not apply to a site: the check that failed, where, and what would help.

    call: the measured call in which it failed; "" for the example.
    """

    check: Check
    where: str = ""
    hint: str = ""
    call: str = ""

    @property
    def reason(self) -> str:
        reason = f"{self.check.value}: {self.where}" if self.where else self.check.value
        return f"{reason} in the call with {self.call}" if self.call else reason
