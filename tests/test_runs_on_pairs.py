"""Runs on photos with condition images: what they leave, how they go on, and the pictures that they draw."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from blockskip_hooks.config import BlockSkipConfig
from blockskip_hooks.inference.streamed_model import ImageFlags, image_settings
from blockskip_hooks.transformer import DiTBlockSkipTransformer
from tests import script
from tests.pairs import KONTEXT, VALIDATION, condition_inputs, image_tokens, train
from tests.script import assert_same_weights, losses


@pytest.fixture(scope="module")
def finished(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    flags = ("--skip_blocks", "1,2", "--checkpointing_steps", "2", "--upcast_before_saving", *VALIDATION)
    kept = ("--residual_dir", str(output.parent / "records"), "--refresh_residuals")
    return train(KONTEXT, pairs, output, *flags, *kept, "--validation_image", str(pairs / "0.png"))


def test_the_card_and_the_page_show_pairs(finished: Path):
    """The card's code gives the pipeline an image; the page has both pictures of a pair side by side."""
    card = (finished / "README.md").read_text()
    assert 'image=load_image("condition.png")' in card and 'prompt="a photo' in card
    encoded = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', (finished / "report.html").read_text())
    shapes = {Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in encoded}
    assert any(width == 2 * height for width, height in shapes)


@pytest.mark.slow
def test_a_resumed_run_on_pairs_equals_the_one_that_was_never_stopped(finished: Path, pairs: Path, tmp_path: Path):
    """E5."""
    halves = tmp_path / "halves"
    shutil.copytree(finished / "checkpoint-2", halves / "checkpoint-2")
    flags = ("--skip_blocks", "1,2", "--upcast_before_saving", "--resume_from_checkpoint", "latest")
    train(KONTEXT, pairs, halves, *flags)
    assert_same_weights(halves, finished)
    assert losses(halves) == losses(finished) and len(losses(halves)) == 4


def test_records_are_as_large_as_planned(finished: Path):
    planned = json.loads((finished / "plan.json").read_text())["residuals"]
    shards = [load_file(path) for path in (finished.parent / "records").glob("*.safetensors")]
    sizes: dict[str, int] = {}
    for name, tensor in (item for shard in shards for item in shard.items()):
        sizes[name.partition("/")[0]] = sizes.get(name.partition("/")[0], 0) + tensor.nbytes
    of_samples = {size for name, size in sizes.items() if name.startswith("instance")}
    assert of_samples == {planned["record_bytes"]}


def test_the_lora_differs_from_the_full_model_by_the_trailing_approximation_only(finished: Path):
    """E4: with residuals of the trained model the two agree to rounding."""
    _, inputs, tokens = condition_inputs(KONTEXT)
    transformer = KONTEXT.make_transformer()
    transformer.load_lora_adapter(finished / script.WEIGHTS, prefix="transformer")
    model = DiTBlockSkipTransformer(transformer, BlockSkipConfig(leading=1, trailing=2))
    transformer.disable_adapters()
    base = model.capture_residuals(**inputs, condition_tokens=tokens)
    transformer.enable_adapters()
    fresh = model.capture_residuals(**inputs, condition_tokens=tokens)
    with torch.no_grad():
        full, with_fresh, with_base = (
            image_tokens(model(**inputs, residuals=r, condition_tokens=tokens, return_dict=False)[0])
            for r in (None, fresh, base)
        )
    assert (with_fresh - full).abs().max() <= 1e-5 * max(1.0, float(full.abs().max()))
    assert (with_base - full).abs().max() > 1e-5
    assert torch.equal(fresh.leading_hidden_states, base.leading_hidden_states)


@pytest.mark.slow
def test_validation_images_are_made_from_the_validation_image(finished: Path, pairs: Path, tmp_path: Path):
    other = train(
        KONTEXT,
        pairs,
        tmp_path / "out",
        *("--skip_blocks", "1,2", "--upcast_before_saving", *VALIDATION),
        *("--validation_image", str(pairs / "0_cond.png")),
    )
    assert_same_weights(other, finished)
    first, second = ((output / "image_0.png").read_bytes() for output in (finished, other))
    assert first != second


def test_images_of_an_evaluation_have_the_size_that_is_asked_for():
    """Without being told, the pipeline of FLUX.1 Kontext scales any size to a megapixel."""
    given = {"pretrained_model_name_or_path": str(KONTEXT.folder), "resolution": 64}
    flags = ImageFlags(**{**dict.fromkeys(field.name for field in fields(ImageFlags)), **given})
    kwargs = image_settings(flags).pipeline_kwargs
    assert (kwargs["height"], kwargs["width"], kwargs["max_area"]) == (64, 64, 64 * 64)
