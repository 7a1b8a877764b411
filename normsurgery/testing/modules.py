"""How a norm behaves as a module: odd shapes, types, layouts, copies, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import torch

from normsurgery.errors import WrongShape
from normsurgery.spec import NormSpec
from normsurgery.testing.cases import (
    LOW_PRECISION,
    each_case,
    is_torch_class,
    made,
    modes,
    random_input,
    require,
    run,
)
from normsurgery.verifying.judge import judge


def check_batch_sizes(spec: NormSpec) -> None:
    """Batch 1 and an odd batch equal the formula; an empty batch gives an empty output.

    The last is not asked of torch's own classes: an instance norm in eval raises an IndexError.
    """
    if spec.attach == "weight":
        return
    for example, shape in each_case(spec):
        for batch in (1, 7, 0):
            module = made(example, False)
            if batch == 0 and is_torch_class(module):
                continue
            x = random_input((batch, *shape[1:]))
            y = run(module, x)
            where = f"{spec.name} ({example.label}, batch {batch})"
            if batch == 0:
                assert y.shape[0] == 0, f"{where}: output has shape {tuple(y.shape)}"
            else:
                require(judge(y, spec.reference(module, x)), where)


def check_one_position(spec: NormSpec) -> None:
    """On 1x1 maps it equals the formula, or is refused where the formula would be constant."""
    for example, shape in each_case(spec):
        module = made(example, False)
        settings = spec.read(module).settings
        if len(settings.get("normalized_shape", ())) > 1 or len(shape) < 3:
            continue
        axis = settings.get("channel_axis", 1) % len(shape)
        small = tuple(size if d in (0, axis) else 1 for d, size in enumerate(shape))
        x = random_input(small)
        expected = spec.reference(module, x)
        try:
            y = run(module, x)
        except ValueError as error:
            constant = torch.equal(expected, spec.reference(module, random_input(small, seed=5)))
            assert constant, f"{spec.name} ({example.label}) refuses 1x1 maps: {error}"
            continue
        require(judge(y, expected), f"{spec.name} ({example.label}, shape {small})")


def check_constant_input(spec: NormSpec) -> None:
    """Zero variance gives finite outputs and finite gradients."""
    for example, shape in each_case(spec):
        for training in modes(spec):
            x = torch.full(shape, 3.0, dtype=torch.float64, requires_grad=True)
            y = made(example, training)(x)
            torch.autograd.backward(y.sum())
            assert x.grad is not None
            finite = bool(y.isfinite().all()) and bool(x.grad.isfinite().all())
            assert finite, f"{spec.name} ({example.label}): not finite where variance is zero"


def check_dtype(spec: NormSpec) -> None:
    """The output has the type of the input."""
    for example, shape in each_case(spec):
        for dtype in (torch.float64, *LOW_PRECISION):
            y = run(made(example, False).to(dtype), random_input(shape).to(dtype))
            assert y.dtype == dtype, f"{spec.name} ({example.label}): {dtype} became {y.dtype}"


def check_memory_format(spec: NormSpec) -> None:
    """Contiguous stays contiguous; channels_last gives the same values and is kept.

    Of torch's own class only the values are asked, since its kernels decide the layout.
    """
    if spec.attach != "norm":
        return
    for example, shape in each_case(spec):
        module = made(example, False)
        x = random_input(shape)
        where = f"{spec.name} ({example.label})"
        y = run(module, x)
        assert y.is_contiguous(), f"{where}: a contiguous input gave strides {y.stride()}"
        if len(shape) != 4:
            continue
        last = run(module, x.contiguous(memory_format=torch.channels_last))
        require(judge(last, y), f"{where}, channels_last")
        kept = last.is_contiguous(memory_format=torch.channels_last)
        assert kept or is_torch_class(module), (
            f"{where}: channels_last input gave strides {last.stride()}"
        )


def check_wrong_shape(spec: NormSpec) -> None:
    """Another number of channels is a WrongShape, which says how to mend it.

    Torch's own classes have their own words, or accept it where they have no parameters.
    """
    for example, shape in each_case(spec):
        module = made(example, False)
        settings = spec.read(module).settings
        if "features" not in settings or spec.attach != "norm" or is_torch_class(module):
            continue
        axis = settings["channel_axis"] % len(shape)
        wrong = tuple(size + 1 if d == axis else size for d, size in enumerate(shape))
        where = f"{spec.name} ({example.label})"
        try:
            run(module, random_input(wrong))
        except WrongShape:
            continue
        except Exception as error:
            raise AssertionError(
                f"{where}: raised {type(error).__name__}, not WrongShape, for {wrong}: {error}"
            ) from error
        raise AssertionError(f"{where}: accepted an input of shape {wrong}")


def check_copies(spec: NormSpec) -> None:
    """deepcopy, pickle and a strict state_dict round trip change no bit."""
    for example in spec.examples():
        module = made(example, False)
        x = random_input(example.inputs[0])
        expected = run(module, x)
        loaded = example.module().double().eval()
        with torch.no_grad():
            for tensor in (*loaded.parameters(), *loaded.buffers()):
                tensor.zero_()
        loaded.load_state_dict(module.state_dict(), strict=True)
        copies = {
            "deepcopy": copy.deepcopy(module),
            "pickle": pickle.loads(pickle.dumps(module)),
            "state_dict": loaded,
        }
        for how, other in copies.items():
            same = torch.equal(run(other, x), expected) and other.training == module.training
            assert same or (how == "state_dict" and torch.equal(run(other, x), expected)), (
                f"{spec.name} ({example.label}): changed by {how}"
            )
