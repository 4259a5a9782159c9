"""Trains `emoji-qwen-image`, the small Qwen-Image that ships with the package; see __main__.py."""
