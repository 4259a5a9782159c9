"""One picture on several devices: context, tensor and CFG parallelism, and ranks that fail together."""
