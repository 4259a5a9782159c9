"""A client of the server: OpenAI's own package, with two fields of this project's.

    omni serve --model emoji-qwen-image --quality high &
    pip install openai
    python examples/server_client.py http://127.0.0.1:8000

With a full-size model only the server's command changes: `omni serve --model Qwen/Qwen-Image --quality high`; then
leave out `size` and `steps`, and the model's own are used.

It prints:

    out/examples/served-1.png: 10 of 20 steps computed
    out/examples/served-2.png: 10 of 20 steps computed
    image_generation.partial_image
    image_generation.partial_image
    image_generation.completed
"""

import base64
import sys
from pathlib import Path

from openai import OpenAI

out = Path("out/examples")
out.mkdir(parents=True, exist_ok=True)
address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{address}/v1", api_key="none")

more = {"steps": 20, "seed": 1, "cache_backend": "velocity_cache", "cache_config": {"budget": 10}}
answer = client.images.generate(prompt="red apple on blue", n=2, size="64x64", extra_body=more)
for picture in answer.data:
    told = picture.omni
    path = out / f"served-{told['seed']}.png"
    path.write_bytes(base64.b64decode(picture.b64_json))
    print(f"{path}: {told['computed']} of {told['steps']} steps computed")

# A stream shows unfinished pictures: the clean picture that the model predicts at that step.
stream = client.images.generate(
    prompt="a ghost on blue", size="64x64", stream=True, partial_images=2, extra_body={"steps": 20}
)
for event in stream:
    print(event.type)
