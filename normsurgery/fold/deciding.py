"""Which rule folds each norm of a recorded run, site by site in the order they run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from normsurgery.errors import CannotConvert
from normsurgery.find import Located
from normsurgery.fold.acceptance import accepted, last_axis_of
from normsurgery.fold.affines import is_affine
from normsurgery.fold.branch_surroundings import Merging, belong_to
from normsurgery.fold.centring import centre
from normsurgery.fold.checks import BY_BATCH, Check, NoMatch
from normsurgery.fold.edits import Fill
from normsurgery.fold.ground import Choices, Ground, Refused
from normsurgery.fold.merged_layers import merged_layer, with_unpadded
from normsurgery.fold.merging import merge_steps
from normsurgery.fold.parallel_branches import BranchSum
from normsurgery.fold.preconditions import (
    require,
    require_called_as,
)
from normsurgery.fold.rules import (
    AFFINE_RULES,
    TAIL_RULES,
    Proposal,
    Rule,
    standalone,
)
from normsurgery.fold.twins import as_one, twins
from normsurgery.plan import MERGED, Step
from normsurgery.spec import Fidelity, get
from normsurgery.surgery.obstacles import lost_fact
from normsurgery.surgery.references import ModuleReferences
from normsurgery.surgery.source import build, source_of, tensor_at, what_is_left
from normsurgery.survey import Site, Skip

Decision = Step | Skip
NOT_SELECTED = "not selected"


class Decider:
    """Decides site by site, in the order they run: norms that are affine first, then the rest."""

    def __init__(self, model: nn.Module, choices: Choices, refused: Mapping[str, NoMatch]) -> None:
        self.model = model
        self.choices = choices
        self.refused = refused
        self.around = ModuleReferences(model)

    def decide(self, located: Located, chosen: Collection[int]) -> list[Decision]:
        ground = Ground(located, self.choices)
        sites = _in_order(ground)
        affine, rest = ([s for s in sites if is_affine(s) is whole] for whole in (True, False))
        decided: dict[int, Decision] = {}
        self._begin(ground, affine, chosen, decided)
        # The other norms do not go, and so keep branches apart in any case. Their scale and shift
        # go into the layer that branches become: a centred stream wants that layer made before.
        merged = self._merge(ground, chosen, decided)
        if merged:
            self._settle(ground, decided)
        self._begin(ground, rest, chosen, decided)
        if merged:
            decided = with_unpadded(decided)
        if self.choices.rmsnorm:
            allowed = {s.index for s in sites if s.index in chosen and s.label not in self.refused}
            for site in (site for site in (*affine, *rest) if site.index in allowed):
                centre(ground, self.model, site, allowed, decided)
        return list(decided.values())

    def _begin(
        self,
        ground: Ground,
        sites: Sequence[Site],
        chosen: Collection[int],
        decided: dict[int, Decision],
    ) -> None:
        """Decide these sites, and again those that were decided before and that are left."""
        for site in sites:
            decided[site.index] = (
                self._decided(ground, site)
                if site.index in chosen
                else Skip(site.label, NOT_SELECTED, "", site.kind)
            )
        self._settle(ground, decided)

    def _settle(self, ground: Ground, decided: dict[int, Decision]) -> None:
        """Until no norm that is left can go, alone or together with others."""
        self._try_again(ground, decided)
        while self._decide_together(ground, decided):
            self._try_again(ground, decided)
        for index, made in decided.items():  # a norm may have been given a weight since
            if isinstance(made, Step) and made.rule != MERGED:
                decided[index] = replace(made, site=ground.site(index))

    def _try_again(self, ground: Ground, decided: dict[int, Decision]) -> None:
        """What was in the way of one norm may itself be gone by now."""
        changed = True
        while changed:
            changed = False
            for site in [s for s in ground.located.survey if s.index in decided]:
                old = decided[site.index]
                if not _is_left(old) or not ground.runs[site.index]:
                    continue
                new = self._decided(ground, site)
                if _is_left(new):
                    decided[site.index] = new  # what is in the way now
                else:
                    del decided[site.index]
                    decided[site.index] = new
                    changed = True

    def _decide_together(self, ground: Ground, decided: dict[int, Decision]) -> bool:
        """Calls of one norm at several places, where none of them could go alone."""
        left = [
            site
            for site in ground.located.survey
            if site.index in decided and _is_left(decided[site.index])
            if ground.runs[site.index]
        ]
        changed = False
        for lead, *others in twins(left):
            with as_one(ground, lead, others):
                made = self._decided(ground, lead)
            if not isinstance(made, Step) or _is_left(made):
                continue
            note = f"with {lead.label}"
            led = [replace(made, site=site, edits=(), notes=(note,)) for site in others]
            for step in (made, *led):
                del decided[step.site.index]
                decided[step.site.index] = step
            changed = True
        return changed

    def _merge(self, ground: Ground, chosen: Collection[int], decided: dict[int, Decision]) -> bool:
        """Make one layer of parallel branches; a norm among them goes with them. Comes when every
        edit of a branch is done. Whether there were any."""
        if self.choices.keep_classes:
            return False
        merging = Merging(ground, self.model, self.around)
        sums, _ = merging.sums(chosen, self.refused)
        made = (step for step in decided.values() if isinstance(step, Step))
        planned = [edit for step in made for edit in step.edits]
        steps = merge_steps(ground, sums, planned)
        for step in steps:
            decided.pop(step.site.index, None)
            decided[step.site.index] = step
        for found, step in zip(sums, (step for step in steps if step.edits), strict=True):
            take_merge(ground, found, step)
            belong_to(ground, found)
        return bool(sums)

    def _decided(self, ground: Ground, site: Site) -> Decision:
        site = ground.site(site.index)
        refused = self.refused.get(site.label)
        if refused not in (None, BY_BATCH):
            return skip(site, [refused])
        failed: list[NoMatch] = [] if refused is None else [refused]
        try:
            require(ground, self.model, site, self.around)
        except Refused as refusal:
            return skip(site, [refusal.match])
        for rule in self._rules(site):
            try:
                proposal = rule(ground, site)
                runs = ground.runs[site.index]
                notes = accepted(
                    ground,
                    self.model,
                    runs,
                    proposal.landings,
                    proposal.changed,
                    last_axis_of(site, proposal),
                )
            except Refused as refusal:
                failed.append(refusal.match)
                continue
            step = _step(ground, site, proposal, (*notes, *_still(proposal, failed)))
            made = _readable(ground, self.model, step, self.around)
            if isinstance(made, Skip):
                return made
            take(ground, site, proposal)
            return made
        return skip(site, failed)

    def _rules(self, site: Site) -> Sequence[Rule]:
        """What batch it is given does not change what a norm is, only where it can go."""
        if self.refused.get(site.label) == BY_BATCH:
            return (standalone,) if is_affine(site) else ()
        return AFFINE_RULES if is_affine(site) else TAIL_RULES


def _is_left(made: Decision) -> bool:
    """A norm that another one may have been in the way of."""
    if isinstance(made, Skip):
        return made.reason != NOT_SELECTED
    return made.rule == "standalone affine"


def take_merge(ground: Ground, found: BranchSum, step: Step) -> None:
    """From here on the branches are one layer."""
    ground.merged.append(merged_layer(found, step))
    ground.settled.update(site.index for site in found.identities)


def take(ground: Ground, site: Site, proposal: Proposal) -> None:
    """From here on the proposal is done."""
    if proposal.landings:
        ground.settled.add(site.index)
    ground.created |= proposal.agreed.created
    ground.untied |= proposal.agreed.untied
    ground.extend(proposal.agreed.created)
    if proposal.gone:
        ground.gone.update({run.end: run.start for run in ground.runs[site.index]})


def _in_order(ground: Ground) -> list[Site]:
    """The sites in the order of their first run; those that did not run come last."""
    last = len(ground.flow.nodes)

    def first(site: Site) -> int:
        indices = [node.index for run in ground.runs[site.index] for node in run.nodes]
        return min(indices, default=last)

    return sorted(ground.located.survey, key=first)


def _step(ground: Ground, site: Site, proposal: Proposal, notes: tuple[str, ...]) -> Step:
    edits = proposal.agreed.edits
    to, options = proposal.to, proposal.options
    if ground.choices.keep_classes:
        edits, to, options = (*edits, *_neutral(ground, site)), site.kind, {}
    return Step(
        site=site,
        to=to,
        options=options,
        fidelity=Fidelity.EVAL,
        action="fold",
        notes=(*proposal.agreed.notes, *proposal.notes, *notes),
        rule=proposal.rule,
        edits=edits,
    )


def _neutral(ground: Ground, site: Site) -> tuple[Fill, ...]:
    """The norm's own tensors, so filled that its scale is 1 and its shift 0."""
    neutral = {
        "weight": 1.0 - float(site.settings.get("weight_offset", 0.0)),
        "bias": 0.0,
        "running_mean": 0.0,
        "running_var": 1.0 - float(site.settings.get("eps") or 0.0),
    }
    return tuple(
        Fill(name, neutral[role]) for role, name in site.parameters.items() if role in neutral
    )


def _readable(ground: Ground, model: nn.Module, step: Step, around: ModuleReferences) -> Decision:
    """The step, or one that leaves a neutral norm where other code asks for its weight's dtype."""
    conversion = get(step.to).conversion(step.site.kind)
    kept = ground.choices.keep_classes or "pad" in step.options
    if step.site.form != "module" or kept or conversion is None:
        return step
    there = {r: name for r, name in step.site.parameters.items() if name not in ground.created}
    source, options = what_is_left(source_of(model, replace(step.site, parameters=there)), step)
    try:
        new = build(conversion, source, options, "copy")
        require_called_as(ground, step.site, new)
    except CannotConvert as error:
        return skip(step.site, [NoMatch(Check.NOT_REWRITABLE, error.why, error.cure)])
    except Refused as refusal:
        return skip(step.site, [refusal.match])
    reason = lost_fact(model, step.site, new, around)
    if reason is None:
        return step
    neutral = _neutral(ground, step.site)
    if all(edit.target not in ground.created and _is_full(model, edit) for edit in neutral):
        return skip(step.site, [NoMatch(Check.COMPUTES, reason)])
    return replace(
        step,
        to=step.site.kind,
        options={},
        edits=(*step.edits, *neutral),
        notes=(*step.notes, f"stays, with a scale of 1 and a shift of 0: {reason}"),
    )


def _is_full(model: nn.Module, edit: Fill) -> bool:
    tensor = tensor_at(model, edit.target)
    return not tensor.is_meta and bool((tensor == edit.value).all())


def _still(proposal: Proposal, failed: Sequence[NoMatch]) -> tuple[str, ...]:
    """Why an affine is left, where one is."""
    if not failed or proposal.to != "affine":
        return ()
    match = _foremost(failed)
    return (f"{match.reason}. {match.hint}".rstrip(". "),)


def skip(site: Site, failed: Sequence[NoMatch]) -> Skip:
    match = _foremost(failed)
    return Skip(site.label, match.reason, match.hint, site.kind)


# A rule that fails so never had a chance; what another rule says is the reason.
_HOPELESS = (Check.NO_NEIGHBOUR, Check.UNKNOWN, Check.NON_LINEAR, Check.ADDED, Check.RETURNED)


def _foremost(failed: Sequence[NoMatch]) -> NoMatch:
    """The failed check that stands closest to a fold; the first among equals."""
    return min(failed, key=lambda match: _rank(match.check))


def _rank(check: Check) -> int:
    if check is Check.NO_NEIGHBOUR:
        return 2
    return 1 if check in _HOPELESS else 0
