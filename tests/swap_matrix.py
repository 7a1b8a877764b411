"""Every model of the zoo swapped to every registered norm: what happens, as a table.

Run as a script it writes the table that the tests compare with; look at the difference before
committing it.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers_zoo import Row, models

import normsurgery as ns
from normsurgery.errors import NormsurgeryError
from normsurgery.inputs import Inputs, as_inputs, flatten_outputs
from normsurgery.surgery.application import apply
from normsurgery.surgery.calls import recorded_calls
from normsurgery.treecopy import tree_copy

TABLE = Path(__file__).with_name("swap_matrix.json")

DRAWS = 24

# The closed list: why a swap may be refused, by a phrase of the reason that no other one has.
REASONS = {
    "a weight's norm": "it normalises a weight, not an activation",
    "inside a function": "outside any forward",
    "few elements": "would share one mean and variance",
    "few weights": "so the standardized weight would",
    "one element": "only one element would be normalised",
    "several axes": "which of these dimensions is the channel",
    "mixes positions": "would mix positions",
    "other axis": "neither the second nor the last",
    "no site": "there is nothing to swap",
    "batch norm of unknown rank": "torch has one class each",
    "cannot rewrite": "its forward cannot be rewritten",
    "read elsewhere": "so it would not compute with a replacement",
    "no conversion": "there is no conversion from",
    "read attribute missing": "and the replacement has no",
}


@dataclass
class Outcome:
    """What became of one model and one target: how many swapped, refused why, and what is wrong."""

    swapped: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    skips: list[ns.Skip] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"swapped": self.swapped, "refused": dict(sorted(self.refused.items()))}


def reason_of(text: str) -> str:
    return next((name for name, phrase in REASONS.items() if phrase in text), f"UNKNOWN: {text}")


class Swapper:
    """One model of the zoo, surveyed once for every way a norm attaches."""

    def __init__(self, row: Row) -> None:
        self.model = row.build()
        self.inputs = as_inputs(row.inputs())
        self.surveys: dict[str, ns.Survey] = {}
        self.owner_calls: dict[str, Any] | None = None
        self.vanished = _vanished(tree_copy(self.model, clone=True), self.inputs)

    def survey(self, attach: Any) -> ns.Survey:
        if attach not in self.surveys:
            self.surveys[attach] = ns.find(self.model, self.inputs, attach=attach)
        return self.surveys[attach]

    def outcome(self, target: str) -> Outcome:
        """Swap, then run, differentiate and step the result."""
        outcome = Outcome()
        survey = self.survey(ns.get(target).attach)
        try:
            plan = ns.plan(survey, self.model, target)
            if self.owner_calls is None:
                owners = {s.path for s in self.survey("norm").sites if s.form != "module"}
                self.owner_calls = recorded_calls(self.model, sorted(owners), self.inputs)
            applied = apply(tree_copy(self.model, clone=True), plan, self.owner_calls)
        except NormsurgeryError as error:
            outcome.refused.update(_reasons_in(str(error)))
            return outcome
        outcome.swapped = len(applied.plan.steps)
        outcome.skips = [skip for skip in applied.plan.skips if skip.reason != "not selected"]
        outcome.refused.update(reason_of(skip.reason) for skip in outcome.skips)
        outcome.wrong.extend(
            _faults(applied.model, self.inputs, applied.new_modules, self.vanished)
        )
        return outcome


def _reasons_in(text: str) -> Iterable[str]:
    known = [name for name, phrase in REASONS.items() if phrase in text]
    return known or [f"UNKNOWN: {text}"]


def _vanished(model: nn.Module, inputs: Inputs) -> set[str]:
    """Parameters of the model as it is whose gradient is rounding error: no swap revives them."""
    torch.manual_seed(0)
    _loss(flatten_outputs(_larger(inputs).call(model.train()))).backward()
    sizes = {
        n: float(p.grad.abs().max()) for n, p in model.named_parameters() if p.grad is not None
    }
    smallest = torch.finfo(torch.float32).eps * max(sizes.values())
    return {name for name, size in sizes.items() if size < smallest}


def _faults(
    model: nn.Module, inputs: Inputs, new: Iterable[nn.Module], vanished: set[str]
) -> list[str]:
    """What does not work in the swapped model: outputs, gradients, a step, generate()."""
    faults: list[str] = []
    hopeless = {id(p) for name, p in model.named_parameters() if name in vanished}
    made = {id(p): p for module in new for p in module.parameters() if p.requires_grad}
    fresh = [parameter for key, parameter in made.items() if key not in hopeless]
    torch.manual_seed(0)
    with torch.no_grad():
        model.eval()
        if not _finite(flatten_outputs(inputs.call(model))):
            faults.append("eval outputs are not finite")
    model.train()
    batch = _larger(inputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-30)
    for _ in range(DRAWS):  # an ensemble trains the members that the draws reach
        outputs = flatten_outputs(batch.call(model))
        _loss(outputs).backward()
        if not _gradient_faults(fresh):
            break
    if not _finite(outputs):
        faults.append("train outputs are not finite")
    faults += _gradient_faults(fresh)
    before = [parameter.detach().clone() for parameter in fresh]
    optimizer.step()
    still = sum(torch.equal(old, now) for old, now in zip(before, fresh, strict=True))
    if still:
        faults.append(f"{still} of {len(fresh)} new parameters did not move")
    faults += _generation_faults(model.eval(), inputs)
    return faults


def _larger(inputs: Inputs) -> Inputs:
    """A batch eight times as large: a statistic over a neuron's own samples needs several."""

    def repeated(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        many = tensor.repeat(8, *[1] * (tensor.dim() - 1))
        return many + torch.randn_like(many) if many.is_floating_point() else many

    return as_inputs({name: repeated(value) for name, value in inputs.kwargs.items()})


def _loss(outputs: Mapping[str, Tensor]) -> Tensor:
    terms = [
        (tensor.float() * torch.randn_like(tensor.float())).mean()
        for tensor in outputs.values()
        if tensor.requires_grad
    ]
    return torch.stack(terms).sum()


def _gradient_faults(parameters: list[nn.Parameter]) -> list[str]:
    missing = sum(parameter.grad is None for parameter in parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    infinite = sum(not bool(gradient.isfinite().all()) for gradient in gradients)
    zero = sum(not bool(gradient.any()) for gradient in gradients)
    counts = {"without a gradient": missing, "with an infinite one": infinite, "with zero": zero}
    return [f"{count} new parameters {what}" for what, count in counts.items() if count]


def _generation_faults(model: nn.Module, inputs: Inputs) -> list[str]:
    can = getattr(model, "can_generate", lambda: False)()
    ids = inputs.kwargs.get("input_ids")
    if not can or ids is None:
        return []
    start = {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
    made = model.generate(ids, max_new_tokens=2, do_sample=False, **start)  # type: ignore[operator]
    return [] if made.shape[0] == ids.shape[0] else ["generate() gave another batch"]


def _finite(outputs: Mapping[str, Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in outputs.values() if t.is_floating_point())


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for name, row in models().items():
        if not re.search(wanted, name):
            continue
        swapper, cells = Swapper(row), {}
        for target in ns.names():
            outcome = swapper.outcome(target)
            cells[target] = outcome.to_json()
            wrong = "; ".join(outcome.wrong)
            sys.stdout.write(f"{name} {target} {cells[target]} {wrong}\n")
            sys.stdout.flush()
        table[name] = cells
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
