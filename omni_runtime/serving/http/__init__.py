"""`omni serve`: a model behind the OpenAI images and videos API. Needs the extra `serve`."""
