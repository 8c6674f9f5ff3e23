"""E5 under SIGKILL: runs that die at any file operation or step, once resumed, with the weights of one that lived."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import script
from tests.kills import SETTINGS, KillTest
from tests.tiny import TINY_FAMILIES


KILLS = 20


@pytest.mark.parametrize("name", list(SETTINGS)[:2])
def test_killed_runs_end_with_the_same_weights(name: str, tmp_path: Path):
    family, flags = SETTINGS[name]
    (tiny,) = (tiny for tiny in TINY_FAMILIES if tiny.name == family)
    photos = script.save_photos(tmp_path / "photos", [(80, 64), (64, 64), (64, 96)])
    sizes = {"resolution": tiny.resolution, "text_tokens": tiny.text_tokens}
    trial = KillTest(tiny.folder, photos, tmp_path, flags, sizes)
    trial.go(KILLS)
    assert trial.kills >= KILLS and not trial.lost, trial.lost
