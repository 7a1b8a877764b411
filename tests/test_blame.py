"""Blame names the node: faults planted in small graphs, by their meaning and by their kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import make_node
from torch import Tensor, nn

import normsurgery as ns
from normsurgery.errors import CannotTrace, UsageError
from normsurgery.exporting.tracing import trace
from normsurgery.inputs import Inputs, as_inputs
from normsurgery.verifying.alignment import correspond
from normsurgery.verifying.judge import judge
from normsurgery.verifying.runners import run_float64, run_native
from normsurgery.verifying.values import SourceValues


class Block(nn.Module):
    """One of everything: convolution, batch norm, tokens, layer norm, RMS norm by hand, softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.ln = nn.LayerNorm(8)
        self.query = nn.Linear(8, 8)
        self.key = nn.Linear(8, 8, bias=False)
        self.weight = nn.Parameter(torch.ones(8))
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        image = torch.relu(self.bn(self.conv(x)))
        tokens = self.ln(image.flatten(2).transpose(1, 2))
        scores = torch.softmax(self.query(tokens) @ self.key(tokens).transpose(1, 2) / 3.0, -1)
        mixed = scores @ tokens - 0.5 * tokens
        rms = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + 1e-6) * self.weight
        first, second = self.out(torch.tanh(rms)).split(3, dim=-1)[0], rms.sum(1)
        return first.sigmoid(), second


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters and statistics far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(0.3 + 0.5 * torch.rand(tensor.shape, generator=generator))
                if tensor.dim() > 1:
                    tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    return module.eval()


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 2, 4, generator=torch.Generator().manual_seed(1))


@cache
def model() -> nn.Module:
    return randomised(Block())


def written(
    module: nn.Module, inputs: tuple[Tensor, ...], opset: int, **options: Any
) -> ModelProto:
    program = torch.onnx.export(
        module, inputs, dynamo=True, opset_version=opset, verbose=False, **options
    )
    assert program is not None
    return program.model_proto


@cache
def graph() -> ModelProto:
    return written(model(), (image(),), 20)


# --- faults of meaning ----------------------------------------------------------------------------


class Faulty:
    """A copy of a graph to plant one fault in."""

    def __init__(self, original: ModelProto) -> None:
        self.proto = ModelProto()
        self.proto.CopyFrom(original)
        del self.proto.graph.value_info[:]

    def only(self, operator: str, number: int = 0) -> NodeProto:
        return [node for node in self.proto.graph.node if node.op_type == operator][number]

    def constant(self, name: str) -> np.ndarray:
        found = (t for t in self.proto.graph.initializer if t.name == name)
        return numpy_helper.to_array(next(found))

    def set_constant(self, node: NodeProto, place: int, value: np.ndarray) -> NodeProto:
        name = f"{node.name}_planted"
        self.proto.graph.initializer.append(numpy_helper.from_array(value, name))
        node.input[place] = name
        return node

    def set_attribute(self, node: NodeProto, name: str, value: Any) -> NodeProto:
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
        return node

    def readers(self, value: str) -> list[NodeProto]:
        return [node for node in self.proto.graph.node if value in node.input]

    def remove(self, node: NodeProto) -> list[NodeProto]:
        """Whoever read its result reads its first input. The readers."""
        readers = self.readers(node.output[0])
        for reader in readers:
            for place, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[place] = node.input[0]
        self.proto.graph.node.remove(node)
        return readers

    def insert(self, reader: NodeProto, place: int, *nodes: NodeProto) -> None:
        """Nodes between a value and one of its readers."""
        value = reader.input[place]
        position = list(self.proto.graph.node).index(reader)
        for node in reversed(nodes):
            self.proto.graph.node.insert(position, node)
        planted = list(self.proto.graph.node)[position : position + len(nodes)]
        planted[0].input[0] = value
        reader.input[place] = nodes[-1].output[0]


Plant = Callable[[Faulty], tuple[str, ...]]  # returns the names of nodes that may be blamed


def _epsilon(faulty: Faulty) -> tuple[str, ...]:
    return (faulty.set_attribute(faulty.only("LayerNormalization"), "epsilon", 1e-6).name,)


def _epsilon_as_constant(faulty: Faulty) -> tuple[str, ...]:
    nodes = [node for node in faulty.proto.graph.node if node.op_type == "Add"]
    for node in nodes:
        for place, name in enumerate(node.input):
            known = {tensor.name for tensor in faulty.proto.graph.initializer}
            if name in known and faulty.constant(name).size == 1:
                return (faulty.set_constant(node, place, np.float32(2e-6)).name,)
    raise AssertionError("the graph has no eps")


def _bias_dropped(faulty: Faulty) -> tuple[str, ...]:
    node = faulty.only("LayerNormalization")
    del node.input[2]
    return (node.name,)


def _one_weight(faulty: Faulty) -> tuple[str, ...]:
    node = faulty.only("MatMul")
    weight = faulty.constant(node.input[1]).copy()
    weight[3, 4] *= 1 + 2.0**-10
    return (faulty.set_constant(node, 1, weight).name,)


def _weights_swapped(faulty: Faulty) -> tuple[str, ...]:
    """Two of one shape."""
    first, second = faulty.only("MatMul", 0), faulty.only("MatMul", 1)
    first.input[1], second.input[1] = second.input[1], first.input[1]
    return (first.name, second.name)


def _relu_lost(faulty: Faulty) -> tuple[str, ...]:
    return tuple(node.name for node in faulty.remove(faulty.only("Relu")))


def _added(faulty: Faulty) -> tuple[str, ...]:
    faulty.insert(faulty.only("LayerNormalization"), 0, make_node("Tanh", [""], ["t"], name="new"))
    return ("new",)


def _through_half(faulty: Faulty) -> tuple[str, ...]:
    casts = (
        make_node("Cast", [""], ["low"], name="down", to=TensorProto.FLOAT16),
        make_node("Cast", ["low"], ["high"], name="up", to=TensorProto.FLOAT),
    )
    faulty.insert(faulty.only("Softmax"), 0, *casts)
    return ("down", "up")


def _softmax_axis(faulty: Faulty) -> tuple[str, ...]:
    return (faulty.set_attribute(faulty.only("Softmax"), "axis", 1).name,)


def _operands(faulty: Faulty) -> tuple[str, ...]:
    node = faulty.only("Sub")
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return (node.name,)


def _permutation(faulty: Faulty) -> tuple[str, ...]:
    """There are as many tokens as channels, so that every shape stays."""
    return (faulty.set_attribute(faulty.only("Transpose"), "perm", [0, 1, 2]).name,)


def _padding(faulty: Faulty) -> tuple[str, ...]:
    return (faulty.set_attribute(faulty.only("Conv"), "pads", [0, 0, 2, 2]).name,)


def _other_operator(faulty: Faulty) -> tuple[str, ...]:
    node = faulty.only("Tanh")
    node.op_type = "Sigmoid"
    return (node.name,)


def _mean_axis(faulty: Faulty) -> tuple[str, ...]:
    return (faulty.set_constant(faulty.only("ReduceMean"), 1, np.array([1])).name,)


GRAPH_FAULTS: dict[str, Plant] = {
    "an eps": _epsilon,
    "an eps that is a constant": _epsilon_as_constant,
    "a dropped bias": _bias_dropped,
    "one element off by 2^-10": _one_weight,
    "two weights swapped": _weights_swapped,
    "a lost activation": _relu_lost,
    "an added operation": _added,
    "through half precision and back": _through_half,
    "softmax over another axis": _softmax_axis,
    "operands in the other order": _operands,
    "a permutation": _permutation,
    "padding on the other side": _padding,
    "another operator": _other_operator,
    "a mean over another axis": _mean_axis,
}


@pytest.mark.parametrize("against", ["module", "graph"])
@pytest.mark.parametrize("fault", GRAPH_FAULTS)
def test_the_node_with_the_planted_fault_is_named(fault: str, against: str) -> None:
    faulty = Faulty(graph())
    wanted = GRAPH_FAULTS[fault](faulty)
    source = model() if against == "module" else graph()
    found = ns.blame(source, faulty.proto, (image(),))
    assert found is not None, "nothing blamed"
    assert found.kind == "graph", found
    assert found.node in wanted, found
    assert found.verdict.passed is False
    assert found.inherited == 0.0, "what comes before the first fault is right"
    assert found.detail, found


def test_details_say_what_differs() -> None:
    def detail(fault: str) -> str:
        faulty = Faulty(graph())
        GRAPH_FAULTS[fault](faulty)
        found = ns.blame(graph(), faulty.proto, (image(),))
        assert found is not None
        return found.detail

    assert detail("an eps") == "epsilon 1e-06, the source has 1e-05"
    assert "the source has a Tanh" in detail("another operator")
    assert "1 of 64 elements" in detail("one element off by 2^-10")
    assert "Relu" in detail("a lost activation") and "missing" in detail("a lost activation")
    assert "float16" in detail("through half precision and back")
    assert "no such Tanh" in detail("an added operation")
    assert "another order" in detail("operands in the other order")


def test_where_a_node_comes_from_is_told() -> None:
    faulty = Faulty(graph())
    _epsilon(faulty)
    found = ns.blame(model(), faulty.proto, (image(),))
    assert found is not None
    assert (found.module, found.fx_node) == ("ln", "layer_norm")
    assert "in forward: tokens = self.ln(" in found.source and "test_blame.py" in found.source


def test_where_a_node_comes_from_is_told_without_metadata() -> None:
    faulty = Faulty(graph())
    _epsilon(faulty)
    for node in faulty.proto.graph.node:
        del node.metadata_props[:]
    found = ns.blame(model(), faulty.proto, (image(),))
    assert found is not None
    assert (found.module, found.fx_node) == ("ln", "layer_norm")
    assert "test_blame.py" in found.source


def test_of_two_faults_the_first_is_named() -> None:
    faulty = Faulty(graph())
    (first,) = _epsilon(faulty)
    _other_operator(faulty)
    found = ns.blame(model(), faulty.proto, (image(),))
    assert found is not None and found.node == first


def test_a_deleted_eps_is_found_where_no_input_shows_it() -> None:
    """The variance in front of it is large on every input of the model."""

    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x.clamp(-1, 1)) * 1e3 + torch.arange(16.0) * 1e3
            return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-7)

    source = randomised(Loud())
    inputs = (torch.randn(3, 4),)
    faulty = Faulty(written(source, inputs, 20))
    adds = [node for node in faulty.proto.graph.node if node.op_type == "Add"]
    readers = [reader.name for reader in faulty.remove(adds[-1])]
    found = ns.blame(source, faulty.proto, inputs)
    assert found is not None and found.node in readers, found
    assert "alone" in found.case and "Add" in found.detail


# --- inputs and outputs ---------------------------------------------------------------------------


def test_swapped_outputs_are_no_fault_of_a_node() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.exp(), x.square()

    inputs = (torch.randn(3, 4),)
    faulty = Faulty(written(Two(), inputs, 20))
    outputs = [copy.deepcopy(value) for value in faulty.proto.graph.output]
    for value, name in zip(faulty.proto.graph.output, ("one", "two"), strict=True):
        value.name = name
    for node in faulty.proto.graph.node:
        new = "two" if node.output[0] == outputs[0].name else "one"
        node.output[0] = new
    found = ns.blame(Two(), faulty.proto, inputs)
    assert found is not None and found.kind == "input"
    assert "output 0 (one) is what the source returns as output 1" in found.detail


# --- nothing to blame -----------------------------------------------------------------------------


def test_the_same_graph_is_not_blamed() -> None:
    assert ns.blame(model(), graph(), (image(),)) is None


def _renamed(faulty: Faulty) -> None:
    ports = {v.name for v in (*faulty.proto.graph.input, *faulty.proto.graph.output)}
    new = lambda name: name if name in ports or not name else f"v{abs(hash(name))}"  # noqa: E731
    for tensor in faulty.proto.graph.initializer:
        tensor.name = new(tensor.name)
    for node in faulty.proto.graph.node:
        del node.metadata_props[:]
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = new(name)


def _reciprocal(faulty: Faulty) -> None:
    """x / 3 as x * (1 / 3), a constant that is rounded once more."""
    node = faulty.only("Div")
    value = faulty.constant(node.input[1])
    faulty.set_constant(node, 1, (1 / value).astype(np.float32))
    node.op_type = "Mul"


def _relu_as_maximum(faulty: Faulty) -> None:
    node = faulty.only("Relu")
    node.op_type = "Max"
    node.input.append("")
    faulty.set_constant(node, 1, np.float32(0.0))


def _layernorm_written_out(faulty: Faulty) -> None:
    node = faulty.only("LayerNormalization")
    x, scale, bias = node.input
    epsilon = onnx.helper.get_node_attr_value(node, "epsilon")
    faulty.proto.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.float32(epsilon), "small"),
        ]
    )
    steps = [
        make_node("ReduceMean", [x, "last"], ["m"], name="n0"),
        make_node("Sub", [x, "m"], ["d"], name="n1"),
        make_node("Mul", ["d", "d"], ["q"], name="n2"),
        make_node("ReduceMean", ["q", "last"], ["var"], name="n3"),
        make_node("Add", ["var", "small"], ["e"], name="n4"),
        make_node("Sqrt", ["e"], ["s"], name="n5"),
        make_node("Div", ["d", "s"], ["u"], name="n6"),
        make_node("Mul", ["u", scale], ["w"], name="n7"),
        make_node("Add", ["w", bias], [node.output[0]], name="n8"),
    ]
    position = list(faulty.proto.graph.node).index(node)
    faulty.proto.graph.node.remove(node)
    for step in reversed(steps):
        faulty.proto.graph.node.insert(position, step)


REWRITES = {
    "other names": _renamed,
    "a product in place of a quotient": _reciprocal,
    "a maximum in place of a relu": _relu_as_maximum,
    "a norm written out": _layernorm_written_out,
}


@pytest.mark.parametrize("name", REWRITES)
def test_the_same_written_otherwise_is_not_blamed(name: str) -> None:
    rewritten = Faulty(graph())
    REWRITES[name](rewritten)
    for source in (model(), graph()):
        found = ns.blame(source, rewritten.proto, (image(),))
        assert found is None, found


@pytest.mark.parametrize("fault", ["an eps", "another operator", "a lost activation"])
def test_a_fault_is_found_under_other_names(fault: str) -> None:
    faulty = Faulty(graph())
    wanted = GRAPH_FAULTS[fault](faulty)
    _renamed(faulty)
    found = ns.blame(model(), faulty.proto, (image(),))
    assert found is not None and found.node in wanted, found


def test_a_wrong_eps_is_found_in_a_norm_that_was_written_out() -> None:
    faulty = Faulty(graph())
    _layernorm_written_out(faulty)
    add = next(node for node in faulty.proto.graph.node if node.name == "n4")
    faulty.set_constant(add, 1, np.float32(1e-3))
    found = ns.blame(model(), faulty.proto, (image(),))
    assert found is not None and found.node == "n4", found


# --- faults of kernels ----------------------------------------------------------------------------


class Groups(nn.Module):
    """Three group norms, one of them behind a large mean: onnxruntime computes GroupNormalization
    from the mean of squares, which cancels there."""

    def __init__(self, place: int, offset: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(3))
        self.place, self.offset = place, offset

    def forward(self, x: Tensor) -> Tensor:
        for place, norm in enumerate(self.norms):
            x = torch.tanh(norm(x + self.offset if place == self.place else x))
        return x


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_node_whose_kernel_cancels_is_named(place: int, offset: float) -> None:
    inputs = (torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(2)),)
    proto = written(randomised(Groups(place, offset)), inputs, 21)
    norms = [n.name for n in proto.graph.node if n.op_type == "GroupNormalization"]
    source = ModelProto()
    source.CopyFrom(proto)
    source.graph.name = "source"
    found = ns.blame(source, proto, inputs, hard=False)
    assert found is not None and found.kind == "kernel", found
    assert found.node == norms[place], found
    assert found.verdict.passed is False and found.source, found


def test_a_kernel_is_blamed_against_the_module_too() -> None:
    source = randomised(Groups(1, 1e3))
    inputs = (torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(2)),)
    found = ns.blame(source, written(source, inputs, 21), inputs, hard=False)
    assert found is not None
    assert (found.kind, found.operator, found.module) == ("kernel", "GroupNormalization", "norms.1")
    assert "kernel is not" in found.detail


def test_what_overflows_half_precision_is_named() -> None:
    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x) * 300
            return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)

    source = randomised(Loud()).half()
    inputs = (torch.randn(2, 8, generator=torch.Generator().manual_seed(2)).half(),)
    found = ns.blame(source, written(source, inputs, 20), inputs, hard=False)
    assert found is not None and (found.kind, found.operator) == ("kernel", "Pow"), found
    assert "exceeds the type" in found.detail


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x) + 100
        centred = y - y.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)


class OnePass(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x) + 100
        mean = y.mean(-1, keepdim=True)
        variance = y.square().mean(-1, keepdim=True) - mean.square()
        return (y - mean) * torch.rsqrt(variance + 1e-5)


def test_a_difference_that_cancels_is_named_where_every_kernel_is_right() -> None:
    inputs = (torch.randn(4, 16, generator=torch.Generator().manual_seed(2)),)
    proto = written(OnePass().eval(), inputs, 20)
    subtractions = [node.name for node in proto.graph.node if node.op_type == "Sub"]
    found = ns.blame(Centred().eval(), proto, inputs, hard=False)
    assert found is not None and found.kind == "kernel", found
    assert found.node in subtractions and "multiplies the error" in found.detail


# --- plans ----------------------------------------------------------------------------------------


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.tanh(norm(conv(x)))
        return x


def norms_input() -> tuple[Tensor]:
    return (torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(3)),)


@pytest.mark.parametrize("broken", [(1,), (0, 4)])
def test_the_step_of_a_fold_that_broke_its_promise_is_named(broken: tuple[int, ...]) -> None:
    source = randomised(Norms())
    plan = ns.fold(source, inputs=norms_input())[1].plan
    assert len(plan.steps) == 5
    assert ns.blame(source, plan, norms_input()) is None
    steps = list(plan.steps)
    for number in broken:  # the weights are scaled, and the biases are not
        steps[number] = replace(steps[number], edits=steps[number].edits[:1])
    found = ns.blame(source, replace(plan, steps=tuple(steps)), norms_input())
    assert found is not None
    assert tuple(blamed.number for blamed in found.steps) == broken
    assert all(blamed.reason for blamed in found.steps)
    assert f"norms.{broken[0]}" in str(found)


def test_a_step_that_promises_too_much_is_named_and_one_that_promises_nothing_is_said() -> None:
    source = randomised(Norms())
    plan = ns.swap(source, "groupnorm", inputs=norms_input(), options={"num_groups": 2})[1].plan
    found = ns.blame(source, plan, norms_input())
    assert found is not None and not found.steps
    assert found.unpromised == (0, 1, 2, 3, 4)
    assert "promise nothing" in str(found)
    steps = list(plan.steps)
    steps[3] = replace(steps[3], fidelity=ns.Fidelity.EVAL)
    found = ns.blame(source, replace(plan, steps=tuple(steps)), norms_input())
    assert found is not None
    assert [blamed.number for blamed in found.steps] == [3]
    assert found.unpromised == (0, 1, 2, 4)


def test_blame_wants_a_graph_or_a_plan() -> None:
    with pytest.raises(UsageError, match="is none"):
        ns.blame(model(), randomised(Block(), 1), (image(),))


# --- values of the source, and which is which -----------------------------------------------------


class Casting(nn.Module):
    """A cast to float32 and back, an eps that depends on the type, a write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(6)
        self.register_buffer("shift", torch.linspace(-1, 1, 6), persistent=False)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.norm(x) + self.shift
        z = (y.float() * 0.3).to(x.dtype)
        z.mul_(2.0)
        return z if scale is None else z * scale


def test_source_values_are_the_float64_truth_and_native_torch() -> None:
    source = randomised(Casting())
    inputs = as_inputs({"x": torch.randn(3, 6) * 1e-4, "scale": torch.randn(6)})
    values = SourceValues(trace(source, inputs))
    (output,) = values.outputs
    truth = values.float64(inputs)
    assert all(v.dtype is torch.float64 for v in truth.values() if v.is_floating_point())
    expected = run_float64(source, inputs, "eval", seed=0).outputs["output"]
    assert judge(truth[output], expected).passed
    native = run_native(source, inputs, "eval", seed=0).outputs["output"]
    assert torch.equal(values.native(inputs)[output], native)
    assert values.constants["b_shift"] == "shift"
    assert torch.equal(truth["b_shift"], source.get_buffer("shift").double())


def test_source_values_take_keywords_in_any_order_and_refuse_another_number() -> None:
    source = randomised(Casting())
    x, scale = torch.randn(3, 6), torch.randn(6)
    values = SourceValues(trace(source, as_inputs({"x": x, "scale": scale})))
    (output,) = values.outputs
    one = values.native(Inputs((), {"x": x, "scale": scale}))[output]
    other = values.native(Inputs((), {"scale": scale, "x": x}))[output]
    assert torch.equal(one, other)
    with pytest.raises(CannotTrace, match="takes 2 inputs"):
        values.native(Inputs((x,)))


def test_source_values_leave_the_program_as_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    program = trace(Counting(), as_inputs((torch.ones(2),)))
    values = SourceValues(program)
    first = values.float64(as_inputs((torch.ones(2),)))[values.outputs[-1]]
    again = values.float64(as_inputs((torch.ones(2),)))[values.outputs[-1]]
    assert torch.equal(first, again) and torch.equal(first, torch.ones(2).double())
    assert float(program.state_dict["calls"]) == 0.0


def test_values_correspond_by_name_and_by_value() -> None:
    value, other = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    source = {"a": value, "b": other, "twin": value.clone(), "ids": torch.arange(3)}
    rounded = value * (1 + 2.0**-24)
    graph = {"twin": rounded, "renamed": other, "b": value + 1e-3, "n": torch.arange(3)}
    assert correspond(graph, source) == {"twin": "twin", "renamed": "b", "n": "ids"}
    assert correspond({"flat": value.flatten()}, source) == {}
    # 8 ulp of the type, and not of a finer one
    off = {"x": value * (1 + 2.0**-12)}
    assert correspond(off, source) == {}
    assert correspond(off, source, dtypes={"x": torch.float16}) == {"x": "a"}
