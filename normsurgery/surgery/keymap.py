"""How a checkpoint of the old model becomes one of the new model, and back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normsurgery.errors import CannotConvert, UsageError
from normsurgery.fold.editing import edited, needed_by, require_padding_held
from normsurgery.fold.edits import Drop
from normsurgery.plan import Plan
from normsurgery.spec import Source
from normsurgery.steps import Step
from normsurgery.surgery.optimizer import OptimizerState, carried_state
from normsurgery.surgery.relation import tensors_in
from normsurgery.surgery.source import build, conversion_of, what_is_left

StateDict = Mapping[str, Tensor]
STAND_INS = (1.0, 2.0)  # positive, so that a variance is one


@dataclass(frozen=True)
class Move:
    """`new = old + offset`; `kept`: the old key stays too, because other code reads it."""

    old: str
    new: str
    offset: float = 0.0
    kept: bool = False


@dataclass(frozen=True)
class Made:
    """A new key that a step makes: tensor `name` of its new module.

    computed: from old values; otherwise it is a constant that starts the same in every model.
    """

    new: str
    step: int
    name: str
    computed: bool


@dataclass(frozen=True)
class KeyMap:
    """Old state_dict keys to new ones, in both directions; keys it does not name are unchanged.

    A tied tensor has an entry for each of its names. `dropped` old keys have no exact counterpart:
    they vanish, or only something computed from them is left. `unsaved` are the buffers of swapped
    norms that a state_dict does not hold (persistent=False), with their shapes. What a fold edits
    has the plan's edits; `aliases` are the other names of such a tensor.
    """

    plan: Plan
    moved: tuple[Move, ...] = ()
    made: tuple[Made, ...] = ()
    dropped: tuple[str, ...] = ()
    unsaved: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def edited(self) -> tuple[str, ...]:
        """Keys whose tensors a fold makes or changes, in the order it does."""
        edits = (edit for step in self.plan.steps for edit in step.edits)
        named = dict.fromkeys(edit.target for edit in edits if not isinstance(edit, Drop))
        gone = set(self.dropped) | {move.old for move in self.moved if not move.kept}
        return tuple(name for name in named if name not in gone)

    @property
    def created(self) -> tuple[str, ...]:
        """New keys that start as constants."""
        return tuple(made.new for made in self.made if not made.computed)

    def __bool__(self) -> bool:
        return bool(self.moved or self.made or self.dropped or self.edited)

    def load(self, state_dict: StateDict) -> OrderedDict[str, Tensor]:
        """A state_dict of the old model as one of the new model.

        What the swap computes from old values is computed again from these, so that swapping a
        loaded model and loading a swapped model give the same. Raises UsageError for a missing key,
        and where a new value is computed from a buffer that is not saved; CannotHold where a weight
        cannot hold what a fold makes of these values.
        """
        state_dict = self._with_edits(state_dict)
        self._require(state_dict, [move.old for move in self.moved], "the old model")
        gone = {move.old for move in self.moved if not move.kept} | set(self.dropped)
        loaded = _like(state_dict, (item for item in state_dict.items() if item[0] not in gone))
        for move in self.moved:
            loaded[move.new] = _shifted(state_dict[move.old], move.offset)
        built: dict[int, dict[str, Tensor]] = {}
        for made in self.made:
            if made.step not in built:
                built[made.step] = self._made_by(made.step, state_dict)
            loaded[made.new] = built[made.step][made.name]
        return loaded

    def reverse(self, state_dict: StateDict) -> OrderedDict[str, Tensor]:
        """A state_dict of the new model as one of the old model, where that loses nothing.

        A weight that moved between `weight` and `1 + weight` comes back rounded once. Raises
        UsageError naming what the old model needs and the new one does not have, and what the new
        one has learned and the old one has no place for.
        """
        if self.edited:
            raise UsageError(
                f"the old model cannot be made again: {_listed(self.edited)} were changed by the "
                "fold. Keep the old checkpoint."
            )
        if self.dropped:
            raise UsageError(
                f"the old model cannot be made again: {_listed(self.dropped)} were dropped by the "
                "swap. Keep the old checkpoint."
            )
        self._require(state_dict, [move.new for move in self.moved], "the new model")
        old = self._without_made(state_dict)
        for move in self.moved:
            old.pop(move.new, None)
        for move in reversed(
            self.moved
        ):  # where one tensor became several, the first stands for it
            old[move.old] = _shifted(state_dict[move.new], -move.offset)
        self._check_untrained(state_dict, old)
        return old

    def optimizer_state(
        self,
        state: OptimizerState,
        old_model: nn.Module,
        new_model: nn.Module,
        *,
        names: Sequence[Sequence[str]] | None = None,
    ) -> dict[str, Any]:
        """The state_dict of an optimizer over `old_model` as one for an optimizer over `new_model`.

        See `carried_state` in surgery/optimizer.py for `names` and the order of parameters.
        """
        exact = {move.old: move.new for move in reversed(self.moved)}
        changed = {made.new for made in self.made}
        return carried_state(state, old_model, new_model, exact, changed, names)

    def to_json(self) -> dict[str, Any]:
        """Without the plan, which stands beside it in a report."""
        return {
            "moved": [asdict(move) for move in self.moved],
            "made": [asdict(made) for made in self.made],
            "dropped": list(self.dropped),
            "unsaved": {name: list(shape) for name, shape in self.unsaved.items()},
            "aliases": {name: list(others) for name, others in self.aliases.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], plan: Plan) -> KeyMap:
        return cls(
            plan,
            tuple(Move(**item) for item in data["moved"]),
            tuple(Made(**item) for item in data["made"]),
            tuple(data["dropped"]),
            {name: tuple(shape) for name, shape in data.get("unsaved", {}).items()},
            {name: tuple(others) for name, others in data.get("aliases", {}).items()},
        )

    def _with_edits(self, state_dict: StateDict) -> StateDict:
        """A state_dict of the old model after the edits of the plan."""
        needed = needed_by(self.plan.steps)
        if not needed:
            return state_dict
        self._require(state_dict, needed, "the old model")
        values = edited(self.plan.steps, state_dict)
        for name, others in self.aliases.items():
            values |= {other: values[name] for other in others if name in values}
        dropped = {e.target for s in self.plan.steps for e in s.edits if isinstance(e, Drop)}
        dropped |= {other for name in dropped for other in self.aliases.get(name, ())}
        changed = _like(state_dict, (i for i in state_dict.items() if i[0] not in dropped))
        changed.update(values)
        return changed

    def _require(self, state_dict: StateDict, keys: Iterable[str], whose: str) -> None:
        missing = [key for key in keys if key not in state_dict]
        if missing:
            raise UsageError(
                f"this is not a state_dict of {whose}: {_listed(missing)} are missing. "
                f"It has {_listed(list(state_dict))}."
            )

    def _made_by(self, number: int, state_dict: StateDict) -> dict[str, Tensor]:
        """The tensors of one step's new module, of which those in `made` are right.

        A buffer that is not saved is stood in for by two different values: what comes out different
        would need the real one.
        """
        step = self.plan.steps[number]
        names = step.site.parameters.values()
        unsaved = [name for name in names if name in self.unsaved and name not in state_dict]
        self._require(state_dict, [name for name in names if name not in unsaved], "the old model")
        if not unsaved:
            return self._rebuilt(step, state_dict)
        like = next((t for t in state_dict.values() if t.is_floating_point()), torch.ones(()))
        first, second = (
            self._rebuilt(
                step,
                {**state_dict, **{n: like.new_full(self.unsaved[n], value) for n in unsaved}},
            )
            for value in STAND_INS
        )
        made = [made for made in self.made if made.step == number]
        lost = [item.new for item in made if not torch.equal(first[item.name], second[item.name])]
        if lost:
            raise UsageError(
                f"{_listed(lost)} of the new model are computed from {_listed(unsaved)}, which the "
                "old model does not save (persistent=False). Load the state_dict into the old "
                "model and swap that."
            )
        return first

    def _rebuilt(self, step: Step, state_dict: StateDict) -> dict[str, Tensor]:
        conversion = conversion_of(step)
        tensors = {role: state_dict[name] for role, name in step.site.parameters.items()}
        if conversion is None:
            raise UsageError(f"there is no conversion from {step.site.kind} to {step.to} any more.")
        floating = next((t for t in tensors.values() if t.is_floating_point()), None)
        source = Source(
            kind=step.site.kind,
            where=step.site.label,
            settings=step.site.settings,
            tensors=tensors,
            shape=step.site.shape,
            dtype=None if floating is None else floating.dtype,
            device=None if floating is None else floating.device,
        )
        kept, options = what_is_left(source, step)
        require_padding_held(step, source)
        try:
            return {
                name: tensor.detach()
                for name, tensor in tensors_in(
                    build(conversion, kept, options, self.plan.init)
                ).items()
            }
        except CannotConvert as error:
            raise UsageError(
                f"the new tensors of {step.site.label} cannot be made from a state_dict alone: "
                f"{error.why}. Load it into the old model and swap that."
            ) from error

    def _without_made(self, state_dict: StateDict) -> OrderedDict[str, Tensor]:
        made = {made.new for made in self.made}
        return _like(state_dict, (item for item in state_dict.items() if item[0] not in made))

    def _check_untrained(self, new: StateDict, old: StateDict) -> None:
        fresh = self.load(old)
        exact = [move.new for move in self.moved if move.offset == 0.0]
        names = (*(made.new for made in self.made), *exact)
        learned = [name for name in names if not torch.equal(fresh[name], new[name])]
        if learned:
            raise UsageError(
                f"the old model has no place for {_listed(learned)}, which changed since the swap."
            )


@dataclass
class Entries:
    """The entries of a KeyMap while they are collected."""

    moved: list[Move] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    unsaved: dict[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def keymap(self, plan: Plan) -> KeyMap:
        moved = tuple(m for m in self.moved if m.old != m.new or m.offset != 0.0)
        dropped = tuple(dict.fromkeys(self.dropped))
        return KeyMap(plan, moved, tuple(self.made), dropped, self.unsaved, self.aliases)


def _shifted(tensor: Tensor, offset: float) -> Tensor:
    if offset == 0.0:
        return tensor
    return (tensor.double() + offset).to(tensor.dtype)


def _like(state_dict: StateDict, items: Iterable[tuple[str, Tensor]]) -> OrderedDict[str, Tensor]:
    copied = OrderedDict(items)
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        copied._metadata = metadata  # type: ignore[attr-defined]
    return copied


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
