"""oneDNN's products wherever they may be chosen: within the error rule, and chosen only where measured faster."""

from __future__ import annotations

import weakref

import pytest
import torch
from cases import CASES, call
from errors import assert_within_rule

import fastlm
import fastlm.functional as F
from fastlm.ops import measured, onednn

pytestmark = pytest.mark.skipif(bool(onednn.missing()), reason=onednn.missing())
NAMES = [str(case) for case in CASES if case.op in ("linear", "linear_cross_entropy") and torch.float32 in case.only]


@pytest.mark.parametrize("name", NAMES)
def test_with_it_values_and_gradients_are_within_the_error_rule(name, monkeypatch):
    def faster(rows, weight):
        return rows > 0 and weight.numel() > 0 and weight.dtype == torch.float32

    monkeypatch.setattr(onednn, "faster", faster)
    expected = call(name, torch.float32, "cpu")
    outputs, gradients = expected.ours()
    for ours, torchs, exact in zip(outputs, expected.torch_outputs, expected.outputs, strict=True):
        assert_within_rule(ours, torchs, exact, "output")
    for argument, exact in expected.gradients.items():
        assert_within_rule(gradients[argument], expected.torch_gradients[argument], exact, f"gradient of {argument}")


def test_linear_cross_entropy_takes_it_and_holds_one_chunk_of_logits_at_a_time(monkeypatch):
    monkeypatch.setattr(onednn, "faster", lambda rows, weight: True)
    formed, product = [], onednn.product

    def counted(x, y, bias=None):
        if len(y) == 3000:
            assert all(chunk() is None for chunk in formed), "logits of an earlier chunk are still there"
        out = product(x, y, bias)
        if len(y) == 3000:
            formed.append(weakref.ref(out))
        return out

    monkeypatch.setattr(onednn, "product", counted)
    x, weight = torch.randn(1024, 8, requires_grad=True), torch.randn(3000, 8, requires_grad=True)
    for options in ({}, {"recompute": True}, {"reduction": "none"}):
        formed.clear()
        F.linear_cross_entropy(x, weight, torch.randint(3000, (1024,)), **options).sum().backward()
        assert len(formed) >= 4


@pytest.fixture
def table(monkeypatch):
    entry = {"linear of many rows": {"float32": ["onednn", 1 << 16]}}
    monkeypatch.setitem(measured.TABLE, "a processor", entry)
    monkeypatch.setattr(measured, "device_class", lambda device: "a processor")
    measured._entry.cache_clear()
    yield
    measured._entry.cache_clear()


def test_auto_takes_it_for_many_rows_of_a_large_weight_in_fp32_and_nothing_else(table):
    x, large, small = torch.randn(onednn.MANY_ROWS.start, 256), torch.randn(512, 256), torch.randn(8, 256)
    assert fastlm.explain(F.linear, x, large).backend == "onednn"
    assert fastlm.explain(F.linear, x, small).backend == "native"
    assert fastlm.explain(F.linear, x[1:], large).backend == "native"
    assert fastlm.explain(F.linear, torch.randn(onednn.MANY_ROWS.stop, 256), large).backend == "native"
    assert fastlm.explain(F.linear, x.bfloat16(), large.bfloat16()).backend == "native"
    assert fastlm.explain(F.linear, x.double(), large.double()).backend == "native"
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, large).dtype == torch.bfloat16
    weight = large.clone().requires_grad_()
    assert "linear" in type(F.linear(x, weight).grad_fn).__name__.lower()
    F.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand_as(weight), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(lambda x, w: F.linear(x, w).sum(), fullgraph=True)
    torch.testing.assert_close(compiled(x, large), (x @ large.T).sum(), rtol=1e-4, atol=1e-2)
