"""megafork against its peers: the same inputs, the same ranks, their own code. `make bench`, or `python -m benchmarks --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # for `ranks` and `measure`
