"""What a recorded run did not show: hidden branches, conditions, and reads of data."""

from __future__ import annotations

import contextlib
import functools
import linecache
import sys
import warnings

import pytest
import torch
import transformers as hf
from torch import nn
from transformers_zoo.decoders import decoders
from transformers_zoo.row import built, image
from transformers_zoo.vision import vision

from normsurgery.errors import CannotTrace
from normsurgery.graph import record
from normsurgery.graph.branches import conditions, hidden_uses, reads_data, same_conditions
from normsurgery.inputs import Inputs

torch.set_num_threads(1)


class ConvNorm(nn.Module):
    """A convolution and its batch norm; every trap below writes its own forward with them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)
        self.flags = {"aux": False}

    def forward(self, x):
        return self.bn(self.conv(x))


def x(batch=2):
    return torch.randn(batch, 3, 5, 5, generator=torch.Generator().manual_seed(3))


def recorded(model, *args, **kwargs):
    return record(model.eval(), Inputs(args, kwargs), lines=True)


def calls_of(recording, path):
    return [call for call in recording.module_calls if recording.path(call.module) == path]


def found(model, *args, first="conv", last="bn", **kwargs):
    """Everything that speaks against folding `last` into `first`: uses and conditions."""
    recording = recorded(model, *args, **kwargs)
    ends = [calls_of(recording, path)[0] for path in (first, last)]
    between = [ends[0].output.value] if first == "conv" else [ends[1].output.value]
    sentences = list(hidden_uses(recording, [call.module for call in ends], between))
    ops = [recording.ops[call.end - 1] for call in ends]
    condition = same_conditions(recording, ops)
    return sentences + ([condition] if condition else [])


class TrainingOrAux(ConvNorm):
    def forward(self, x, aux=None):
        y = self.conv(x)
        z = self.bn(y)
        if self.training or aux is not None:
            return z, self.other(y)
        return z


class BatchSize(ConvNorm):
    def forward(self, x):
        y = self.conv(x)
        if x.shape[0] > 1:
            y = self.bn(y)
        return y


class EarlyReturn(ConvNorm):
    def forward(self, x, features=False):
        y = self.conv(x)
        if features:
            return y
        return self.bn(y)


class ReturnsBeforeTheEnd(ConvNorm):
    def forward(self, x, aux=None):
        z = self.bn(self.conv(x))
        if aux is None:
            return z
        return z + self.conv(aux)


class Ternary(ConvNorm):
    def forward(self, x, plain=False):
        y = self.conv(x)
        return y if plain else self.bn(y)


class ShortCircuit(ConvNorm):
    def forward(self, x, mask=None):
        y = self.conv(x)
        z = self.bn(y)
        extra = mask is not None and self.other(y)
        return z if extra is False else extra


class MethodInBranch(ConvNorm):
    def both(self, x):
        return self.conv(x) + 1

    def forward(self, x, twice=False):
        z = self.bn(self.conv(x))
        if twice:
            z = z + self.both(x)
        return z


class SuperInBranch(ConvNorm):
    def forward(self, x, twice=False):
        z = self.bn(self.conv(x))
        if twice:
            z = z + super().forward(x)
        return z


class PropertyInBranch(ConvNorm):
    @property
    def first(self):
        return self.conv

    def forward(self, x, twice=False):
        z = self.bn(self.conv(x))
        return z + self.first(x) if twice else z


def maybe_doubled(value, double=False):
    if double:
        return value * value
    return value


class HelperOutside(ConvNorm):
    def forward(self, x, double=False):
        return self.bn(maybe_doubled(self.conv(x), double))


def run_first(model, x):
    return model.conv(x)


class HelperGivenTheModel(ConvNorm):
    def forward(self, x, first=False):
        z = self.bn(self.conv(x))
        if first:
            return run_first(self, x)
        return z


class DictDispatch(ConvNorm):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4)})

    def forward(self, x, task="a"):
        return self.norms[task](self.conv(x))


class NameAtRunTime(ConvNorm):
    def forward(self, x, which="bn"):
        return getattr(self, which)(self.conv(x))


class DynamicDepth(ConvNorm):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)]
        )

    def forward(self, x, depth=2):
        for index in range(depth):
            x = self.layers[index](x)
        return x


class LeavesTheLoop(ConvNorm):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)])

    def forward(self, x, last=None):
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == last:
                break
        return x


class OnData(ConvNorm):
    def forward(self, x):
        y = self.conv(x)
        if y.sum() > 1e9:
            y = self.other(y)
        return self.bn(y)


class WhileOnData(ConvNorm):
    def forward(self, x):
        y = self.conv(x)
        while y.abs().max() > 1e9:
            y = y / 2
        return self.bn(y)


class Handler(ConvNorm):
    def forward(self, x):
        y = self.conv(x)
        try:
            z = self.bn(y)
        except RuntimeError:
            z = y
        return z


class Replaced(ConvNorm):
    """The branch only sets the name that the norm reads."""

    def forward(self, x, given=None):
        y = self.conv(x)
        if given is not None:
            y = given
        return self.bn(y)


class Listed(ConvNorm):
    def forward(self, x, everything=False):
        kept = []
        kept.append(self.conv(x))
        z = self.bn(kept[0])
        if everything:
            return z, kept
        return z


class Matched(ConvNorm):
    def forward(self, x, mode="norm"):
        y = self.conv(x)
        match mode:
            case "plain":
                return y
            case _:
                return self.bn(y)


class InComprehension(ConvNorm):
    def forward(self, x, extra=()):
        z = self.bn(self.conv(x))
        return [z, *[self.conv(item) for item in extra]]


class ConditionalProducer(ConvNorm):
    """The norm always runs, what it would be folded into does not."""

    def forward(self, x, embedded=None):
        y = self.conv(x) if embedded is None else embedded
        return self.bn(y)


class Kept(ConvNorm):
    def forward(self, x, again=False):
        self.last = self.conv(x)
        z = self.bn(self.last)
        if again:
            z = z + self.read()
        return z

    def read(self):
        return self.last


class FlagSetInBranch(ConvNorm):
    def forward(self, x, skip=None):
        use = True
        if skip is not None:
            use = False
        y = self.conv(x)
        if use:
            y = self.bn(y)
        return y


class AttributeSetWhileRunning(ConvNorm):
    def forward(self, x, skip=False):
        self.skip = skip
        y = self.conv(x)
        return y if self.skip else self.bn(y)


class ClosureInBranch(ConvNorm):
    def forward(self, x, again=False):
        y = self.conv(x)
        z = self.bn(y)

        def extra():
            return self.other(y)

        return z + extra() if again else z


class ChosenNorm(ConvNorm):
    """The norm is called outside the ternary that picks it."""

    def forward(self, x, plain=False):
        norm = nn.Identity() if plain else self.bn
        return norm(self.conv(x))


class ChosenValue(ConvNorm):
    def forward(self, x, given=None):
        y = self.conv(x)
        y = y if given is None else given
        return self.bn(y)


class ReturnedValue(ConvNorm):
    def first(self, x, given):
        y = self.conv(x)
        if given is None:
            return y
        return given

    def forward(self, x, given=None):
        return self.bn(self.first(x, given))


class ListOfBoth(ConvNorm):
    def forward(self, x, which=1):
        y = self.conv(x)
        return [y, self.bn(y)][which]


class TableOfFunctions(ConvNorm):
    def forward(self, x, which="norm"):
        table = {"norm": lambda y: self.bn(y), "none": lambda y: y}
        return table[which](self.conv(x))


class Slots(ConvNorm):
    def forward(self, x, which=None):
        out = {}
        out["first"] = self.conv(x)
        out["last"] = self.bn(out["first"])
        return out[which or "last"]


class ProducerInTry(ConvNorm):
    def forward(self, x):
        try:
            y = self.conv(x)
        except RuntimeError:
            y = x
        return self.bn(y)


class LoopWithBreak(ConvNorm):
    def forward(self, x, rounds=1):
        y, done = self.conv(x), 0
        while True:
            if done >= rounds:
                break
            y, done = self.bn(y), done + 1
        return y


def raw_on_request(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        if kwargs.pop("raw", False):
            return self.conv(*args)
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(ConvNorm):
    @raw_on_request
    def forward(self, x):
        return self.bn(self.conv(x))


class SlicedContainer(ConvNorm):
    def __init__(self):
        super().__init__()
        self.both = nn.Sequential(self.conv, self.bn)

    def forward(self, x, depth=2):
        return self.both[:depth](x)


class NestedReturn(ConvNorm):
    def forward(self, x, a=1, b=2):
        y = self.conv(x)
        if a == 1 and b == 3:
            return None
        return self.bn(y)


class Generated(ConvNorm):
    def steps(self, x, raw):
        y = self.conv(x)
        if raw:
            yield y * 2
        yield self.bn(y)

    def forward(self, x, raw=False):
        return list(self.steps(x, raw))[-1]


class FlagsInTurn(ConvNorm):
    """An item of a list of flags does not have the list's truth."""

    def __init__(self):
        super().__init__()
        self.flags, self.pair = [False, True], (False, False)

    def forward(self, x):
        y = self.conv(x)
        highest = lowest = None
        for flag in self.flags:
            if not flag:
                highest = x.amax()
        first, _ = self.pair
        if not first:
            lowest = x.amin()
        if highest is not None and highest > 1e9:
            return y + 1
        if lowest is not None and lowest < -1e9:
            return y + 2
        return self.bn(y)


REPORTED = {
    Slots: "picks one of `out`",
    ProducerInTry: "RuntimeError",
    LoopWithBreak: "reads `y`",
    Decorated: "reads `self.conv`",
    SlicedContainer: "picks one of `self.both`",
    NestedReturn: "(a == 1 and b == 3)",
    Generated: "reads `y`",
    ChosenNorm: "hands on `self.bn`",
    ChosenValue: "hands on `y`",
    ReturnedValue: "hands on `y`",
    ListOfBoth: "picks one of `[y, self.bn(y)]`",
    TableOfFunctions: "picks one of `table`",
    TrainingOrAux: "reads `y`",
    BatchSize: "x.shape[0] > 1",
    EarlyReturn: "reads `y`",
    ReturnsBeforeTheEnd: "reads `self.conv`",
    Ternary: "reads `y`",
    ShortCircuit: "reads `y`",
    MethodInBranch: "calls MethodInBranch.both, which reads `self.conv`",
    SuperInBranch: "calls ConvNorm.forward, which reads `self.conv`",
    PropertyInBranch: "reads `self.conv`",
    HelperOutside: "maybe_doubled line",
    HelperGivenTheModel: "calls run_first, which reads `model.conv`",
    OnData: "reads `y`",
    WhileOnData: "reads `y`",
    Handler: "reads `y`",
    Replaced: "sets `y`",
    Listed: "reads `kept`",
    Matched: "reads `y`",
    InComprehension: "reads `self.conv`",
    ConditionalProducer: "(embedded is None)",
    Kept: "reads `self.last`",
    FlagSetInBranch: "(use)",
    AttributeSetWhileRunning: "reads `y`",
    ClosureInBranch: "reads `extra`",
}


@pytest.mark.parametrize("model_class", REPORTED, ids=lambda item: item.__name__)
def test_code_that_did_not_run_is_reported(model_class):
    """A run with the default arguments does not show what these models do with others."""
    sentences = found(model_class(), x())
    assert any(REPORTED[model_class] in sentence for sentence in sentences), sentences
    assert all("test_branches.py" in sentence for sentence in sentences)


def test_an_item_of_a_list_does_not_have_its_truth():
    assert sum("reads `y`" in sentence for sentence in found(FlagsInTurn(), x())) == 2


def test_modules_picked_at_run_time_are_reported():
    (sentence, *_) = found(DictDispatch(), x(), last="norms.a")
    assert "picks one of `self.norms`" in sentence
    assert any("picks one of `self`" in sentence for sentence in found(NameAtRunTime(), x()))
    sentences = found(DynamicDepth(), x(), first="layers.0", last="layers.1")
    assert any("picks one of `self.layers`" in sentence for sentence in sentences)
    assert any("runs only under a condition" in sentence for sentence in sentences)
    assert found(LeavesTheLoop(), x(), first="layers.0", last="layers.1")


class IfTraining(ConvNorm):
    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        if self.training:
            return z, self.other(y)
        return z


class Raises(ConvNorm):
    def forward(self, x, old=None):
        y = self.conv(x)
        if old is not None:
            warnings.warn(f"{y}", stacklevel=2)
            raise ValueError(f"no such argument any more: {self.conv} {y}")
        return self.bn(y)


class RaisesElse(ConvNorm):
    def forward(self, x):
        y = self.conv(x)
        if y.dim() == 4:
            y = self.bn(y)
        else:
            raise ValueError(y)
        assert y.shape[0] > 0, f"{self.conv(x)}"
        return y


class Settings(ConvNorm):
    def __init__(self):
        super().__init__()
        self.with_aux = False
        self.second = None

    def forward(self, x, scale=1):
        aux = self.with_aux
        y = self.conv(x)
        z = self.bn(y)
        if aux or isinstance(self.bn, nn.GroupNorm) or torch.jit.is_tracing():
            return y
        if self.second is not None and self.training:
            return self.second(y)
        return z if not hasattr(self, "missing") else y


class MissingModule(ConvNorm):
    """The branch asks for a module that this model was built without, and so can only raise."""

    def forward(self, x, more=None):
        y = self.conv(x)
        if more is not None:
            if not hasattr(self, "cross"):
                raise ValueError("built without cross attention")
            y = y + self.cross(more)
        return self.bn(y)


def dropped(value, probability, training):
    if probability == 0.0 or not training:
        return value
    return value * torch.rand_like(value)


class FixedArguments(ConvNorm):
    def forward(self, x):
        return self.bn(dropped(self.conv(x), 0.1, self.training))


class Unrelated(ConvNorm):
    def forward(self, x, double=False):
        z = self.bn(self.conv(x))
        if double:
            z = self.other(z) + x.shape[0]
        return z


class OnlyShapes(ConvNorm):
    def forward(self, x, mask=None):
        y = self.conv(x)
        if mask is not None:
            mask = mask.expand(y.shape[0], y.size(1)).to(y.dtype)
        return self.bn(y)


class BothInTheBranch(ConvNorm):
    def forward(self, x, skip=False):
        if not skip:
            x = self.bn(self.conv(x))
        return x


class SettingsLoop(ConvNorm):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)])

    def forward(self, x):
        for index, layer in enumerate(self.layers[: len(self.layers)]):
            x = layer(x) if index < len(self.layers) else x
        return x


class SetUnderAFlag(ConvNorm):
    """The mask is never set: the flag is a setting, and off."""

    def __init__(self):
        super().__init__()
        self.parallel, self.aux = False, None

    def forward(self, x, limit=None):
        y = self.conv(x)
        mask = None
        if self.parallel:
            mask, kind = x[:, :1] > 0, "masked"
        else:
            kind = "plain"
        bias = None
        if not (self.parallel or self.aux is None):
            bias = x.mean()
        if mask is not None:
            y = y.masked_fill(mask, 0.0)
        if bias is not None or kind == "masked":
            y = y + bias
        return self.bn(y)


QUIET = [
    ConvNorm,
    SetUnderAFlag,
    IfTraining,
    Raises,
    RaisesElse,
    Settings,
    MissingModule,
    FixedArguments,
    Unrelated,
    OnlyShapes,
    BothInTheBranch,
]


@pytest.mark.parametrize("model_class", QUIET, ids=lambda item: item.__name__)
def test_what_cannot_change_an_output_is_not_reported(model_class):
    assert found(model_class(), x()) == []


def test_loop_over_the_modules_themselves_is_no_condition():
    assert found(SettingsLoop(), x(), first="layers.0", last="layers.1") == []


def test_two_runs_of_one_loop_body_are_two_conditions():
    """Each round has its own number, so what two rounds share is not taken for one condition."""
    recording = recorded(DynamicDepth(), x())
    conv, norm = (calls_of(recording, path)[0] for path in ("layers.0", "layers.1"))
    first = conditions(recording, recording.ops[conv.start])
    second = conditions(recording, recording.ops[norm.start])
    assert len(first) == len(second) == 1
    assert first != second


def test_forward_without_source_is_reported():
    namespace = {"ConvNorm": ConvNorm}
    source = (
        "class Built(ConvNorm):\n    def forward(self, x, y=None): return self.bn(self.conv(x))"
    )
    exec(source, namespace)
    assert any("has no source" in sentence for sentence in found(namespace["Built"](), x()))


def test_reads_of_data():
    recording = recorded(OnData(), x())
    (read,) = reads_data(recording)
    assert read.name.startswith("aten._local_scalar_dense") or "nonzero" in read.name
    assert reads_data(recorded(BatchSize(), x())) == ()


def test_graph_modules_hide_nothing():
    traced = torch.fx.symbolic_trace(ConvNorm().eval())
    assert found(traced, x()) == []


def test_nothing_is_reported_of_a_parameter_that_no_branch_reads():
    """A parameter is looked up by its number; reading its module's other settings is no use."""

    class Reads(ConvNorm):
        def forward(self, x, scale=False, stride=False):
            z = self.bn(self.conv(x))
            if stride:
                z = z * self.conv.stride[0]
            return z * self.bn.weight.sum() if scale else z

    recording = recorded(Reads(), x())
    numbers = {value.name: number for number, value in enumerate(recording.values) if value.name}
    assert hidden_uses(recording, parameters=[numbers["conv.weight"]]) == ()
    assert "self.bn.weight" in hidden_uses(recording, parameters=[numbers["bn.weight"]])[0]


def test_trace_function_is_restored_and_values_are_the_same():
    def before(frame, event, arg):
        return None

    model = TrainingOrAux().eval()
    outer = sys.gettrace()
    sys.settrace(before)
    try:
        lines = record(model, Inputs((x(),)), lines=True)
        with contextlib.suppress(CannotTrace):
            record(model, Inputs((1,)), lines=True)
        assert sys.gettrace() is before
    finally:
        sys.settrace(outer)
    plain = record(model, Inputs((x(),)))
    assert [op.name for op in plain.ops] == [op.name for op in lines.ops]
    with pytest.raises(ValueError, match="lines=True"):
        hidden_uses(plain, [plain.model])
    with pytest.raises(ValueError, match="lines=True"):
        same_conditions(plain, plain.ops)


ROWS = {**vision(), **decoders()}


def folds_into_convolutions(recording):
    """(norm call, the convolution or linear call that made its input) for every batch norm."""
    made = {
        call.output.value: call
        for call in recording.module_calls
        if isinstance(call.module, (nn.Conv2d, nn.Linear))
    }
    for call in recording.module_calls:
        if isinstance(call.module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            given = call.args[0].value
            op = recording.values[given].op
            ops = recording.ops
            while given not in made and op is not None and "view" in ops[op].name:
                given = ops[op].inputs[0]
                op = recording.values[given].op
            if given in made:
                yield [call, made[given]], {given, call.args[0].value}


def folds_into_linears(recording):
    """(norm call, the linear calls that read its output) for every norm of tokens."""
    for call in recording.module_calls:
        if "Norm" not in type(call.module).__name__ or not hasattr(call.output, "value"):
            continue
        readers = [
            other
            for other in recording.module_calls
            if type(other.module).__name__ in ("Linear", "Conv1D")
            and other.args
            and other.args[0] == call.output
        ]
        if readers:
            yield [call, *readers], {call.output.value}


def built_here():
    regnet = hf.RegNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8)
    mobilenet = hf.MobileNetV2Config(depth_multiplier=0.25, image_size=32)
    return {
        "regnet": (built(hf.RegNetForImageClassification, regnet), image()),
        "mobilenet_v2": (built(hf.MobileNetV2ForImageClassification, mobilenet), image(64)),
    }


def zoo(name):
    build, inputs = built_here().get(name) or (ROWS[name].build, ROWS[name].inputs)
    return record(build(), Inputs((), inputs()), lines=True)


# How many folds of each architecture are looked at.
ZOO_CONVOLUTIONS = {
    "resnet": 11,
    "efficientnet": 10,
    "levit": 26,
    "regnet": 12,
    "mobilenet_v2": 52,
}
ZOO_LINEARS = {
    "convnext": 4,
    "vit": 4,
    "gpt2": 4,
    "opt": 4,
    "llama": 4,
    "qwen3": 4,
    "gemma3": 4,
    "mamba": 2,
}


@pytest.mark.parametrize("name", ZOO_CONVOLUTIONS)
def test_batch_norms_of_real_models_have_no_hidden_branch(name):
    recording = zoo(name)
    folds = list(folds_into_convolutions(recording))
    assert len(folds) == ZOO_CONVOLUTIONS[name]
    for calls, values in folds:
        assert hidden_uses(recording, [call.module for call in calls], values) == ()
        ops = [recording.ops[call.end - 1] for call in calls]
        assert same_conditions(recording, ops) is None


@pytest.mark.parametrize("name", ZOO_LINEARS)
def test_token_norms_of_real_models_have_no_hidden_branch(name):
    recording = zoo(name)
    folds = list(folds_into_linears(recording))
    assert len(folds) == ZOO_LINEARS[name]
    for calls, values in folds:
        assert hidden_uses(recording, [c.module for c in calls], values, (), "scale") == ()
        ops = [recording.ops[call.end - 1] for call in calls]
        assert same_conditions(recording, ops) is None


def test_last_norm_of_llama_is_also_a_hidden_state():
    """With `output_hidden_states` the model gives out what the last norm made."""
    recording = zoo("llama")
    (norm,), (head,) = calls_of(recording, "model.norm"), calls_of(recording, "lm_head")
    modules, values = (norm.module, head.module), (norm.output.value, head.args[0].value)
    found = hidden_uses(recording, modules, values, last_axis="scale")
    assert any("outputs.last_hidden_state" in sentence for sentence in found)
    assert all("output_capturing.py" in sentence for sentence in found)
    # Which positions become logits is a choice of whole tokens.
    assert any("slice_logits" in text for text in hidden_uses(recording, modules, values))


class PerToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 3)

    def forward(self, x, mask=None, gate=None):
        y = self.norm(x)
        if mask is not None:
            y = (y * mask[:, :, None]).to(y.dtype)
        if gate is not None:
            y = y * gate
        return self.linear(y)


def test_factors_of_whole_tokens_pass_a_scale_only():
    recording = recorded(PerToken(), torch.randn(2, 3, 4))
    value = calls_of(recording, "norm")[0].output.value
    lines = {axis: hidden_uses(recording, (), [value], (), axis) for axis in ("scale", "affine")}
    assert all("y = y * gate" in line_of(text) for text in lines["scale"])
    assert len(lines["scale"]) == 2
    assert len(lines["affine"]) == 4


class Grouped(nn.Module):
    """A product whose name is a question of the machine, as transformers writes it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.weight = nn.Parameter(torch.randn(2, 4, 8))

    def forward(self, x, ends):
        return self.product(self.norm(x), ends)

    def product(self, x, ends):
        if x.data_ptr() % 16 == 0 or ends.dtype == torch.int32:
            return torch.nn.functional.grouped_mm(x, self.weight, offs=ends)
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight, offs=ends)


class GroupedOther(Grouped):
    def product(self, x, ends):
        if x.data_ptr() % 16 == 0 or ends.dtype == torch.int32:
            return torch.nn.functional.grouped_mm(x, self.weight, offs=ends)
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight + 1, offs=ends)


class GroupedReassigned(Grouped):
    def product(self, x, ends):
        if x.data_ptr() % 16 == 0 or ends.dtype == torch.int32:
            return torch.nn.functional.grouped_mm(x, self.weight, offs=ends)
        x = 2 * x
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight, offs=ends)


def test_a_product_under_another_name_is_the_same_product():
    ends = torch.tensor([2, 5], dtype=torch.int32)
    said = {}
    for model in (Grouped(), GroupedOther(), GroupedReassigned()):
        recording = recorded(model, torch.randn(5, 4), ends)
        norm = calls_of(recording, "norm")[0].output.value
        ops = [op for op in recording.ops if "layer_norm" in op.name or "grouped_mm" in op.name]
        assert len(ops) == 2
        said[type(model)] = (
            bool(hidden_uses(recording, (), [norm])),
            same_conditions(recording, ops),
        )
    assert said[Grouped] == (False, None)
    for other in (GroupedOther, GroupedReassigned):
        assert said[other][0] and "_grouped_mm" in said[other][1]


def line_of(sentence):
    number = int(sentence.split(" line ")[1].split()[0])
    return linecache.getline(__file__, number)


def test_embedding_of_gpt2_is_conditional():
    """`inputs_embeds` takes the place of the table, and token types read it a second time."""
    recording = zoo("gpt2")
    table, norm = (
        calls_of(recording, path)[0] for path in ("transformer.wte", "transformer.h.0.ln_1")
    )
    assert any("self.wte" in text for text in hidden_uses(recording, [table.module]))
    difference = same_conditions(recording, [recording.ops[table.start], recording.ops[norm.start]])
    assert difference is not None
    assert "inputs_embeds is None" in difference
