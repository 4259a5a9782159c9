"""Our side: the weights and inputs for both, and the requests under our caches."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

import omni_kernels
from benchmarks.against_vllm_omni.cases import MODELS, NEGATIVE, PROMPT, Setting, sigmas
from benchmarks.models import tiny
from omni_runtime import embedded_pipeline
from omni_runtime.cache.models import row_of


class Ours:
    """A model under our caches.

    Args:
        name: one of MODELS.
        directory: the transformer, the scheduler and the inputs are written here, for the other side.
    """

    def __init__(self, name: str, directory: Path) -> None:
        kind = MODELS[name]
        if name.startswith("tiny"):
            model = tiny.build(kind)
            self.pipe, self.plain, self.guided = model.pipe, dict(model.arguments), dict(model.guided)
        else:
            self.pipe = embedded_pipeline(name)
            self.plain, self.guided = _encoded(self.pipe, kind)
        self.pipe.set_progress_bar_config(disable=True)
        self.latents: torch.Tensor | None = None
        self.latents = self._first_latents()
        self.pipe.transformer.save_pretrained(directory / "transformer")
        self.pipe.scheduler.save_pretrained(directory / "scheduler")
        inputs = {"plain": self.plain, "guided": self.guided, "latents": self.latents}
        torch.save(inputs | {"vae_scale_factor": self.pipe.vae_scale_factor}, directory / "inputs.pt")

    def _first_latents(self) -> torch.Tensor:
        found: list[torch.Tensor] = []
        step = self.pipe.scheduler.step

        def kept(output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append(sample)
            return step(output, timestep, sample, *args, **kwargs)

        self.pipe.scheduler.step = kept
        try:
            self.generate(2, False)
        finally:
            del self.pipe.scheduler.step
        return found[0].clone()

    def generate(self, steps: int, guided: bool) -> torch.Tensor:
        """The latents of one request."""
        arguments = self.plain | (self.guided if guided else {})
        start = {} if self.latents is None else {"latents": self.latents.clone()}
        with torch.no_grad():
            output = self.pipe(
                **arguments,
                **start,
                num_inference_steps=steps,
                sigmas=sigmas(steps),
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                return_dict=False,
            )[0]
        assert isinstance(output, torch.Tensor)
        return output

    def run(self, setting: Setting | None, steps: int, guided: bool) -> dict[str, Any]:
        """The latents, and the computed steps of each branch; or the error."""
        if setting is None:
            return {"latents": self.generate(steps, guided)}
        config = dict(setting.theirs if setting.ours is None else setting.ours)
        if setting.backend == "tea_cache" and "coefficients" not in config:
            # Those published for the class, as theirs are: not those that were fitted to this model.
            config["coefficients"] = row_of(type(self.pipe.transformer).__name__).tea_coefficients
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with omni_kernels.patched(self.pipe, setting.backend, config) as handle:
                    latents = self.generate(steps, guided)
                    report = handle.report
            except (ValueError, TypeError) as error:
                return {"error": f"{type(error).__name__}: {error}"}
        return {"latents": latents, "computed": [branch.computed for branch in report.branches.values()]}


def _encoded(pipe: Any, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a request without guidance, and what guidance adds."""
    size = {"height": 64, "width": 64}
    with torch.no_grad():
        if kind == "ZImagePipeline":
            positive, negative = pipe.encode_prompt(PROMPT, negative_prompt=NEGATIVE, device="cpu")
            plain = {"prompt_embeds": positive, "guidance_scale": 0.0}
            return plain | size, {"negative_prompt_embeds": negative, "guidance_scale": 3.0}
        found = {}
        for prefix, text in (("", PROMPT), ("negative_", NEGATIVE)):
            embeds, mask = pipe.encode_prompt(text, device="cpu")
            mask = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
            found[prefix] = {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}
    return found[""] | {"true_cfg_scale": 1.0} | size, found["negative_"] | {"true_cfg_scale": 4.0}
