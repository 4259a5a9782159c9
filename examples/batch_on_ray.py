"""A batch of pictures on two workers: processes that Ray starts, with the model in each.

    pip install 'omni-kernels[ray]'
    python examples/batch_on_ray.py

Ray opens ports on all addresses of the machine: run it where other machines cannot reach them. With the full-size
model, write `Omni("Qwen/Qwen-Image", ...)`, and as many workers as there are GPUs. RAY_ADDRESS names a cluster.

It prints, in the order in which the rows end:

    out/examples/batch/apple.png: 10 of 20 steps computed
    out/examples/batch/fox.png: 10 of 20 steps computed
    out/examples/batch/ghost.png: 20 of 20 steps computed
    3 rows made, 0 failed
"""

import json
from pathlib import Path

from omni_runtime import Omni
from omni_runtime.serving import batch

out = Path("out/examples/batch")
out.mkdir(parents=True, exist_ok=True)
rows = [
    {"id": "apple", "prompt": "red apple on blue"},
    {"id": "fox", "prompt": "a fox on white"},
    {"id": "ghost", "prompt": "ghost", "cache_backend": None},  # this one without a cache
]
file = out / "rows.jsonl"
file.write_text("\n".join(json.dumps({**row, "seed": 1, "num_inference_steps": 20}) for row in rows))


def tell(row, line):
    """Print what became of a row."""
    print(f"{out / line['files'][0]}: {line.get('computed', line['steps'])} of {line['steps']} steps computed")


# The model is not loaded here, but in each worker.
omni = Omni("emoji-qwen-image", cache_backend="velocity_cache", cache_config={"budget": 10})
summary = batch.run(batch.read(file, omni), out, omni, workers=2, fresh=True, listener=tell)
print(f"{summary.made} rows made, {summary.failed} failed")
