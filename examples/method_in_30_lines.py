"""A new method in 30 lines: compute every n-th step, and forecast the blocks' outputs in between.

    python examples/method_in_30_lines.py

The page "Add a method" explains it, and shows how to make it a package. The method works with the full-size model as it
is: load that one instead of `embedded_pipeline()`.

It prints:

    skipped: [1, 2, 4, 5, 7, 8, 10, 11]
    n must be a whole number from 1 to 10, not 11
"""

import torch

import omni_kernels
from omni_runtime import embedded_pipeline
from omni_runtime.cache import config as keys
from omni_runtime.cache.forecasters import make_forecaster
from omni_runtime.cache.gates import Gate, Limits, Plan
from omni_runtime.cache.methods import METHODS
from omni_runtime.cache.methods.method import Method
from omni_runtime.cache.passage import Parts
from omni_runtime.cache.signals import Nothing


class EveryNth(Gate):
    """Compute steps 0, n, 2n, ..."""

    def __init__(self, n):
        super().__init__(Limits())
        self.n = n

    def plan(self, step):
        """Called at every step, before anything is measured."""
        return (Plan.COMPUTE, "its turn") if step % self.n == 0 else (Plan.SKIP, "between")


def parts(config, row, blocks):
    """What the method is made of, for a transformer of so many blocks."""
    return Parts(
        first=0,  # the blocks from `first` to `last` are skipped
        last=blocks,
        signal=Nothing(),
        gate=lambda request: EveryNth(config["n"]),
        forecaster=make_forecaster("newton", 1),
    )


EVERY_NTH = Method(
    name="every_nth",
    summary="Compute every n-th step, and forecast the blocks' outputs in between",
    keys=(keys.integer("n", 2, 1, 10, "a step is computed when its number is a multiple of this"),),
    parts=parts,
)

if __name__ == "__main__":
    torch.set_num_threads(1)  # for the small model only
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    METHODS["every_nth"] = EVERY_NTH  # to try it; a package names it as an entry point instead
    with omni_kernels.patched(pipe, "every_nth", {"n": 3}) as handle:
        pipe("red apple on blue", negative_prompt=" ", num_inference_steps=12)
    print(f"skipped: {handle.report.skipped}")

    try:
        omni_kernels.patch(pipe, "every_nth", {"n": 11})
    except ValueError as error:
        print(error)
