"""Every error a user can meet. Each class words its own message: what, where, why, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class NormsurgeryError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 2


class UsageError(NormsurgeryError):
    """The call itself is wrong: an option, a combination, a name."""


class NoOperator(NormsurgeryError):
    """ONNX has no operator for a norm as it is spelled, with the reason."""


class UnknownName(UsageError):
    """A name that is not in the list it must come from."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = get_close_matches(name, names, n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {what} {name!r}.{guess} Known: {', '.join(names) or 'none'}.")


class CannotConvert(NormsurgeryError):
    """One site cannot become the wanted norm."""

    def __init__(self, where: str, what: str, to: str, why: str, cure: str) -> None:
        self.where, self.what, self.to, self.why, self.cure = where, what, to, why, cure
        super().__init__(f"{where or '(the model itself)'} ({what}) -> {to}: {why}. {cure}")


class WrongShape(NormsurgeryError, ValueError):
    """A norm was given an input it cannot normalise."""

    def __init__(self, norm: str, got: Iterable[int], wanted: str, cure: str) -> None:
        super().__init__(f"{norm}: the input has shape {tuple(got)}, wanted {wanted}. {cure}")


class PromiseBroken(NormsurgeryError):
    """What was measured is less than what was promised or required."""

    exit_code = 1


class CannotRead(NormsurgeryError):
    """A file, a model or an input that cannot be read, loaded or run."""

    exit_code = 3


class CannotTrace(NormsurgeryError):
    """The model cannot be run or traced on the inputs it was given."""

    exit_code = 3


class CannotRun(NormsurgeryError):
    """A runtime has no kernel for an operator, or rejects the graph."""

    exit_code = 3


class CannotRewrite(NormsurgeryError):
    """The forward that holds a call or a formula cannot be rewritten; `reason` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)
