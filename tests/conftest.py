"""Every test starts and ends with the process's own choice of backend and torch's own random state."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a graph cached on disk does not know that an op has changed

import torch

if torch.cuda.device_count() == 0:  # asks the driver, starts nothing
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when fastlm and triton are imported

import interpreter
import proof.emulator  # registers the backend "emulator": the CUDA kernels, thread by thread on a CPU

from fastlm.ops import compiled, measured, registry
from fastlm.ops.attention import op as attention
from fastlm.ops.cross_entropy import op as cross_entropy
from fastlm.ops.layer_norm import op as layer_norm
from fastlm.ops.linear import op as linear


def interpreted(function):
    def run(*args):
        interpreter.correct()  # at the first call: importing fastlm imports no triton, nor do these tests before
        with np.errstate(all="ignore"):  # numpy warns of every NaN and infinity
            return function(*args)

    return run


if os.environ.get("TRITON_INTERPRET") == "1":
    for op in registry.OPS.values():
        if "triton" in op.backends:
            record = op.backends["triton"]
            op.register(dataclasses.replace(record, fwd=interpreted(record.fwd), bwd=interpreted(record.bwd)))

elif torch.cuda.device_count() == 0:
    import proof.triton_ptx  # noqa: F401 - registers the backend "triton_ptx": what Triton compiles its kernels to

if not compiled.cpu_missing():  # the CPU kernels for lesser processors, which this one runs too
    for target in list(compiled.extension().CPU_TARGETS)[:-1]:
        for op in (attention, cross_entropy, layer_norm, linear):
            op.register_cpu(f"cpu_{target}", compiled.cpu_launchers(target))


measured.entries.cache_clear()
with pytest.MonkeyPatch.context() as nowhere:  # what the user of this machine has measured decides nothing here
    nowhere.setattr(measured.cache, "folder", lambda: Path("nowhere"))
    measured.entries()


# torch.manual_seed writes the stack down for every kind of device, also where there is none: 0.75 ms in each test.
seed = torch.manual_seed if torch.cuda.device_count() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def own_state():
    setters, order = list(registry._setters), {name: op.auto for name, op in registry.OPS.items()}
    backends = {name: (dict(op.backends), dict(op.calls)) for name, op in registry.OPS.items()}
    state = torch.get_rng_state()
    seed(0)
    yield
    torch.set_rng_state(state)
    registry._setters.clear()
    registry._setters.extend(setters)
    registry._publish()
    registry._state.names = None
    for name, op in registry.OPS.items():
        op.auto = order[name]
        op.backends, op.calls = backends[name]
        op._chosen.clear()
