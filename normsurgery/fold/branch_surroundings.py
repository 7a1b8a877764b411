"""Which sums of branches may be merged: no other code of the model needs what goes with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from normsurgery.fold.acceptance import require_accepted
from normsurgery.fold.checks import Check, NoMatch
from normsurgery.fold.ground import Ground, Landing, Refused
from normsurgery.fold.neutral import NeutralBranch
from normsurgery.fold.parallel_branches import KIND, Apart, BranchSum, branch_sums
from normsurgery.fold.preconditions import require
from normsurgery.graph.nodes import outputs_of
from normsurgery.surgery.obstacles import lost_fact, obstacle
from normsurgery.surgery.owner.install import is_rewritten
from normsurgery.surgery.references import ModuleReferences
from normsurgery.survey import Site

# What a module is asked for that looks through everything it holds.
CONTENTS = frozenset({"_modules", "children", "modules", "parameters", "buffers", "state_dict"})
CONTENTS |= {"named_children", "named_modules", "named_parameters", "named_buffers"}


@dataclass(frozen=True)
class Merging:
    """The model whose branches are to be merged, and what refers to its modules."""

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
            where = f"that of {found.owner or 'the model'} was rewritten before"
            raise Refused(Check.NOT_REWRITABLE, where)
        for site in found.identities:
            require(ground, self.model, site, self.around)
        for path in found.places:
            self._require_replaceable(path)
        landings = [Landing(branch.nodes, (), ()) for branch in found.branches]
        nodes = ground.flow.between(found.branches[0].source, found.output)
        inside = {value for node in nodes for value in outputs_of(node)} - {found.output}
        require_accepted(ground, self.model, landings, inside)

    def _require_replaceable(self, path: str) -> None:
        """Nothing refers to the module or to what it holds. Raises Refused."""
        top = self.model.get_submodule(path)
        for below, module in top.named_modules(prefix=path):
            if len(self.around.paths_of(module)) > 1:
                raise Refused(Check.TIED, f"{below} has another name too")
            site = Site(0, KIND, (below,), "module", "", {}, {})
            reason = obstacle(self.model, site, copies=False, around=self.around)
            reason = reason or lost_fact(self.model, site, NeutralBranch(), self.around)
            if reason is not None:
                raise Refused(Check.NOT_REWRITABLE, f"{below}: {reason}")
        for module in self._above(path):
            for read in self.around.reads_of(module):
                if read.attribute in CONTENTS:
                    raise Refused(Check.NOT_REWRITABLE, f"{read}, of which {path} is a part")

    def _above(self, path: str) -> Iterator[nn.Module]:
        while path:
            path = path.rpartition(".")[0]
            yield self.model.get_submodule(path)


def belong_to(ground: Ground, found: BranchSum) -> None:
    """The norms that are gone in front of its branches are part of the merged layer from here on.

    What goes forward from its source would else reach a branch through them.
    """
    for value in {value for branch in found.branches for value in branch.between}:
        if ground.gone.pop(value, None) is not None:
            ground.settled.add(ground.ends[value].site.index)
