"""Checks that every op is correct on a device, and measures its speed: `python -m omni_kernels.validate`.

The project's tests and benchmarks use the same oracle, tolerances, layouts, guards, cases and timing.
"""
