"""`python scripts/demo.py`: one network, a folder of photos, every way to a faster file in one table."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.studies.stacked.demo import main

if __name__ == "__main__":
    main()
