"""What it takes to say of a device whether every op is right on it, and how fast: `python -m omni_kernels.validate`.

The tests and benchmarks of the project use the same oracle, tolerances, layouts, guards, cases and clocks.
"""
