"""The comparison with vLLM-Omni."""
