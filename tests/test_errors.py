"""The error rule itself: what it lets pass, and what it must not."""

import math

import pytest
import torch
from errors import allowed_error, assert_within_rule

EXACT = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
TORCHS = EXACT.float() + torch.tensor([0.0, 1e-3, 0.0])


def test_twice_the_error_of_torch_passes_and_more_does_not():
    assert allowed_error(TORCHS, EXACT) == pytest.approx(2e-3, rel=1e-2)
    assert_within_rule(EXACT.float() + torch.tensor([1.9e-3, 0.0, 0.0]), TORCHS, EXACT)
    with pytest.raises(AssertionError, match=r"grad: off by 2\.1\d*e-03 where 2\.0"):
        assert_within_rule(EXACT.float() + torch.tensor([2.1e-3, 0.0, 0.0]), TORCHS, EXACT, "grad")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_where_torch_is_exact_four_ulp_of_the_largest_value_pass_and_more_do_not(dtype):
    exact = EXACT.to(dtype)
    ulp = torch.finfo(dtype).eps * 4.0
    assert_within_rule(exact - torch.tensor([0.0, 0.0, 4 * ulp]).to(dtype), exact, EXACT)
    with pytest.raises(AssertionError, match="off by"):
        assert_within_rule(exact - torch.tensor([0.0, 0.0, 5 * ulp]).to(dtype), exact, EXACT)


def test_only_finite_elements_set_the_scale():
    exact = torch.tensor([1.0, math.inf, math.nan], dtype=torch.float64)
    assert allowed_error(exact.float(), exact) == 4 * torch.finfo(torch.float32).eps
    assert allowed_error(exact[1:].float(), exact[1:]) == 0.0


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("right", [2.0, math.inf, -math.inf, math.nan])
def test_infinities_and_nans_must_be_where_torch_and_the_exact_value_have_them(wrong, right):
    exact = torch.tensor([1.0, right], dtype=torch.float64)
    assert_within_rule(exact.float(), exact.float(), exact)
    if wrong == right or (math.isnan(wrong) and math.isnan(right)):
        return
    with pytest.raises(AssertionError, match=r"is(nan|posinf|neginf) is|off by"):
        assert_within_rule(torch.tensor([1.0, wrong]), exact.float(), exact)


def test_a_finite_value_where_infinity_is_due_fails():
    exact = torch.tensor([1.0, math.inf], dtype=torch.float64)
    with pytest.raises(AssertionError, match="isposinf is 0 elements, 1 in the exact value"):
        assert_within_rule(torch.tensor([1.0, 3e38]), exact.float(), exact)


def test_an_overflow_of_torch_may_be_shared_or_avoided():
    exact = torch.tensor([1.0, 1e39], dtype=torch.float64)
    torchs = torch.tensor([1.0, math.inf])
    assert_within_rule(torchs, torchs, exact)
    assert_within_rule(torch.tensor([1.0, 3e38]), torchs, exact)


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (EXACT.float()[:2], "ours.shape"),
        (EXACT.float()[None], "ours.shape"),
        (EXACT, "torch gives torch.float32, got torch.float64"),
        (EXACT.bfloat16(), "torch gives torch.float32, got torch.bfloat16"),
        (EXACT.float().to("meta"), "torch gives cpu, got meta"),
    ],
)
def test_shape_dtype_and_device_must_be_those_of_torch(ours, message):
    with pytest.raises(AssertionError, match=message):
        assert_within_rule(ours, EXACT.float(), EXACT)


def test_an_exact_value_that_is_not_float64_is_refused():
    with pytest.raises(AssertionError, match="must be float64"):
        assert_within_rule(EXACT.float(), EXACT.float(), EXACT.float())


def test_empty_tensors_pass():
    assert_within_rule(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.float64))
