"""`omni compare`: the same prompts and seeds under several caches, measured against no cache."""
