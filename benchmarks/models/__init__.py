"""Which cache works in which diffusers pipeline: `python -m benchmarks.models` makes the table in docs/models.md."""
