"""Which sums of branches may be merged: no other code of the model needs what goes with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import CodeType

from torch import nn

from normsurgery.fold.acceptance import require_accepted
from normsurgery.fold.branch_checks import inner_modules
from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.code_reach import Reach, reaches
from normsurgery.fold.ground import Ground, Landing, Refused
from normsurgery.fold.parallel_branches import KIND, Apart, BranchSum, branch_sums
from normsurgery.fold.preconditions import require
from normsurgery.graph.nodes import frames, maker, outputs_of
from normsurgery.surgery.obstacles import obstacle
from normsurgery.surgery.owner.install import is_rewritten
from normsurgery.surgery.references import ModuleReferences
from normsurgery.survey import Site


@dataclass(frozen=True)
class Merging:
    """The model whose branches are to be merged, and what surrounds its modules."""

    ground: Ground
    model: nn.Module
    around: ModuleReferences

    def sums(
        self, chosen: Collection[int], refused: Mapping[str, NoMatch]
    ) -> tuple[list[BranchSum], list[Apart]]:
        """The sums that may be merged, and those that may not, with the reason.

        chosen: the Sites that may go; a sum with another norm in it is neither.
        refused: labels of sums that turned out to be impossible.
        """
        known, apart = branch_sums(self.ground)
        found: list[BranchSum] = []
        for one in known:
            if any(site.index not in chosen for site in one.identities):
                continue
            try:
                if one.label in refused:
                    raise Refused(refused[one.label].check, refused[one.label].where)
                self._require_accepted(one)
                found.append(one)
            except Refused as refusal:
                apart.append(Apart(refusal.match, one.identities))
        return found, apart

    def _require_accepted(self, found: BranchSum) -> None:
        """Raises Refused where something else needs a branch."""
        ground = self.ground
        if is_rewritten(self.model.get_submodule(found.owner)):
            # What was a call when the norms around it were decided would be a branch now.
            raise Refused(
                Check.NOT_REWRITABLE, f"that of {found.owner or 'the model'} was rewritten before"
            )
        for site in found.identities:
            require(ground, self.model, site, self.around)
        for path in found.convolutions:
            reason = obstacle(self.model, _site(path), copies=False, around=self.around)
            if reason is not None:
                raise Refused(Check.NOT_REWRITABLE, f"{path}: {reason}")
        landings = [Landing(branch.nodes, (), ()) for branch in found.branches]
        nodes = ground.flow.between(found.branches[0].source, found.output)
        inside = {value for node in nodes for value in outputs_of(node)} - {found.output}
        require_accepted(ground, self.model, landings, inside)
        self._require_unreached(found)

    def _require_unreached(self, found: BranchSum) -> None:
        """Only the code that adds the branches up reaches the modules that go. Raises Refused."""
        gone = [self.model.get_submodule(path) for path in _gone(self.ground, found)]
        own = set(_code_of(self.ground, found))
        for reach in self._reaches:
            if (self._paths[id(reach.owner)], reach.code) in own:
                continue
            if any(reach.touches(module) for module in gone):
                where = self._paths[id(reach.owner)] or "the model itself"
                expression = "self." + ".".join(reach.chain)
                raise Refused(
                    Check.NOT_REWRITABLE, f"{where} reads {expression} in {reach.function}"
                )

    @cached_property
    def _reaches(self) -> Sequence[Reach]:
        return list(reaches(self.model))

    @cached_property
    def _paths(self) -> Mapping[int, str]:
        return {id(module): path for path, module in self.model.named_modules()}


def belong_to(ground: Ground, found: BranchSum) -> None:
    """The norms that are gone in front of its branches are part of the merged layer from here on.

    What goes forward from its source would else reach a branch through them.
    """
    for value in {value for branch in found.branches for value in branch.between}:
        if ground.gone.pop(value, None) is not None:
            ground.settled.add(ground.ends[value].site.index)


def _site(path: str) -> Site:
    """A layer, as obstacles are asked about."""
    return Site(0, KIND, (path,), "module", "", {}, {})


def _gone(ground: Ground, found: BranchSum) -> set[str]:
    """The paths of the branches, of what holds them below the owner, and of the norms in there."""
    above = f"{found.owner}." if found.owner else ""
    paths = {branch.path for branch in found.branches}
    around = {
        above + ".".join(parts[:length])
        for parts in (path.removeprefix(above).split(".") for path in paths)
        for length in range(1, len(parts))
    }
    owner = ground.model.get_submodule(found.owner)
    ran = {
        ground.located.recording.path(module)
        for branch in found.branches
        for module in inner_modules(branch.nodes, owner)
    }
    return (
        paths | around | {path for path in ran if path.startswith(tuple(f"{a}." for a in around))}
    )


def _code_of(ground: Ground, found: BranchSum) -> Iterator[tuple[str, CodeType]]:
    """The code that runs the branches, with the path of the module that runs it."""
    owner = ground.model.get_submodule(found.owner)
    last = maker(found.output)
    nodes = [node for branch in found.branches for node in branch.nodes]
    for node in (*nodes, *(() if last is None else (last,))):
        modules = [frame.module for frame in frames(node)]
        if owner not in modules:
            continue
        outermost = len(modules) - modules[::-1].index(owner)
        for frame in frames(node)[:outermost]:
            if frame.code is not None:
                yield ground.located.recording.path(frame.module), frame.code
