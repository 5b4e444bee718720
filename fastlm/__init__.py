"""FastLM: fused attention, layer norm and softmax cross-entropy for PyTorch, with GPT and BERT built on them.

Importing this needs torch and numpy only; it patches nothing and touches no GPU.
"""

import importlib
from typing import Any

from fastlm import functional
from fastlm.accelerate import accelerate
from fastlm.info import info
from fastlm.ops.registry import Backend, BackendError, explain, register_backend, use_backend
from fastlm.sdpa import register_sdpa

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendError",
    "accelerate",
    "explain",
    "functional",
    "info",
    "register_backend",
    "register_sdpa",
    "tune",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """`fastlm.models` and the like without an import of their own, loaded when first asked for."""
    if name == "tune":
        return importlib.import_module("fastlm.bench.tune").tune
    if name in ("bench", "data", "generation", "models", "nn", "train", "transformers"):
        return importlib.import_module(f"fastlm.{name}")
    raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
