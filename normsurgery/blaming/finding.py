"""The order in which faults are looked for, and the answer."""

from __future__ import annotations

from typing import Literal

from onnx import NodeProto

from normsurgery.blaming.alone import wrong_alone
from normsurgery.blaming.causes import causes, inherited, local_verdict
from normsurgery.blaming.kernels import badly_computed, producer_of
from normsurgery.blaming.narrowing import Culprit, narrow, with_what_is_missing
from normsurgery.blaming.reference import TRACED
from normsurgery.blaming.setting import Setting, outputs_judged, worst
from normsurgery.blaming.sweep import Sweep, sweep
from normsurgery.blaming.types import first_lowered
from normsurgery.blaming.wording import difference
from normsurgery.onnxfile.reading import Origin, origin
from normsurgery.verifying.judge import Verdict
from normsurgery.verifying.stages import Blame


def find_fault(setting: Setting) -> Blame | None:
    """What the graph says wrongly, shown on the inputs or on smaller numbers; what it keeps in too
    coarse a type; outputs that are not where they belong; at last what the runtime computes badly.
    """
    swept = sweep(setting.graph, setting.reference, setting.fed)
    return (
        _wrong_node(setting, swept)
        or _wrong_when_small(setting, swept)
        or _wrong_output(setting, swept)
        or _coarse_value(setting, swept)
        or _bad_kernel(setting)
    )


def _wrong_node(setting: Setting, swept: Sweep) -> Blame | None:
    found = causes(setting, swept)
    if not found:
        return None
    culprits = [narrow(setting, swept, value) for value in found]
    first = min(range(len(found)), key=lambda index: culprits[index].node)
    culprit = culprits[first]
    value, expected = culprit.value, culprit.expected
    if not expected:  # nothing to hold it against: what it spoils is told
        value, expected = found[first], swept.pairs[found[first]]
    verdict, case = local_verdict(setting, swept, value, expected)
    return _blame(setting, swept, culprit, "graph", verdict, case)


def _wrong_when_small(setting: Setting, swept: Sweep) -> Blame | None:
    found = wrong_alone(setting, swept)
    if found is None:
        return None
    culprit = with_what_is_missing(setting, swept, narrow(setting, swept, found.value))
    label = f"the node alone, on {setting.looked[0].case.label} times {found.scale:g}"
    return _blame(setting, swept, culprit, "graph", found.verdict, label)


def _wrong_output(setting: Setting, swept: Sweep) -> Blame | None:
    """Every node is right, and what the graph returns is not."""
    for one in setting.looked:
        judged = outputs_judged(setting.graph, one.plain, one.truth)
        wrong = [name for name, verdict in judged.items() if verdict.passed is False]
        if not wrong:
            continue
        name = wrong[0]
        position = setting.graph.producer.get(name)
        detail = _where_instead(setting, swept, wrong)
        if position is None:
            return Blame(
                "input", "", "", name, "", "", "", worst(judged), 0.0, one.case.label, detail
            )
        culprit = Culprit(position, name, "")
        return _blame(setting, swept, culprit, "input", judged[name], one.case.label, detail=detail)
    return None


def _where_instead(setting: Setting, swept: Sweep, wrong: list[str]) -> str:
    """Which output of the source a wrong output is."""
    expected = dict(zip(setting.graph.outputs, setting.reference.outputs, strict=False))
    places = {name: place for place, name in enumerate(setting.reference.outputs)}
    mine = {name: place for place, name in enumerate(setting.graph.outputs)}
    found = [
        f"output {mine[name]} ({name}) is what the source returns as output {places[pair]} ({pair})"
        for name in wrong
        for pair in [swept.pairs.get(name, "")]
        if name in mine and pair in places and pair != expected.get(name)
    ]
    return "; ".join(found) or "no node is wrong by itself, and the outputs are"


def _coarse_value(setting: Setting, swept: Sweep) -> Blame | None:
    found = first_lowered(setting, swept)
    if found is None:
        return None
    name, verdict, case = found
    pair = swept.pairs[name]
    mine, theirs = setting.graph.dtype(name), setting.reference.dtype(pair)
    detail = f"it computes in {_type(mine)}, the source in {_type(theirs)}"
    culprit = Culprit(setting.graph.producer[name], name, pair)
    return _blame(setting, swept, culprit, "graph", verdict, case, detail=detail)


def _bad_kernel(setting: Setting) -> Blame | None:
    found = badly_computed(setting)
    if found is None:
        return None
    node = producer_of(setting, found)
    told = origin(node) if node is not None else Origin()
    return Blame(
        kind="kernel",
        node=found.node or (node.name if node is not None else ""),
        operator=found.operator,
        value=found.value,
        fx_node=told.fx_node,
        module=told.module,
        source=told.source,
        verdict=found.verdict,
        inherited=0.0,
        case=found.case,
        detail=found.detail,
    )


def _blame(
    setting: Setting,
    swept: Sweep,
    culprit: Culprit,
    kind: Literal["graph", "kernel", "input"],
    verdict: Verdict,
    case: str,
    *,
    detail: str = "",
) -> Blame:
    node = setting.graph.nodes[culprit.node]
    told = _origin(setting, swept, node, culprit)
    return Blame(
        kind=kind,
        node=node.name,
        operator=node.op_type,
        value=culprit.value,
        fx_node=told.fx_node,
        module=told.module,
        source=told.source,
        verdict=verdict,
        inherited=inherited(setting, swept, culprit.node),
        case=case,
        detail=detail or difference(setting, swept, culprit),
    )


def _origin(setting: Setting, swept: Sweep, node: NodeProto, culprit: Culprit) -> Origin:
    """What the node tells of itself; else what is known of the value it stands for."""
    told = origin(node)
    if told != Origin():
        return told
    pair = culprit.expected or swept.pairs.get(culprit.value, "")
    return setting.reference.origin_of(pair.removeprefix(TRACED) if pair else "")


def _type(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
