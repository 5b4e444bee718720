"""Every test starts and ends with the process's own choice of backend and torch's own random state."""

import os

import pytest

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a graph cached on disk does not know that an op has changed

import torch

from fastlm.ops import registry


@pytest.fixture(autouse=True)
def own_state():
    setters, order = list(registry._setters), {name: op.auto for name, op in registry.OPS.items()}
    backends = {name: (dict(op.backends), dict(op._calls)) for name, op in registry.OPS.items()}
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)
    registry._setters.clear()
    registry._setters.extend(setters)
    registry._publish()
    registry._state.names = None
    for name, op in registry.OPS.items():
        op.auto = order[name]
        op.backends, op._calls = backends[name]
