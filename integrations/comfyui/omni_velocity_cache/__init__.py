"""ComfyUI node "Omni velocity cache": skips whole sampling steps of a model. Copy this folder to `custom_nodes`."""

from __future__ import annotations

from typing import Any

from omni_runtime.cache import presets

from .steps import VelocityCache

KEY = "omni_velocity_cache"
BY_SPEEDUP = "by speedup"


class OmniVelocityCache:
    """The node: MODEL → MODEL, and the schedule in words. The model that comes in is not changed."""

    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "schedule")
    FUNCTION = "apply"
    CATEGORY = "model/optimization"
    DESCRIPTION = (
        "Computes only some of the sampling steps, and forecasts the others from them. For samplers with one "
        "evaluation of the model in each step. 'steps' is for the text of the schedule only: a run has the sampler's."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        """The node's inputs."""
        names = [*presets.PRESETS, BY_SPEEDUP]
        return {
            "required": {
                "model": ("MODEL",),
                "preset": (names, {"default": presets.DEFAULT, "tooltip": "how many steps are skipped"}),
                "speedup": (
                    "FLOAT",
                    {"default": 2.0, "min": 1.1, "max": 10.0, "step": 0.1, "tooltip": "used by 'by speedup'"},
                ),
                "steps": ("INT", {"default": 30, "min": 1, "max": 1000, "tooltip": "for the text of the schedule"}),
            }
        }

    def apply(self, model: Any, preset: str, speedup: float, steps: int) -> tuple[Any, str]:
        """A copy of the model with the cache, and what it does in a run of `steps` steps."""
        from comfy.patcher_extension import WrappersMP

        asked = presets.Asked(speedup=speedup) if preset == BY_SPEEDUP else presets.Asked(quality=preset)
        cache, patched = VelocityCache(asked), model.clone()
        for kind, wrapper in ((WrappersMP.SAMPLER_SAMPLE, cache.sample), (WrappersMP.PREDICT_NOISE, cache.predict)):
            patched.remove_wrappers_with_key(kind, KEY)  # of a node before this one
            patched.add_wrapper_with_key(kind, KEY, wrapper)
        return patched, preview(asked, steps)


def preview(asked: presets.Asked, steps: int) -> str:
    """The schedule: ■ for each computed step, □ for each skipped one, and what to expect."""
    answer = presets.answer(asked, steps)
    return f"{''.join('□■'[bit] for bit in answer.schedule.mask)}\n{answer}"


NODE_CLASS_MAPPINGS = {"OmniVelocityCache": OmniVelocityCache}
NODE_DISPLAY_NAME_MAPPINGS = {"OmniVelocityCache": "Omni velocity cache"}
