"""Every op on every backend: values, gradients and dtypes within the error rule, over hostile inputs."""

import pytest
import torch
from cases import CASES, backends_of, call, device_of, serves_here
from errors import assert_within_rule

import fastlm
import fastlm.functional as F


def backends_for(case, dtype):
    """Every backend in fp32; the choice does not depend on the dtype, and fp16 goes where bf16 goes in every layout."""
    if dtype == torch.float16 and (case.layouts or case.far):
        return []
    return [name for name in backends_of(case.op) if name != "auto" or dtype == torch.float32]


RUNS = [
    pytest.param(str(case), dtype, backend, id=f"{case}-{str(dtype).removeprefix('torch.')}-{backend}")
    for case in CASES
    for dtype in case.only
    for backend in backends_for(case, dtype)
]


@pytest.mark.parametrize(("name", "dtype", "backend"), RUNS)
def test_values_and_gradients_are_within_the_error_rule(name, dtype, backend):
    op = name.partition("-")[0]
    expected = call(name, dtype, device_of(op, backend))
    with fastlm.use_backend(backend):
        if not serves_here(getattr(F, op), **expected.leaves(expected.arguments), **expected.case.options):
            return
        outputs, gradients = expected.ours()
    assert len(outputs) == len(expected.outputs)
    for n, (ours, torchs, exact) in enumerate(zip(outputs, expected.torch_outputs, expected.outputs, strict=True)):
        assert_within_rule(ours, torchs, exact, f"output {n}")
        assert ours.requires_grad == torchs.requires_grad, f"output {n}: requires_grad"
    for argument, exact in expected.gradients.items():
        assert_within_rule(gradients[argument], expected.torch_gradients[argument], exact, f"gradient of {argument}")
