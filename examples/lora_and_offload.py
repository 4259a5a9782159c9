"""A LoRA, a cache and offloaded weights on one pipeline, in any order.

    pip install peft
    python examples/lora_and_offload.py

With the full-size model, on a GPU, load it as in `diffusers_script.py`, load your own LoRA file, and write
`pipe.enable_model_cpu_offload()` or `enable_group_offload(onload_device=torch.device("cuda"), ...)`.

It prints:

    12 of 24 steps computed
    the LoRA changes the picture: True
    the cache keeps the LoRA's picture: PSNR … dB; expect more than 35 dB
    without the LoRA, the picture is the first one: True
"""

import tempfile

import diffusers
import peft
import torch

import omni_kernels
from omni_runtime import embedded_pipeline
from omni_runtime.compare.quality import psnr

torch.set_num_threads(1)  # for the small model only
pipe = embedded_pipeline()
pipe.set_progress_bar_config(disable=True)


def picture():
    """The picture of one prompt and seed."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a fox on white", negative_prompt=" ", num_inference_steps=24, generator=generator).images[0]


def write_lora(folder):
    """Write a LoRA of random numbers, which stands for yours."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    other = embedded_pipeline()
    other.transformer.add_adapter(config)
    layers = peft.get_peft_model_state_dict(other.transformer, adapter_name="default")
    diffusers.QwenImagePipeline.save_lora_weights(folder, transformer_lora_layers=layers)


# Each block's weights are on the device only while the block runs; here both devices are the CPU.
cpu = torch.device("cpu")
pipe.transformer.enable_group_offload(
    onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
)
handle = omni_kernels.patch(pipe, "velocity_cache", {"budget": 12})
first = picture()
print(f"{24 - len(handle.report.skipped)} of 24 steps computed")

with tempfile.TemporaryDirectory() as folder:
    write_lora(folder)
    pipe.load_lora_weights(folder, adapter_name="style")  # on the patched, offloaded pipeline
styled = picture()
print(f"the LoRA changes the picture: {styled.tobytes() != first.tobytes()}")

handle.undo()
print(f"the cache keeps the LoRA's picture: PSNR {psnr(picture(), styled):.0f} dB; expect more than 35 dB")

pipe.unload_lora_weights()
with omni_kernels.patched(pipe, "velocity_cache", {"budget": 12}):
    print(f"without the LoRA, the picture is the first one: {picture().tobytes() == first.tobytes()}")
