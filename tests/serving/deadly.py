"""`python -m deadly ROWS MODEL OUT`: a batch on two workers, of which some rows end the process that makes them."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from omni_runtime import Omni
from omni_runtime.serving import batch, ray_batch
from omni_runtime.serving.jobs import Job


class DeadlyRowMaker(ray_batch.RowMaker):
    """Dies of the prompt "deadly" each time; of "device" as of a device that fails."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._submit = self._worker._engine.submit
        self._worker._engine.submit = self._deadly  # type: ignore[method-assign]

    def _deadly(self, prompt: str, **arguments: Any) -> Job:
        if prompt == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "device":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self._submit(prompt, **arguments)


if __name__ == "__main__":
    from deadly import DeadlyRowMaker as Maker  # not of __main__, which workers do not have

    rows, model, out = map(Path, sys.argv[1:])
    ray_batch.RowMaker = Maker  # type: ignore[misc]
    omni = Omni(model, cache_backend=None)
    small = {"height": 32, "width": 32, "num_inference_steps": 3}
    print(batch.run(batch.read(rows, omni, small), out, omni, workers=2, in_flight=4, threads=1))
