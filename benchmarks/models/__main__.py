"""`python -m benchmarks.models`: see `benchmarks.models.table`."""

import sys

from benchmarks.models.table import main

if __name__ == "__main__":
    sys.exit(main())
