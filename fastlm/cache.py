"""Where FastLM keeps what it can make again: prepared texts, measurements."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """`$FASTLM_CACHE`, else `$XDG_CACHE_HOME/fastlm`, else `~/.cache/fastlm`."""
    if named := os.environ.get("FASTLM_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"
