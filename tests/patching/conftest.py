"""For all tests of patching: what one model was told to attend with, the next one is not."""

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry


@pytest.fixture(autouse=True)
def attention_backend_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's `set_attention_backend` sets the default of all models, too."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
