"""A transformer's wide linear layers in 8 bits: saved to a directory, loaded again, and under a cache.

    python examples/quantised.py

With the full-size model, load it as in `diffusers_script.py`, and write `quantize="int8"`: `min_width`, `height` and
`width` are for this small model, whose layers are narrow. On a GPU from sm_89 on, `"fp8"` works, too.

It prints which layers are in 8 bits, and then:

    int8: PSNR … dB; expect more than 30 dB
    loaded from out/examples/emoji-int8: the same picture
    int8, 10 of 20 steps computed: PSNR … dB; expect more than 25 dB
    without quantisation again: the first picture
"""

import shutil
from pathlib import Path

import torch

import omni_kernels
from omni_runtime import embedded_pipeline, load_quantised, save_quantised
from omni_runtime.compare.quality import psnr

torch.set_num_threads(1)  # for the small model only


def picture(pipe):
    """The picture of one prompt and seed."""
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        "a crown on blue",
        negative_prompt=" ",
        num_inference_steps=20,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
    )
    return made.images[0]


pipe = embedded_pipeline()
before = picture(pipe)
folder = Path("out/examples/emoji-int8")
shutil.rmtree(folder, ignore_errors=True)  # it must be empty

how = {"dtype": "int8", "min_width": 64}
with omni_kernels.patched(pipe, quantize=how) as handle:
    print(handle.quantised)
    small = picture(pipe)
    save_quantised(pipe, folder)
print(f"int8: PSNR {psnr(before, small):.0f} dB; expect more than 30 dB")

loaded = load_quantised(folder)  # the full weights of these layers are never in memory
with omni_kernels.patched(loaded):
    same = picture(loaded).tobytes() == small.tobytes()
print(f"loaded from {folder}: {'the same picture' if same else 'another picture'}")

with omni_kernels.patched(loaded, "velocity_cache", {"budget": 10}) as handle:
    cached = picture(loaded)
steps = 20 - len(handle.report.skipped)
print(f"int8, {steps} of 20 steps computed: PSNR {psnr(before, cached):.0f} dB; expect more than 25 dB")
same = picture(pipe).tobytes() == before.tobytes()
print(f"without quantisation again: {'the first picture' if same else 'another picture'}")
