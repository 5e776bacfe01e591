"""Fixtures for models of transformers whose attention is replaced."""

import logging

import pytest

from efficient_transformers.any_model import masks


@pytest.fixture
def every_mask_is_long(monkeypatch):
    """The engines take over at any length."""
    monkeypatch.setattr(masks, "SHORT_LENGTH", 0)


@pytest.fixture
def warnings(caplog):
    """Messages of this test, each of them given once more."""
    type(masks.logger).warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, "efficient_transformers"):
        yield caplog
