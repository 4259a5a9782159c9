"""A diffusers script with a cache: one line puts it on the pipeline, and one takes it off.

    python examples/diffusers_script.py

With the full-size model, on a GPU, write instead of `embedded_pipeline()`:
`DiffusionPipeline.from_pretrained("Qwen/Qwen-Image", dtype=torch.bfloat16).to("cuda")`

It prints, where … is a number of your machine:

    all 50 steps: … s
    with the cache, 25 of 50 steps computed: … s
    PSNR between the two pictures: … dB; expect more than 40 dB
    without the cache again: the same picture as before
"""

import time

import torch

import omni_kernels
from omni_runtime import embedded_pipeline
from omni_runtime.compare.quality import psnr

torch.set_num_threads(1)  # for the small model only: with more threads it is many times slower
pipe = embedded_pipeline()
pipe.set_progress_bar_config(disable=True)


def picture():
    """The picture of one prompt and seed, and the seconds that it took."""
    start = time.perf_counter()
    made = pipe(
        "a penguin on red",
        negative_prompt=" ",
        true_cfg_scale=4.0,
        num_inference_steps=50,
        generator=torch.Generator().manual_seed(0),
    )
    return made.images[0], time.perf_counter() - start


whole, seconds = picture()
print(f"all 50 steps: {seconds:.1f} s")

handle = omni_kernels.patch(pipe, "auto", {"quality": "high"})
cached, seconds = picture()
print(f"with the cache, {50 - len(handle.report.skipped)} of 50 steps computed: {seconds:.1f} s")
print(f"PSNR between the two pictures: {psnr(whole, cached):.0f} dB; expect more than 40 dB")

handle.undo()
same = picture()[0].tobytes() == whole.tobytes()
print(f"without the cache again: {'the same picture as before' if same else 'another picture'}")
