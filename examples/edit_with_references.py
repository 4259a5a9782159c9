"""Edit pictures: each request has a reference, and a cache that looks at the noise alone, not at the reference.

    python examples/edit_with_references.py

With the full-size model, on a GPU, write `Omni("Qwen/Qwen-Image-Edit-2511", ...)`. It takes a list of references, too:
`image=[person, coat]`.

It prints:

    mirror it: … of 50 steps computed, … forwards saved
    make it gray: … of 50 steps computed, … forwards saved
    put it on blue: … of 50 steps computed, … forwards saved
    the pictures are in out/examples
"""

from pathlib import Path

import torch
from PIL import Image

import omni_runtime
from omni_runtime import Omni

torch.set_num_threads(1)  # for the small model only
references = Path(omni_runtime.__file__).parent / "embedded/emoji-qwen-image-edit/references"
out = Path("out/examples")
out.mkdir(parents=True, exist_ok=True)

omni = Omni(
    "emoji-qwen-image-edit", cache_backend="tea_cache", cache_config={"rel_l1_thresh": 0.2, "forecaster": "newton"}
)
for number, prompt in enumerate(["mirror it", "make it gray", "put it on blue"]):
    reference = Image.open(references / f"0{number}.png")
    result = omni.generate(prompt, image=reference, seed=0)[0]
    result.images[0].save(out / f"edit-{number}.png")
    cache = result.cache
    print(f"{prompt}: {50 - len(cache.skipped)} of 50 steps computed, {cache.forwards_saved} forwards saved")
print(f"the pictures are in {out}")
