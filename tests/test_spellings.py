"""No file of the tool names a norm but the norm's own."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

from normsurgery import spec

PACKAGE = Path(spec.__file__).parent
# The registry's table, and the norms, which name one another as what they are made from.
NORMS = PACKAGE / "norms"
# Also words: `identity` is what a fold leaves, `affine` is that or an option of a conversion.
WORDS = {"identity", "affine"}
CLASS = re.compile(r"nn\.(Sync)?(Batch|Layer|Group|Instance|RMS|LocalResponse)Norm(\dd)?\b")
# Files that look at torch's own classes for what is no fact about the norm.
CLASSES_ALLOWED = {
    "inputs/inference.py",  # the shape of an input, from the first layer that tells it
    "numerics/precision.py",  # an eps that torch takes from the type is held while types change
}


def _strings(path: Path) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return [token.string.strip("\"'") for token in tokens if token.type == tokenize.STRING]


def test_no_norm_is_named_outside_its_own_file() -> None:
    names = set(spec.names()) - WORDS
    found = [
        f"{path.relative_to(PACKAGE)}: {text!r}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if NORMS not in path.parents
        for text in _strings(path)
        if text in names
    ]
    assert not found, "\n".join(found)


def test_no_class_of_a_norm_is_named_outside_its_own_file() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}: {match.group()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if NORMS not in path.parents and str(path.relative_to(PACKAGE)) not in CLASSES_ALLOWED
        for match in CLASS.finditer(_code(path))
    ]
    assert not found, "\n".join(found)


def _code(path: Path) -> str:
    """Without comments and strings, where a norm may be spoken of."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    told = (tokenize.COMMENT, tokenize.STRING)
    return "".join(token.string if token.type not in told else " " for token in tokens)
