"""Flags that need the model's shape: what becomes of them, and what does not fit it."""

import re

import pytest

from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.cli.errors import explain
from blockskip_hooks.cli.preparation import prepare_run
from blockskip_hooks.data.buckets import standard_buckets
from tests.script import save_photos
from tests.tiny import TINY_FAMILIES


pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    """Prepare a run on a tiny model."""
    photos = save_photos(tmp_path_factory.mktemp("photos"), [(64, 64)])

    def call(*argv, name="flux"):
        tiny = next(tiny for tiny in TINY_FAMILIES if tiny.family.name == name)
        settings = ["--pretrained_model_name_or_path", tiny.folder, "--instance_data_dir", photos]
        settings += ["--instance_prompt", "a sks dog", "--resolution", tiny.resolution, "--report_to", "none"]
        return prepare_run(parse_args([*map(str, settings), *argv]))

    return call


def test_alpha_is_the_rank_where_the_family_has_no_flag_for_it(prepare):
    assert prepare("--rank", "7", name="sd3").settings.lora_alpha == 7
    assert prepare("--rank", "7", "--lora_alpha", "2", name="sd3").settings.lora_alpha == 2
    assert prepare("--rank", "7").settings.lora_alpha == 4


@pytest.mark.parametrize(
    ("skipped", "numbers", "blocks"),
    [
        ("none", "0,4", {"transformer_blocks.0", "single_transformer_blocks.2"}),
        ("none", " 1 , 1", {"transformer_blocks.1"}),
        ("1,1", "1,2,3", {"transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1"}),
        ("2,0", "3", {"single_transformer_blocks.1"}),
    ],
)
def test_lora_blocks_are_numbers_of_blocks_in_order_of_execution(prepare, skipped, numbers, blocks):
    run = prepare("--skip_blocks", skipped, "--lora_blocks", numbers)
    assert {".".join(target.split(".")[:2]) for target in run.targets} == blocks
    assert len(run.targets) == len(set(run.targets))
    every = prepare("--skip_blocks", skipped).targets
    assert set(run.targets) == {target for target in every if ".".join(target.split(".")[:2]) in blocks}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_blocks", "0"], r"^--lora_blocks 0 is a skipped block; name kept ones \(1 to 3\) or change --skip_b"),
        (["--lora_blocks", "1,4"], "^--lora_blocks 4 is a skipped block"),
        (["--lora_blocks", "5"], "^--lora_blocks '5': '5' is no block; the 5 blocks are numbered 0 to 4"),
        (["--lora_blocks", "-1"], "^--lora_blocks '-1': '-1' is no block"),
        (["--lora_blocks", "1-3"], "^--lora_blocks '1-3': '1-3' is no block"),
        (["--lora_blocks", "1,"], "^--lora_blocks '1,': '' is no block"),
        (["--lora_blocks", "1,\u00b2"], "^--lora_blocks .* is no block"),
        (["--lora_blocks", "9" * 5000], "^--lora_blocks .* is no block"),
        (["--lora_blocks", "3", "--lora_layers", "attn.add_q_proj"], "none of single_.*name others"),
        (["--aspect_ratio_buckets", "64,64;60,64"], "^--aspect_ratio_buckets has 60,64, which are not .*8 px"),
        (["--aspect_ratio_buckets", "64,68"], "^--aspect_ratio_buckets has 64,68"),
        (["--aspect_ratio_buckets", "0,64"], "^--aspect_ratio_buckets has 0,64, which are not positive"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_does_not_fit_the_model_is_refused_in_one_line(prepare, argv, message):
    with pytest.raises(ValueError) as error:
        prepare("--skip_blocks", "1,1", *argv)
    shown = explain(error.value)
    assert re.search(message, shown) and "\n" not in shown


@pytest.mark.parametrize("layers", ["1", "1 2 -9", "1 2 999"])
def test_layers_that_the_text_encoder_lacks_are_refused(prepare, layers):
    with pytest.raises(ValueError, match=f"^--text_encoder_out_layers {layers} does not fit this model; give 3 num"):
        prepare("--text_encoder_out_layers", *layers.split(), name="flux2-klein")


def test_buckets_are_those_typed_or_standard_ones_of_the_largest_patch(prepare):
    typed = ("--aspect_ratio_buckets", "64,64; 96,64")
    assert prepare().patch.buckets == ()
    assert prepare(*typed).patch.buckets == ((64, 64), (96, 64))
    assert prepare(*typed, "--use_aspect_ratio_buckets").patch.buckets == ((64, 64), (96, 64))
    assert prepare("--use_aspect_ratio_buckets").patch.buckets == standard_buckets(64, 8)
    largest = ("--skip_blocks", "1,1", "--max_patch_size", "48", "--min_patch_size", "24")
    assert prepare("--use_aspect_ratio_buckets", *largest).patch.buckets == standard_buckets(48, 8)
