"""An optimiser of ONNX graphs that computes what the graph computes.

onnxscript's passes and rules in its own order, except for those that change a result: its
`x + 0 -> x`, `x * 1 -> x` and their like take 1e-8 for 0 and 1 + 1e-5 for 1, which deletes an eps;
here they ask for exactly 0 and 1. Batch norm is folded by normsurgery's own fold, in float64 and
with its reasons, never by onnxscript's rule, which rounds in the type of the graph.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from normsurgery.exporting.annotating import SHARED, told_module
from normsurgery.exporting.quiet import quiet

ITERATIONS = 2


def optimise(model: Any) -> None:
    """Optimise an onnx_ir model in place."""
    from onnx_ir.passes import PassManager, Sequential
    from onnx_ir.passes import common as passes
    from onnxscript.optimizer import _constant_folding as folding
    from onnxscript.rewriter import RewritePass

    repeated = PassManager(
        [
            folding.FoldConstantsPass(
                shape_inference=True,
                input_size_limit=folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
                output_size_limit=folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
            ),
            RewritePass(rules()),
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            passes.RemoveUnusedOpsetsPass(),
        ],
        steps=ITERATIONS,
        early_stop=True,
    )
    rewritten = Sequential(
        passes.InlinePass(),
        repeated,
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
    )
    merged = Sequential(
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )
    with quiet():
        rewritten(model)
        note_shared(model)
        merged(model)


def note_shared(model: Any) -> None:
    """Write into nodes that are the same computation, of which one will be left, the modules of
    all of them: two norms of one input may become one node."""
    numbers: dict[int, int] = {}  # id of a value -> number of the computation it is the result of
    known: dict[Any, int] = {}
    same: dict[int, list[Any]] = {}
    for node in model.graph:
        inputs = tuple(None if v is None else numbers.get(id(v), id(v)) for v in node.inputs)
        attributes = tuple(sorted((name, str(a.value)) for name, a in node.attributes.items()))
        key = (node.domain, node.op_type, len(node.outputs), inputs, attributes)
        number = known.setdefault(key, len(known))
        same.setdefault(number, []).append(node)
        for index, value in enumerate(node.outputs):
            numbers[id(value)] = -(number * 1000 + index + 1)  # below every id
    for nodes in same.values():
        if len(nodes) > 1:
            modules = json.dumps([told_module(node.metadata_props) for node in nodes])
            for node in nodes:
                node.metadata_props[SHARED] = modules


@cache
def rules() -> Any:
    """The rewrite rules, as one rule set."""
    from onnxscript.rewriter import RewriteRuleSet
    from onnxscript.rewriter.rules import common

    kept = (
        common._broadcast_to_matmul,
        common._cast_constant_of_shape,
        common._collapse_slices,
        common._materialize_reshape_shape,
        common._min_max_to_clip,
        common._fuse_relus_clips,
    )
    behind = (
        common._redundant_scatter_nd,
        common._fuse_pad_into_conv,
        common._remove_optional_bias,
    )
    found = [
        *_exact_no_ops(),
        *(rule for module in kept for rule in module.rules),
        *common._basic_rules.basic_optimization_rules(),
        *(rule for module in behind for rule in module.rules),
    ]
    return RewriteRuleSet(found)


def _exact_no_ops() -> list[Any]:
    """`x + 0`, `x - 0`, `x * 1`, `x / 1` where the constant is exactly that; dropout that does
    nothing."""
    from onnxscript.rewriter import RewriteRule
    from onnxscript.rewriter.pattern import Constant
    from onnxscript.rewriter.rules.common import _no_op

    def exactly(value: float) -> Any:
        return Constant(value, rel_tol=0.0, abs_tol=0.0)

    def plus(op: Any, x: Any) -> Any:
        return op.Add(x, exactly(0.0))

    def minus(op: Any, x: Any) -> Any:
        return op.Sub(x, exactly(0.0))

    def times(op: Any, x: Any) -> Any:
        return op.Mul(x, exactly(1.0))

    def over(op: Any, x: Any) -> Any:
        return op.Div(x, exactly(1.0))

    def same(op: Any, x: Any, **_: Any) -> Any:
        return op.Identity(x)

    commuting = [RewriteRule(pattern, same) for pattern in (plus, times)]
    fixed = [RewriteRule(pattern, same) for pattern in (minus, over)]
    return [
        *(version for rule in commuting for version in rule.commute()),
        *fixed,
        _no_op.dropout_zero_rule,
        _no_op.dropout_inference_rule,
    ]
