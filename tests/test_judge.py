"""judge(): the criterion itself, as properties, and the cases fixed tolerances get wrong."""

import json
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from normsurgery.verifying import Verdict, judge
from normsurgery.verifying.differences import ulp
from normsurgery.verifying.judge import FREE_ULPS, NATIVE_FACTOR, same_bits, unchanged

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
dtypes = st.sampled_from(HALF_AND_SINGLE)
seeds = st.integers(0, 2**31 - 1)
shapes = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)


def drawn(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@given(seed=seeds, shape=shapes, dtype=dtypes, scale=st.sampled_from((1e-3, 1.0, 1e3)))
def test_a_correctly_rounded_result_passes(seed, shape, dtype, scale):
    reference = drawn(seed, shape, scale)
    verdict = judge(reference.to(dtype), reference)
    assert verdict.passed is True
    assert verdict.ulps <= 1 and verdict.factor <= 1
    assert verdict.compared == reference.numel()


@given(seed=seeds, shape=shapes, dtype=dtypes)
def test_exact_equality_has_no_error(seed, shape, dtype):
    values = drawn(seed, shape).to(dtype)
    verdict = judge(values, values.double(), values)
    assert verdict.passed is True and verdict.max_error == 0 and verdict.factor == 0
    assert verdict.same_bits


@given(
    seed=seeds,
    dtype=dtypes,
    small=st.floats(0, 60),
    more=st.floats(0, 60),
    native=st.floats(0, 20),
)
def test_more_error_never_turns_a_failure_into_a_pass(seed, dtype, small, more, native):
    reference = drawn(seed, (6,)).to(dtype).double()
    unit = ulp(float(reference.abs().max()), dtype)
    at = int(reference.abs().argmax())

    def moved(ulps: float) -> Tensor:
        values = reference.clone()
        values[at] += math.copysign(unit * round(ulps), float(reference[at]))
        return values.to(dtype)

    less, worse = (judge(moved(u), reference, moved(native)) for u in (small, small + more))
    assert worse.max_error >= less.max_error and worse.factor >= less.factor
    assert less.allowed == worse.allowed
    assert less.passed or not worse.passed


@given(seed=seeds, dtype=dtypes, native=st.integers(0, 25), factor=st.floats(0, 2))
def test_the_smallest_passing_factor_is_where_the_verdict_turns(seed, dtype, native, factor):
    reference = drawn(seed, (5,)).to(dtype).double()
    unit = ulp(float(reference.abs().max()), dtype)
    near = (reference + native * unit).to(dtype)
    verdict = judge((reference + factor * 2 * native * unit).to(dtype), reference, near)
    assume(verdict.passed is not None)
    assert verdict.passed == (verdict.factor <= 1) == (verdict.max_error <= verdict.allowed)
    assert verdict.native_error is not None
    assert verdict.allowed == NATIVE_FACTOR * verdict.native_error + FREE_ULPS * unit


@given(seed=seeds, dtype=dtypes, noise=st.sampled_from((1e-8, 1e-5, 1e-3, 1e-1)))
def test_permuting_the_samples_keeps_the_verdict(seed, dtype, noise):
    reference, error = drawn(seed, (7, 3)), drawn(seed + 1, (7, 3), noise)
    native = (reference + drawn(seed + 2, (7, 3), noise)).to(dtype)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    candidate = (reference + error).to(dtype)
    straight = judge(candidate, reference, native)
    permuted = judge(candidate[order], reference[order], native[order])
    assert (straight.passed, straight.max_error, straight.factor) == (
        permuted.passed,
        permuted.max_error,
        permuted.factor,
    )
    assert straight.worst is not None and permuted.worst is not None
    where = tuple(int(i) for i in permuted.worst)
    difference = (candidate.double() - reference).abs()
    assert difference[order][where] == difference[straight.worst]


@given(seed=seeds, dtype=st.sampled_from((torch.float32, torch.bfloat16)), power=st.integers(-8, 8))
def test_scaling_by_a_power_of_two_keeps_the_verdict(seed, dtype, power):
    """Nothing absolute may stand in the criterion."""
    reference, scale = drawn(seed, (5,)), 2.0**power
    candidate = (reference + drawn(seed + 1, (5,), 1e-6)).to(dtype)
    native = (reference + drawn(seed + 2, (5,), 1e-7)).to(dtype)
    small, large = (
        judge(candidate, reference, native),
        judge(candidate * scale, reference * scale, native * scale),
    )
    assert small.passed == large.passed and small.factor == large.factor
    assert small.ulps == large.ulps


@given(seed=seeds, dtype=dtypes, bad=st.sampled_from((math.nan, math.inf, -math.inf)))
def test_one_value_that_is_not_finite_fails_and_is_named(seed, dtype, bad):
    reference = drawn(seed, (3, 4))
    candidate = reference.to(dtype)
    candidate[1, 2] = bad
    verdict = judge(candidate, reference, reference.to(dtype))
    assert verdict.passed is False and verdict.factor == math.inf
    assert verdict.worst == (1, 2)
    assert verdict.nonfinite is not None and sum(verdict.nonfinite.values()) == 1


def test_infinities_of_different_sign_differ_and_equal_ones_agree():
    reference = torch.tensor([1.0, math.inf, math.nan], dtype=torch.float64)
    assert judge(reference.float(), reference).passed is True
    wrong = torch.tensor([1.0, -math.inf, math.nan])
    assert judge(wrong, reference).passed is False


def test_a_zero_dimensional_nan_is_a_failure():
    """The index of a 0-dim tensor is the empty tuple, which is false in an `if`."""
    verdict = judge(torch.tensor(math.nan), torch.tensor(1.0, dtype=torch.float64))
    assert verdict.passed is False and verdict.factor == math.inf and verdict.worst == ()


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_undecided_where_native_is_poor_even_for_a_perfect_candidate(dtype):
    """Where native torch itself is more than 100 ulp off, passing would prove nothing."""
    reference = torch.tensor([1.0, 0.5], dtype=torch.float64)
    poor = (reference - 101 * ulp(1.0, dtype)).to(dtype)
    verdict = judge(reference.to(dtype), reference, poor)
    assert verdict.passed is None and "reference poor" in verdict.reason
    assert not verdict.holds
    fair = (reference - 99 * ulp(1.0, dtype)).to(dtype)
    assert judge(reference.to(dtype), reference, fair).passed is True


def test_undecided_where_native_is_not_finite():
    reference = torch.tensor([1.0, 7e4], dtype=torch.float64)
    overflowed = reference.half()
    assert judge(reference.half(), reference, overflowed).passed is None
    assert judge(torch.tensor([1.0, 6e4]).half(), reference, overflowed).passed is None


def test_the_same_bits_as_a_poor_native_run_hold_without_being_a_pass():
    reference = torch.tensor([1.0], dtype=torch.float64)
    poor = torch.tensor([1.5])
    verdict = judge(poor.clone(), reference, poor)
    assert verdict.passed is None and verdict.holds


def test_an_ill_conditioned_truth_decides_nothing_but_a_nan_there_still_fails():
    """A lucky native run (exact on a constant row) must not fail a correct candidate."""
    reference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    moved = reference + 1e-2
    other = (reference + 3e-3).float()
    assert judge(other, reference, reference.float()).passed is False
    assert judge(other, reference, reference.float(), moved).passed is None
    broken = torch.tensor([1.0, math.nan])
    assert judge(broken, reference, reference.float(), moved).passed is False


@pytest.mark.parametrize(
    ("candidate", "reference"),
    [
        (torch.zeros(2, 1), torch.zeros(2, 3)),
        (torch.zeros(3), torch.zeros(2, 3)),
        (torch.zeros(1), torch.zeros(())),
        (torch.zeros(2, 3).int(), torch.zeros(2, 3)),
    ],
)
def test_shapes_are_never_broadcast_and_kinds_of_numbers_never_mixed(candidate, reference):
    assert judge(candidate, reference.double()).passed is False


def test_another_dtype_than_the_native_one_fails():
    reference = torch.ones(3, dtype=torch.float64)
    verdict = judge(reference.float(), reference, reference.half())
    assert verdict.passed is False and "dtype" in verdict.reason


def test_a_reference_that_is_not_float64_is_no_reference():
    values = torch.ones(3)
    verdict = judge(values, values, values)
    assert verdict.passed is False and "not float64" in verdict.reason


def test_nothing_compared_is_no_pass():
    empty = torch.zeros(0, 3)
    verdict = judge(empty, empty.double(), empty)
    assert verdict.passed is None and not verdict.holds


def test_integers_are_compared_exactly():
    reference = torch.tensor([3, 1, 2])
    assert judge(reference.clone(), reference, reference).passed is True
    off = torch.tensor([3, 2, 2])
    verdict = judge(off, reference, reference)
    assert verdict.passed is False and verdict.worst == (1,)
    assert judge(off, reference, off).passed is True, "a tie that native breaks in this way"


def test_complex_results_are_judged_by_their_parts():
    reference = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    assert judge(reference.to(torch.complex64), reference).passed is True
    assert judge(reference.conj().to(torch.complex64), reference).passed is False


def test_a_float64_result_is_held_to_the_formula():
    reference = drawn(0, (50,))
    assert judge(reference * (1 + 1e-12), reference).passed is True
    assert judge(reference * (1 + 1e-9), reference).passed is False


def test_a_result_cast_up_is_judged_in_the_type_it_was_computed_in():
    """bf16 language models return float32 logits; in float32 ulp native torch would be poor."""
    reference = drawn(0, (50,))
    native = reference.bfloat16().float()
    other = (reference * (1 + 2**-9)).bfloat16().float()
    assert judge(other, reference, native).passed is None
    verdict = judge(other, reference, native, precision=torch.bfloat16)
    assert verdict.passed is True and verdict.ulps < 8
    wrong = judge(reference.float() * 1.2, reference, native, precision=torch.bfloat16)
    assert wrong.passed is False
    same = judge(native.bfloat16(), reference, precision=torch.float32)
    assert same == judge(native.bfloat16(), reference), "a finer precision changes nothing"


def test_a_fixed_tolerance_is_wrong_both_ways():
    """A fault of 2^-10 is far below an absolute 5e-3, and the rounding of large logits above it."""
    small = drawn(0, (100,), 1e-2)
    assert float((small * 2**-10).abs().max()) < 5e-3
    assert judge((small * (1 + 2**-10)).float(), small).passed is False
    large = drawn(1, (100,), 3e5)
    rounded = large.float()
    assert float((rounded.double() - large).abs().max()) > 5e-3
    assert judge(rounded, large).passed is True


def test_bits_tell_signed_zeros_apart_and_nan_from_nothing():
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([math.nan]), torch.tensor([math.nan]))
    assert not same_bits(torch.tensor([1.0]), torch.tensor([1.0]).half())
    assert unchanged(torch.tensor([1.0]), torch.tensor([2.0])) is None
    assert unchanged(torch.zeros(0), torch.zeros(0)) is None
    found = unchanged(torch.tensor([1.0]), torch.tensor([1.0]))
    assert found is not None and found.passed is True


@given(value=st.floats(1e-30, 1e30), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_ulp_is_the_distance_to_the_next_number(value, dtype):
    here = torch.tensor(value, dtype=dtype)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    following = (here.view(bits) + 1).view(dtype)
    assert float(following.double() - here.double()) == ulp(float(here), dtype)


def test_a_verdict_is_text_for_people_and_plain_values_for_json():
    reference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    verdict = judge(torch.tensor([1.0, 2.5]), reference)
    assert verdict.worst == (1,) and verdict.worst_candidate == 2.5
    assert "2.5" in str(verdict) and "failed" in str(verdict)
    json.dumps(verdict.__dict__)
    assert "shape" in str(Verdict(False, "shape (1,) instead of (2,)"))
