"""Where a half-precision device would overflow, seen on a CPU; and that its provider does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normsurgery.errors import UsageError
from normsurgery.onnxfile.sessions import Session
from normsurgery.verifying.half_device import computes_wider, overflow_on_device
from normsurgery.verifying.judge import judge, same_bits

HALF = (torch.float16, torch.bfloat16)


class PlainRMS(nn.Module):
    """RMS as it is written by people who never left float32."""

    def __init__(self, size: int = 64, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class UpcastRMS(PlainRMS):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * normed.to(x.dtype)


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.layer(x) * 0)  # type: ignore[no-any-return]


def large(rows: int = 4, size: float = 300.0) -> Tensor:
    signs = torch.randn(rows, 64).sign()
    return signs * (size + size / 3 * torch.rand(rows, 64))


def program(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> ExportedProgram:
    held = model.eval() if dtype is None else model.eval().to(dtype)
    with torch.no_grad():
        return torch.export.export(held, (x if dtype is None else x.to(dtype),), strict=False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("traced", [torch.float16, None], ids=["traced in half", "in float32"])
def test_squares_that_overflow_are_found_with_module_and_line(traced: torch.dtype | None) -> None:
    x = large()
    found = overflow_on_device(program(Block(PlainRMS()), x, traced), (x,), torch.float16)
    assert found.harmful and found.first is not None
    first = found.first
    assert (first.kind, first.operator, first.module) == ("overflow", "aten::pow", "norm")
    assert first.count == first.total == 4 * 64
    assert judge(torch.tensor(first.largest), x.double().square().max(), x.square().max()).passed
    assert "test_half_device.py:" in first.source and "x.pow(2)" in first.source
    text = str(found)
    assert "spoils the output" in text and "overflows float16 (largest 65504)" in text
    assert not any(bool(value.any()) for value in found.outputs.values())  # eager: zero everywhere


@pytest.mark.parametrize(
    ("model", "dtype", "size"),
    [
        (PlainRMS, torch.bfloat16, 300.0),  # bfloat16 has the range of float32
        (UpcastRMS, torch.float16, 300.0),  # the upcast is there for this
        (PlainRMS, torch.float16, 3.0),
    ],
)
@pytest.mark.parametrize("half", [True, False], ids=["traced in half", "in float32"])
def test_what_fits_is_left_in_peace(
    model: type[PlainRMS], dtype: torch.dtype, size: float, half: bool
) -> None:
    x = large(size=size)
    made = program(Block(model()), x, dtype if half else None)
    found = overflow_on_device(made, (x.to(dtype) if half else x,), dtype)
    assert not found.events and not found.harmful and found.first is None
    assert "loses nothing" in str(found)
    assert all(verdict.passed for verdict in found.verdicts.values())


def test_without_the_upcast_the_same_model_is_found() -> None:
    """The fault planted in the last test: its upcast taken away."""
    x = large()
    found = overflow_on_device(program(Block(PlainRMS()), x, torch.float16), (x,), torch.float16)
    assert found.harmful


def test_what_vanishes_is_an_event_and_may_be_harmless() -> None:
    x = torch.randn(4, 64).sign() * 1e-4
    found = overflow_on_device(program(PlainRMS(eps=1e-8), x), (x,), torch.float16)
    assert found.first is not None and found.harmful  # eps vanishes too, and 1 / 0 is left
    vanished = [event.node for event in found.events if event.kind == "underflow"]
    assert vanished == ["pow_1"]  # and not what follows from it
    assert "vanishes in float16 (smallest 5.96e-08)" in str(found.events[0])

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1e-9 * x

    x = torch.randn(4, 64)
    found = overflow_on_device(program(Scaled(), x), (x,), torch.float16)
    assert found.first is not None and not found.harmful
    assert "does no harm" in str(found)


def test_a_weight_that_half_precision_cannot_hold_is_found() -> None:
    model = nn.Sequential(nn.BatchNorm1d(64))
    model[0].running_var.fill_(1e5)  # type: ignore[operator,union-attr]
    x = torch.randn(4, 64)
    found = overflow_on_device(program(model, x), (x,), torch.float16)
    assert found.first is not None and found.harmful
    assert (found.first.operator, found.first.module) == ("a weight", "0.running_var")
    assert not overflow_on_device(program(model, x), (x,), torch.bfloat16).harmful


def test_an_overflow_behind_a_mask_is_an_event_but_no_harm() -> None:
    class Masked(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            hidden = torch.triu(torch.ones(8, 8, dtype=torch.bool), 1)
            least = torch.zeros(8, 8).masked_fill(hidden, -65504.0).to(scores.dtype)
            return (scores * 20 + least).softmax(-1)

    x = torch.randn(2, 8, 8).half()
    found = overflow_on_device(program(Masked(), x, torch.float16), (x,), torch.float16)
    assert [event.kind for event in found.events] == ["overflow"]
    assert not found.harmful


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_it_is_what_torch_computes_where_one_operation_is_one_rounding(dtype: torch.dtype) -> None:
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = (x * 1.75 + 0.25).float() / 3
            return torch.where(x > 0, y.to(x.dtype) * x, x - 0.125)

    x = torch.randn(5, 7).to(dtype)
    found = overflow_on_device(program(Chain(), x, dtype), (x,), dtype)
    (output,) = found.outputs.values()
    assert same_bits(output, Chain()(x))


def test_in_place_operations_and_the_program_itself_stay_as_they_are() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y.mul_(2.0).relu_().square()

    x = torch.randn(2, 64)
    made = program(InPlace(), x)
    before = {name: tensor.clone() for name, tensor in made.state_dict.items()}
    found = overflow_on_device(made, (x * 200,), torch.float16)
    assert found.first is not None and found.first.kind == "overflow"
    assert all(same_bits(before[name], tensor) for name, tensor in made.state_dict.items())


def test_only_half_types_are_taken() -> None:
    x = torch.randn(2, 64)
    with pytest.raises(UsageError, match=r"float16 or bfloat16, not torch\.float32"):
        overflow_on_device(program(PlainRMS(), x), (x,), torch.float32)


def test_the_cpu_provider_computes_half_precision_in_float32_and_it_is_said() -> None:
    x = large().half()
    made = program(Block(PlainRMS()), x, torch.float16)
    written = torch.onnx.export(made, dynamo=True, verbose=False, opset_version=20)
    assert written is not None
    wider = computes_wider(written.model_proto)
    assert wider.wider and wider.casts > 0 and wider.half > 0
    assert "proves nothing about a device" in str(wider)
    (name,) = (port.name for port in written.model_proto.graph.input)
    (right,) = Session(written.model_proto).run({name: x}).values()
    assert bool(right.any())  # where the device gives zero everywhere
    found = overflow_on_device(made, (x,), torch.float16)
    assert found.harmful and not any(bool(value.any()) for value in found.outputs.values())

    single = torch.onnx.export(program(PlainRMS(), x.float(), torch.float32), dynamo=True)
    assert single is not None
    plain = computes_wider(single.model_proto)
    assert (plain.wider, plain.half) == (False, 0)
    assert "nothing in half precision" in str(plain)
