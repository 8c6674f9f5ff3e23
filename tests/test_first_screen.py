"""What a run says before it begins: its learning rate, its pictures, and the home folder."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blockskip_hooks.cli.arguments import build_parser, parse_args
from blockskip_hooks.cli.first_screen import training_lines
from blockskip_hooks.cli.preparation import other_capitals, prepare_run
from blockskip_hooks.reporting.hub import nearby
from blockskip_hooks.training.learning_rate import describe_rate, format_rate, warn_of_warmup
from blockskip_hooks.training.samples import expected_schedule
from blockskip_hooks.training.used_flags import without_effect
from blockskip_hooks.utils.errors import UserError
from blockskip_hooks.utils.formatting import fit_lines
from tests import script
from tests.tiny import TINY_FAMILIES, save_tiny_flux


pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.save_photos(tmp_path_factory.mktemp("photos") / "dog", [(64, 64)] * 2)


# The learning rate


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "constant at 1e-4"),
        ("--lr_warmup_steps 100", "constant at 1e-4; --lr_warmup_steps has no effect with constant"),
        ("--lr_warmup_steps 0", "constant at 1e-4"),
        ("--lr_scheduler cosine --lr_warmup_steps 0", "1e-4, falls as a cosine to 0"),
        (
            "--lr_scheduler constant_with_warmup --lr_warmup_steps 100",
            "warms up for 100 of 500 steps to 1e-4, then constant",
        ),
        ("--lr_scheduler constant_with_warmup --lr_warmup_steps 0", "constant at 1e-4"),
        ("--lr_scheduler linear", "warms up for all 500 steps, to 9.98e-5 of 1e-4"),
        (
            "--lr_scheduler cosine_with_restarts --lr_num_cycles 3 --lr_warmup_steps 50",
            "warms up for 50 of 500 steps to 1e-4, then falls as a cosine to 0, 3 times",
        ),
        (
            "--lr_scheduler polynomial --lr_power 2 --lr_warmup_steps 50",
            "warms up for 50 of 500 steps to 1e-4, then falls to 1e-7 by the power 2",
        ),
        ("--optimizer prodigy --learning_rate 1", "constant at 1, times what prodigy finds"),
        ("--train_text_encoder", "constant at 1e-4; text encoder 5e-6"),
    ],
)
def test_the_learning_rate_is_told_in_words(words: str, said: str):
    assert describe_rate(parse_args(words.split()), 500) == said


def test_scale_lr_counts():
    assert describe_rate(parse_args(["--scale_lr"]), 500, 8) == "constant at 8e-4"


@pytest.mark.parametrize(
    ("rate", "text"), [(1e-4, "1e-4"), (3e-3, "3e-3"), (2.5e-5, "2.5e-5"), (0.01, "0.01"), (1, "1")]
)
def test_rates_are_written_as_people_do(rate: float, text: str):
    assert format_rate(rate) == text


@pytest.mark.parametrize(
    ("words", "steps", "warned"),
    [
        ("--lr_scheduler cosine", 500, "--lr_warmup_steps 500 (the default) is more than a third of the run's 500"),
        ("--lr_scheduler cosine --lr_warmup_steps 167", 500, "--lr_warmup_steps 167 is more than a third"),
        ("--lr_scheduler cosine --lr_warmup_steps 166", 500, None),
        ("--lr_scheduler cosine", 1500, None),
        ("--lr_warmup_steps 500", 500, None),
    ],
)
def test_a_long_warmup_is_warned_of(words: str, steps: int, warned: str | None):
    line = warn_of_warmup(parse_args(words.split()), steps)
    assert line is None if warned is None else line is not None and line.startswith(warned)


# Paths

PATHS = [action for action in build_parser()._actions if getattr(action.type, "__name__", "") == "expand_home"]


def test_every_flag_that_takes_a_path_is_one():
    names = {action.dest for action in build_parser()._actions if action.nargs != 0 and action.choices is None}
    ends = (
        "_dir",
        "_path",
        "validation_image",
        "assistant_lora",
        "_config_path",
        "config",
        "selection_table",
        "dataset_name",
        "from_checkpoint",
        "assistant_lora",
    )
    found = {name for name in names if name.endswith(ends) and name != "dump_config"}
    assert {action.dest for action in PATHS} == found


@pytest.mark.parametrize("action", PATHS, ids=lambda action: action.dest)
def test_a_tilde_is_the_home_folder(action: argparse.Action, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    name, there = action.dest, str(tmp_path / "there")
    if name == "config":
        (tmp_path / "there").write_text("output_dir: ~/out\n")
        settings = parse_args(["--config=~/there"])
        assert (settings.output_dir, settings.config) == (str(tmp_path / "out"), there)
        return
    assert parse_args([f"--{name}=~/there"]).flags()[name] == there
    (tmp_path / "run.yaml").write_text(f"{name}: ~/there\n")
    assert parse_args(["--config", str(tmp_path / "run.yaml")]).flags()[name] == there
    # Elsewhere in a name it is a letter like others.
    assert parse_args([f"--{name}=a~b"]).flags()[name] == "a~b"


def test_paths_on_pages_are_those_from_here(tmp_path: Path):
    assert (
        nearby(tmp_path / "out" / "x") == "out/x" and nearby("out") == "out" and nearby("owner/name") == "owner/name"
    )
    assert nearby("/somewhere/else/out") == "out"


# Pictures


def prepared(model: Path, photos: Path, *flags: str):
    return prepare_run(parse_args(script.settings(model, photos, Path("out"), "--resolution", "64", *flags)))


def copied(model: Path, folder: Path, **vae: Any) -> Path:
    """The model with other settings of its VAE; ``None`` takes one out."""
    shutil.copytree(model, folder)
    (folder / "blockskip_defaults.json").unlink()
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text()) | vae
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("sample_size", "flags", "size"),
    [
        (1024, (), 512),
        (48, (), 48),
        (None, (), 64),
        (1024, ("--validation_resolution", "96"), 96),
        (None, ("--validation_resolution", "1024"), 1024),
    ],
)
def test_pictures_have_the_size_of_the_model(
    sample_size: int | None, flags: tuple[str, ...], size: int, model: Path, photos: Path, tmp_path: Path
):
    run = prepared(copied(model, tmp_path / "model", sample_size=sample_size), photos, *flags)
    assert run.image_size == size
    said = run.image_kwargs
    assert (said.get("height", 512), said.get("width", 512)) == (size, size)
    # Class images are no validation.
    assert run.class_image_size == {1024: 512, 48: 48, None: 64}[sample_size]


def test_a_size_that_the_model_cannot_draw_is_refused(model: Path, photos: Path):
    with pytest.raises(UserError, match="--validation_resolution is 60, .* use 64"):
        prepared(model, photos, "--validation_resolution", "60")


def test_images_that_nobody_makes_are_not_promised(model: Path, photos: Path):
    words = ("--validation_prompt", "a sks dog", "--skip_final_inference")
    run = prepared(model, photos, *words)
    epoch = expected_schedule(run, 1)[0]
    said = f"Images   none: the run ends before those of step {50 * epoch} (50 epochs)"
    assert training_lines(run, 50 * epoch, 1)[1] == said
    assert not prepare_run(parse_args(["--skip_final_inference"])).makes_images


def test_trackers_write_where_the_run_does(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """That is the family's own folder if none is named."""
    monkeypatch.chdir(tmp_path)
    (tiny,) = (tiny for tiny in TINY_FAMILIES if tiny.name == "z-image")
    words = script.settings(tiny.folder, photos, Path("out"), "--report_to", "tensorboard", text_tokens=16)
    at = words.index("--output_dir")
    script.AcceleratorState._reset_state(reset_partial_state=True)
    assert script.load_script().main([*words[:at], *words[at + 2 :]]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["z-image-dreambooth-lora"]
    assert any((tmp_path / "z-image-dreambooth-lora" / "logs").iterdir())


def test_several_prompts_are_drawn(model: Path, photos: Path):
    words = ("--validation_prompt", "a sks dog", "a cat", "a sks dog", "--num_validation_images", "3")
    run = prepared(model, photos, *words)
    assert run.prompts == run.final_prompts == ["a sks dog", "a cat"]
    assert run.settings.plain()["validation_prompt"] == ["a sks dog", "a cat"]
    epoch = expected_schedule(run, 1)[0]
    drawn = f"Images   3 of each of 2 prompts, {run.image_size} px, "
    assert training_lines(run, 50 * epoch + 1, 1)[1] == f"{drawn}every {50 * epoch} steps (50 epochs) and at the end"
    assert training_lines(run, 50 * epoch, 1)[1] == f"{drawn}at the end"


def test_capitals_that_differ_are_warned_of(model: Path, photos: Path, caplog: pytest.LogCaptureFixture):
    prepared(
        model, photos, "--instance_prompt", "A Photo of SKS dog", "--validation_prompt", "photo of sks dog", "a photo"
    )
    said = [record.getMessage() for record in caplog.records if "Capital letters" in record.getMessage()]
    # All words in one line.
    assert len(said) == 1 and "of a validation prompt: SKS (sks), Photo (photo). To many" in said[0]
    # Sentences begin with a capital letter, and further words are no other spelling.
    assert other_capitals("A photo of sks dog", ["Portrait of a sks dog", "Sks dog in Rome"]) == {}


def test_one_prompt_is_a_text_and_words_without_quotes_are_refused(model: Path, photos: Path):
    assert parse_args(["--validation_prompt", "a dog"]).plain()["validation_prompt"] == "a dog"
    with pytest.raises(UserError, match='put quotes around each: --validation_prompt "a photo of sks dog"'):
        prepared(model, photos, "--validation_prompt", *["a", "photo", "of", "sks", "dog"])


def test_the_first_screen_says_how_many_steps_there_are_once(model: Path, photos: Path):
    (rate, _) = training_lines(prepared(model, photos), 400, 1)
    assert rate == "Rate     constant at 0.01; 400 steps"
    (rate, _) = training_lines(prepared(model, photos, "--lr_scheduler", "linear", "--lr_warmup_steps", "9"), 400, 1)
    assert rate == "Rate     warms up for 9 of 400 steps to 0.01, then falls in a line to 0"


def test_without_a_prompt_the_first_screen_says_how_to_ask_for_pictures(model: Path, photos: Path):
    (_, line) = training_lines(prepared(model, photos), 4, 1)
    assert line == f'Images   none are made; --validation_prompt "{script.PROMPT} on a beach" asks for some'


def test_the_first_screen_fits_a_terminal(capsys):
    script.AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--skip_blocks", "auto", "--plan_only", "--output_dir", "out", "--lr_warmup_steps", "100"]
    assert script.load_script().main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 15 and max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for said in (
        "Photos   5 from",
        "Sizes    256 x 256 px, scaled and cropped to 128 x 128",
        "Rate     warms up for 100 of 200 steps to 3e-3",
        "Images   2 of each of 4 prompts, 128 px, at the end",
    ):
        assert said in text


# Pages to be shared


@pytest.fixture(scope="module")
def shared(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that was told to write into the folder it was started in."""
    folder = tmp_path_factory.mktemp("somewhere") / "my dog"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = ("--skip_blocks", "1,1", "--max_train_steps", "2", "--num_validation_images", "1")
        flags += ("--validation_prompt", "a sks dog", "a sks dog at night", "--validation_resolution", "64")
        words = script.settings(model, photos, Path("."), *flags)
        at = words.index("--seed")
        script.AcceleratorState._reset_state(reset_partial_state=True)
        assert script.load_script().main([*words[:at], *words[at + 2 :]]) == 0
    return folder


def test_a_run_into_the_folder_of_now_has_a_title(shared: Path):
    card = (shared / "README.md").read_text()
    assert "# my dog\n" in card and 'load_lora_weights("my dog")' in card
    images = [Image.open(shared / f"image_{number}.png").size for number in range(2)]
    assert images == [(64, 64)] * 2


def test_pages_to_be_shared_hold_no_folders_of_the_machine(shared: Path, model: Path, photos: Path):
    for page in ("README.md", "report.html"):
        text = (shared / page).read_text()
        assert [str(path) for path in (shared.parent, model.parent, photos.parent) if str(path) in text] == []
    assert json.loads((shared / "run_report.json").read_text())["settings"]["instance_data_dir"] == str(photos)
    assert "run_report.json has them in full" in (shared / "report.html").read_text()


def test_the_page_has_the_command_that_repeats_the_run_with_the_seed_that_was_drawn(shared: Path):
    page = re.sub("<[^>]+>", "", (shared / "report.html").read_text())
    seed = json.loads((shared / "run_report.json").read_text())["settings"]["seed"]
    command = re.search("blockskip train --pretrained_model_name_or_path [^\n]+", page)[0]
    assert re.search(f"--validation_resolution 64 --seed {seed}\\b", command) and "accelerate launch" not in page


def test_the_page_lists_the_settings_in_use_with_what_they_came_to(shared: Path):
    page = (shared / "report.html").read_text()
    listed = dict(re.findall('<tr><th scope="row">([a-z_0-9]+)</th><td>([^<]*)</td>', page))
    came_to = {
        "mixed_precision": "no",
        "max_train_steps": "2",
        "stretch_steps": "1",
        "refresh_residuals": "True",
        "residual_dir": "residuals",
        "patch_sampling": "dynamic",
        "min_patch_size": "32",
        "max_patch_size": "64",
        "validation_prompt": "a sks dog | a sks dog at night",
        "validation_resolution": "64",
        "guidance_scale": "3.5",
        "instance_data_dir": "dog",
        "learning_rate": "0.01",
    }
    assert {name: listed.get(name) for name in came_to} == came_to
    assert int(listed["precompute_batch_size"]) >= 1 and listed["lora_layers"].startswith("attn.to_k")
    left_out = "complex_human_instruction system_prompt prodigy_beta3 class_prompt num_class_images lr_power"
    assert [name for name in (*left_out.split(), "hub_model_id", "num_train_epochs") if name in listed] == []
    assert set(listed.values()).isdisjoint({"–", "None", ""})


def test_long_lines_go_on_below_their_text():
    assert fit_lines("Photos   " + "word " * 20).splitlines()[1].startswith(" " * 9 + "word")
    assert fit_lines("short") == "short"


def test_what_has_no_effect_is_known():
    names = [name for name, _ in without_effect(parse_args(["--lr_warmup_steps", "5"]))]
    assert {"lr_warmup_steps", "lr_power", "prodigy_beta3", "residual_dir"} <= set(names)
    assert "lr_warmup_steps" not in dict(without_effect(parse_args(["--lr_scheduler", "linear"])))
