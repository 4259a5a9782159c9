"""Silences the cache-dit library, which logs its configuration at every request."""

import logging

import pytest


@pytest.fixture(autouse=True)
def quiet_library():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
