"""Sites from recordings: drafts of every norm seen, made whole after all runs were read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from normsurgery.find.by_type import Typed
from normsurgery.find.dormant import is_candidate, recordings_alone
from normsurgery.find.proof import Proof
from normsurgery.find.reader import Ends, Key, Reader, Tree, dtype_name
from normsurgery.graph import Flow
from normsurgery.graph.nodes import frames
from normsurgery.survey import Site, Skip


class Drafts:
    """Collects Sites over recordings. The same norm seen twice stays one Site."""

    def __init__(self, model: nn.Module, typed: Sequence[Typed]) -> None:
        self.tree = Tree.of(model)
        self.typed = {found.paths[0]: _typed_site(found) for found in typed}
        self.sites: dict[Key, Site] = {("module", path): s for path, s in self.typed.items()}
        self.skips: dict[tuple[str, str], Skip] = {}
        self.proofs: dict[Any, Proof | None] = {}
        self.ends: dict[Key, Ends] = {}
        self.ran: set[str] = set()

    def read(self, recording: Flow) -> None:
        """Add what one run shows."""
        running = (frame for node in recording.operations for frame in frames(node))
        modules = (*(call.module for call in recording.module_calls), *(f.module for f in running))
        self.ran.update(recording.path(module) for module in {id(m): m for m in modules}.values())
        reader = Reader(self.tree, recording, self.typed, self.proofs)
        for key, site in reader.sites():
            self._add(key, site, recording.training)
        if not recording.training:
            self.ends.update(reader.ends)
        self.skips.update({(skip.path, skip.reason): skip for skip in reader.skips})

    def read_dormant(self, watched: frozenset[Callable[..., Any]]) -> None:
        """Prove, each by itself, the modules that no run reached and that may be norms."""
        for path, module in self.tree.modules.items():
            if path in self.ran or path in self.typed or not is_candidate(module):
                continue
            alone = Drafts(module, ())
            alone.proofs = self.proofs
            for recording in recordings_alone(module, watched):
                alone.read(recording)
                if ("module", "") in alone.sites:
                    self._wake(path, module, alone.sites["module", ""])
                    break

    def _wake(self, path: str, module: nn.Module, site: Site) -> None:
        prefix = f"{path}." if path else ""
        self.sites["module", path] = replace(
            site,
            paths=self.tree.paths[id(module)],
            parameters={role: prefix + name for role, name in site.parameters.items()},
            calls=None,
            shape=None,
            producer=None,
            consumers=(),
        )

    def finish(self, *, ran: bool) -> tuple[list[Site], list[Skip]]:
        """Sites in the order of the tree, without modules that only lend their parameters."""
        order = {path: place for place, path in enumerate(self.tree.modules)}
        sites = list(self.sites.values())
        if ran:
            sites = [site for site in sites if not self._only_lends(site, sites)]
            sites = [_with_calls(site) for site in sites]
        sites.sort(key=lambda site: (order.get(site.path, 0), site.label))
        return sites, list(self.skips.values())

    def _only_lends(self, site: Site, sites: Sequence[Site]) -> bool:
        if site.calls:
            return False
        own = set(site.parameters.values())
        return any(own & set(other.parameters.values()) for other in sites if other is not site)

    def _add(self, key: Key, site: Site, training: bool) -> None:
        if key in self.sites:
            known = self.sites[key]
            if known.calls is None or not training:
                site = replace(known, **_seen(site))
            else:
                settings = _in_both(known.settings, site.settings, "activation_module")
                site = replace(
                    known,
                    parameters={**site.parameters, **known.parameters},
                    settings=settings,
                    shape=_smaller(known.shape, site.shape),
                )
        elif training:
            site = replace(site, notes=(*site.notes, "runs in train mode only"))
        self.sites[key] = site


def _seen(site: Site) -> dict[str, Any]:
    return {
        name: getattr(site, name)
        for name in ("attach", "settings", "calls", "shape", "dtype", "producer", "consumers")
    }


def _in_both(eval_run: Mapping[str, Any], train_run: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The settings of the eval run, without `key` where the train run has another value for it."""
    same = eval_run.get(key) == train_run.get(key)
    return {name: value for name, value in eval_run.items() if same or name != key}


def _with_calls(site: Site) -> Site:
    if site.calls is not None:
        return site
    return replace(site, calls=0, notes=(*site.notes, "did not run on these inputs"))


def _typed_site(found: Typed) -> Site:
    prefix = f"{found.paths[0]}." if found.paths[0] else ""
    tensors = [*found.module.parameters(), *found.module.buffers()]
    floating = next((t for t in tensors if t.is_floating_point()), None)
    return Site(
        index=0,
        kind=found.spec.name,
        paths=found.paths,
        form="module",
        class_name=type(found.module).__name__,
        parameters={role: prefix + name for role, name in found.reading.tensors.items()},
        settings=dict(found.reading.settings),
        dtype=dtype_name(floating) if floating is not None else None,
        found_by="type",
    )


def _smaller(
    first: tuple[int, ...] | None, second: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    if first is None or second is None:
        return first or second
    return min(first, second, key=prod)
