"""Calls that must be refused, with torch's exception type where torch has the op and a text that names the argument."""

import inspect
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as T

import fastlm
import fastlm.functional as F

ROWS, CLASSES = 4, 8
X, W = torch.ones(ROWS, CLASSES), torch.ones(CLASSES)
TARGET, QUERY = torch.zeros(ROWS, dtype=torch.int64), torch.ones(2, 2, 5, 8)
ENDS = torch.tensor([0, 2, 5], dtype=torch.int32)

GOOD: dict[str, dict[str, Any]] = {
    "layer_norm": {"input": X, "normalized_shape": (8,), "weight": W, "bias": W},
    "rms_norm": {"input": X, "normalized_shape": (8,), "weight": W},
    "add_layer_norm": {"input": X, "residual": X, "normalized_shape": (8,), "weight": W, "bias": W},
    "add_rms_norm": {"input": X, "residual": X, "normalized_shape": (8,), "weight": W},
    "cross_entropy": {"input": X, "target": TARGET},
    "linear_cross_entropy": {"input": torch.ones(ROWS, 6), "linear_weight": torch.ones(8, 6), "target": TARGET},
    "linear": {"input": X, "weight": torch.ones(3, 8), "bias": torch.ones(3)},
    "scaled_dot_product_attention": {"query": QUERY, "key": QUERY, "value": QUERY},
    "varlen_attention": {
        "query": torch.ones(5, 2, 8),
        "key": torch.ones(5, 2, 8),
        "value": torch.ones(5, 2, 8),
        "cu_seqlens_q": ENDS,
        "cu_seqlens_k": ENDS,
        "max_seqlen_q": 3,
        "max_seqlen_k": 3,
    },
}
OURS_ALONE = {"dropout_p", "z_loss", "softcap", "window", "alibi_slopes", "key_lengths", "return_lse", "weight_scale"}


class Bad(NamedTuple):
    """A good call with some arguments changed; `silent` where torch takes it without a word."""

    op: str
    change: dict[str, Any]
    error: type[Exception]
    words: str
    silent: bool = False

    def __str__(self) -> str:
        def shown(value: Any) -> str:
            if isinstance(value, torch.Tensor):
                return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{value.device.type}"
            return repr(value)

        return f"{self.op}-{'-'.join(f'{name}={shown(value)}' for name, value in self.change.items())}"


def _norms() -> list[Bad]:
    rows = []
    for op in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"):
        added = op.startswith("add")
        shape_error = ValueError if added else RuntimeError
        long_error = ValueError if added or op == "rms_norm" else RuntimeError
        kind_error = TypeError if added else NotImplementedError
        bare = dict.fromkeys(("weight", "bias")[: 1 + ("layer" in op)])

        def bad(change, error, words, silent=False, op=op):
            rows.append(Bad(op, change, error, words, silent))

        for shape in ((7,), ()):
            bad({"normalized_shape": shape}, shape_error, "normalized_shape must be")
        for shape in ((2, 4, 8), (4, 4, 8)):
            bad(bare | {"normalized_shape": shape}, long_error, "normalized_shape must be")
        for shape in (8, (8.0,), [True], ["8"], "8", None, torch.tensor([8])):
            bad({"normalized_shape": shape}, TypeError, "normalized_shape")
        scalars = dict.fromkeys(("input", "residual")[: 1 + added], torch.tensor(1.0))
        bad(bare | scalars | {"normalized_shape": (1,)}, long_error, "normalized_shape must be")
        for name in ("weight", "bias")[: 1 + ("layer" in op)]:
            for value in (torch.ones(7), torch.ones(1, 8), torch.ones(8, device="meta")):
                bad({name: value}, shape_error, f"{name} must")
            for value in ([1.0] * 8, 1.0):
                bad({name: value}, TypeError, f"{name} must be a Tensor")
            bad({name: W.long()}, shape_error, f"{name} must be", "rms" in op)
            if "layer" in op:
                bad({name: W.double()}, shape_error, f"{name} must be")
                bad({name: W.half()}, shape_error, f"{name} must be")
        for name in ("input", "residual")[: 1 + added]:
            for value in (None, X.tolist(), 1.0):
                bad({name: value}, TypeError, f"{name} must be a Tensor")
            bad(bare | {name: X.long()}, kind_error, f"{name} must be floating point")
            bad(bare | {name: X.bool()}, kind_error, f"{name} must be floating point")
            bad(bare | {name: X.cfloat()}, kind_error, f"{name} must be floating point", "rms" in op)
        for eps in ("1e-5", [1e-5], *(() if "rms" in op else (None,))):
            bad({"eps": eps}, TypeError, "eps must be a number")
        if added:
            bad({"residual": torch.ones(3, 8)}, ValueError, "input and residual must broadcast")
            bad({"residual": X.to("meta")}, ValueError, "residual must be on")
            for p in (-0.1, 1.5, math.nan, math.inf):
                bad({"dropout_p": p}, ValueError, "dropout_p must be between 0 and 1")
            for p in ("0.1", None, [0.1]):
                bad({"dropout_p": p}, TypeError, "dropout_p must be a number")
    return rows


def _losses() -> list[Bad]:
    rows = []
    for op in ("cross_entropy", "linear_cross_entropy"):
        logits = "input" if op == "cross_entropy" else None

        def bad(change, error, words, silent=False, op=op):
            rows.append(Bad(op, change, error, words, silent))

        for value in (TARGET[:3], torch.tensor(0), torch.zeros(3, 8)):
            bad({"target": value}, ValueError, "target must have shape")
        for dtype in (torch.float32, torch.int32, torch.bool):
            bad({"target": TARGET.to(dtype)}, RuntimeError, "target must be int64 or uint8")
        bad({"target": torch.zeros(4, 7)}, RuntimeError, "target must have shape")
        bad({"target": torch.zeros(4, 8, dtype=torch.int64)}, RuntimeError, "target with the shape of the logits must")
        bad({"target": torch.zeros(4, 1, dtype=torch.int64)}, RuntimeError, "target must have shape")
        for value in (TARGET.tolist(), None, 0):
            bad({"target": value}, TypeError, "target must be a Tensor")
        bad({"target": TARGET.to("meta")}, RuntimeError, "target must be on cpu")
        for value in (8, -1, 2**40, -101):
            bad({"target": torch.full((4,), value)}, IndexError, "")
        bad({"target": torch.tensor([0, 1, 2, 8]), "reduction": "none"}, IndexError, "")
        bad({"target": torch.tensor([0, -100, 2, 8]), "ignore_index": 3}, IndexError, "")
        for value in ("avg", None, 1, "Mean"):
            bad({"reduction": value}, ValueError, "reduction must be")
        bad({"label_smoothing": 1.5}, RuntimeError, "label_smoothing must be between 0")
        bad({"label_smoothing": -0.1}, RuntimeError, "label_smoothing must be between 0", True)
        bad({"label_smoothing": math.nan}, RuntimeError, "label_smoothing must be between 0", True)
        for value in ("0.1", None):
            bad({"label_smoothing": value}, TypeError, "label_smoothing must be a number")
        for value in ("0", 1.5, True, *((None,) if op == "cross_entropy" else ())):
            bad({"ignore_index": value}, TypeError, "ignore_index must be an int")
        bad({"target": torch.ones(4, 8), "ignore_index": 1}, RuntimeError, "ignore_index must not be given")
        for value in (torch.ones(7), torch.ones(8, 1), torch.ones(1)):
            bad({"weight": value}, RuntimeError, "weight must have shape (8,)")
        bad({"weight": W.double()}, RuntimeError, "weight must be torch.float32")
        bad({"weight": W.long()}, RuntimeError, "weight must be torch.float32")
        bad({"weight": W.to("meta")}, RuntimeError, "weight must be on cpu")
        bad({"weight": [1.0] * 8}, TypeError, "weight must be a Tensor")
        bad({"weight": W.clone().requires_grad_()}, RuntimeError, "weight must not require a gradient")
        for name in ("z_loss", "softcap"):
            for value in (-0.1, math.nan, math.inf):
                bad({name: value}, ValueError, f"{name} must be")
            for value in ("1", None, [1.0]):
                bad({name: value}, TypeError, f"{name} must be a number")
        if logits:
            for value in (X.tolist(), None):
                bad({"input": value}, TypeError, "input must be a Tensor")
            bad({"input": X.long()}, NotImplementedError, "input must be floating point")
            bad({"input": X.cfloat()}, NotImplementedError, "input must be floating point")
            bad({"input": torch.tensor(1.0), "target": torch.tensor(0)}, RuntimeError, "input must have")
            bad({"input": X[0]}, ValueError, "target must have shape")
            deep = torch.ones(4, 8, 3)
            for value in (TARGET, torch.zeros(4, 2).long(), torch.zeros(4, 1, 3).long()):
                bad({"input": deep, "target": value}, RuntimeError, "target must have shape (4, 3)")
            bad({"input": deep, "target": torch.zeros(3, 3).long()}, ValueError, "target must have shape (4, 3)")
            bad({"input": torch.ones(4, 0)}, IndexError, "")
    x, w = GOOD["linear_cross_entropy"]["input"], GOOD["linear_cross_entropy"]["linear_weight"]
    linear = [
        ({"linear_weight": w[:, :5]}, RuntimeError, "linear_weight must have shape"),
        ({"linear_weight": w[0]}, RuntimeError, "linear_weight must have shape"),
        ({"linear_weight": w.double()}, RuntimeError, "linear_weight must be torch.float32"),
        ({"linear_weight": w.to("meta")}, RuntimeError, "linear_weight must be on cpu", True),
        ({"linear_bias": torch.ones(7)}, RuntimeError, "linear_bias must have shape (8,)"),
        ({"linear_bias": torch.ones(1)}, RuntimeError, "linear_bias must have shape (8,)"),
        ({"linear_bias": torch.ones(1, 8)}, RuntimeError, "linear_bias must have shape (8,)"),
        ({"linear_bias": W.double()}, RuntimeError, "linear_bias must be torch.float32"),
        ({"linear_bias": W.to("meta")}, RuntimeError, "linear_bias must be on cpu"),
        ({"input": torch.ones(2, 4, 6)}, RuntimeError, "input must have 1 or 2 dimensions"),
        ({"input": torch.tensor(1.0)}, RuntimeError, "input must have 1 or 2 dimensions"),
        ({"input": x[0], "linear_weight": torch.ones(8, 3, 6)}, RuntimeError, "input must have 2 dimensions"),
        ({"input": x.long(), "linear_weight": w.long()}, NotImplementedError, "input must be floating point"),
    ]
    rows += [Bad("linear_cross_entropy", *row) for row in linear]
    for name in ("input", "linear_weight"):
        rows += [Bad("linear_cross_entropy", {name: value}, TypeError, f"{name} must be a Tensor") for value in ([], 1)]
    rows.append(Bad("linear_cross_entropy", {"linear_bias": 0.0}, TypeError, "linear_bias must be a Tensor"))
    return rows


def _linear() -> list[Bad]:
    w, int8, scale = torch.ones(3, 8), torch.ones(3, 8, dtype=torch.int8), torch.ones(3)
    rows = [
        ({"input": torch.ones(4, 7)}, RuntimeError, "input must be (*, in_features)"),
        ({"input": torch.tensor(1.0)}, RuntimeError, "input must be (*, in_features)"),
        ({"weight": w[:, :5]}, RuntimeError, "input must be (*, in_features)"),
        ({"weight": w.double()}, RuntimeError, "weight must be torch.float32"),
        ({"weight": int8}, RuntimeError, "weight must be torch.float32"),
        ({"weight": w.to("meta")}, RuntimeError, "weight must be on cpu", True),
        ({"bias": scale.half()}, RuntimeError, "bias must be torch.float32"),
        ({"bias": scale.to("meta")}, RuntimeError, "bias must be on cpu"),
        ({"bias": 1.0}, TypeError, "bias must be a Tensor"),
        ({"weight_scale": scale}, RuntimeError, "weight must be int8"),
        ({"weight": int8[0], "weight_scale": scale}, RuntimeError, "weight must be int8"),
        ({"weight": int8, "weight_scale": 1.0}, TypeError, "weight_scale must be a Tensor"),
        ({"weight": int8, "weight_scale": scale.double()}, RuntimeError, "weight_scale must be torch.float32"),
        ({"weight": int8, "weight_scale": scale[:2]}, RuntimeError, "weight_scale must be torch.float32 of shape (3,)"),
        ({"weight": int8, "weight_scale": scale.to("meta")}, RuntimeError, "weight_scale must be on cpu"),
        ({"weight": int8, "weight_scale": scale, "input": X.long()}, RuntimeError, "an input that is floating point"),
        ({"weight": int8, "weight_scale": scale, "bias": scale.half()}, RuntimeError, "bias must be torch.float32"),
    ]
    rows += [
        ({name: value}, TypeError, f"{name} must be a Tensor") for name in ("input", "weight") for value in ([], 1)
    ]
    return [Bad("linear", *row) for row in rows]


def _attention() -> list[Bad]:
    rows = []
    for op in ("scaled_dot_product_attention", "varlen_attention"):
        dense = op.startswith("scaled")
        error, good = (RuntimeError if dense else ValueError), GOOD[op]

        def bad(change, error, words, silent=False, op=op):
            rows.append(Bad(op, change, error, words, silent))

        for name in ("query", "key", "value"):
            x = good[name]
            for value in (None, x.tolist(), 1.0):
                bad({name: value}, TypeError, f"{name} must be a Tensor")
            if name != "query":
                bad({name: x.double()}, error, f"{name} must be torch.float32")
                bad({name: x.to("meta")}, error, f"{name} must be on cpu")
        bad({name: good[name].long() for name in ("query", "key", "value")}, error, "must be floating point")
        bad({"key": good["key"][..., :7]}, error, "key must have head dimension 8")
        bad({"value": torch.ones(2, 2, 7, 8) if dense else torch.ones(7, 2, 8)}, error, "value must have", dense)
        bad({"dropout_p": 1.5}, error, "dropout_p must be between 0 and 1")
        bad({"dropout_p": -0.1}, error, "dropout_p must be between 0 and 1")
        bad({"dropout_p": math.nan}, error, "dropout_p must be between 0 and 1")
        for value in ("0.1", None):
            bad({"dropout_p": value}, TypeError, "dropout_p must be a number")
        for value in (1, 0, None, "True"):
            bad({"is_causal": value}, TypeError, "is_causal must be a bool")
        for value in ("0.5", [0.5]):
            bad({"scale": value}, TypeError, "scale must be a number")
        for value in (-0.1, math.nan, math.inf):
            bad({"softcap": value}, ValueError, "softcap must be")
        for value in ("1", None, [1.0]):
            bad({"softcap": value}, TypeError, "softcap must be a number")
        for value in (1, 2.0):
            bad({"window": value}, TypeError, "window")
        for value in ((1,), (1, 2, 3), (-2, 0), (0, -5)):
            bad({"window": value}, ValueError, "window")
        for value in ((1.0, 2), ("1", 2), (None, 1), (True, 1), "ab"):
            bad({"window": value}, (TypeError, ValueError), "window")
        for value in ([0.5, 0.5], 0.5):
            bad({"alibi_slopes": value}, TypeError, "alibi_slopes must be a Tensor")
        for value in (torch.ones(3), torch.ones(3, 2), torch.ones(2, 3), torch.ones(()), torch.ones(2).long()):
            bad({"alibi_slopes": value}, ValueError, "alibi_slopes must be floating point of shape")
        bad({"alibi_slopes": torch.ones(2, device="meta")}, ValueError, "alibi_slopes must be on cpu")

    def dense_bad(change, error, words, silent=False):
        rows.append(Bad("scaled_dot_product_attention", change, error, words, silent))

    def packed_bad(change, error, words):
        rows.append(Bad("varlen_attention", change, error, words))

    heads = {"query": torch.ones(2, 3, 5, 8)}
    dense_bad({"query": QUERY[0, 0, 0]}, RuntimeError, "query must have at least 2 dimensions")
    dense_bad(heads, RuntimeError, "key")
    dense_bad({"query": torch.ones(3, 2, 5, 8)}, RuntimeError, "key")
    dense_bad(heads | {"enable_gqa": True}, RuntimeError, "key must have a number of heads that divides query's")
    flat = dict.fromkeys(("query", "key", "value"), QUERY[0, 0])
    dense_bad(flat | {"enable_gqa": True}, IndexError, "enable_gqa")
    for mask in (torch.ones(5, 4), torch.ones(4, 5).bool(), torch.ones(3, 1, 5, 5), torch.ones(2, 2, 2, 5, 5)):
        dense_bad({"attn_mask": mask}, RuntimeError, "attn_mask must broadcast")
    for mask in (torch.ones(5, 5).long(), torch.ones(5, 5).half()):
        dense_bad({"attn_mask": mask}, RuntimeError, "attn_mask must be bool, float32 or")
    dense_bad({"attn_mask": torch.ones(5)}, IndexError, "attn_mask must have at least 2 dimensions")
    dense_bad({"attn_mask": torch.ones(5, 5, device="meta")}, RuntimeError, "attn_mask must be on cpu", True)
    for mask in ([1.0], 1.0, True):
        dense_bad({"attn_mask": mask}, TypeError, "attn_mask must be a Tensor")
    for value in ("yes", None, 1):
        dense_bad({"enable_gqa": value}, TypeError, "enable_gqa must be a bool")
    for value in ([5, 5], 5):
        dense_bad({"key_lengths": value}, TypeError, "key_lengths must be a Tensor")
    for value in (
        torch.tensor([5.0, 5.0]),
        torch.tensor([5]).int(),
        torch.tensor([[5, 5]]).int(),
        torch.tensor(5).int(),
    ):
        dense_bad({"key_lengths": value}, ValueError, "key_lengths must be int32 of shape (2,)")
    for value in ([6, 5], [5, -1]):
        dense_bad({"key_lengths": torch.tensor(value).int()}, ValueError, "key_lengths must be")
    dense_bad({"key_lengths": ENDS[:2].to("meta")}, ValueError, "key_lengths must be on cpu")
    for name, value in (("alibi_slopes", torch.ones(2)), ("key_lengths", ENDS[:2]), ("return_lse", True)):
        dense_bad(flat | {name: value}, ValueError, f"{name} needs query of shape (B, H, T, D)")

    for name in ("query", "key", "value"):
        packed_bad({name: torch.ones(5, 8)}, ValueError, f"{name} must have shape (total, H, D)")
    packed_bad({"query": torch.ones(5, 3, 8)}, ValueError, "number of heads")
    for side in ("q", "k"):
        name = f"cu_seqlens_{side}"
        for value in (ENDS.long(), ENDS.float(), ENDS[None], ENDS[:0]):
            packed_bad({name: value}, ValueError, f"{name} must be int32 of shape (B + 1,)")
        for value in ([1, 2, 5], [0, 2, 4], [0, 2, 6], [0, 6, 5], [0, -1, 5]):
            packed_bad({name: torch.tensor(value).int()}, ValueError, f"{name} must rise from 0 to 5")
        packed_bad({name: ENDS[[0, 2]]}, ValueError, "must have one length")
        packed_bad({name: ENDS.tolist()}, TypeError, f"{name} must be a Tensor")
        packed_bad({name: ENDS.to("meta")}, ValueError, f"{name} must be on cpu")
        for value in (2, 0, -1):
            packed_bad({f"max_seqlen_{side}": value}, ValueError, f"max_seqlen_{side} must be at least")
        for value in (3.0, "3", None, True, torch.tensor(3.5)):
            packed_bad({f"max_seqlen_{side}": value}, TypeError, f"max_seqlen_{side} must be an int")
    return rows


BAD = [*_norms(), *_losses(), *_linear(), *_attention()]


@pytest.mark.parametrize("op", GOOD)
@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_the_call_that_the_bad_ones_start_from_is_good(op, backend):
    with fastlm.use_backend(backend):
        result = getattr(F, op)(**GOOD[op])
    assert all(x.isfinite().all() for x in (result if isinstance(result, tuple) else (result,)))


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_call_is_refused_by_op_and_argument(bad):
    for backend in ("auto", "native", "reference"):
        with fastlm.use_backend(backend), pytest.raises(bad.error) as raised:
            getattr(F, bad.op)(**(GOOD[bad.op] | bad.change))
        assert not isinstance(raised.value, fastlm.BackendError)
        if bad.words:
            assert str(raised.value).startswith(f"{bad.op}: ")
            assert bad.words in str(raised.value)


IN_TORCH = [bad for bad in BAD if hasattr(T, bad.op) and not (bad.change.keys() & (OURS_ALONE - {"dropout_p"}))]


@pytest.mark.parametrize("bad", IN_TORCH, ids=str)
def test_a_bad_call_raises_what_torch_raises(bad):
    arguments = GOOD[bad.op] | bad.change
    if bad.silent:
        getattr(T, bad.op)(**arguments)  # torch takes it, and computes something
        return
    with pytest.raises((bad.error, AttributeError)) as raised:
        getattr(T, bad.op)(**arguments)
    stumbled = type(raised.value) is AttributeError  # over something that is not a tensor
    assert (TypeError if stumbled else type(raised.value)) is bad.error


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("value", [8, -1])
def test_our_own_text_for_a_target_out_of_range_names_it(op, value):
    with fastlm.use_backend("reference"), pytest.raises(IndexError) as raised:
        getattr(F, op)(**(GOOD[op] | {"target": torch.tensor([0, value, 1, 2])}))
    assert str(raised.value) == f"{op}: target must be in [0, 8) or ignore_index -100, got {value}"


NUMBERS = {"eps", "z_loss", "label_smoothing", "softcap", "scale", "dropout_p"}
INTEGERS = {"ignore_index", "max_seqlen_q", "max_seqlen_k"}


@pytest.mark.parametrize("op", [op for op in GOOD if op != "linear"])
def test_numbers_may_be_of_pythons_or_of_numpys_kinds(op):
    parameters = inspect.signature(getattr(F, op)).parameters
    kinds = [(name, (1, 0.5, np.float32(0.5), np.float64(0.5))) for name in NUMBERS & parameters.keys()]
    kinds += [(name, (5, np.int64(5), np.int32(5))) for name in INTEGERS & parameters.keys()]
    assert kinds
    for name, values in kinds:
        for value in values:
            result = getattr(F, op)(**(GOOD[op] | {name: value}))
            assert isinstance(result[0] if isinstance(result, tuple) else result, torch.Tensor)
