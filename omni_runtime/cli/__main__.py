"""`python -m omni_runtime.cli`: the same as `omni`."""

import sys

from omni_runtime.cli import main

sys.exit(main())
