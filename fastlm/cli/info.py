"""`fastlm info`."""

from __future__ import annotations

import fastlm
from fastlm.cli.parser import Parser


def info(argv: list[str]) -> int:
    """say what this installation has and lacks"""
    Parser("info", info.__doc__).parse(argv)
    print(fastlm.info())
    return 0
