"""Commands of the upstream FLUX, SANA and SD3 scripts' own tests, given to this script: flags, names and outcomes.

Each command is upstream's with ``--skip_blocks none``, so that it means the same; where block skipping could change
the outcome it runs with skipped blocks as well.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import safe_open

from blockskip_hooks.training import validation
from blockskip_hooks.training.history import History
from blockskip_hooks.training.records import RecordSource
from tests import script
from tests.script import WEIGHTS, assert_same_weights, losses, weights
from tests.tiers import fast_first, fast_rows
from tests.tiny import TINY_FAMILIES, TinyFamily


TINY = {tiny.name: tiny for tiny in TINY_FAMILIES if tiny.name in ("flux-dev", "sana", "sd3")}
# What differs between the three commands.
COMMANDS: dict[str, list[str]] = {
    "flux-dev": ["--instance_prompt", "photo", "--resolution", "64"],
    "sana": ["--instance_prompt", "", "--resolution", "32", "--max_sequence_length", "16"],
    "sd3": ["--instance_prompt", "photo", "--resolution", "64"],
}
SIZE = ["--train_batch_size", "1", "--gradient_accumulation_steps", "1"]
OPTIMIZER = ["--learning_rate", "5.0e-04", "--scale_lr", "--lr_scheduler", "constant", "--lr_warmup_steps", "0"]
# A layer of one block, as each upstream test names it, and one of a block that 1,1 keeps.
LAYERS = {
    ("flux-dev", "none"): "single_transformer_blocks.0.attn.to_k",
    ("flux-dev", "1,1"): "single_transformer_blocks.0.attn.to_k",
    ("sana", "none"): "transformer_blocks.0.attn1.to_k",
    ("sana", "1,1"): "transformer_blocks.2.attn1.to_k",
    ("sd3", "none"): "transformer_blocks.0.attn.to_k",
    ("sd3", "1,1"): "transformer_blocks.2.attn.to_k",
}
OUTPUT_DIRS = {"flux-dev": "flux-dreambooth-lora", "sana": "sana-dreambooth-lora", "sd3": "sd3-dreambooth"}


@pytest.fixture(scope="module", params=fast_first(TINY))
def tiny(request: pytest.FixtureRequest) -> TinyFamily:
    return TINY[request.param]


@pytest.fixture(scope="module", params=fast_first(["none", "1,1"]), ids=["plain", "skipping"])
def spans(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.save_photos(tmp_path_factory.mktemp("photos"), [(160, 128), (128, 128), (128, 192)])


def launch(tiny: TinyFamily, *flags: str, photos: Path | None = None, output: Path | None = None, steps: int = 2):
    """Run the script with the family's command and ``flags``, of which the last of a name counts."""
    command = ["--pretrained_model_name_or_path", tiny.folder, *COMMANDS[tiny.name], *SIZE, "--seed", "0"]
    command += ["--max_train_steps", steps]
    command += [] if photos is None else ["--instance_data_dir", photos]
    command += [] if output is None else ["--output_dir", output]
    AcceleratorState._reset_state(reset_partial_state=True)
    code = script.load_script().main([str(part) for part in (*command, *flags)])
    assert code == 0, f"the script ended with {code}"
    return output


def checkpoints(output: Path) -> set[str]:
    return {path.name for path in output.iterdir() if "checkpoint" in path.name}


def blocks(output: Path) -> set[str]:
    """Names of the blocks that the exported LoRA is for."""
    return {".".join(name.split(".")[1:3]) for name in weights(output)}


def metadata(output: Path) -> dict:
    with safe_open(output / WEIGHTS, framework="pt") as file:
        return json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])


def assert_transformer_lora(output: Path) -> None:
    exported = weights(output)
    assert exported
    assert all("lora" in name and name.startswith("transformer.") for name in exported)
    assert all(value.any() for value in exported.values())


# Training


@pytest.mark.parametrize("flags", [(), ("--cache_latents",)], ids=["basic", "cache_latents"])
def test_the_basic_command_exports_a_lora_of_the_transformer(
    tiny: TinyFamily, spans: str, photos: Path, tmp_path: Path, flags: tuple[str, ...]
):
    output = launch(tiny, *OPTIMIZER, *flags, "--skip_blocks", spans, photos=photos, output=tmp_path)
    assert_transformer_lora(output)
    assert len(losses(output)) == 2
    assert len(blocks(output)) == (tiny.num_blocks if spans == "none" else tiny.num_blocks - 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux-dev", "sd3"])
def test_a_trained_text_encoder_is_in_the_same_file(name: str, photos: Path, tmp_path: Path):
    output = launch(TINY[name], *OPTIMIZER, "--train_text_encoder", photos=photos, output=tmp_path)
    prefixes = {key.partition(".")[0] for key in weights(output)}
    assert prefixes == {"transformer", "text_encoder"} | ({"text_encoder_2"} if name == "sd3" else set())
    assert all("lora" in key for key in weights(output))


def test_lora_layers_are_the_only_ones_that_train(tiny: TinyFamily, spans: str, photos: Path, tmp_path: Path):
    layer = LAYERS[tiny.name, spans]
    flags = ("--cache_latents", "--lora_layers", layer, "--skip_blocks", spans)
    output = launch(tiny, *OPTIMIZER, *flags, photos=photos, output=tmp_path)
    assert set(weights(output)) == {f"transformer.{layer}.lora_{part}.weight" for part in "AB"}


@pytest.mark.parametrize(
    "flags, expected",
    fast_rows(
        [
            (
                ["--lora_blocks", "1,3", "--lora_layers", "attn.to_k,attn.to_q", "--skip_blocks", "1,1"],
                [f"transformer_blocks.{n}.attn.to_{which}" for n in (1, 3) for which in "kq"],
            ),
            (["--lora_blocks", "0"], None),
            (["--lora_layers", "attn.to_k"], [f"transformer_blocks.{n}.attn.to_k" for n in range(5)]),
            (["--lora_blocks", "0", "--lora_layers", "attn.to_k"], ["transformer_blocks.0.attn.to_k"]),
        ]
    ),
    ids=["layers of kept blocks", "block", "layer", "layer of a block"],
)
def test_sd3_trains_the_blocks_and_layers_that_are_named(
    flags: list[str], expected: list[str] | None, photos: Path, tmp_path: Path
):
    output = launch(TINY["sd3"], *OPTIMIZER, *flags, photos=photos, output=tmp_path)
    assert_transformer_lora(output)
    layers = {name.partition(".lora_")[0].removeprefix("transformer.") for name in weights(output)}
    if expected is None:
        assert blocks(output) == {"transformer_blocks.0"} and len(layers) > 1
    else:
        assert layers == set(expected)


# Checkpoints


@pytest.mark.slow
def test_old_checkpoints_go_when_the_limit_is_reached(tiny: TinyFamily, photos: Path, tmp_path: Path):
    flags = ("--checkpointing_steps=2", "--checkpoints_total_limit=2")
    assert checkpoints(launch(tiny, *flags, photos=photos, output=tmp_path, steps=6)) == {
        "checkpoint-4",
        "checkpoint-6",
    }


@pytest.fixture(scope="module")
def finished(tiny: TinyFamily, spans: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with all of its checkpoints."""
    output = tmp_path_factory.mktemp("finished") / "out"
    launch(tiny, "--checkpointing_steps", "2", "--skip_blocks", spans, photos=photos, output=output, steps=6)
    assert checkpoints(output) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    return output


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """The same run, killed after step 4."""
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(finished / name, tmp_path / "unfinished" / name)
    return tmp_path / "unfinished"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the optimiser steps that are really made."""
    steps: list[int] = []
    original = History.end_step

    def spy(self):
        step = original(self)
        steps.append(step.number)
        return step

    monkeypatch.setattr(History, "end_step", spy)
    return steps


@pytest.mark.parametrize("checkpoint, first", [pytest.param("latest", 5, marks=pytest.mark.slow), ("checkpoint-2", 3)])
def test_a_resumed_run_ends_at_max_train_steps_as_if_never_stopped(
    tiny: TinyFamily,
    spans: str,
    photos: Path,
    finished: Path,
    unfinished: Path,
    trained: list[int],
    checkpoint: str,
    first: int,
):
    flags = ("--resume_from_checkpoint", checkpoint, "--checkpointing_steps", "2", "--skip_blocks", spans)
    launch(tiny, *flags, photos=photos, output=unfinished, steps=6)
    assert trained == list(range(first, 7))
    assert losses(unfinished) == losses(finished)
    assert_same_weights(unfinished, finished)
    assert checkpoints(unfinished) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


@pytest.mark.slow
def test_resuming_with_a_smaller_limit_removes_several_checkpoints(
    tiny: TinyFamily, spans: str, photos: Path, finished: Path, tmp_path: Path
):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    flags = ("--checkpointing_steps=2", "--checkpoints_total_limit=2", "--resume_from_checkpoint=checkpoint-6")
    launch(tiny, *flags, "--skip_blocks", spans, photos=photos, output=output, steps=8)
    assert checkpoints(output) == {"checkpoint-6", "checkpoint-8"}
    assert len(losses(output)) == 8


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_trains_no_further(
    tiny: TinyFamily, photos: Path, finished: Path, tmp_path: Path, trained: list[int], spans: str
):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    flags = ("--resume_from_checkpoint", "latest", "--skip_blocks", spans)
    launch(tiny, *flags, photos=photos, output=output, steps=6)
    assert trained == []
    assert_same_weights(output, finished)


@pytest.mark.slow
def test_resuming_without_a_checkpoint_says_that_it_starts_anew(
    tiny: TinyFamily, photos: Path, tmp_path: Path, trained: list[int], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        launch(tiny, *OPTIMIZER, "--resume_from_checkpoint", "latest", photos=photos, output=tmp_path)
    assert f"no checkpoint in {tmp_path}, starting anew" in caplog.text
    assert trained == [1, 2]


def test_a_checkpoint_that_is_not_there_stops_the_run(
    tiny: TinyFamily, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    with pytest.raises(AssertionError, match="ended with 2"):
        launch(tiny, "--resume_from_checkpoint", "checkpoint-4", photos=photos, output=tmp_path)
    assert "--resume_from_checkpoint checkpoint-4" in capsys.readouterr().err
    assert not (tmp_path / WEIGHTS).exists()


# Output


def test_without_an_output_dir_it_is_the_familys_with_rank_and_alpha_in_the_file(
    tiny: TinyFamily, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    launch(tiny, *OPTIMIZER, "--rank=4", "--lora_alpha=8", photos=photos)
    assert [path.name for path in tmp_path.iterdir()] == [OUTPUT_DIRS[tiny.name]]
    output = tmp_path / OUTPUT_DIRS[tiny.name]
    assert_transformer_lora(output)
    assert metadata(output)["transformer.r"] == 4 and metadata(output)["transformer.lora_alpha"] == 8
    assert {value.shape[0] for name, value in weights(output).items() if "lora_A" in name} == {4}


@pytest.mark.slow
def test_validation_images_are_made_every_few_epochs_and_at_the_end(
    tiny: TinyFamily, photos: Path, tmp_path: Path, trained: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Three photos at a batch size of one: an epoch is three steps."""
    calls: list[tuple[int, bool]] = []
    original = validation.generate_images

    def spy(embeds, **settings):
        # Without its LoRA the transformer is the base model.
        layers = [m for m in settings["model"].transformer.modules() if isinstance(m, BaseTunerLayer)]
        calls.append((trained[-1], bool(layers[0].active_adapters)))
        return original(embeds, **settings)

    monkeypatch.setattr(validation, "generate_images", spy)
    flags = ("--validation_prompt", "a photo on the beach", "--validation_epochs", "1", "--num_validation_images", "1")
    output = launch(tiny, *OPTIMIZER, *flags, photos=photos, output=tmp_path, steps=7)
    # The base model's images, made once, stand beside the first ones.
    assert calls == [(3, True), (3, False), (6, True), (7, True)]
    with Image.open(output / "image_0.png") as image:
        assert image.size == (32, 32)


def test_a_dataset_of_pictures_and_captions_trains(
    tiny: TinyFamily, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "set"
    shutil.copytree(photos, folder)
    captions = {"0.png": "a red dog", "1.png": "a dog in snow", "2.png": "a blue dog"}
    rows = [{"file_name": name, "text": caption} for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts: list[str] = []
    original = RecordSource.complete

    def spy(self, batch):
        prompts.extend(batch.prompts)
        original(self, batch)

    monkeypatch.setattr(RecordSource, "complete", spy)
    flags = ["--dataset_name", str(folder), "--image_column", "image", "--caption_column", "text"]
    flags += ["--cache_dir", str(tmp_path / "cache")]
    output = launch(tiny, *OPTIMIZER, *flags, output=tmp_path / "out", steps=3)
    assert_transformer_lora(output)
    assert sorted(prompts) == sorted(captions.values())


IN_A_FRESH_PROCESS = """
import sys
import numpy as np
import torch
from diffusers import FluxPipeline

model, lora = sys.argv[1:]
pipeline = FluxPipeline.from_pretrained(model)
size = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 12, "output_type": "np"}

def draw():
    return pipeline("a photo of sks dog", **size, generator=torch.Generator().manual_seed(0)).images

before = draw()
pipeline.load_lora_weights(lora)
print(np.abs(draw() - before).max())
"""


@pytest.mark.slow
def test_the_stock_pipeline_of_another_process_loads_the_lora(photos: Path, tmp_path: Path):
    tiny = TINY["flux-dev"]
    flags = ("--learning_rate", "1e-2", "--lr_warmup_steps", "0", "--max_sequence_length", "12")
    output = launch(tiny, *flags, "--skip_blocks", "1,1", photos=photos, output=tmp_path / "out", steps=4)
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tiny.folder), str(output)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 1e-4


def test_a_first_step_at_rate_zero_is_no_failure(tiny: TinyFamily, photos: Path, tmp_path: Path):
    """Warmup starts at zero, so that a trial of one step leaves the LoRA as it was."""
    output = launch(tiny, "--lr_scheduler", "cosine", photos=photos, output=tmp_path, steps=1)
    assert len(losses(output)) == 1
    assert not any(value.any() for name, value in weights(output).items() if "lora_B" in name)
