"""One random model folded, and judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.steps import Step

from .grow import grow
from .interpret import Call, run
from .labels import hazard_labels, rule_labels
from .oracle import judge_norm, random_input
from .program import Program
from .render import built, source

BOUND = 1e-9  # relative, float64 against float64
SEES = 1e-6  # an output smaller than this beside what it is computed from is rounding
FLAG = 1.7


@dataclass
class Outcome:
    """What came of one seed.

    wrong: what did not hold, in words. rules: labels of the folds that were made. left: norms that
    the oracle folds and fold does not, each with fold's reason. half: whether it was folded in half
    precision too. unproven: half precision in which fold reports an error above what it allows.
    """

    seed: int
    wrong: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    hazards: set[str] = field(default_factory=set)
    norms: int = 0
    folded: int = 0
    foldable: int = 0
    foldable_folded: int = 0
    left: list[str] = field(default_factory=list)
    half: int = 0
    unproven: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """What failed, and the model's source."""
        failed = "\n".join(self.wrong)
        return f"seed {self.seed}: {failed}\n\n{source(grow(self.seed))}"


def try_fold(seed: int, *, oracle: bool, again: bool = True) -> Outcome:
    """Fold the model of this seed in float64, and in half precision where it says so.

    again: also fold what came out, and find nothing to do.
    """
    program = grow(seed)
    outcome = Outcome(seed, hazards=hazard_labels(program))
    double = replace(program, dtype="float64")
    with built(double) as model, torch.no_grad():
        tensors = {name: t.clone() for name, t in model.state_dict().items()}
        if not tells(double, tensors):
            return Outcome(seed)
        try:
            _fold_and_compare(double, model, tensors, outcome, oracle=oracle, again=again)
        except Exception as error:
            outcome.wrong.append(f"{type(error).__name__}: {error}")
    if program.dtype != "float64":
        _fold_half(program, outcome)
    return outcome


def tells(program: Program, tensors: dict[str, Tensor]) -> bool:
    """Whether the outputs are more than rounding errors, with one image and with two."""
    for call in calls(program):
        values = run(program, tensors, call)
        size = max(float(values[node.name].abs().max()) for node in program.nodes)
        if any(not float(values[name].abs().max()) > SEES * size for name in program.outputs):
            return False
    return True


def calls(program: Program) -> Iterator[Call]:
    """The example (batch 2), fresh batches of 1, 2 and 3, and one with a flag."""
    generator = torch.Generator().manual_seed(program.seed)
    for batch in (2, 1, 2, 3):
        yield Call(random_input(program, generator, batch))
    if program.takes_flag:
        flag = torch.tensor(FLAG, dtype=torch.float64)
        yield Call(random_input(program, generator, 2), flag)


def outputs(model: nn.Module, call: Call) -> tuple[Tensor, ...]:
    """What the model returns, as a tuple; the input is not written to."""
    arguments = [call.x.clone()] + ([] if call.flag is None else [call.flag])
    got = model(*arguments)
    return got if isinstance(got, tuple) else (got,)


def _fold_and_compare(
    program: Program,
    model: nn.Module,
    tensors: dict[str, Tensor],
    outcome: Outcome,
    *,
    oracle: bool,
    again: bool,
) -> None:
    example = next(calls(program))
    modules = repr(model)
    folded, report = ns.fold(model, inputs=(example.x,), verify=False)
    if repr(model) != modules or not _equal(model.state_dict(), tensors):
        outcome.wrong.append("the original was changed")
    for number, call in enumerate(calls(program)):
        error = _difference(model, folded, call)
        if not error < BOUND:
            outcome.wrong.append(f"call {number} differs by {error:.1e}: {_made(report)}")
    if again:
        second = ns.fold(folded, inputs=(example.x,), verify=False)[1].plan.steps
        if second:
            outcome.wrong.append(f"a second fold finds {second[0]} ({second[0].rule})")
    _account(program, tensors, report.plan, outcome, oracle=oracle)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _difference(model: nn.Module, folded: nn.Module, call: Call) -> float:
    pairs = zip(outputs(model, call), outputs(folded, call), strict=True)
    return max(float((b - a).abs().max() / a.abs().max()) for a, b in pairs)


def _made(report: ns.Report) -> str:
    return "; ".join(f"{step.site.label} {step.rule}" for step in report.plan.steps)


def _account(
    program: Program, tensors: dict[str, Tensor], plan: ns.Plan, outcome: Outcome, *, oracle: bool
) -> None:
    """Which norms were folded, by which rule; which could have been."""
    steps = {name: _step_of(program, name, plan) for name in program.norms}
    folded = {name for name, step in steps.items() if step is not None and is_folded(step)}
    reasons = {name: _reason(program, name, plan) for name in program.norms if steps[name] is None}
    called = {node.layer for node in program.nodes if node.when != "flag"}  # the example has none
    unlisted = [name for name, why in reasons.items() if not why and name in called]
    if unlisted:
        outcome.wrong.append(f"neither step nor skip: {', '.join(unlisted)}")
    outcome.norms = len(program.norms)
    outcome.folded = len(folded)
    for name, step in steps.items():
        if step is None:
            continue
        outcome.rules.append(f"rule: {step.rule}")
        if name in folded and step.rule in ("into producer", "into consumers"):
            outcome.rules += sorted(rule_labels(program, name, step.rule == "into consumers"))
    if not oracle:
        return
    verdicts = {name: judge_norm(program, tensors, name) for name in program.norms}
    for name, verdict in verdicts.items():
        if not verdict.foldable:
            continue
        partners = (verdict.into & set(program.norms)) - {
            n for n, v in verdicts.items() if v.foldable
        }
        outcome.foldable += 1
        if name in folded or partners & folded:
            outcome.foldable_folded += 1
            continue
        left = f"{name} ({program.layers[name].kind}) {verdict.side} {sorted(verdict.into)}"
        why = reasons.get(name) or f"step {steps[name]}"
        outcome.left.append(f"seed {outcome.seed}: {left}: {why}")


def is_folded(step: Step) -> bool:
    """Whether nothing of the norm is left that could be folded."""
    if step.to == "identity":
        return True
    return step.to == step.site.kind and step.options.get("affine") is False


def _step_of(program: Program, norm: str, plan: ns.Plan) -> Step | None:
    layer = program.layers[norm]
    names = {layer.tensor(role) for role in layer.roles}
    for step in plan.steps:
        of_call = layer.functional and names & set(step.site.parameters.values())
        if of_call or (not layer.functional and layer.path in step.site.paths):
            return step
    return None


def _reason(program: Program, norm: str, plan: ns.Plan) -> str:
    layer = program.layers[norm]
    for skip in plan.skips:
        path = skip.path.partition("#")[0]
        if path == layer.path or (layer.functional and path == layer.home):
            return skip.reason
    return ""


def _fold_half(program: Program, outcome: Outcome) -> None:
    """In half precision fold's own evidence passes, or says that it does not."""
    with built(program) as model, torch.no_grad():
        x = next(calls(program)).x
        x = x if program.ids else x.to(getattr(torch, program.dtype))
        try:
            model(x.clone())
        except NotImplementedError:
            return  # torch has no such kernel on this device
        try:
            report = ns.fold(model, inputs=(x,))[1]
        except Exception as error:
            outcome.wrong.append(f"{program.dtype}: {type(error).__name__}: {error}")
            return
        outcome.half = 1
        if not report.passed:
            outcome.unproven.append(f"seed {outcome.seed}: {program.dtype} did not pass")
