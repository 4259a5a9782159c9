"""A schedule is searched for one model and one number of computed steps, and then used.

    python examples/calibrated_schedule.py

This search is small, so that it ends within seconds. For the full-size model, give its name as `--model`, and prompts
of your kind: see the guide "Calibrate". Without `--out`, the file is kept in your data directory, where `auto` and
`velocity_cache` find it by themselves.

It prints what the search has found, and then:

    the schedule of the file: 5 of 12 steps, from 0 to …
    the request computed the same steps: True
    PSNR to the picture of all steps: … dB; expect more than 20 dB
"""

import json
from pathlib import Path

import torch

import omni_kernels
from omni_runtime import cli, embedded_pipeline
from omni_runtime.compare.quality import psnr

torch.set_num_threads(1)  # for the small model only
file = Path("out/examples/schedule.json")
command = "calibrate schedule --model emoji-qwen-image --steps 12 --budgets 5 --tries 4 --seeds 1000 --quiet"
code = cli.main([*command.split(), "--prompts", "red apple", "--held-out", "a rocket", "--out", str(file)])
assert code == 0

schedule = json.loads(file.read_text())["schedules"][0]
computed = schedule["computed"]
print(f"the schedule of the file: {len(computed)} of {schedule['steps']} steps, from {computed[0]} to {computed[-1]}")

pipe = embedded_pipeline("emoji-qwen-image")
pipe.set_progress_bar_config(disable=True)


def picture():
    """The picture of one prompt and seed."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a star on pink", negative_prompt=" ", num_inference_steps=12, generator=generator).images[0]


whole = picture()
with omni_kernels.patched(pipe, "velocity_cache", {"calibration": str(file), "budget": 5}) as handle:
    cached = picture()
skipped = handle.report.skipped
print(f"the request computed the same steps: {[step for step in range(12) if step not in skipped] == computed}")
print(f"PSNR to the picture of all steps: {psnr(whole, cached):.0f} dB; expect more than 20 dB")
