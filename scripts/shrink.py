"""`python scripts/shrink.py ARGS` is exactly `surgery shrink ARGS`, from a checkout, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from surgery.cli import main

if __name__ == "__main__":
    sys.exit(main(["shrink", *sys.argv[1:]]))
