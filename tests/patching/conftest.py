"""For all tests of patching: restores the attention backend after each test."""

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry


@pytest.fixture(autouse=True)
def attention_backend_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the default attention backend, which a model's `set_attention_backend` changes for all models."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
