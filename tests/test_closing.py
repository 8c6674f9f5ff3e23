"""The last screen of a run: what came out, how to use it, how alike it is; and the page in a browser."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from blockskip_hooks.embedded import embedded_photos
from blockskip_hooks.reporting import closing
from tests import script


PROMPT = "a photo of sks dog at night"


@pytest.fixture(scope="module")
def said(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """What a short run with images prints at its end, and the pages that it opened."""
    output, opened, printed = tmp_path_factory.mktemp("closing"), [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closing.webbrowser, "open", lambda address: opened.append(address) or True)
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        flags = ("--skip_blocks", "1,1", "--max_train_steps", "1", "--num_validation_images", "1", "--open")
        script.train(model, photos, output, *flags, "--validation_prompt", PROMPT, "--validation_resolution", "64")
    return output, "\n".join(printed).splitlines(), opened


def test_files_are_named_and_there(said: tuple[Path, list[str], list[str]]):
    output, lines, _ = said
    start = next(n for n, line in enumerate(lines) if line.startswith("Trained 1 steps in "))
    assert "the process at most " in lines[start] or "on the device" in lines[start]
    for number, (name, file) in enumerate(
        (("LoRA", "pytorch_lora_weights.safetensors"), ("Page", "report.html"), ("Picture", "before_after.png")),
        start=start + 1,
    ):
        assert lines[number] == f"{name:<9}{output / file}" and (output / file).is_file()
    assert lines[start + 4] == "Measure  blockskip evaluate compares images with your photos (--help)"


def test_the_lines_that_use_the_lora_are_those_of_the_card(
    said: tuple[Path, list[str], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    output, lines, _ = said
    used = lines[lines.index("Use it:") + 1 :]
    card = (output / "README.md").read_text()
    assert used[:2] == ["import torch", "from diffusers import DiffusionPipeline"]
    assert used[2].startswith("pipeline = DiffusionPipeline.from_pretrained(")
    assert used[3].startswith("pipeline.load_lora_weights(") and used[-1].startswith("image.save(")
    assert all(line in card for line in used if "from_pretrained" not in line and "load_lora" not in line)
    # They run as they stand, from the folder that the run was started in.
    monkeypatch.chdir(tmp_path)
    exec("\n".join(used), {})
    assert Image.open(tmp_path / "image.png").size == (32, 32)


def test_the_page_is_shown_where_there_is_a_browser(said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    output, _, opened = said
    assert opened == [(output / "report.html").resolve().as_uri()]
    monkeypatch.setattr(closing.webbrowser, "open", lambda address: False)
    assert closing.open_page(tmp_path) == f"No browser could be started here; open {tmp_path / 'report.html'}."


def test_images_of_the_embedded_model_are_compared(monkeypatch: pytest.MonkeyPatch):
    run: Any = SimpleNamespace(embedded=True)
    photos = [Image.open(file).convert("RGB") for file in sorted(embedded_photos("dog").glob("*.png"))]
    (line,) = closing._alike(run, photos, [[Image.new("RGB", (64, 64))]], [photos])
    before, after, most = map(float, re.findall(r"-?\d\.\d\d", line))
    assert len(line) <= 80
    # The mean over photos that are the images has each photo itself in it.
    assert line.startswith("Alike    ") and before < 0.5 < most < after
    (line,) = closing._alike(run, photos[:1], [photos[:1]], [photos[:1]])
    assert line == "Alike    images to photos 1.00 before, 1.00 after; 1 is the same"
    assert closing._alike(run, photos, [], []) == []
