"""Every value that a traced model computes: in float64, and as native torch computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from normsurgery.errors import CannotTrace
from normsurgery.inputs import Inputs
from normsurgery.numerics.precision import lifted
from normsurgery.verifying.runners import fresh, same_randomness

# They compute nothing and may refuse sizes that only the tracing excluded.
ASSERTIONS = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_async",
        "_assert_scalar",
        "_functional_assert_async",
        "_functional_assert_scalar",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)
# What `eps=None` of torch's own RMS norm means for every type below float64.
_RMS_EPS = torch.finfo(torch.float32).eps
_RMS_NORMS = {"rms_norm": 3, "_fused_rms_norm": 3}


class SourceValues:
    """Runs of an exported program that keep every value, by the name of its node.

    The program is not touched: its weights are cloned for each run, and what a run writes to a
    buffer is lost. Parameters, buffers and constants are among the values, under the names of their
    placeholders (`p_conv_weight`); `constants` says what the model calls them (`conv.weight`).
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self._graph = program.graph_module
        self.constants: dict[str, str] = {
            spec.arg.name: spec.target
            for spec in program.graph_signature.input_specs
            if spec.target is not None and hasattr(spec.arg, "name")
        }

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the nodes that the program returns to its user, in order; tensors only."""
        return tuple(
            name
            for name in self.program.graph_signature.user_outputs
            if isinstance(name, str) and name
        )

    def float64(
        self, inputs: Inputs, *, seed: int = 0, instead: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The truth: exactly the weights there are, computed in float64 throughout.

        instead: values that take the place of what nodes of that name give. Integers and booleans
        keep their type. Raises CannotTrace where the program does not take the inputs, NotFloat64
        where an operation insists on a lower type.
        """
        return self._run(inputs, _doubled, lifted, seed, instead)

    def native(self, inputs: Inputs, *, seed: int = 0) -> dict[str, Tensor]:
        """What torch computes in the program's own types on the CPU. Raises CannotTrace."""
        return self._run(inputs, Tensor.clone, torch.no_grad, seed)

    def _run(
        self,
        inputs: Inputs,
        convert: Callable[[Tensor], Tensor],
        context: Callable[[], AbstractContextManager[Any]],
        seed: int,
        instead: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        leaves = list(self._leaves(inputs, convert))
        recorder = _Recorder(self._graph, truth=context is lifted, instead=instead)
        with torch.no_grad(), same_randomness(seed), context():
            recorder.run(*leaves, enable_io_processing=False)
        return recorder.values

    def _leaves(self, inputs: Inputs, convert: Callable[[Tensor], Tensor]) -> Iterator[Any]:
        """What each placeholder gets, in order."""
        given = iter(_flat(self.program, fresh(inputs, "cpu")))
        for spec in self.program.graph_signature.input_specs:
            if spec.kind is not InputKind.USER_INPUT:
                value = self._held(spec.target or "")
            else:
                value = next(given)
                if isinstance(spec.arg, ConstantArgument) and not isinstance(value, Tensor):
                    value = spec.arg.value
            yield convert(value.detach().cpu()) if isinstance(value, Tensor) else value

    def _held(self, name: str) -> Any:
        """A buffer that the state_dict leaves out is among the constants."""
        held = self.program.state_dict.get(name)
        return self.program.constants.get(name) if held is None else held


class _Recorder(fx.Interpreter):
    """An interpreter that keeps what every node gave and passes over assertions."""

    def __init__(
        self,
        graph: fx.GraphModule,
        *,
        truth: bool,
        instead: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self._instead = instead or {}
        self.values: dict[str, Tensor] = {}
        self._truth = truth
        # Without in-place operations a value never changes once it is there.
        self._keep = Tensor.clone if _has_mutation(graph) else Tensor.detach

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "call_function" and _name(node.target) in ASSERTIONS:
            return None
        result = super().run_node(node)
        result = self._instead.get(node.name, result)
        if isinstance(result, Tensor):
            self.values[node.name] = self._keep(result)
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = _RMS_NORMS.get(_name(target))
        if self._truth and place is not None and _lacks(args, kwargs, place):
            args, kwargs = args[:place], {**kwargs, "eps": _RMS_EPS}
        return super().call_function(target, args, kwargs)


def _lacks(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int) -> bool:
    given = args[place] if len(args) > place else kwargs.get("eps")
    return given is None


def _name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return str(getattr(target, "__name__", ""))
    return str(schema.name).rpartition("::")[2]


def _has_mutation(graph: fx.GraphModule) -> bool:
    schemas = (getattr(node.target, "_schema", None) for node in graph.graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def _flat(program: ExportedProgram, inputs: Inputs) -> list[Any]:
    """The leaves of the inputs in the order of the program's own.

    Keyword arguments may come in any order. Where the program was traced with other arguments as
    keywords, the leaves count in the order they are given. Raises CannotTrace for another number.
    """
    spec = program.call_spec.in_spec
    wanted = list(program.graph_signature.user_inputs)
    if spec is not None:
        names = list(spec.children()[1].context or ())
        if set(names) == set(inputs.kwargs):
            kwargs = {name: inputs.kwargs[name] for name in names}
            leaves, given = tree_flatten((tuple(inputs.args), kwargs))
            if given == spec or len(leaves) == len(wanted):
                return leaves
    leaves = tree_leaves(tree_map(lambda value: value, (inputs.args, dict(inputs.kwargs))))
    if len(leaves) != len(wanted):
        raise CannotTrace(
            f"the traced program takes {len(wanted)} inputs ({', '.join(map(str, wanted))}), not "
            f"{len(leaves)}. Give the inputs it was traced with."
        )
    return leaves
