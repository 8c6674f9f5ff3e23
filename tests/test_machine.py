"""What a run's report says of the machine and of the libraries it ran with."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
import torch

from blockskip_hooks.utils.machine import LIBRARIES, describe_machine


class Distribution:
    """An installed library with what its installer noted of where it came from."""

    noted: dict[str, object] = {}

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return json.dumps(self.noted) if self.noted else None


@pytest.mark.parametrize(
    ("noted", "source"),
    [
        (
            {"url": "https://example.org/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            {"commit": "abc", "branch": None},
        ),
        ({"url": "file:///a/folder", "dir_info": {}}, None),
        ({}, None),
    ],
    ids=["commit", "folder", "release"],
)
def test_report_says_which_commit_of_a_library_ran(noted, source, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Distribution, "noted", noted)
    real = metadata.distribution
    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution() if name == "peft" else real(name))
    described = describe_machine(torch.device("cpu"))
    assert described["device"] == "cpu" and described["device_name"] is None
    assert sorted(described["sources"]) == sorted(LIBRARIES)
    assert described["sources"]["peft"] == source
