# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Word-level tokenizers and small text encoders in the formats of CLIP and T5.

Every word of the captions is one token; other words fall apart into characters, so any prompt can be encoded.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from brush import COLOURS
from catalogue import BACKGROUNDS, HELD_OUT_ICONS, RARE_TOKEN
from shapes import OTHERS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast


CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
T5_TOKENS = 16


def words() -> list[str]:
    """The words of all captions, and of the classes that only serve as distractors, sorted."""
    phrases = ["a photo of a", "a picture of a", "an object the", RARE_TOKEN, *HELD_OUT_ICONS, *BACKGROUNDS.values()]
    phrases += [*COLOURS, *OTHERS]
    return sorted({word for phrase in phrases for word in phrase.split()})


def _merges(vocabulary: list[str]) -> list[str]:
    """Byte-pair merges, most frequent first and ties in order of the alphabet, until every word is one token."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges: list[str] = []
    while pairs := Counter(pair for parts in split for pair in zip(parts, parts[1:])):
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(f"{left} {right}")
        for parts in split:
            i = 0
            while i < len(parts) - 1:
                if parts[i] == left and parts[i + 1] == right:
                    parts[i : i + 2] = [left + right]
                i += 1
    return merges


def write_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level BPE (`vocab.json`, `merges.txt`) whose merges end in the caption words."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = _merges(words())
    tokens = sorted(set(CHARACTERS)) + [character + "</w>" for character in sorted(set(CHARACTERS))]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 77,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    special = {name: settings[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def spellings(text: str) -> list[str]:
    """The text, with a capital letter and in capitals."""
    return list(dict.fromkeys((text, text.capitalize(), text.upper())))


def write_t5_tokenizer(folder: Path) -> T5TokenizerFast:
    """A unigram model (`tokenizer.json`): caption words score 0, single characters -20.

    T5's tokenizer does not lower the case, so each word has a token per spelling (see `share_spellings`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), ("▁", -20.0)]
    pieces += [("▁" + word, 0.0) for spelled in words() for word in spellings(spelled)]
    single = [character for lower in sorted(set(CHARACTERS)) for character in spellings(lower)]
    pieces += [(character, -20.0) for character in single]
    model = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=2))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    model.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    model.post_processor = TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    model.add_special_tokens(["<pad>", "</s>", "<unk>"])
    model.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "T5TokenizerFast",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 0,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    special = {name: settings[name] for name in ("eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    return T5TokenizerFast.from_pretrained(folder)


@torch.no_grad()
def share_spellings(t5: T5EncoderModel, tokenizer: T5TokenizerFast) -> None:
    """Gives capitals the embeddings of the lower case; training only sees lower case."""
    ids, table = tokenizer.get_vocab(), t5.get_input_embeddings().weight
    for token, row in ids.items():
        if token != token.lower() and token.lower() in ids:
            table[row] = table[ids[token.lower()]]


@torch.no_grad()
def move_embeddings(table: torch.Tensor, ids: dict[str, int], old: torch.Tensor, old_ids: dict[str, int]) -> None:
    """Copies the rows (V, D) of tokens that the old vocabulary knows; new words begin as the mean of its words."""
    table.copy_(old.mean(0, keepdim=True) + 0.5 * old.std() * torch.randn(table.shape))
    for token, row in ids.items():
        if token in old_ids:
            table[row] = old[old_ids[token]]


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained two-layer CLIP text encoder of width 64."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """An untrained two-layer T5 encoder of width 96."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=96,
            d_kv=32,
            d_ff=192,
            num_layers=2,
            num_heads=3,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
