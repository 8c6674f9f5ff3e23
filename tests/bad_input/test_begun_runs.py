"""What only a run that has begun can tell: records, checkpoints and class images that do not fit it."""

import shutil

import pytest

from blockskip_hooks.loading.lora_files import WEIGHTS_NAME
from tests.bad_input.harness import assert_one_line, assert_stopped, command, tree


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--seed": "1"}, ["samples"]),
        ({"--skip_blocks": "1,2"}, ["spans"]),
        ({"--instance_prompt": "a photo of sks cat", "--guidance_scale": "1"}, ["guidance_scale, photos"]),
    ],
    ids=["seed", "spans", "prompt and guidance"],
)
def test_records_of_another_run_are_refused_and_kept(begin, finished, tmp_path, changes, words):
    before = tree(finished)
    result = begin(command(tmp_path / "out", {"--residual_dir": str(finished / "records"), **changes}))
    assert_stopped(result, [f"--residual_dir {finished / 'records'}", "--overwrite_residuals", *words])
    assert tree(finished) == before


def test_a_residual_folder_with_other_files_is_refused_and_kept(begin, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.jpg").write_text("kept")
    changes = {"--residual_dir": str(tmp_path / "pictures"), "--overwrite_residuals": True}
    assert_one_line(begin(command(tmp_path / "out", changes)), 2, ["--residual_dir", "neither empty"])
    assert tree(tmp_path / "pictures") == {tmp_path / "pictures" / "holiday.jpg": b"kept"}


def test_a_folder_of_the_name_of_the_records_is_refused_and_kept(begin, tmp_path):
    (tmp_path / "out" / "residuals").mkdir(parents=True)
    (tmp_path / "out" / "residuals" / "holiday.jpg").write_text("kept")
    result = begin(command(tmp_path / "out", {}))
    assert_one_line(result, 2, [f"{tmp_path / 'out' / 'residuals'} is neither empty", "another --output_dir"])
    assert result.out == "" and tree(tmp_path) == {tmp_path / "out" / "residuals" / "holiday.jpg": b"kept"}


def test_a_residual_folder_that_is_a_file_is_refused_and_kept(begin, tmp_path):
    (tmp_path / "file").write_text("kept")
    result = begin(command(tmp_path / "out", {"--residual_dir": str(tmp_path / "file")}))
    assert_one_line(result, 2, [f"--residual_dir {tmp_path / 'file'} is a file"])
    assert (tmp_path / "file").read_text() == "kept"


def test_a_budget_below_one_step_is_refused(begin, tmp_path):
    result = begin(command(tmp_path / "out", {"--residual_budget": "1KB"}))
    assert_one_line(result, 2, ["--residual_budget", "1000 bytes", "raise it or lower --train_batch_size"])
    assert not (tmp_path / "out" / "residuals").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--rank": "8"}, ["--resume_from_checkpoint", "--rank 4 (now 8)"]),
        ({"--optimizer": "prodigy", "--learning_rate": "1"}, ["--resume_from_checkpoint", "optimizer"]),
    ],
    ids=["rank", "optimizer"],
)
def test_a_checkpoint_of_other_settings_is_refused_and_kept(begin, finished, tmp_path, changes, words):
    if changes.get("--optimizer") == "prodigy":
        pytest.importorskip("prodigyopt")
    checkpoint = finished / "out" / "checkpoint-1"
    before = tree(finished)
    changes = {"--resume_from_checkpoint": str(checkpoint), "--max_train_steps": "2", **changes}
    assert_one_line(begin(command(tmp_path / "out", changes)), 2, words)
    assert tree(finished) == before and not (tmp_path / "out" / WEIGHTS_NAME).exists()


def test_an_incomplete_checkpoint_is_refused(begin, tmp_path):
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    result = begin(command(tmp_path / "out", {"--resume_from_checkpoint": "checkpoint-3"}))
    assert_one_line(result, 2, ["--resume_from_checkpoint checkpoint-3", "complete"])


def test_a_damaged_checkpoint_is_refused(begin, finished, tmp_path):
    damaged = shutil.copytree(finished / "out" / "checkpoint-1", tmp_path / "checkpoint-1")
    (damaged / WEIGHTS_NAME).write_bytes((damaged / WEIGHTS_NAME).read_bytes()[:100])
    changes = {"--resume_from_checkpoint": str(damaged), "--max_train_steps": "2"}
    assert_one_line(begin(command(tmp_path / "out", changes)), 2, ["--resume_from_checkpoint"])


def test_unreadable_class_images_are_all_listed(begin, ground, tmp_path):
    changes = {
        "--with_prior_preservation": True,
        "--class_prompt": "a dog",
        "--class_data_dir": "broken",
        "--num_class_images": "4",
    }
    before = tree(ground / "broken")
    words = ["--class_data_dir broken", "3 images", "empty.jpg", "page.png", "cut.png"]
    assert_one_line(begin(command(tmp_path / "out", changes)), 2, words)
    assert tree(ground / "broken") == before
