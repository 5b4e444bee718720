"""`python -m fastlm`: the command, for torchrun among others."""

import sys

from fastlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
