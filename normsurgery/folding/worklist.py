"""One worklist for a fold: propose on the example, check on every measured call, take.

What was taken may be what stood in the way of something else, so everything that is left is tried
again until nothing changes: a second fold finds nothing by construction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from normsurgery.flow.flow import Operand
from normsurgery.flow.nodes import position
from normsurgery.folding.acceptance import require_accepted
from normsurgery.folding.affines import is_affine
from normsurgery.folding.branch_surroundings import Merging, belong_to
from normsurgery.folding.checks import Check, NoMatch
from normsurgery.folding.ground import Ground, Refused, Run
from normsurgery.folding.merged_layers import merged_layer, with_unpadded
from normsurgery.folding.merging import merge_steps
from normsurgery.folding.parallel_branches import BranchSum, branch_sums
from normsurgery.folding.preconditions import require
from normsurgery.folding.rules import AFFINE_RULES, TAIL_RULES, Proposal, Rule, standalone
from normsurgery.folding.steps import foremost, step_of
from normsurgery.folding.unrun_code import UnrunCode
from normsurgery.rewriting.references import ModuleReferences
from normsurgery.steps import Merge, Step, Together
from normsurgery.survey import Site

Key = int | str  # a site by its index, a sum of branches by its label


@dataclass(frozen=True)
class Taken:
    """A rule that applies to a norm in one call."""

    ground: Ground
    proposal: Proposal
    runs: tuple[Run, ...]


class Worklist:
    """Folds on the grounds of all measured calls, the example's first.

    refused: what turned out to be impossible. hints: what would help where a module is called
    again. made: the steps in the order they were taken. failed: why the others stay, by site index.
    """

    def __init__(
        self,
        model: nn.Module,
        grounds: Sequence[Ground],
        chosen: Collection[int],
        refused: Mapping[Key, NoMatch],
        hints: Mapping[int, str],
    ) -> None:
        self.model = model
        self.example, *self.others = grounds
        self.grounds = grounds
        self.refused = refused
        self.hints = hints
        self.around = ModuleReferences(model)
        self.unrun = UnrunCode(grounds)
        self.made: dict[int, Step] = {}
        self.failed: dict[int, list[NoMatch]] = {}
        sites = [site.index for site in _in_order(self.example) if site.index in chosen]
        self.affine = [index for index in sites if is_affine(self.example.site(index))]
        self.rest = [index for index in sites if index not in self.affine]
        self.chosen = chosen

    def run(self) -> None:
        """Take what can be taken, until nothing is left that can."""
        # Norms that are affine go whole, and so come first. The others keep branches apart in any
        # case; their scale and shift go into the layer that branches become.
        while self._fold(self.affine) or self._merge() or self._fold(self.rest):
            pass
        self._reduce()
        self.made = with_unpadded(self.made)

    @property
    def called_again(self) -> frozenset[int]:
        """The norms that stay, or stay an affine, because a module is called more than once."""
        left = (i for i in self.failed if i not in self.made or self.made[i].to == "affine")
        again = (i for i in left if foremost(self.failed[i]).check is Check.CALLED_AGAIN)
        return frozenset(again)

    def why_left(self, index: int) -> NoMatch:
        """The check that stands closest to a fold of a norm that stays."""
        match = foremost(self.failed[index])
        again = match.check is Check.CALLED_AGAIN
        return replace(match, hint=self.hints[index]) if again and index in self.hints else match

    # --- one norm, or several that are one --------------------------------------------------------

    def _fold(self, indices: Sequence[int]) -> bool:
        """Fold each of these that can go alone, else those that can together; whether any did."""
        left = [index for index in indices if index not in self.made]
        alone = [index for index in left if self._folded([index])]
        if alone:
            return True
        sites = [self.example.site(index) for index in left]
        together = [group for group in one_norm(sites) if self._folded([s.index for s in group])]
        return bool(together)

    def _folded(self, indices: Sequence[int]) -> bool:
        """Whether the first rule that applies to the norm at all these places was taken."""
        lead = self.example.site(indices[0])
        failed: list[NoMatch] = []
        try:
            self._require(indices)
            for rule in AFFINE_RULES if is_affine(lead) else TAIL_RULES:
                try:
                    taken = self._proposed(rule, indices)
                except Refused as refusal:
                    failed.append(refusal.match)
                    continue
                self._take(indices, taken)
                return True
        except Refused as refusal:
            failed.append(refusal.match)
        if len(indices) == 1:
            self.failed[lead.index] = failed
        return False

    def _require(self, indices: Sequence[int]) -> None:
        """Raises Refused where the norm must stay whatever surrounds it."""
        for index in indices:
            known = self.refused.get(index)
            if known is not None:
                raise Refused(known.check, known.where, known.hint)
            require(self.example, self.model, self.example.site(index), self.around)

    def _proposed(self, rule: Rule, indices: Sequence[int]) -> list[Taken]:
        """The rule on every call: the same edits, or the norm and the edited weights do not run
        there. Raises Refused."""
        found: list[Taken] = []
        for ground in self.grounds:
            try:
                taken = self._proposed_in(ground, rule, indices, found)
            except Refused as refusal:
                raise refusal.in_call(ground.call) if ground.call else refusal from None
            found += [] if taken is None else [taken]
        return found

    def _proposed_in(
        self, ground: Ground, rule: Rule, indices: Sequence[int], found: Sequence[Taken]
    ) -> Taken | None:
        runs = tuple(run for index in indices for run in ground.runs[index])
        if not runs and found:
            require_unread(ground, (edit.target for edit in found[0].proposal.agreed.edits))
            return None
        proposal = rule(ground, ground.site(indices[0]), runs)
        require_accepted(ground, self.model, proposal.landings, proposal.changed)
        if found:
            _require_same(ground, proposal, found[0].proposal)
        else:
            tensors = (operand for landing in proposal.landings for operand in landing.tensors)
            self.unrun.require_unnamed(operand.name for operand in tensors)
            notes = self.unrun.chosen_by(runs, proposal.landings)
            proposal = replace(proposal, notes=(*proposal.notes, *notes))
        return Taken(ground, proposal, runs)

    def _take(self, indices: Sequence[int], taken: Sequence[Taken]) -> None:
        """From here on the proposal is done, in every call. Raises Refused before it is."""
        lead, first = self.example.site(indices[0]), taken[0].proposal
        step = step_of(self.example, self.model, lead, first, None, self.around)
        self.made[lead.index] = step
        for index in indices[1:]:
            site = self.example.site(index)
            self.made[index] = Together(
                site=site,
                to=step.to,
                options=step.options,
                fidelity=step.fidelity,
                notes=(f"with {lead.label}",),
                lead=lead.index,
                where=step.where,
            )
        for one in taken:
            take(one, indices)
        for ground in self.grounds:
            ground.extend(first.agreed.created)

    def _reduce(self) -> None:
        """What can go nowhere becomes one multiplication and addition."""
        for index in [index for index in self.affine if index not in self.made]:
            site, failed = self.example.site(index), self.failed[index]
            if not self.example.runs[index] or index in self.refused:
                continue
            try:
                self._require([index])
                proposal = standalone(self.example, site, self.example.runs[index])
                left = self.why_left(index)
                step = step_of(self.example, self.model, site, proposal, left, self.around)
            except Refused as refusal:
                failed.append(refusal.match)
                continue
            self.made[index] = step

    # --- parallel branches ------------------------------------------------------------------------

    def _merge(self) -> bool:
        """Make one layer of parallel branches; a norm among them goes with them."""
        if self.example.choices.keep_classes:
            return False
        refused = {key: match for key, match in self.refused.items() if isinstance(key, str)}
        merging = Merging(self.example, self.model, self.around)
        known = {layer.output for layer in self.example.merged}
        sums, _ = merging.sums(self.chosen, refused)
        found = [s for s in sums if s.output not in known]
        agreed = [(s, same) for s in found if (same := self._in_other_calls(s)) is not None]
        if not agreed:
            return False
        planned = [edit for step in self.made.values() for edit in step.edits]
        steps = merge_steps(self.example, [one for one, _ in agreed], planned)
        for step in steps:
            self.made[step.site.index] = step
        for (_, same), step in zip(agreed, (s for s in steps if isinstance(s, Merge)), strict=True):
            for ground, one in same:
                ground.merged.append(merged_layer(one, step))
                ground.settled.update(site.index for site in one.identities)
                belong_to(ground, one)
        return True

    def _in_other_calls(self, found: BranchSum) -> list[tuple[Ground, BranchSum]] | None:
        """The same sum in every call; None where one adds up something else, or may."""
        same = [(self.example, found)]
        try:
            self.unrun.require_unnamed(_tensors(found))
        except Refused:
            return None
        for ground in self.others:
            sums = [s for s in branch_sums(ground)[0] if _is_same_sum(s, found)]
            if sums:
                same.append((ground, sums[0]))
                continue
            try:
                require_unread(ground, _tensors(found))
            except Refused:
                return None
        return same


def take(taken: Taken, indices: Collection[int]) -> None:
    """From here on the proposal is done in this call."""
    ground, proposal = taken.ground, taken.proposal
    if proposal.landings:
        ground.settled.update(indices)
    ground.created |= proposal.agreed.created
    ground.untied |= proposal.agreed.untied
    ground.changed |= proposal.changed
    ground.absorbing |= {node for landing in proposal.landings for node in landing.nodes}
    ground.absorbing |= {node for run in taken.runs for node in run.nodes}
    if proposal.gone:
        ground.gone.update({run.end: run.start for run in taken.runs})


def one_norm(sites: Sequence[Site]) -> list[list[Site]]:
    """The groups of two and more sites that are calls with the very same tensors and settings.

    `F.batch_norm(conv(x), mean, var, ...)`, written twice around one convolution, is two sites, as
    a module called twice is one. Neither can go alone, for the convolution serves both.
    """
    groups: list[list[Site]] = []
    for site in sites:
        if site.form == "module" or not site.parameters:
            continue
        group = next((group for group in groups if _are_one(group[0], site)), None)
        if group is None:
            groups.append([site])
        else:
            group.append(site)
    return [group for group in groups if len(group) > 1]


def _are_one(first: Site, second: Site) -> bool:
    return (first.kind, first.parameters, first.settings) == (
        second.kind,
        second.parameters,
        second.settings,
    )


def _require_same(ground: Ground, proposal: Proposal, first: Proposal) -> None:
    """The edits are those of the example, but for weights that do not run here. Raises Refused."""
    own, wanted = proposal.agreed.edits, first.agreed.edits
    left = (proposal.to, proposal.options) == (first.to, first.options)
    if not left or any(edit not in wanted for edit in own):
        raise Refused(Check.OTHER_EDITS)
    require_unread(ground, (edit.target for edit in wanted if edit not in own))


def require_unread(ground: Ground, names: Iterable[str]) -> None:
    """None of these tensors is read in this call, in which the norm does not run as in the example.

    Raises Refused.
    """
    for name in dict.fromkeys(names):
        tensor = ground.flow.named.get(name)
        uses = () if tensor is None else ground.flow.uses(Operand(name, tensor, ()))
        if uses:
            raise Refused(
                Check.OUTPUT_USED, f"{ground.path(uses[0])} reads {name} without the norm"
            )


def _is_same_sum(first: BranchSum, second: BranchSum) -> bool:
    paths = [[branch.path for branch in one.branches] for one in (first, second)]
    return first.label == second.label and paths[0] == paths[1]


def _tensors(found: BranchSum) -> list[str]:
    """The names of the tensors of its branches."""
    layers = [branch.layer for branch in found.branches if branch.layer is not None]
    held = [operand for one in layers for operand in (one.weight, one.bias) if operand is not None]
    norms = [name for site in found.identities for name in site.parameters.values()]
    return [*(operand.name for operand in held), *norms]


def _in_order(ground: Ground) -> list[Site]:
    """The sites in the order of their first run; those that did not run come last."""
    last = len(ground.flow.graph.nodes)

    def first(site: Site) -> int:
        indices = [position(node) for run in ground.runs[site.index] for node in run.nodes]
        return min(indices, default=last)

    return sorted(ground.located.survey, key=first)
