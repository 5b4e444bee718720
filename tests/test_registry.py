"""Choosing a backend: use_backend, FASTLM_BACKEND, third-party backends, explain, and the errors of all of them."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import typing
from pathlib import Path

import pytest
import torch
from cases import serves_here
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
import fastlm.functional as F
from fastlm.ops import measured
from fastlm.ops.registry import KNOWN_NAMES, OPS, preference

X = torch.linspace(-1, 2, 24).reshape(3, 8)


def chosen(**options):
    return fastlm.explain(F.layer_norm, X, (8,), **options).backend


def watched(name, log, **fields):
    """The reference's layer norm under another name; says when it runs."""
    record = OPS["layer_norm"].backends["reference"]

    def fwd(*args):
        log.append(f"{name} forward")
        return record.fwd(*args)

    def bwd(*args):
        log.append(f"{name} backward")
        return record.bwd(*args)

    return fastlm.Backend(name, fwd=fwd, bwd=bwd, **fields)


class Dispatched(TorchDispatchMode):
    """Names of the ops that went through torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.fixture
def log():
    """What the backends "first" and "second" of layer_norm have run."""
    runs = []
    for name in ("first", "second"):
        fastlm.register_backend("layer_norm", watched(name, runs))
    return runs


# use_backend --------------------------------------------------------------------------------------------------------


def test_use_backend_alone_sets_the_whole_process_and_the_latest_wins():
    assert preference() == ("auto",)
    fastlm.use_backend("reference")
    assert (chosen(), preference()) == ("reference", ("reference",))
    fastlm.use_backend("native")
    assert chosen() == "native"
    fastlm.use_backend("auto")
    assert preference() == ("auto",)


def test_use_backend_as_a_context_ends_with_the_block():
    with fastlm.use_backend("reference"):
        assert chosen() == "reference"
        with fastlm.use_backend("native"):
            assert chosen() == "native"
        assert chosen() == "reference"
    assert preference() == ("auto",)


def test_use_backend_as_a_context_ends_with_an_exception_and_lets_it_through():
    with pytest.raises(KeyError, match="mine"), fastlm.use_backend("reference"):
        raise KeyError("mine")
    assert preference() == ("auto",)


def test_one_use_backend_object_may_be_entered_again_and_within_itself():
    reference, native = fastlm.use_backend("reference"), fastlm.use_backend("native")
    for _ in range(2):
        with reference:
            with native, reference:
                assert chosen() == "reference"
            assert chosen() == "reference"
            with native:
                assert chosen() == "native"
            assert chosen() == "reference"
    assert preference() == ("auto",)


def test_use_backend_as_a_decorator_holds_during_each_call():
    @fastlm.use_backend("reference")
    def name(depth=0):
        """Its text."""
        if depth:
            with fastlm.use_backend("native"):
                return [chosen(), *name(depth - 1), chosen()]
        return [chosen()]

    assert preference() == ("auto",)
    assert name() == ["reference"]
    assert name(1) == ["native", "reference", "native"]
    assert (name.__name__, name.__doc__, preference()) == ("name", "Its text.", ("auto",))


def test_use_backend_as_a_decorator_ends_with_an_exception():
    @fastlm.use_backend("reference")
    def fails():
        raise KeyError(chosen())

    with pytest.raises(KeyError, match="reference"):
        fails()
    assert preference() == ("auto",)


def test_a_setting_inside_a_context_holds_when_the_context_is_over():
    with fastlm.use_backend("native"):
        fastlm.use_backend("reference")
        assert chosen() == "native"
    assert chosen() == "reference"


def test_a_context_inside_a_setting_returns_to_it():
    fastlm.use_backend("reference")
    with fastlm.use_backend("native"):
        assert chosen() == "native"
    assert chosen() == "reference"

    @fastlm.use_backend("native")
    def name():
        return chosen()

    assert (name(), chosen()) == ("native", "reference")


def test_any_number_of_contexts_and_settings_keeps_the_latest():
    fastlm.use_backend("reference")
    for _ in range(200):
        with fastlm.use_backend("native"):
            pass
    assert chosen() == "reference"
    for _ in range(200):
        fastlm.use_backend("native")
    fastlm.use_backend("reference")
    assert chosen() == "reference"


def in_thread(function):
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def test_a_context_of_one_thread_is_not_seen_by_another():
    with fastlm.use_backend("reference"):
        assert in_thread(chosen) == "native"
        assert chosen() == "reference"


def test_a_setting_is_seen_by_every_thread_and_may_come_from_any():
    fastlm.use_backend("reference")
    assert in_thread(chosen) == "reference"
    in_thread(lambda: fastlm.use_backend("native"))
    assert chosen() == "native"


def test_many_contexts_at_once_each_keep_to_their_thread(log):
    names = ["first", "second", "native", "reference"] * 3
    barrier, wrong = threading.Barrier(len(names)), []

    def work(name):
        barrier.wait()
        for _ in range(50):
            with fastlm.use_backend(name):
                if chosen() != name:
                    wrong.append((name, chosen()))
            if preference() != ("auto",):
                wrong.append((name, preference()))

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert preference() == ("auto",)


def test_backward_in_another_thread_runs_where_forward_ran(log):
    x = X.clone().requires_grad_()
    with fastlm.use_backend("first"):
        y = F.layer_norm(x, (8,))
    in_thread(lambda: y.sum().backward())
    assert log == ["first forward", "first backward"]


@pytest.mark.parametrize("name", ["nonsense", "reference,nonsense", "reference,", "", "Reference"])
def test_an_unknown_name_is_refused_at_once_and_changes_nothing(name):
    with pytest.raises(ValueError, match="use_backend: unknown backend") as raised:
        fastlm.use_backend(name)
    for known in KNOWN_NAMES:
        assert known in str(raised.value)
    assert preference() == ("auto",)


@pytest.mark.parametrize("name", [None, 3, ["reference"], b"reference"])
def test_a_name_that_is_not_a_string_is_a_type_error(name):
    with pytest.raises(TypeError, match="use_backend: name must be a string"):
        fastlm.use_backend(name)


def test_names_of_registered_backends_are_known(log):
    with fastlm.use_backend("second"):
        assert chosen() == "second"
    with pytest.raises(ValueError, match="first"):
        fastlm.use_backend("nonsense")


# Lists --------------------------------------------------------------------------------------------------------------


def test_the_first_of_a_list_that_can_serve_runs():
    q = torch.randn(1, 1, 3, 4)
    attention = F.scaled_dot_product_attention
    with fastlm.use_backend("native,reference"):
        assert fastlm.explain(attention, q, q, q).backend == "native"
        assert fastlm.explain(attention, q, q, q, softcap=1.0).backend == "reference"
    with fastlm.use_backend("reference,native"):
        assert fastlm.explain(attention, q, q, q).backend == "reference"


def test_a_list_may_end_with_auto_and_have_spaces():
    q = torch.randn(1, 1, 3, 4, dtype=torch.float64)  # which no kernel serves
    with fastlm.use_backend(" cuda , auto "):
        assert preference() == ("cuda", "auto")
        found = fastlm.explain(F.scaled_dot_product_attention, q, q, q, softcap=1.0)
        assert found.backend == "reference"
        assert list(found.reasons)[:3] == ["cuda", "cpu", "native"]
        assert F.layer_norm(X, (8,)).shape == X.shape


def test_a_list_without_auto_does_not_fall_back(log):
    q = torch.randn(1, 1, 3, 4)
    with fastlm.use_backend("native,cuda"), pytest.raises(fastlm.BackendError) as raised:
        F.scaled_dot_product_attention(q, q, q, softcap=1.0, return_lse=True)
    text = str(raised.value)
    assert text.startswith("scaled_dot_product_attention: no backend of 'native,cuda' can serve these inputs")
    for reason in ("no softcap", "no log-sum-exp output", "cuda: serves cuda tensors, got cpu"):
        assert reason in text
    assert "query = float32 (1, 1, 3, 4) strides (12, 12, 4, 1) cpu" in text
    assert "softcap = 1.0" in text


def test_a_backend_error_is_a_runtime_error():
    assert issubclass(fastlm.BackendError, RuntimeError)


def test_a_known_backend_that_is_not_here_may_be_set_and_raises_when_called(monkeypatch):
    monkeypatch.delitem(OPS["layer_norm"].backends, "cuda")
    with fastlm.use_backend("cuda"), pytest.raises(fastlm.BackendError, match=r"cuda: layer_norm has no such backend"):
        F.layer_norm(X, (8,))


# FASTLM_BACKEND -----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, torch
for value in json.loads(os.environ["VALUES"]):
    if os.fork():
        os.wait()
        continue
    os.environ.pop("FASTLM_BACKEND", None)
    if value is not None:
        os.environ["FASTLM_BACKEND"] = value
    import fastlm
    import fastlm.functional as F
    x, result = torch.randn(3, 8), []
    for choice in (None, "reference"):
        try:
            if choice:
                fastlm.use_backend(choice)
            found = fastlm.explain(F.layer_norm, x, (8,))
            F.layer_norm(x, (8,))
            result.append(found.backend)
        except Exception as error:
            result.append(f"{type(error).__mro__[:2]} {error}")
    print(json.dumps([value, result]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def environment():
    """For each value of FASTLM_BACKEND, the choice of a fresh process, and its choice after a setter."""
    values = [None, "", "auto", "reference", "native", "cuda,reference", "nonsense"]
    variables = os.environ | {"VALUES": json.dumps(values), "PYTHONPATH": str(Path(fastlm.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=variables, capture_output=True, text=True, check=True)
    return dict(map(json.loads, run.stdout.splitlines()))


@pytest.mark.parametrize(
    ("value", "backend"),
    [
        (None, "native"),
        ("", "native"),
        ("auto", "native"),
        ("reference", "reference"),
        ("native", "native"),
        ("cuda,reference", "reference"),
    ],
)
def test_the_environment_names_the_backend_and_a_setter_overrules_it(environment, value, backend):
    assert environment[value] == [backend, "reference"]


def test_an_unknown_name_in_the_environment_raises_at_the_first_call(environment):
    error, after_setter = environment["nonsense"]
    assert "BackendError" in error
    assert "RuntimeError" in error
    assert "nonsense" in error
    assert after_setter == "reference"


# Backends of other packages -----------------------------------------------------------------------------------------


def test_a_registered_backend_runs_when_named_forward_and_backward(log):
    x = X.clone().requires_grad_()
    with fastlm.use_backend("first"):
        y = F.layer_norm(x, (8,))
        y.sum().backward()
    assert log == ["first forward", "first backward"]
    assert torch.equal(y, torch.ops.fastlm.layer_norm_fwd(x, (8,), None, None, 1e-5, "reference")[0])


def test_auto_ignores_a_registered_backend_unless_it_is_put_before_one():
    log = []
    fastlm.register_backend("layer_norm", watched("mine", log))
    assert chosen() == "native"
    assert fastlm.explain(F.layer_norm, X, (8,)).reasons["mine"] == ["can serve when named"]
    fastlm.register_backend("layer_norm", watched("mine", log), before="reference")
    assert OPS["layer_norm"].auto == ("native", "mine", "reference")
    assert chosen() == "native"
    fastlm.register_backend("layer_norm", watched("mine", log), before="native")
    assert OPS["layer_norm"].auto == ("mine", "native", "reference")
    assert chosen() == "mine"
    F.layer_norm(X, (8,))
    assert log == ["mine forward"]


def test_a_backend_with_call_runs_outside_the_op_under_torchs_autograd():
    seen = []

    def call(input, normalized_shape, weight, bias, eps):
        seen.append((tuple(normalized_shape), eps))
        return input * 2

    fastlm.register_backend("layer_norm", fastlm.Backend("doubling", call=call))
    x = X.clone().requires_grad_()
    with fastlm.use_backend("doubling"):
        y = F.layer_norm(x, (8,), eps=0.5)
    y.sum().backward()
    assert seen == [((8,), 0.5)]
    assert torch.equal(y, 2 * x)
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


def test_a_backend_registered_again_replaces_the_first(log):
    other = []
    fastlm.register_backend("layer_norm", watched("first", other))
    with fastlm.use_backend("first"):
        F.layer_norm(X, (8,))
    assert (log, other) == ([], ["first forward"])


def test_devices_dtypes_availability_and_reasons_each_keep_a_backend_from_serving():
    log = []
    fields = {
        "other_device": {"devices": frozenset({"cuda", "xpu"})},
        "other_dtype": {"dtypes": frozenset({torch.float16})},
        "absent": {"available": lambda: "its library is not installed"},
        "picky": {"reasons": lambda inputs: [f"eps {inputs.eps} is odd", "rows are few"]},
        "fit": {},
    }
    for name, field in fields.items():
        fastlm.register_backend("layer_norm", watched(name, log, **field))
    with fastlm.use_backend(",".join(fields)):
        found = fastlm.explain(F.layer_norm, X, (8,), eps=0.25)
        F.layer_norm(X, (8,))
    assert found.backend == "fit"
    assert log == ["fit forward"]
    expected = {
        "other_device": ["serves cuda, xpu tensors, got cpu"],
        "other_dtype": ["does not serve torch.float32"],
        "absent": ["its library is not installed"],
        "picky": ["eps 0.25 is odd", "rows are few"],
    }
    assert {name: found.reasons[name] for name in expected} == expected
    del fields["fit"]
    with fastlm.use_backend(",".join(fields)), pytest.raises(fastlm.BackendError) as raised:
        F.layer_norm(X, (8,), eps=0.25)
    for name, reasons in expected.items():
        assert f"{name}: {'; '.join(reasons)}" in str(raised.value)


def test_auto_passes_over_a_backend_that_cannot_serve():
    log = []
    fastlm.register_backend(
        "layer_norm", watched("picky", log, reasons=lambda inputs: ["no"] if inputs.eps == 1 else []), before="native"
    )
    assert (chosen(), chosen(eps=1.0)) == ("picky", "native")


def test_what_is_asked_about_the_inputs_in_backward_has_their_names():
    seen = []

    def reasons(inputs):
        seen.append({name: x.shape for name, x in inputs._asdict().items() if isinstance(x, torch.Tensor)})
        return []

    record = OPS["add_layer_norm"].backends["reference"]
    fastlm.register_backend("add_layer_norm", dataclasses.replace(record, name="mine", reasons=reasons))
    x, residual, weight = (torch.randn(*shape, requires_grad=True) for shape in ((3, 8), (3, 8), (8,)))
    with fastlm.use_backend("mine"):
        output, _ = F.add_layer_norm(x, residual, (8,), weight)
    before = len(seen)
    with Dispatched():  # past it the choice that forward made is not made again
        output.sum().backward()
    assert len(seen) > before
    assert all(shapes == {"input": (3, 8), "residual": (3, 8), "weight": (8,)} for shapes in seen)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (fastlm.Backend("mine"), "needs either call, or fwd and bwd"),
        (fastlm.Backend("mine", fwd=print), "needs either call, or fwd and bwd"),
        (fastlm.Backend("mine", bwd=print), "needs either call, or fwd and bwd"),
        (fastlm.Backend("mine", call=print, fwd=print, bwd=print), "needs either call, or fwd and bwd"),
        (fastlm.Backend("auto", call=print), "must be an identifier other than 'auto', got 'auto'"),
        (fastlm.Backend("a,b", call=print), "must be an identifier other than 'auto', got 'a,b'"),
        (fastlm.Backend("", call=print), "must be an identifier other than 'auto', got ''"),
    ],
)
def test_an_incomplete_or_misnamed_backend_is_refused(backend, message):
    before = dict(OPS["layer_norm"].backends)
    with pytest.raises(ValueError, match=f"layer_norm: .*{message}"):
        fastlm.register_backend("layer_norm", backend)
    assert OPS["layer_norm"].backends == before


def test_a_backend_for_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match=r"register_backend: unknown op 'nonsense'; known: .*layer_norm"):
        fastlm.register_backend("nonsense", fastlm.Backend("mine", call=print))


def test_a_backend_before_an_unknown_one_is_refused_and_not_registered():
    with pytest.raises(ValueError, match=r"layer_norm: .*nonsense"):
        fastlm.register_backend("layer_norm", fastlm.Backend("mine", call=print), before="nonsense")
    assert "mine" not in OPS["layer_norm"].backends
    assert OPS["layer_norm"].auto == ("native", "reference")


# Backward -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", ["second", "native", "reference", "auto"])
def test_backward_runs_where_forward_ran_whatever_was_chosen_since(log, later):
    x = X.clone().requires_grad_()
    with fastlm.use_backend("first"):
        y = F.layer_norm(x, (8,))
    with fastlm.use_backend(later):
        y.sum().backward()
    assert log == ["first forward", "first backward"]
    fastlm.use_backend(later)
    with fastlm.use_backend("second,first"):
        y = F.layer_norm(x, (8,))
    y.sum().backward()
    assert log[2:] == ["second forward", "second backward"]


def test_auto_runs_torchs_own_op_when_it_is_native():
    y = F.layer_norm(X.clone().requires_grad_(), (8,))
    assert type(y.grad_fn).__name__ == "NativeLayerNormBackward0"


def test_inside_the_op_a_list_is_walked_and_errors_name_every_candidate(log):
    arguments = (X, (8,), None, None, 1e-5)
    torch.ops.fastlm.layer_norm_fwd(*arguments, "cuda,native,second")
    assert log == ["second forward"]
    with pytest.raises(RuntimeError) as raised:
        torch.ops.fastlm.layer_norm_fwd(*arguments, "cuda,native")
    assert "cuda: serves cuda tensors, got cpu" in str(raised.value)
    assert "native: runs outside torch.ops.fastlm.layer_norm_fwd" in str(raised.value)


# Who watches the dispatcher -----------------------------------------------------------------------------------------

OURS = ["reference", "cpu", "triton", "emulator"]
SEEN = ["fastlm::layer_norm_fwd", "fastlm::layer_norm_bwd"]


def normed(backend, x=None):
    """Layer norm of a backend and its backward; False where the backend cannot serve here."""
    x = X.clone().requires_grad_() if x is None else x
    with fastlm.use_backend(backend):
        if not serves_here(F.layer_norm, x, (8,)):
            return False
        y = F.layer_norm(x, (8,))
    y.sum().backward()
    return True


@pytest.mark.parametrize("backend", OURS)
def test_a_dispatch_mode_sees_the_op_forward_and_backward(backend):
    with Dispatched() as dispatched:
        served = normed(backend)
    assert [name for name in dispatched.names if "layer_norm" in name] == (SEEN if served else [])


@pytest.mark.parametrize("backend", OURS)
def test_the_profiler_sees_the_op_forward_and_backward(backend):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        served = normed(backend)
    names = {event.name for event in profile.events()}
    assert set(SEEN) <= names if served else not set(SEEN) & names


@pytest.mark.parametrize("backend", OURS)
def test_a_tensor_subclass_sees_the_op(backend):
    class Wrapper(torch.Tensor):
        names: typing.ClassVar = []

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
            )

        def __init__(self, inner):
            self.inner = inner.detach()

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            cls.names.append(function.name())
            plain = [arg.inner if isinstance(arg, cls) else arg for arg in args]
            results = function(*plain, **(kwargs or {}))
            if isinstance(results, tuple):
                return tuple(cls(result) for result in results)
            return cls(results)

    served = normed(backend, Wrapper(X.clone().requires_grad_()))
    assert [name for name in Wrapper.names if "layer_norm" in name] == (SEEN if served else [])


def test_where_nobody_watches_the_backend_runs_past_the_dispatcher(log, monkeypatch):
    def dispatched(*args):
        raise ZeroDivisionError("through the dispatcher")

    for name in ("fwd", "bwd"):
        monkeypatch.setattr(OPS["layer_norm"], name, dispatched)
    normed("first")
    assert log == ["first forward", "first backward"]
    with Dispatched(), pytest.raises(ZeroDivisionError, match="through the dispatcher"):
        normed("first")


# explain ------------------------------------------------------------------------------------------------------------


def test_explain_names_the_choice_and_why_the_others_do_not_run():
    q = torch.randn(1, 2, 3, 4, dtype=torch.float64)  # which no kernel serves
    found = fastlm.explain(F.scaled_dot_product_attention, q, q, q, softcap=2.0)
    assert (found.backend, found.preference, found.copies) == ("reference", ("auto",), [])
    assert found.reasons["native"] == ["torch's scaled_dot_product_attention has no softcap"]
    assert found.reasons.keys() == OPS["scaled_dot_product_attention"].backends.keys() - {"reference"}
    text = str(found)
    assert text.splitlines()[0] == "scaled_dot_product_attention: reference (asked for: auto)"
    assert "  not native: torch's scaled_dot_product_attention has no softcap" in text
    assert "  query = float64 (1, 2, 3, 4) strides (24, 12, 4, 1) cpu" in text
    assert repr(found) == text


def test_explain_says_what_could_serve_as_well():
    found = fastlm.explain(F.layer_norm, X, (8,))
    assert found.backend == "native"
    assert found.reasons["reference"] == ["can serve, ranked after the choice"]


def test_explain_says_what_would_be_copied():
    with fastlm.use_backend("reference"):
        plain = fastlm.explain(F.cross_entropy, torch.randn(3, 4), torch.zeros(3).long())
        moved = fastlm.explain(F.cross_entropy, torch.randn(3, 4, 2), torch.zeros(3, 2).long())
    assert plain.copies == []
    assert moved.copies == ["input, of strides (8, 1, 2)"]
    assert "  copies input, of strides (8, 1, 2)" in str(moved)


def test_explain_of_what_nothing_can_serve_gives_reasons_instead_of_raising():
    with fastlm.use_backend("cuda,triton"):
        found = fastlm.explain(F.layer_norm, X.double(), (8,))
    assert found.backend is None
    assert "no backend" in str(found)
    assert set(found.reasons) >= {"cuda", "triton"}


def test_explain_computes_nothing(log):
    state = torch.get_rng_state()
    with fastlm.use_backend("first"):
        assert chosen() == "first"
    with fastlm.use_backend("reference"):
        assert fastlm.explain(F.add_layer_norm, X, X, (8,), dropout_p=0.5).backend == "reference"
    assert log == []
    assert torch.equal(state, torch.get_rng_state())


def test_explain_lets_errors_through_and_leaves_no_state_behind():
    with pytest.raises(RuntimeError, match="normalized_shape"):
        fastlm.explain(F.layer_norm, X, (7,))
    assert F.layer_norm(X, (8,)).shape == X.shape
    with pytest.raises(TypeError):
        fastlm.explain(F.layer_norm, X)
    assert F.layer_norm(X, (8,)).shape == X.shape

    def unpredictable(inputs):
        raise ZeroDivisionError("in reasons")

    fastlm.register_backend("layer_norm", watched("broken", [], reasons=unpredictable))
    with fastlm.use_backend("broken"), pytest.raises(ZeroDivisionError, match="in reasons"):
        fastlm.explain(F.layer_norm, X, (8,))
    assert F.layer_norm(X, (8,)).shape == X.shape


@pytest.mark.parametrize("function", [torch.nn.functional.layer_norm, torch.add])
def test_explain_refuses_functions_that_do_not_choose(function):
    with pytest.raises(TypeError, match=r"explain: expected a function of fastlm\.functional"):
        fastlm.explain(function, X, (8,) if function is torch.nn.functional.layer_norm else torch.randn(1, 8))
    assert F.layer_norm(X, (8,)).shape == X.shape


def test_explain_in_one_thread_does_not_disturb_calls_in_another():
    stop, errors = threading.Event(), []

    def work():
        while not stop.is_set():
            try:
                F.layer_norm(X, (8,))
            except BaseException as error:
                errors.append(error)
                return

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(300):
        chosen()
    stop.set()
    thread.join()
    assert errors == []


def test_every_op_can_be_explained_and_names_a_backend_that_it_has():
    q, x, target = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(3, 8), torch.zeros(3).long()
    ends = torch.tensor([0, 3], dtype=torch.int32)
    calls = {
        "layer_norm": (x, (8,)),
        "rms_norm": (x, (8,)),
        "add_layer_norm": (x, x, (8,)),
        "add_rms_norm": (x, x, (8,)),
        "cross_entropy": (x, target),
        "linear_cross_entropy": (x, torch.randn(5, 8), target),
        "linear": (x, torch.randn(5, 8)),
        "scaled_dot_product_attention": (q, q, q),
        "varlen_attention": (*(torch.randn(3, 2, 8).bfloat16() for _ in range(3)), ends, ends, 3, 3),
    }
    assert calls.keys() == OPS.keys()
    for op, arguments in calls.items():
        for name in OPS[op].backends:
            with fastlm.use_backend(name):
                found = fastlm.explain(getattr(F, op), *arguments)
            assert found.backend in (name, None), op
            record = OPS[op].backends[name]
            serves = (record.devices is None or "cpu" in record.devices) and not record.available()
            assert (found.backend == name) == serves, (op, name)
            assert serves or found.reasons[name], (op, name)


# What is measured ---------------------------------------------------------------------------------------------------


def test_auto_takes_what_is_measured_faster_from_its_size_on(monkeypatch):
    table = {measured.device_class(torch.device("cpu")): {"layer_norm": {"float32": ["spy", 64]}}}
    monkeypatch.setattr(measured, "TABLE", table)
    measured._entry.cache_clear()
    ran = []

    def spy(*inputs):
        ran.append(inputs[0].numel())
        return torch.nn.functional.layer_norm(*inputs)

    fastlm.register_backend("layer_norm", fastlm.Backend("spy", call=spy))
    try:
        for rows in (7, 8, 9, 7):  # the choice is remembered, but not across the size where it changes
            F.layer_norm(torch.randn(rows, 8), (8,))
        F.layer_norm(torch.randn(64, 8, dtype=torch.float64), (8,))
        assert ran == [64, 72]
        with fastlm.use_backend("native"):
            F.layer_norm(torch.randn(8, 8), (8,))
        assert ran == [64, 72]
    finally:
        measured._entry.cache_clear()


def test_the_table_of_measurements_names_ops_dtypes_and_backends_that_exist():
    for ops in measured.TABLE.values():
        for op, dtypes in ops.items():
            for dtype, (backend, elements) in dtypes.items():
                assert isinstance(getattr(torch, dtype), torch.dtype)
                assert backend in OPS[op.split()[0]].backends
                assert elements >= 0
