"""Shared fixtures: tiny pipelines of real diffusers and transformers classes with random weights, built locally."""

from __future__ import annotations

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.tiny import TINY_FAMILIES, TinyFamily  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(params=TINY_FAMILIES, ids=lambda family: family.name)
def tiny(request: pytest.FixtureRequest) -> TinyFamily:
    """Every family's tiny transformer in turn."""
    return request.param
