"""E5 under faults: runs that die at any file operation or step, once resumed, with the weights of one that lived."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockskip_hooks.residuals.store import ResidualStore
from tests import script
from tests.kills import SETTINGS, KillTest
from tests.tiers import fast_rows
from tests.tiny import TINY_FAMILIES


FLUX, SANA = list(SETTINGS)[:2]
REFRESHED = "flux: refreshed residuals, repeated records"


@pytest.fixture
def trial(tmp_path: Path):
    """Open a test of one setting under one fault."""

    def open_trial(setting: str, fault: str = "kill") -> KillTest:
        family, flags = SETTINGS[setting]
        (tiny,) = (tiny for tiny in TINY_FAMILIES if tiny.name == family)
        photos = script.save_photos(tmp_path / "photos", [(80, 64), (64, 64), (64, 96)])
        sizes = {"resolution": tiny.resolution, "text_tokens": tiny.text_tokens}
        return KillTest(tiny.folder, photos, tmp_path, flags, sizes, fault=fault)

    return open_trial


@pytest.mark.parametrize(("setting", "kills"), fast_rows([(FLUX, 4), (FLUX, 16), (SANA, 16), (REFRESHED, 10)]))
def test_killed_runs_end_with_the_same_weights(trial, setting: str, kills: int):
    killed = trial(setting)
    killed.go(kills)
    assert killed.kills == kills and not killed.lost, killed.lost


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "fault"), [(FLUX, "term"), (SANA, "int"), (FLUX, "full"), (SANA, "full")])
def test_a_signal_or_a_full_disk_ends_a_run_with_one_line_and_nothing_is_lost(trial, setting: str, fault: str):
    ended = trial(setting, fault)
    ended.go(5)
    assert ended.kills == 5 and not ended.lost, ended.lost


@pytest.mark.slow
def test_two_runs_share_a_residual_dir(trial, tmp_path: Path):
    both = trial(SANA)
    store = tmp_path / "records"
    names = ("one", "two")
    fixed = ("--residual_budget", "1GB", "--no-refresh_residuals")
    runs = [both.start(name, more=("--residual_dir", str(store), *fixed)) for name in names]
    runs.append(both.start("alone", more=fixed))
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0], [both.log(name) for name in names]
    for name in names:
        script.assert_same_weights(tmp_path / name / "out", tmp_path / "alone" / "out")
    ids = [f"instance-{number:08d}" for number in range(8)]
    import json

    found = ResidualStore(store, json.loads((store / "manifest.json").read_text())["description"])
    assert all(sample_id in found for sample_id in ids) and found.verify(ids) == []
