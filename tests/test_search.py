"""The masking search: what it decides does not depend on where it was stopped, and it shows what it found."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from blockskip_hooks.cli.errors import explain
from blockskip_hooks.loading.download import resolve_model
from blockskip_hooks.search.masking_search import BlockRun, Curves, MaskedImages, Subject, search_curves
from blockskip_hooks.search.picture import draw_table, masked_variants
from blockskip_hooks.search.tables import cache_file, read_table
from tests.loras import save_random_lora
from tests.script import WEIGHTS, load_script
from tests.test_selection_tables import MEASURED, save
from tests.tiny import TINY_FAMILIES


BLOCKS, STRIDE = 30, 8
SUBJECTS, SEEDS = [Subject("dog", "a dog"), Subject("cat", "a cat")], [0, 1]
# How far an image turns with each number of masked blocks, from either end.
TURNS = np.random.default_rng(0).random((2, BLOCKS)).cumsum(1) / BLOCKS


def embed(runs: list[BlockRun]) -> torch.Tensor:
    """Vectors of images that are their masked runs."""
    turns = [TURNS[int(first > 0), stop - first - 1] if stop else 0.0 for first, stop in runs]
    return torch.tensor([[np.cos(turn), np.sin(turn)] for turn in turns], dtype=torch.float32)


def search(store: Path, made: list[BlockRun], stop_at: int = 0) -> Curves:
    """A search that draws nothing; Ctrl-C comes at one of its batches.

    Args:
        store: Its file of finished images.
        made: Takes the images that it makes.
        stop_at: Number of that batch; 0: none.
    """

    class Images(MaskedImages):
        batches = 0

        def images(self, subject: Subject, variants: Any) -> Any:
            self.batches += 1
            if self.batches == stop_at:
                raise KeyboardInterrupt
            runs = [run for _, run in variants]
            made.extend(runs)
            return runs

    parts: dict[str, Any] = dict.fromkeys(("family", "model", "vae", "embeds", "negative", "pipeline_kwargs"))
    encoder: Any = SimpleNamespace(embed=embed)
    images = Images(**parts, encoder=encoder, batch_size=5, store=store)
    return search_curves(images, SUBJECTS, SEEDS, BLOCKS, STRIDE)


def assert_same_curves(actual: Curves, expected: Curves) -> None:
    for name, value in vars(expected).items():
        found = getattr(actual, name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name


def test_a_finished_search_makes_no_new_image_and_comes_to_the_same(tmp_path: Path):
    made: list[BlockRun] = []
    first = search(tmp_path / "store.safetensors", made)
    images = len(made)
    assert images and len(first.measured_leading) < BLOCKS - 1
    assert_same_curves(search(tmp_path / "store.safetensors", made), first)
    assert len(made) == images


@pytest.mark.parametrize("stop_at", [1, 4, 12, 20])
def test_a_search_that_was_stopped_comes_to_what_one_that_ran_through_does(tmp_path: Path, stop_at: int):
    expected: list[BlockRun] = []
    made: list[BlockRun] = []
    whole = search(tmp_path / "whole.safetensors", expected)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "store.safetensors", made, stop_at)
    assert_same_curves(search(tmp_path / "store.safetensors", made), whole)
    assert made == expected


def test_ctrl_c_is_a_line_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """With a LoRA's file beside the folder that the search writes."""
    monkeypatch.chdir(tmp_path)
    tiny = TINY_FAMILIES[0]
    save_random_lora(tiny, tmp_path, alpha=1)
    argv = ["--pretrained_model_name_or_path", str(tiny.folder), "--max_sequence_length", "12", "--resolution", "32"]
    argv += ["--lora_weights", WEIGHTS, "--prompts", "a dog", "--seeds", "0", "--num_inference_steps", "1"]
    argv += ["--encoder", "offline", "--search_stride", "2", "--window_lengths", "--images_at_once", "2", "--no_cache"]
    batches, original = iter(range(3)), MaskedImages.images

    def two_batches(images: MaskedImages, *args: Any) -> Any:
        if next(batches) == 2:
            raise KeyboardInterrupt
        return original(images, *args)

    main = load_script("select_blocks").main
    with monkeypatch.context() as patched:
        patched.setattr(MaskedImages, "images", two_batches)
        assert main(argv) == 130
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == (
        "Stopped by SIGINT. The same command goes on from the 4 images that are kept in block-selection."
    )
    assert "Traceback" not in said.err and "0 finished ones" in said.out
    assert main(argv) == 0
    assert "4 finished ones" in capsys.readouterr().out


def test_the_picture_shows_the_pairs_that_auto_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where another pair frees more for less, because the first blocks are larger."""
    curves = {
        end: {"mean": [rise * n for n in range(10)], "subject_spread": [0] * 10, "measured": [9]}
        for end, rise in (("leading", 0.11), ("trailing", 0.1))
    }
    pairs = {str(skipped): [0, skipped] for skipped in range(1, 10)}
    contents = {**MEASURED, "num_blocks": 10, "curves": curves, "pairs": pairs, "windows": []}
    contents["block_parameters"] = [2**20] * 5 + [2**10] * 5
    table = read_table(save(tmp_path / "selection.json", contents))
    drawn: list[Figure] = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), original(self, *a, **k)))
    draw_table(contents, table, tmp_path / "selection.png")
    labels: list[Any] = drawn[0].axes[2].texts
    assert [(label.get_text(), label.xy) for label in labels] == [
        (f"{ratio}%: 0, {skipped}", (pytest.approx(2 * skipped / 1024), pytest.approx(0.1 * skipped)))
        for ratio, skipped in ((30, 3), (40, 4), (50, 5))
    ]
    runs = [*masked_variants(10, pairs).values()]
    assert len(set(runs)) == len(runs) == 5


def test_a_table_that_takes_anothers_place_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    keep, file = load_script("select_blocks").keep_table, cache_file(MEASURED["weights"])
    for about, instead in [
        ("8 prompts", ""),
        ("8 prompts", ""),
        ("1 prompt", ", in place of mine (measured: 8 prompts, 2026-01-01)"),
    ]:
        contents = {**MEASURED, "about": about}
        keep(contents, read_table(save(tmp_path / "selection.json", contents)))
        assert capsys.readouterr().out == (
            f"--skip_blocks auto uses it from now on{instead}; to go back, delete {file}\n"
        )
        assert read_table(file).about == about
    file.write_text("{")
    keep(contents, read_table(tmp_path / "selection.json"))
    assert read_table(file).about == "1 prompt"


def test_memory_that_runs_out_in_a_search_names_its_flags():
    line = explain(MemoryError(), "select") or ""
    assert "--memory_budget" not in line
    flags = {"--images_at_once", "--resolution", "--stream_blocks"}
    assert flags <= set(line.replace(",", " ").replace(".", " ").split())
    assert flags <= set(load_script("select_blocks").build_parser()._option_string_actions)


@pytest.mark.parametrize("name", ["./no-such-model", "../no-such-model", "/no/such/model"])
def test_a_folder_that_is_not_there_is_not_looked_for_in_the_hubs_cache(name: str):
    with pytest.raises(ValueError, match="is not there; name the folder") as error:
        resolve_model(name)
    assert str(error.value).startswith(f"--pretrained_model_name_or_path {name} ") and "HF_HUB" not in str(error.value)
