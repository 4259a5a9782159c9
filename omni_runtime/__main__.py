"""`python -m omni_runtime`: the same as `omni`. torchrun starts it with `-m omni_runtime`."""

import sys

from omni_runtime.cli import main

sys.exit(main())
