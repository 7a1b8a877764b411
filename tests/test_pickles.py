"""Loading a pickled model runs no code from the file, and ordinary files load.

Every hostile file here would leave a mark when it runs: a file, an entry of `MARKS`, or a module in
`sys.modules`. A refusal counts only if the mark is absent.
"""

from __future__ import annotations

import builtins
import collections
import enum
import functools
import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normsurgery.artefacts import load
from normsurgery.artefacts.nodes import path_to
from normsurgery.artefacts.opcodes import MalformedPickle, interpret
from normsurgery.artefacts.pickles import load_pickled, load_tensors
from normsurgery.artefacts.vetting import Refused, vet
from normsurgery.errors import CannotRead

MARKS: list[str] = []


def leave_mark(*args: Any, **kwargs: Any) -> Any:
    MARKS.append("ran")
    return args[0] if args else None


class Reduces:
    """Pickles as any call one likes."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def in_model(value: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[1].extra = value
    return model


def write_raw(path: Path, program: bytes, *, extra: dict[str, bytes] | None = None) -> Path:
    """A torch zip archive whose data.pkl is any bytes."""
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", program, len(program))
    writer.write_record("byteorder", b"little", 6)
    for name, content in (extra or {}).items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return path


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture(autouse=True)
def no_marks() -> Any:
    MARKS.clear()
    yield
    assert MARKS == []


def refuse(path: Path, *words: str) -> str:
    with pytest.raises(CannotRead) as caught:
        load(path)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert "\n" not in text
    return text


def test_os_system_in_reduce(tmp_path: Path, sentinel: Path) -> None:
    """A loader with weights_only=False runs the command."""
    path = tmp_path / "m.pt"
    torch.save(in_model(Reduces(os.system, f"touch {sentinel}")), path)
    refuse(path, "1.extra", "system", "--weights")
    assert not sentinel.exists()


def test_the_hostile_file_would_have_run(tmp_path: Path, sentinel: Path) -> None:
    """The control: without vetting the same file leaves its mark, so the tests above can fail."""
    path = tmp_path / "m.pt"
    torch.save(in_model(Reduces(os.system, f"touch {sentinel}")), path)
    torch.load(path, weights_only=False)
    assert sentinel.exists()


@pytest.mark.parametrize(
    "function",
    [builtins.eval, builtins.exec, builtins.__import__, builtins.getattr, builtins.open],
    ids=lambda f: f.__name__,
)
def test_builtins(tmp_path: Path, sentinel: Path, function: Any) -> None:
    """`builtins.eval` and its like are refused wherever they stand, also inside nested dicts."""
    argument = f"open({str(sentinel)!r}, 'w')"
    args = (str(sentinel), "w") if function is open else (argument,)
    path = tmp_path / "m.pt"
    torch.save({"epoch": 3, "model": {"deep": [in_model(Reduces(function, *args))]}}, path)
    refuse(path, "model.deep[0].1.extra")
    assert not sentinel.exists()


def test_import_with_side_effects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of a module whose import runs code: the module must not be imported."""
    (tmp_path / "evil_package.py").write_text(
        "import torch\nopen(__file__ + '.ran', 'w')\nclass Net(torch.nn.Linear): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    program = b"\x80\x02cevil_package\nNet\n)\x81."
    text = refuse(write_raw(tmp_path / "m.pt", program), "evil_package.Net", "--trust evil_package")
    assert "evil_package:Net --weights" in text
    assert "evil_package" not in sys.modules
    assert not (tmp_path / "evil_package.py.ran").exists()


def test_trust_opens_exactly_that_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--trust trusted_models` is not `--trust trusted_models_extra`."""
    for name in ("trusted_models", "trusted_models_extra"):
        (tmp_path / f"{name}.py").write_text(
            "import torch\nclass Net(torch.nn.Linear):\n"
            "    def __init__(self): super().__init__(2, 3)\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    import trusted_models
    import trusted_models_extra

    torch.save(trusted_models.Net(), tmp_path / "a.pt")
    torch.save(trusted_models_extra.Net(), tmp_path / "b.pt")
    assert type(load(tmp_path / "a.pt", trust=("trusted_models",)).model) is trusted_models.Net
    with pytest.raises(CannotRead, match="trusted_models_extra"):
        load(tmp_path / "b.pt", trust=("trusted_models",))


def test_lookalike_package(tmp_path: Path) -> None:
    """`transformers_modules` holds code from checkpoints; it only starts like transformers."""
    program = b"\x80\x02ctransformers_modules.x.modeling\nNet\n)\x81."
    refuse(write_raw(tmp_path / "m.pt", program), "transformers_modules")
    assert not any(name.startswith("transformers_modules") for name in sys.modules)


def test_main_names_the_factory(tmp_path: Path) -> None:
    """A model pickled by the script that defines it: --trust cannot help, the factory can."""
    program = b"\x80\x02c__main__\nNet\n)\x81."
    text = refuse(write_raw(tmp_path / "m.pt", program), "__main__.Net", "script", "my_script:Net")
    assert "--weights" in text


def test_function_as_hook(tmp_path: Path) -> None:
    """A hook runs with the model, so it is code, even where the function itself is pure."""
    for hook in (leave_mark, nn.functional.relu):
        model = nn.Sequential(nn.Linear(2, 3))
        model[0].register_forward_hook(hook)
        torch.save(model, tmp_path / "m.pt")
        refuse(tmp_path / "m.pt", "0")


def test_forward_on_the_instance(tmp_path: Path) -> None:
    """A `forward` in the file would run in place of the class's own."""
    model = nn.Sequential(nn.Linear(2, 3))
    model[0].forward = functools.partial(nn.functional.gelu, approximate="tanh")
    torch.save(model, tmp_path / "m.pt")
    refuse(tmp_path / "m.pt", "forward")


def test_graph_module(tmp_path: Path) -> None:
    """A GraphModule's state is its source code."""
    torch.save(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3))), tmp_path / "m.pt")
    refuse(tmp_path / "m.pt", "GraphModule", "code")


def test_script_module_named_in_a_pickle(tmp_path: Path) -> None:
    """TorchScript classes hold compiled code."""
    program = b"\x80\x02ctorch.jit._script\nRecursiveScriptModule\n)\x81."
    refuse(write_raw(tmp_path / "m.pt", program), "TorchScript")


def test_compiled_model(tmp_path: Path) -> None:
    """A compiled model pickles its compiler; the model inside is what to save."""
    torch.save(torch.compile(nn.Linear(2, 3), backend="eager"), tmp_path / "m.pt")
    refuse(tmp_path / "m.pt", "_orig_mod")


def test_distributed_wrapper(tmp_path: Path) -> None:
    """DistributedDataParallel's __setstate__ joins a process group."""
    program = b"\x80\x02ctorch.nn.parallel.distributed\nDistributedDataParallel\n)\x81}b."
    refuse(write_raw(tmp_path / "m.pt", program), "model.module")


class CountsCalls(nn.Module):
    def __init__(self, *args: Any) -> None:
        MARKS.append("constructed")
        super().__init__()


@pytest.mark.parametrize("create", ["reduce", "newobj"])
def test_allowed_class_with_arguments(tmp_path: Path, create: str) -> None:
    """weights_only alone runs `__init__` of an allowed class on arguments from the file."""
    opcode = {"reduce": b"R", "newobj": b"\x81"}[create]
    program = b"\x80\x02ctorch.nn.modules.linear\nLinear\nK\x02K\x03\x86" + opcode + b"."
    refuse(write_raw(tmp_path / "m.pt", program), "Linear", "arguments from the file")


def test_trusted_class_with_one_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One literal argument is how an enum is written; any other class must not be called so."""
    module = types.ModuleType("trusted_models")
    CountsCalls.__module__ = "trusted_models"
    module.CountsCalls = CountsCalls  # type: ignore[attr-defined]
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("trusted_models", None)
    monkeypatch.setitem(sys.modules, "trusted_models", module)
    path = write_raw(tmp_path / "m.pt", b"\x80\x02ctrusted_models\nCountsCalls\nK\x02\x85R.")
    with pytest.raises(CannotRead, match="called with arguments"):
        load(path, trust=("trusted_models",))
    assert MARKS == []


class OwnState(nn.Module):
    def __setstate__(self, state: Any) -> None:
        MARKS.append("__setstate__")


class OwnNew(nn.Module):
    def __new__(cls) -> Any:
        MARKS.append("__new__")
        return super().__new__(cls)


class Deletes(nn.Module):
    def __del__(self) -> None:
        MARKS.append("__del__")


@pytest.mark.parametrize(
    ("cls", "word"), [(OwnState, "__setstate__"), (OwnNew, "__new__"), (Deletes, "__del__")]
)
def test_classes_with_code_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: type, word: str
) -> None:
    """A class of an allowed package that would run its own code while it is loaded."""
    module = types.ModuleType("trusted_models")
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("trusted_models", None)
    monkeypatch.setattr(cls, "__module__", "trusted_models")
    setattr(module, cls.__qualname__, cls)
    monkeypatch.setitem(sys.modules, "trusted_models", module)
    program = f"\x02ctrusted_models\n{cls.__qualname__}\n)\x81}}b.".encode("latin1")
    path = write_raw(tmp_path / "m.pt", b"\x80" + program.replace(b"\xc2\x81", b"\x81"))
    with pytest.raises(CannotRead, match=word):
        load(path, trust=("trusted_models",))
    assert MARKS == []


DOTTED = {
    "builtins of a layer module": ("torch.nn.modules.linear", "__builtins__.eval"),
    "module path through builtins": ("torch.nn.modules.linear.__builtins__", "eval"),
    "os through torch": ("torch", "os.system"),
    "os through torch.nn": ("torch.nn.functional", "torch.os.system"),
    "os through the path": ("torch.os", "system"),
    "a class's globals": ("torch.nn.modules.linear", "Linear.forward.__globals__"),
    "a method": ("torch.nn.modules.linear", "Linear.forward"),
    "another name for a class": ("torch.nn.modules.linear", "Module"),
    "hub": ("torch.hub", "load"),
    "testing": ("torch.testing._internal.common_utils", "run_tests"),
    "data": ("torch.utils.data", "DataLoader"),
    "dynamo": ("torch._dynamo.eval_frame", "OptimizedModule"),
    "load": ("torch", "load"),
    "an empty part": ("torch..nn", "Linear"),
    "a space": ("torch.nn os", "system"),
    "an escape": ("torch.nn\\x2emodules", "Linear"),
}


@pytest.mark.parametrize("opcode", ["GLOBAL", "STACK_GLOBAL"])
@pytest.mark.parametrize("case", DOTTED)
def test_dotted_names(tmp_path: Path, case: str, opcode: str) -> None:
    """Names that start in an allowed package and walk out of it."""
    module, name = (text.encode() for text in DOTTED[case])
    if opcode == "GLOBAL":
        program = b"\x80\x02c" + module + b"\n" + name + b"\n)R."
    else:
        parts = b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, name))
        program = b"\x80\x04" + parts + b"\x93)R."
    refuse(write_raw(tmp_path / "m.pt", program))


def test_another_name_for_a_class(tmp_path: Path) -> None:
    """A class is taken only under its own name, as pickle writes it, not through an import."""
    program = b"\x80\x02ctorch.nn.modules.linear\nModule\n)\x81}b."
    refuse(write_raw(tmp_path / "m.pt", program), "another name for torch.nn.modules.module.Module")


STRUCTURES = {
    "INST": b"(S'echo'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'echo'\no.",
    "EXT1": b"\x80\x02\x82\x01)R.",
    "EXT2": b"\x80\x02\x83\x01\x00)R.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00)R.",
    "NEWOBJ_EX": b"\x80\x04ctorch.nn.modules.linear\nLinear\n)}\x92.",
    "PERSID": b"\x80\x02Pstorage\n.",
    "a state for a class": b"\x80\x02ctorch.nn.modules.linear\nLinear\n}b.",
    "a call of a call": b"\x80\x02ccollections\nOrderedDict\n)R)R.",
    "a call whose name was popped": b"\x80\x02cos\nsystem\n0N.",
    "a call in a memo only": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00echo\x85Rq\x000N.",
    "an object's state as a tuple": b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81N}\x86b.",
    "codecs": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.",
    "a default factory": b"\x80\x02ccollections\ndefaultdict\ncos\nsystem\n\x85R.",
    "partial of a loader": (
        b"\x80\x02cfunctools\npartial\nctorch\nload\n\x85R(ctorch\nload\n)}Nt" + b"b."
    ),
    "partial whose state differs": (
        b"\x80\x02cfunctools\npartial\nctorch.nn.functional\nrelu\n\x85R"
        b"(ctorch._utils\n_rebuild_tensor\n)}Ntb."
    ),
    "partial without a state": b"\x80\x02cfunctools\npartial\nctorch.nn.functional\nrelu\n\x85R.",
}
WORDS = {
    "INST": "INST",
    "OBJ": "OBJ",
    "EXT1": "EXT1",
    "EXT2": "EXT2",
    "EXT4": "EXT4",
    "NEWOBJ_EX": "NEWOBJ_EX",
    "PERSID": "PERSID",
    "a state for a class": "would be given a state",
    "a call of a call": "something computed",
    "a call whose name was popped": "system",
    "a call in a memo only": "system",
    "an object's state as a tuple": "not a dict of attributes",
    "codecs": "other than bytes",
    "a default factory": "system",
    "partial of a loader": "load",
    "partial whose state differs": "other than a layer",
    "partial without a state": "not written the way",
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_instructions_and_shapes(tmp_path: Path, case: str) -> None:
    """Instructions and call shapes that models do not have, and calls that nothing reaches."""
    refuse(write_raw(tmp_path / "m.pt", STRUCTURES[case]), WORDS[case])


REFERENCES = {
    "not a tuple": b"\x80\x02X\x07\x00\x00\x00storageQ.",
    "a module": b"\x80\x02(X\x06\x00\x00\x00modulectorch.nn.modules.linear\nLinear\nNNNtQ.",
    "a class for a storage": (
        b"\x80\x02(X\x07\x00\x00\x00storagectorch.nn.modules.linear\nLinear\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ."
    ),
    "a location that is an object": (
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000}K\x01tQ."
    ),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_odd_persistent_ids(tmp_path: Path, case: str) -> None:
    """A reference may only be to a tensor's storage."""
    refuse(write_raw(tmp_path / "m.pt", REFERENCES[case]))


class Sub(Tensor):
    pass


def test_tensor_subclass(tmp_path: Path) -> None:
    """`_rebuild_from_type_v2` calls the function it is given and makes the class it is given."""
    torch.save(in_model(torch.ones(2).as_subclass(Sub)), tmp_path / "m.pt")
    refuse(tmp_path / "m.pt", "1.extra")


def test_rebuild_that_calls(tmp_path: Path, sentinel: Path) -> None:
    """The function inside `_rebuild_from_type_v2` is judged like any other call."""
    path = tmp_path / "m.pt"
    hidden = Reduces(torch._tensor._rebuild_from_type_v2, nn.Linear, torch.Tensor, (2, 3), {})
    torch.save(in_model(hidden), path)
    refuse(path, "would call")


def test_tensor_state_cannot_reach_a_tensors_own_attributes(tmp_path: Path) -> None:
    """A tensor's state is set attribute by attribute, so `grad` or `__class__` in it would act."""
    plain = torch._utils._rebuild_tensor_v2
    for name in ("grad", "__class__", "data", "_backward_hooks"):
        args = (torch.ones(2).untyped_storage(), 0, (2,), (1,), False, collections.OrderedDict())
        hidden = Reduces(
            torch._tensor._rebuild_from_type_v2, plain, torch.Tensor, args, {name: None}
        )
        torch.save(in_model(hidden), tmp_path / "m.pt")
        refuse(tmp_path / "m.pt", name)


def test_backward_hooks_of_a_tensor(tmp_path: Path) -> None:
    """The hooks argument of a rebuilt tensor must be empty."""
    hooks = collections.OrderedDict({0: nn.ReLU()})
    hidden = Reduces(torch._utils._rebuild_parameter, torch.ones(2), True, hooks)
    torch.save(in_model(hidden), tmp_path / "m.pt")
    refuse(tmp_path / "m.pt", "hooks")


def test_second_pickle_in_the_archive(tmp_path: Path, sentinel: Path) -> None:
    """Two records of one name, or a pickle under another name: what is judged is what is loaded."""
    good, bad = io.BytesIO(), pickle.dumps(Reduces(os.system, f"touch {sentinel}"), 2)
    torch.save(nn.Linear(2, 3), good)
    for first, second in ((good, None), (None, good)):
        path = tmp_path / "m.pt"
        with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
            if first is None:
                target.writestr("archive/data.pkl", bad)
            for item in source.infolist():
                target.writestr(item.filename, source.read(item))
            if second is None:
                target.writestr("archive/data.pkl", bad)
                target.writestr("other/data.pkl", bad)
                target.writestr("archive/more.pkl", bad)
        try:
            load(path)
        except CannotRead as error:
            assert "\n" not in str(error)
        assert not sentinel.exists()


def test_legacy_format(tmp_path: Path, sentinel: Path) -> None:
    """The format before torch 1.6 keeps sources and classes outside the pickle."""
    path = tmp_path / "m.pt"
    value = in_model(Reduces(os.system, f"touch {sentinel}"))
    torch.save(value, path, _use_new_zipfile_serialization=False)
    refuse(path, "before version 1.6")
    assert not sentinel.exists()


def test_plain_pickle(tmp_path: Path, sentinel: Path) -> None:
    """A pickle that torch did not write is not run."""
    path = tmp_path / "m.pt"
    path.write_bytes(pickle.dumps(Reduces(os.system, f"touch {sentinel}")))
    refuse(path, "torch.save did not write")
    assert not sentinel.exists()


def test_newer_protocol_says_how_to_save(tmp_path: Path) -> None:
    """torch's weights-only unpickler reads protocol 2; a harmless file of another is told so."""
    torch.save(nn.Linear(2, 3), tmp_path / "m.pt", pickle_protocol=4)
    refuse(tmp_path / "m.pt", "protocol 4", "torch.save")


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (collections.deque([1]), "deque"),
        (torch.relu, "getattr"),
        (nn.Linear(2, 2).forward, "getattr"),
        (Ellipsis, "Ellipsis"),
        (__import__("numpy").float64(1.0), "numpy"),
        (__import__("numpy").ones(2), "numpy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_need_a_call(tmp_path: Path, value: Any, word: str) -> None:
    """Refused with the attribute's path and the factory to write, never loaded by half."""
    torch.save(in_model(value), tmp_path / "m.pt")
    refuse(tmp_path / "m.pt", "1.extra", word, "--weights")


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Settings:
    width: int = 3


ORDINARY: dict[str, Callable[[], Any]] = {
    "dtype": lambda: torch.bfloat16,
    "device": lambda: torch.device("cpu"),
    "size": lambda: torch.Size([1, 2]),
    "slice": lambda: slice(1, 2),
    "frozenset": lambda: frozenset({1, 2}),
    "set": lambda: {1, 2},
    "complex": lambda: 1 + 2j,
    "bytes": lambda: b"abc",
    "path": lambda: Path("a/b"),
    "defaultdict": lambda: collections.defaultdict(list),
    "ordered": lambda: collections.OrderedDict(a=1),
    "partial of a layer": lambda: functools.partial(nn.LayerNorm, eps=1e-6),
    "partial of an activation": lambda: functools.partial(nn.functional.gelu, approximate="tanh"),
    "a layer class": lambda: nn.LayerNorm,
    "an activation": lambda: nn.functional.silu,
    "range": lambda: range(3),
    "big int": lambda: 2**70,
}


@pytest.mark.parametrize("case", ORDINARY)
def test_ordinary_attributes_survive(tmp_path: Path, case: str) -> None:
    """What ordinary models carry as attributes comes back equal."""
    value = ORDINARY[case]()
    torch.save(in_model(value), tmp_path / "m.pt")
    found = load(tmp_path / "m.pt").model[1].extra
    if isinstance(value, functools.partial):
        assert (found.func, found.args, found.keywords) == (value.func, value.args, value.keywords)
    else:
        assert found == value
        assert type(found) is type(value)


def test_enum_and_dataclass_of_a_trusted_package(tmp_path: Path) -> None:
    """Enums by value and dataclasses by state are data."""
    torch.save(in_model([Colour.RED, Settings(7)]), tmp_path / "m.pt")
    package = __name__.partition(".")[0]
    found = load(tmp_path / "m.pt", trust=(package,)).model[1].extra
    assert found == [Colour.RED, Settings(7)]


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_old_style_hooks_of_torch(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Old weight_norm and spectral_norm keep torch's own hook objects; such models load and run."""
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.BatchNorm1d(4)).eval()
    torch.save(model, tmp_path / "m.pt")
    x = torch.randn(3, 4)
    assert torch.equal(load(tmp_path / "m.pt").model(x), model(x))


class ScriptNet(nn.Module):
    """Stands for a class that only the training script knows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.tied = self.net[0]
        self.register_buffer("hidden", torch.ones(1), persistent=False)


def test_weights_of_a_whole_model_are_read_without_its_class(tmp_path: Path) -> None:
    """A pickled model of unknown code still is a file of weights: its state_dict, key for key."""
    model = ScriptNet()
    model.extra = Reduces(leave_mark, 1)
    torch.save({"model": model, "epoch": 3}, tmp_path / "m.pt")
    found = load_tensors(tmp_path / "m.pt")["model"]
    wanted = model.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_nothing_is_imported_before_everything_is_judged(tmp_path: Path) -> None:
    """A file that names an allowed module and then a refused one imports neither."""
    module = "torchvision.models.resnet"
    program = f"\x02c{module}\nResNet\ncos\nsystem\n".encode() + b"\x86."
    refuse(write_raw(tmp_path / "m.pt", b"\x80" + program), "system")
    with pytest.raises(Refused):
        vet(b"\x80" + program)


def test_paths_name_the_attribute() -> None:
    """The attribute path skips torch's own dicts and follows lists and dict keys."""
    model = in_model({"a": [1, Path("x")]})
    buffer = io.BytesIO()
    torch.save(model, buffer)
    with zipfile.ZipFile(buffer) as archive:
        name = next(item for item in archive.namelist() if item.endswith("data.pkl"))
        program = interpret(archive.read(name))
    posix = [
        node for node in program.nodes if str(getattr(node, "function", "")).startswith("pathlib")
    ]
    assert [path_to(program.root, node) for node in posix] == ["1.extra.a[1]"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02(",
        b"\x80\x02R.",
        b"\x80\x02h\x07.",
        b"\x80\x02Kj",
        b"\x80\x02)u.",
    ],
)
def test_malformed(data: bytes) -> None:
    """Broken programs end in one exception, whatever is missing."""
    with pytest.raises(MalformedPickle):
        interpret(data)


def test_deep_nesting_is_no_crash(tmp_path: Path) -> None:
    """Ten thousand nested lists must not exhaust the interpreter's stack."""
    program = b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b"."
    refuse(write_raw(tmp_path / "m.pt", program), "holds a list")


def test_objects_that_hold_themselves(tmp_path: Path) -> None:
    """A list in itself among a partial's arguments, a module in itself: no endless walk."""
    cycle = b"]q\x00h\x00a"
    partial = b"\x80\x02cfunctools\npartial\nctorch.nn.functional\nrelu\nq\x01\x85R"
    program = partial + b"(h\x01" + cycle + b"}Ntb."
    refuse(write_raw(tmp_path / "m.pt", program), "too deeply")
    module = (
        b"\x80\x02ctorch.nn.modules.container\nSequential\n)\x81q\x00}X\x08\x00\x00\x00_modules"
    )
    program = module + b"}X\x01\x00\x00\x00ah\x00ssb."
    with pytest.raises(CannotRead, match="too deeply"):
        load_tensors(write_raw(tmp_path / "n.pt", program))


def test_size_in_the_header_is_not_believed(tmp_path: Path) -> None:
    """A string that claims four gigabytes is a malformed pickle, not an allocation."""
    program = b"\x80\x02X" + struct.pack("<I", 0xFFFFFFF0) + b"abc."
    refuse(write_raw(tmp_path / "m.pt", program), "not well formed")


def test_refusals_are_json_safe_sentences(tmp_path: Path) -> None:
    """A message with a hostile name in it is one printable line."""
    path = write_raw(tmp_path / "m.pt", b"\x80\x02cos\x1b[31m\nsystem\r\n)R.")
    text = refuse(path)
    assert json.dumps(text) and text.isprintable()


def test_loading_changes_nothing_global(tmp_path: Path) -> None:
    """The caller's own list of safe names is as it was, also where it overlaps."""
    torch.serialization.add_safe_globals([nn.Linear])
    try:
        before = set(torch.serialization.get_safe_globals())
        torch.save(nn.Linear(2, 3), tmp_path / "m.pt")
        load_pickled(tmp_path / "m.pt")
        assert set(torch.serialization.get_safe_globals()) == before
    finally:
        torch.serialization.clear_safe_globals()
