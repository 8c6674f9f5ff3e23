"""Settings that cannot work end in one line that names the flag, before anything is loaded or written."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from blockskip_hooks.families.flux import Flux
from blockskip_hooks.loading.checkpoint_index import index_safetensors
from blockskip_hooks.loading.checks import check_model
from blockskip_hooks.loading.model_defaults import model_defaults
from tests.bad_input.harness import GOOD, assert_one_line, command, tree
from tests.bad_input.model_cases import shards
from tests.bad_input.plan_cases import PLAN_CASES
from tests.bad_input.select_cases import SELECT_CASES
from tests.bad_input.settings_cases import REFUSED
from tests.bad_input.train_cases import TRAIN_CASES
from tests.script import load_script


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_work_end_in_one_line(run, tmp_path, case):
    changes, words = REFUSED[case]
    if "--skip_block" in changes:
        changes = {**changes, "--skip_blocks": None}
    output_dir = tmp_path / "out"
    result = run(command(output_dir, changes))
    assert_one_line(result, 2, words)
    assert result.out == "" and tree(tmp_path) == {} and [*tmp_path.iterdir()] in ([], [output_dir])
    assert not output_dir.exists() or not any(output_dir.iterdir())


# Every script against the tables of bad input

SCRIPTS = {
    "train_dreambooth_blockskip": (TRAIN_CASES, GOOD, "train"),
    "select_blocks": (
        SELECT_CASES,
        {**{name: GOOD[name] for name in ("--pretrained_model_name_or_path", "--max_sequence_length")}}
        | {"--encoder": "offline", "--no_cache": True},
        "open_search",
    ),
    "plan_memory": (PLAN_CASES, {"--preset": "flux.1-dev"}, "plan_run"),
}


def stamps(*folders):
    """When every file below some folders was last written, its size, and where links lead."""
    return {
        path: (status.st_mtime_ns, status.st_size, status.st_ino)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        for status in [path.lstat()]
        if not path.is_dir()
    } | {path: None for folder in folders for path in folder.rglob("*") if path.is_dir()}


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, (cases, _, _) in SCRIPTS.items() for case in cases], ids=str
)
def test_bad_input_ends_in_one_line_before_models_load(
    run, ground, finished, earlier, tmp_path, monkeypatch, name, case
):
    cases, good, loads = SCRIPTS[name]
    changes, words = cases[case]
    module = load_script(name)

    def too_late(*args, **kwargs):
        raise AssertionError("models were about to load")

    if name != "plan_memory":
        monkeypatch.setattr(module, loads, too_late)
    output = shutil.copytree(earlier, tmp_path / "out")
    flags = {**good, **({} if name == "plan_memory" else {"--output_dir": str(output)})}
    for flag, value in changes.items():
        if callable(value):
            folder = tmp_path / "made" / flag.strip("-")
            folder.mkdir(parents=True)
            value = str(value(folder))
        flags[flag] = value
    argv = [
        word
        for flag, value in flags.items()
        if value is not None
        for word in ([flag] if value is True else [flag, value])
    ]
    kept = [ground, output, *(path for path in tmp_path.glob("made/*") if path.name != "cache_dir")]
    before = stamps(*kept)
    result = run(argv, module)
    # Reading a dataset draws a bar, which may come before the line.
    result.err = "\n".join(line for line in result.err.split("\n") if not line.endswith("examples/s]"))
    assert_one_line(result, 2, words)
    assert result.out == "" and stamps(*kept) == before


def test_sound_models_of_every_family_pass(tiny):
    check_model(tiny.folder, tiny.family, None)
    assert model_defaults(tiny.folder)[1]


def test_a_sound_model_in_shards_and_of_a_variant_passes(tmp_path):
    model = Path(shards(lambda *_: None)(tmp_path))
    index = model / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    check_model(model, Flux, None)
    index.rename(index.with_name("diffusion_pytorch_model.safetensors.index.fp16.json"))
    for name in ("vae", "text_encoder", "text_encoder_2"):
        for file in (model / name).glob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
    check_model(model, Flux, "fp16")
    assert len(index_safetensors(model / "transformer", "fp16")) == len(index_safetensors(Path("model/transformer")))


def test_the_tables_hold_many_cases():
    assert sum(len(cases) for cases, _, _ in SCRIPTS.values()) + len(REFUSED) >= 400


def test_the_command_the_cases_start_from_is_good(run, tmp_path):
    result = run(command(tmp_path / "out", {"--plan_only": True}))
    assert (result.code, result.err) == (0, "")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_output_folder_that_is_a_file_is_refused_and_kept(run, tmp_path, name):
    (tmp_path / "file").write_text("kept")
    assert_one_line(run(command(tmp_path / name, {})), 2, ["--output_dir", "is a file"])
    assert tree(tmp_path) == {tmp_path / "file": b"kept"}


def test_an_output_folder_that_cannot_be_written_is_refused(run, tmp_path, monkeypatch):
    # Where root runs the tests, no mode of a folder would keep it out.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path) and access(path, mode))
    assert_one_line(run(command(tmp_path / "out", {})), 2, ["--output_dir", "cannot be written"])
    assert not (tmp_path / "out").exists()


def test_a_caption_for_some_photos_only_still_needs_the_prompt(run, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(photos / f"{name}.png")
    (photos / "a.txt").write_text("a dog on the beach")
    changes = {"--instance_data_dir": str(photos), "--instance_prompt": None}
    assert_one_line(run(command(tmp_path / "out", changes)), 2, ["--instance_prompt"])
