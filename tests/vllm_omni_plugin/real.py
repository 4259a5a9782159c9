"""The plug-in in vLLM-Omni itself, on the CPU; run by `test_real.py` in an environment with vLLM-Omni.

    python real.py DIRECTORY MODEL EMBEDDED

reads what `benchmarks.against_vllm_omni.ours` has written to DIRECTORY, and writes `plugin.pt`. EMBEDDED is a folder
with a pipeline of diffusers, for vLLM-Omni's adapter.
"""

import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch
from vllm_omni import plugins
from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter import DiffusersAdapterPipeline
from vllm_omni.diffusion.worker import diffusion_model_runner as runner

from omni_runtime.vllm_omni.backend import Backend

theirs = import_module("benchmarks.against_vllm_omni.theirs")
STEPS = 20
SETTINGS = (
    ("velocity_cache", {"budget": 8}),
    ("velocity_cache", {"schedule": "qwen-image-17"}),
    ("velocity_cache", {"speedup": 2.5, "corrector_order": 0}),
    ("auto", {"quality": "high"}),
)


def request_of(model, guided):
    """A request; its steps are given as noise levels."""
    arguments = model.inputs["plain"] | (model.inputs["guided"] if guided else {})
    given = {key: arguments.pop(key) for key in list(arguments) if "embeds" in key}
    if model.kind == "ZImagePipeline":
        positive, negative = given.pop("prompt_embeds"), given.pop("negative_prompt_embeds", [])
        model.pipe.encode_prompt = lambda **_: (list(positive), list(negative))
    given = {key: value[0] for key, value in given.items()}
    sampling = theirs.OmniDiffusionSamplingParams(
        num_inference_steps=STEPS,
        sigmas=theirs.sigmas(STEPS),
        max_sequence_length=theirs.TOKENS,
        latents=model.inputs["latents"].clone(),
        output_type="latent",
        **arguments,
    )
    return theirs.OmniDiffusionRequest(prompt={"prompt": "", **given}, sampling_params=sampling, request_id="0")


def run(model, options, guided, name=None, config=None):
    """Latents, computed steps, transformer calls and fused blocks of a request, made as vLLM-Omni's runner makes it."""
    backend = runner.get_cache_backend(name, config)
    one = object.__new__(runner.DiffusionModelRunner)
    one.pipeline, one.cache_backend = model.pipe, backend
    before = dict(vars(model.pipe))
    if backend is not None:
        assert isinstance(backend, Backend)
        assert isinstance(backend, CacheBackend)
        backend.enable(model.pipe)
    request = request_of(model, guided)
    one._refresh_cache_for_requests([request], od_config=options)
    model.calls[:] = [0]
    with torch.no_grad():
        model.pipe.forward(theirs.DiffusionRequestBatch([request]))
    found = {"latents": model.latents.clone(), "calls": sum(model.calls), "computed": None, "fused": 0}
    if backend is not None:
        handle = backend.handle
        report = handle.report
        found["computed"] = None if report is None else [one.computed for one in report.branches.values()]
        found["fused"] = len(handle.fused.replaced)
        backend.disable(model.pipe)
        assert vars(model.pipe).keys() - {"_num_timesteps"} == before.keys() - {"_num_timesteps"}
    return found


def adapted(embedded):
    """The computed steps in vLLM-Omni's adapter for pipelines of diffusers."""
    options = theirs.OmniDiffusionConfig(model=embedded, dtype=torch.float32, cache_backend="velocity_cache")
    adapter = DiffusersAdapterPipeline(od_config=options, device=torch.device("cpu"))
    adapter.load_weights()
    backend = runner.get_cache_backend("velocity_cache", {"quality": 30.0})
    backend.enable(adapter)
    size = {"height": 64, "width": 64, "seed": 0}
    sampling = theirs.OmniDiffusionSamplingParams(num_inference_steps=50, **size)
    prompt = {"prompt": "red apple on blue"}
    request = theirs.OmniDiffusionRequest(prompt=prompt, sampling_params=sampling, request_id="0")
    adapter.forward(theirs.DiffusionRequestBatch([request]))
    return len(backend.handle.report.skipped), backend.handle.report.notes


def main(directory, name, embedded):
    torch.set_num_threads(1)
    theirs.tell_when_run = lambda kind: None  # it replaces the forward of their blocks, which are then not fused
    plugins.load_omni_general_plugins()
    about = json.loads((directory / "transformer" / "config.json").read_text(encoding="utf-8"))
    options = theirs.OmniDiffusionConfig(
        model=str(directory),
        model_class_name=theirs.MODELS[name],
        tf_model_config=theirs.TransformerConfig.from_dict(about),
        dtype=torch.float32,
    )
    vllm = theirs.VllmConfig(device_config=theirs.DeviceConfig(device="cpu"))
    found = {}
    with (
        tempfile.TemporaryDirectory() as store,
        theirs.set_current_vllm_config(vllm),
        theirs.set_current_diffusion_config(options),
        theirs.set_forward_context(vllm_config=vllm, omni_diffusion_config=options),
    ):
        theirs.stand_in(store)
        model = theirs.Theirs(name, directory, options)
        for guided in (False, True):
            found["plain", guided] = run(model, options, guided)
            found["fused_blocks", guided] = run(model, options, guided, "fused_blocks", {})
            for cache, config in SETTINGS:
                found[str(config), guided] = run(model, options, guided, cache, dict(config))
            both = SETTINGS[0][1] | {"fuse": True}
            found["both", guided] = run(model, options, guided, "velocity_cache", both)
            found["again", guided] = run(model, options, guided)
        if embedded:
            found["adapter"] = adapted(embedded)
    torch.save(found, directory / "plugin.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
