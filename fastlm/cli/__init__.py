"""The `fastlm` command.

What a user can get wrong ends in one line on stderr and exit code 2, a run that fails in 1, one that is stopped in 130.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from fastlm.cli.bench import bench
from fastlm.cli.evaluate import evaluate
from fastlm.cli.finetune import finetune
from fastlm.cli.generate import generate
from fastlm.cli.info import info
from fastlm.cli.serve import serve
from fastlm.cli.train import train
from fastlm.cli.tune import tune
from fastlm.config import nearest

__all__ = ["main"]

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "finetune": finetune,
    "evaluate": evaluate,
    "generate": generate,
    "serve": serve,
    "tune": tune,
    "bench": bench,
    "info": info,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command with these arguments, the process's own if None; returns the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if name in ("-h", "--help"):
            print("usage: fastlm COMMAND [OPTION ...]\n")
            print("\n".join(f"  {name:10}{command.__doc__}" for name, command in COMMANDS.items()))
            print("\nfastlm COMMAND --help lists the options of a command.")
            return 0
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
        return COMMANDS[name](rest)
    except KeyboardInterrupt:
        print("\nfastlm: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads what we print has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (ValueError, TypeError, IndexError, OSError, ImportError, RuntimeError) as error:
        print(f"fastlm: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
