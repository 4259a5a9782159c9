"""The embedded models that bring calibrations and recorded results: all that have a schedule of their own."""

from omni_runtime.generation.loading import embedded_models

CALIBRATED = sorted(name for name, folder in embedded_models().items() if (folder / "velocity_cache.json").is_file())
