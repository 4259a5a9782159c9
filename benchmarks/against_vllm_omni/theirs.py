"""Their side, run in vLLM-Omni's environment: its own pipelines, transformers and cache backends, on the CPU.

    python -m benchmarks.against_vllm_omni.theirs DIRECTORY MODEL [BACKEND ...]

reads the transformer, the scheduler and the inputs that `ours.py` has written to DIRECTORY, and writes `theirs.pt`.

What is not theirs: the choice of the attention backend (it has none for a CPU; its own SDPABackend is taken, with its
forward for CUDA, which calls torch), the groups of tensor and CFG parallelism (of one rank), and the text encoders
and decoder, which do not run. A pipeline's constructor would load these, so it is not called. Its own `forward` is.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}

import torch
import vllm_omni  # noqa: F401 (it registers itself with vllm)
from cache_dit.caching.block_adapters.block_adapters import FakeDiffusionPipeline
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state as vllm_groups
from vllm_omni.diffusion.attention import layer as attention
from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend
from vllm_omni.diffusion.cache.selector import get_cache_backend
from vllm_omni.diffusion.config import set_current_diffusion_config
from vllm_omni.diffusion.data import OmniDiffusionConfig, TransformerConfig
from vllm_omni.diffusion.distributed import parallel_state as groups
from vllm_omni.diffusion.forward_context import set_forward_context
from vllm_omni.diffusion.models.flux import pipeline_flux
from vllm_omni.diffusion.models.qwen_image import pipeline_qwen_image
from vllm_omni.diffusion.models.z_image import pipeline_z_image
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from benchmarks.against_vllm_omni.cases import MODELS, Setting, calls_of, settings, sigmas, steps_of

#: Pipeline → the module of its class, and the attribute of its transformer's class there.
PIPELINES = {
    "QwenImagePipeline": (pipeline_qwen_image, "QwenImageTransformer2DModel"),
    "ZImagePipeline": (pipeline_z_image, "ZImageTransformer2DModel"),
    "FluxPipeline": (pipeline_flux, "FluxTransformer2DModel"),
}
#: The most tokens of a prompt.
TOKENS = 512
#: The block lists of a transformer.
LISTS = ("transformer_blocks", "single_transformer_blocks", "layers")


def stand_in(directory: str) -> None:
    """One process without a device, in place of the groups and of the choice of the attention backend."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
    one = {"world_size": 1, "rank_in_group": 0}
    vllm_groups._TP = MagicMock(**one)
    groups._CFG = SimpleNamespace(**one)
    groups._WORLD = MagicMock(**one, device_group=torch.distributed.group.WORLD)
    attention.get_attn_backend_for_role = lambda *args, **kwargs: (SDPABackend, None)
    kernel = SDPABackend.get_impl_cls()
    kernel.forward = kernel.forward_cuda


class Theirs:
    """A model under vLLM-Omni's cache backends, in fp32. It serves one request: a backend is made to stay."""

    def __init__(self, name: str, directory: Path, config: OmniDiffusionConfig) -> None:
        self.kind = MODELS[name]
        module, transformer_class = PIPELINES[self.kind]
        kind = getattr(module, transformer_class)
        if self.kind == "ZImagePipeline":  # its pipeline makes the released size, whatever the model's config says
            about = json.loads((directory / "transformer" / "config.json").read_text(encoding="utf-8"))
            taken = inspect.signature(kind).parameters
            transformer = kind(**{key: value for key, value in about.items() if key in taken})
        else:
            sizes = get_transformer_config_kwargs(config.tf_model_config, kind)
            transformer = kind(od_config=config, quant_config=None, **sizes)
        weights = load_file(directory / "transformer" / "diffusion_pytorch_model.safetensors")
        loaded = transformer.load_weights(weights.items())
        if missing := {name for name, _ in transformer.named_parameters()} - set(loaded):
            raise RuntimeError(f"{len(missing)} parameters were not loaded: {sorted(missing)[:5]}")
        self.inputs = torch.load(directory / "inputs.pt", weights_only=True)
        pipe = object.__new__(getattr(module, self.kind))
        torch.nn.Module.__init__(pipe)
        pipe.od_config, pipe.parallel_config = config, config.parallel_config
        pipe.device = pipe._execution_device = torch.device("cpu")
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(directory / "scheduler")
        pipe.transformer = transformer.eval().float()
        pipe.vae, pipe.text_encoder = None, SimpleNamespace(dtype=torch.float32)
        pipe.vae_scale_factor = self.inputs["vae_scale_factor"]
        pipe.default_sample_size = pipe.tokenizer_max_length = TOKENS
        self.pipe = pipe
        self.calls = [0]  # the number of calls in each step
        self.ran: set[tuple[int, int, str]] = set()  # (step, call, block list)
        self.latents: torch.Tensor | None = None
        self._watch()

    def _watch(self) -> None:
        """Note each transformer call, which block lists it runs the middle of, and each step."""
        transformer, step = self.pipe.transformer, self.pipe.scheduler.step

        def called(module: torch.nn.Module, args: Any) -> None:
            self.calls[-1] += 1

        def stepped(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            self.calls.append(0)
            self.latents = output[0]
            return output

        transformer.register_forward_pre_hook(called)
        self.pipe.scheduler.step = stepped
        for name in LISTS:
            if blocks := getattr(transformer, name, None):
                watched = blocks[len(blocks) // 2]
                watched.when_run = functools.partial(self._ran, name)
                tell_when_run(type(watched))

    def _ran(self, name: str) -> None:
        self.ran.add((len(self.calls) - 1, self.calls[-1] - 1, name))

    def generate(self, steps: int, guided: bool) -> dict[str, Any]:
        """The latents, and the computed steps of each branch."""
        arguments = self.inputs["plain"] | (self.inputs["guided"] if guided else {})
        given = {key: arguments.pop(key) for key in list(arguments) if "embeds" in key}
        if self.kind == "ZImagePipeline":
            positive, negative = given.pop("prompt_embeds"), given.pop("negative_prompt_embeds", [])
            self.pipe.encode_prompt = lambda **_: (list(positive), list(negative))
        given = {key: value[0] for key, value in given.items()}  # a request has no axis for several
        sampling = OmniDiffusionSamplingParams(
            num_inference_steps=steps,
            sigmas=sigmas(steps),
            max_sequence_length=TOKENS,
            latents=self.inputs["latents"].clone(),
            output_type="latent",
            **arguments,
        )
        request = OmniDiffusionRequest(prompt={"prompt": "", **given}, sampling_params=sampling, request_id="0")
        with torch.no_grad():
            self.pipe.forward(DiffusionRequestBatch([request]))
        calls = self.calls[:-1]
        if len(calls) != steps or len(set(calls)) != 1:
            raise RuntimeError(f"{steps} steps were asked for, and made with {calls} calls")
        computed = [sorted({step for step, call, _ in self.ran if call == one}) for one in range(calls[0])]
        # Lists of blocks may have been decided each alone.
        lists = {name: sorted((step, call) for step, call, of in self.ran if of == name) for _, _, name in self.ran}
        assert self.latents is not None
        return {
            "latents": self.latents.clone(),
            "computed": computed,
            "apart": len({str(one) for one in lists.values()}) > 1,
        }

    def run(self, setting: Setting | None, steps: int, guided: bool) -> dict[str, Any]:
        """As `generate`, under a cache; or the error."""
        try:
            if setting is not None:
                # A mark on a class that all pipelines share: with it, a second one would not be cached.
                if "_is_cached" in vars(FakeDiffusionPipeline):
                    del FakeDiffusionPipeline._is_cached
                backend = get_cache_backend(setting.backend, dict(setting.theirs))
                backend.enable(self.pipe)
                backend.refresh(self.pipe, steps)
            return self.generate(steps, guided)
        except Exception as error:  # of their code
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}


def tell_when_run(kind: Any) -> None:
    """Have the blocks of a class call their `when_run`, if they have one, when they run."""
    real = kind.forward
    if hasattr(real, "__wrapped__"):
        return

    @functools.wraps(real)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "when_run" in vars(self):
            self.when_run()
        return real(self, *args, **kwargs)

    kind.forward = forward  # of the class: the caches keep and replace those of single blocks


def results(
    made: Callable[[], Theirs], name: str, wanted: Callable[[Setting], bool]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """((setting, steps, guided), result) for each request."""
    for guided in (False, True):
        for steps in steps_of(name):
            yield (str(None), steps, guided), made().run(None, steps, guided)
            for setting in filter(wanted, settings(steps, calls_of(name, guided))):
                yield (str(setting), steps, guided), made().run(setting, steps, guided)


def main(directory: Path, name: str, backends: list[str]) -> None:
    """The command."""
    torch.set_num_threads(1)
    about = json.loads((directory / "transformer" / "config.json").read_text(encoding="utf-8"))
    config = OmniDiffusionConfig(
        model=str(directory),
        model_class_name=MODELS[name],
        tf_model_config=TransformerConfig.from_dict(about),
        dtype=torch.float32,
    )
    vllm = VllmConfig(device_config=DeviceConfig(device="cpu"))
    with (
        tempfile.TemporaryDirectory() as store,
        set_current_vllm_config(vllm),
        set_current_diffusion_config(config),
        set_forward_context(vllm_config=vllm, omni_diffusion_config=config),
    ):
        stand_in(store)
        one = functools.partial(Theirs, name, directory, config)
        made = dict(results(one, name, lambda setting: not backends or setting.backend in backends))
    torch.save({"cache-dit": importlib.metadata.version("cache-dit"), "requests": made}, directory / "theirs.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
