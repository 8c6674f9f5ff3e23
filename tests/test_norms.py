"""Norms under autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer
from blockskip_hooks.planning.devices import computing_as
from blockskip_hooks.utils.norms import NORMS, free_norm_dtypes, keep_norm_dtypes
from tests.tiny import TINY_FAMILIES


NEW = {
    "layer norm": lambda: torch.nn.LayerNorm(8, dtype=torch.bfloat16),
    "without weights": lambda: torch.nn.LayerNorm(8, elementwise_affine=False),
    "rms norm": lambda: torch.nn.RMSNorm(8, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", NEW)
def test_a_gpus_autocast_leaves_norms_in_half_precision(kind: str):
    made = {}
    with computing_as("cuda"), FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        for kept in (False, True):
            norm = NEW[kind]()
            if kept:
                keep_norm_dtypes(norm)
            made[kept] = norm(torch.ones(2, 8, dtype=torch.bfloat16)).dtype
    assert made == {False: torch.float32, True: torch.bfloat16}


@pytest.mark.parametrize("kind", NEW)
def test_on_a_cpu_nothing_changes(kind: str):
    x, norm = torch.randn(2, 8, dtype=torch.bfloat16), NEW[kind]()
    with torch.autocast("cpu", torch.bfloat16):
        before = norm(x)
        keep_norm_dtypes(norm)
        after, copied = norm(x), copy.deepcopy(norm)(x)
    assert before.dtype == after.dtype and torch.equal(before, after) and torch.equal(before, copied)


def test_an_input_of_another_dtype_is_cast_as_ever():
    """A GPU's kernels refuse it, so autocast has to cast it."""
    with computing_as("cuda"), FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        norm = torch.nn.LayerNorm(8, dtype=torch.bfloat16)
        keep_norm_dtypes(norm)
        assert norm(torch.ones(2, 8)).dtype == torch.float32


def test_a_model_gets_its_norms_back():
    transformer = TINY_FAMILIES[0].make_transformer()
    norms = [module for module in transformer.modules() if isinstance(module, NORMS)]
    model = DiTBlockSkipTransformer(transformer, BlockSkipConfig(leading=1))
    assert norms and all("forward" in vars(norm) for norm in norms)
    model.remove()
    assert not any("forward" in vars(norm) for norm in norms)
    own = torch.nn.LayerNorm(8)
    own.forward = lambda x: x  # type: ignore[method-assign]
    keep_norm_dtypes(own)
    free_norm_dtypes(own)
    assert own(1) == 1
