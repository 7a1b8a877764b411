"""Which sites are meant, and what each of them shall become: kinds, path globs, indices, rules."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from normsurgery.errors import UsageError
from normsurgery.spec import canonical
from normsurgery.survey import Site

ARROW = "->"


@dataclass(frozen=True)
class Rule:
    """`kind path -> to name=value ...`: what sites of a kind, below a path glob, shall become.

    `kind` is a canonical norm name or "*"; `path` is a glob over a site's paths and its label.
    """

    to: str
    kind: str = "*"
    path: str = "*"
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read `batchnorm -> groupnorm num_groups=16` or `* layer4.* -> identity`."""
        left, arrow, right = text.partition(ARROW)
        source, target = left.split(), right.split()
        if not arrow or not 1 <= len(source) <= 2 or not target:
            raise UsageError(
                f"cannot read the rule {text!r}. Write 'KIND [PATH] -> NORM [name=value ...]', "
                "for example 'batchnorm layer4.* -> groupnorm num_groups=16'."
            )
        kind = source[0] if source[0] == "*" else canonical(source[0])
        path = source[1] if len(source) == 2 else "*"
        return cls(canonical(target[0]), kind, path, parse_options(target[1:]))

    def matches(self, site: Site) -> bool:
        return self.kind in ("*", site.kind) and _matches(site, self.path)


def parse_options(words: Iterable[str]) -> dict[str, Any]:
    """`name=value` words as a dict; a value is JSON where it reads as JSON, else text."""
    options: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise UsageError(f"cannot read the option {word!r}. Write name=value.")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options


def as_rules(
    to: str | None,
    rules: Iterable[Rule | str],
    options: Mapping[str, Any],
) -> tuple[Rule, ...]:
    """The rules of one run, from either of the two ways to give them."""
    if isinstance(rules, (str, Rule)):
        rules = (rules,)
    given = tuple(Rule.parse(rule) if isinstance(rule, str) else rule for rule in rules)
    if given and to is not None:
        raise UsageError("give either a target norm or rules, not both: 'to' would be ambiguous.")
    if given and options:
        raise UsageError("options belong into the rules: 'batchnorm -> groupnorm num_groups=16'.")
    if given:
        return given
    if to is None:
        raise UsageError("say what the norms shall become: give a target norm, rules, or a plan.")
    return (Rule(canonical(to), options=dict(options)),)


def select(
    sites: Sequence[Site],
    kind: str | None,
    only: Sequence[str | int],
    exclude: Sequence[str | int],
) -> tuple[Site, ...]:
    """The sites of a kind (None: any) that `only` names (empty: all) and `exclude` does not.

    A pattern is a site's index where it is a number, and where it is text a glob over a site's
    paths and label; digits that are the path of no site are an index too, as the command line has
    text alone. Raises UsageError for a pattern that no site of the survey matches.
    """
    wanted = None if kind is None else canonical(kind)
    only, exclude = _patterns(only), _patterns(exclude)
    kept = _named(sites, only) if only else set(range(len(sites)))
    kept -= _named(sites, exclude)
    return tuple(
        site
        for position, site in enumerate(sites)
        if position in kept and wanted in (None, site.kind)
    )


def is_meant(
    site: Site, kind: str | None, only: Sequence[str | int], exclude: Sequence[str | int]
) -> bool:
    """Whether the selection takes this site, whatever else there is."""
    only, exclude = _patterns(only), _patterns(exclude)
    named = not only or any(_matches(site, pattern) for pattern in only)
    left = any(_matches(site, pattern) for pattern in exclude)
    return named and not left and kind in (None, site.kind)


def _patterns(given: str | int | Sequence[str | int]) -> Sequence[str | int]:
    return (given,) if isinstance(given, (str, int)) else given


def _named(sites: Sequence[Site], patterns: Sequence[str | int]) -> set[int]:
    named: set[int] = set()
    for pattern in patterns:
        found = {n for n, site in enumerate(sites) if _matches(site, pattern)}
        if not found and isinstance(pattern, str) and pattern.isdigit():
            found = {n for n, site in enumerate(sites) if _matches(site, int(pattern))}
        if not found:
            raise UsageError(_nothing_matches(sites, pattern))
        named |= found
    return named


def _matches(site: Site, pattern: str | int) -> bool:
    if isinstance(pattern, int):
        return pattern == site.index
    return any(fnmatchcase(name, pattern) for name in (*site.paths, site.label))


def _nothing_matches(sites: Sequence[Site], pattern: str | int) -> str:
    labels = [site.label or "(the model itself)" for site in sites]
    near = get_close_matches(str(pattern), labels, n=3, cutoff=0.3) or labels[:3]
    listed = ", ".join(near) if near else "none: the model has no site"
    return (
        f"no site matches {str(pattern)!r}. Near ones: {listed}. A pattern is a glob over paths "
        f"('layer4.*') or an index from 0 to {len(sites) - 1}."
    )
