"""Shared fixtures: tiny pipelines of real diffusers and transformers classes with random weights, built locally."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from blockskip_hooks.utils.launcher import ENTRIES  # noqa: E402
from tests import script  # noqa: E402
from tests.pairs import save_pairs  # noqa: E402
from tests.plans import Preset, tiny_preset  # noqa: E402
from tests.tiers import FAST_FAMILIES  # noqa: E402
from tests.tiny import TINY_FAMILIES, TinyFamily  # noqa: E402
from tests.wrapped import save_transformer  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(scope="session")
def hf_homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where folders are made without a number: to find a free one takes the longer the more there are."""
    return tmp_path_factory.mktemp("hf-homes")


@pytest.fixture(autouse=True)
def no_tables_of_this_machine(hf_homes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which blocks are skipped must not depend on what was measured here before."""
    monkeypatch.setenv("HF_HOME", tempfile.mkdtemp(dir=hf_homes))


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that nobody launched, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in {*ENTRIES, "LOCAL_RANK"} - {"OMP_NUM_THREADS"}:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def wrapped_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's folder of the tiny transformer of ``tests.wrapped``; nothing may change it."""
    return save_transformer(tmp_path_factory.mktemp("pipeline"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests of all families but three, or those that ``fast_for`` names, into the slow tier.

    Reports say which cell of the family table a test is, for ``benchmarks/family_table.py``.
    """
    for item in items:
        tiny = item.callspec.params.get("tiny") if hasattr(item, "callspec") else None
        chosen = item.get_closest_marker("fast_for")
        if tiny in TINY_FAMILIES and tiny.name not in (chosen.args if chosen else FAST_FAMILIES):
            item.add_marker(pytest.mark.slow)
        marker = item.get_closest_marker("column")
        if marker is not None:
            item.user_properties += [("column", marker.args[0]), ("family", tiny.name), ("text", tiny.trains_text)]


@pytest.fixture(params=TINY_FAMILIES, ids=lambda family: family.name)
def tiny(request: pytest.FixtureRequest) -> TinyFamily:
    """Every family's tiny transformer in turn."""
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX pipeline, for tests that need one family only."""
    return shutil.copytree(TINY_FAMILIES[0].folder, tmp_path_factory.mktemp("model"), dirs_exist_ok=True)


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    """A tiny FLUX as a preset, for plans."""
    return tiny_preset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three photos of other shapes."""
    return script.save_photos(tmp_path_factory.mktemp("photos"), [(80, 64), (64, 64), (64, 96)])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of folder, with condition images."""
    return save_pairs(tmp_path_factory.mktemp("pairs"))
