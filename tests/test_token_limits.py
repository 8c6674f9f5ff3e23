"""A prompt that is longer than the model reads is said to be, by every family, and only then."""

import logging

import pytest
import torch

from blockskip_hooks.families.prompts import encode_prompts
from blockskip_hooks.families.token_limits import describe_cut
from tests.tiny import TINY_FAMILIES


LIMIT = 96
SHORT = ["a photo of a cat", "a photo of a dog"]
LONG = ["a photo of a red " * 60 + animal for animal in ("cat", "dog")]


def encoded(tiny, prompts, caplog, **settings):
    family = tiny.make_family(max_sequence_length=LIMIT)
    with caplog.at_level(logging.WARNING, "blockskip_hooks"):
        embeds, _ = encode_prompts(family, prompts, dtype=torch.float32, device="cpu", **settings)
    said = [record.getMessage() for record in caplog.records if "does not read the end" in record.getMessage()]
    return [embeds[prompt] for prompt in prompts], said


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tiny", TINY_FAMILIES, ids=lambda tiny: tiny.name)
def test_a_prompt_is_said_to_be_cut_where_its_end_changes_nothing(tiny, caplog):
    if tiny.name.startswith(("ideogram", "qwen-image-2.1")):
        with pytest.raises(ValueError, match="max_sequence_length"):
            encoded(tiny, LONG, caplog)
        return
    (cat, dog), said = encoded(tiny, SHORT, caplog)
    assert not same(cat, dog) and said == []
    (cat, dog, _), said = encoded(tiny, [*LONG, ""], caplog, photos={LONG[0]: ["a.png", "b.png"]})
    assert same(cat, dog)
    (line,) = said
    assert "the end of 2 of 2 prompts (a.png, b.png: " in line
    assert "'a photo of a red a photo of a red a phot…'" in line
    assert "\n" not in line and "--max_sequence_length" in line


def test_what_an_encoder_of_tokens_reads_counts_not_what_clip_reads_beside_it(caplog):
    """FLUX's CLIP reads 77 tokens at most, and gives one vector for all of them."""
    flux = next(tiny for tiny in TINY_FAMILIES if tiny.name.lower().startswith("flux"))
    prompts = ["red " * 84 + animal for animal in ("cat", "dog")]
    (cat, dog), said = encoded(flux, prompts, caplog)
    assert said == []
    assert torch.equal(cat["pooled_prompt_embeds"], dog["pooled_prompt_embeds"])
    assert not torch.equal(cat["prompt_embeds"], dog["prompt_embeds"])


def test_many_cut_prompts_make_one_line():
    line = describe_cut({f"prompt {number}": (100 + number, 77) for number in range(9)}, 12)
    assert "the end of 9 of 12 prompts ('prompt 0…': 100 tokens, limit 77; 'prompt 1…': 101 tokens, limit 77" in line
    assert "and 4 more" in line and "\n" not in line
