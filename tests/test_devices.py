"""The rules of devices that plans are made by, against those of the installed torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from blockskip_hooks.planning.devices import LOWERED, PROMOTED, computing_as, rounded, rules_for


def listed(policy: str) -> set[str]:
    """Operators of one of autocast's lists in torch's own header."""
    header = Path(torch.__path__[0], "include", "ATen", "autocast_mode.h").read_text()
    body = re.split(rf"#define {policy}\(_\)", header)[1].split("\n\n")[0]
    return set(re.findall(r"_\((\w+)", body))


def test_the_lists_are_those_of_the_installed_torch():
    own = {"cudnn_convolution", "cudnn_convolution_transpose", "_mps_convolution"}
    assert listed("AT_FORALL_LOWER_PRECISION_FP") <= LOWERED <= listed("AT_FORALL_LOWER_PRECISION_FP") | own
    assert listed("AT_FORALL_PROMOTE") == PROMOTED


def dtypes() -> dict[str, torch.dtype]:
    """What some operators make of half precision under autocast."""
    x, weight = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        return {
            "layer_norm": torch.nn.functional.layer_norm(x, (8,), weight).dtype,
            "rms_norm": torch.nn.functional.rms_norm(x, (8,), weight).dtype,
            "softmax": x.softmax(-1).dtype,
            "pow": (x**2).dtype,
            "sum": x.sum().dtype,
            "product": (x.float() @ weight.float()).dtype,
            "promoted": torch.addcmul(x, x.float(), x).dtype,
            "gelu": torch.nn.functional.gelu(x).dtype,
        }


def test_operators_run_in_the_dtypes_of_the_device():
    before = dtypes()
    with computing_as("cuda"), FakeTensorMode():
        cuda = dtypes()
    with computing_as("mps"), FakeTensorMode():
        mps = dtypes()
    half = {"product", "gelu"}
    assert {name for name, dtype in cuda.items() if dtype == torch.bfloat16} == half
    # MPS has no autocast kernel of the RMS norm.
    assert {name for name, dtype in mps.items() if dtype == torch.bfloat16} == half | {"rms_norm"}
    # Outside, the CPU computes as ever.
    assert dtypes() == before and before["layer_norm"] == torch.bfloat16


def test_a_fused_norm_keeps_its_input_and_a_number_per_row():
    with computing_as("cuda"), FakeTensorMode():
        x = torch.ones(4, 16, requires_grad=True)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = torch.nn.functional.rms_norm(x, (16,), torch.ones(16))
        y.sum().backward()
    assert sorted(t.numel() for t in kept) == [4, 16, 64] and x.grad is not None and x.grad.shape == x.shape


def test_a_fused_dropout_keeps_a_byte_per_number():
    layer = torch.nn.Dropout(0.1)
    with computing_as("cuda"), FakeTensorMode():
        x = torch.ones(4, 16, dtype=torch.bfloat16, requires_grad=True)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = layer(x)
            assert layer.eval()(x) is x
        y.sum().backward()
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.bool, 64)] and x.grad is not None
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "rules"), [("cuda", "cuda"), ("cpu", "cpu"), ("mps", "mps"), ("xpu", "cuda"), ("npu", "cuda")]
)
def test_devices_without_rules_of_their_own_get_cudas(device: str, rules: str):
    assert rules_for(device) == rules


def test_bytes_are_rounded_as_the_allocator_does():
    assert [rounded(size, "cuda") for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert rounded(513, "cpu") == 513
