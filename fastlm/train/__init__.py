"""Training: a configuration, a loop, and checkpoints that a run goes on from bit by bit.

Example:
    ds = fastlm.data.prepare()
    trainer = Trainer(model, TrainConfig(steps=500), ds.train_tokens, ds.val_tokens, folder="runs/mine")
    result = trainer.train()
"""

import importlib.util

for _name in ("matplotlib", "rich", "safetensors"):
    if importlib.util.find_spec(_name) is None:
        raise ImportError(f"fastlm.train needs the {_name} library: pip install fastlm[train]")

from fastlm.train.config import TrainConfig  # noqa: E402
from fastlm.train.evaluation import Evaluation  # noqa: E402
from fastlm.train.speedup import speedup  # noqa: E402
from fastlm.train.trainer import NonFiniteError, Trainer  # noqa: E402

__all__ = ["Evaluation", "NonFiniteError", "TrainConfig", "Trainer", "speedup"]
