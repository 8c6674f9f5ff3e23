"""Word-level tokenizers of the real classes, and the words they know."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTokenizer, T5TokenizerFast


WORDS = ["a", "photo", "of", "sks", "dog", "cat", "on", "in", "the", "red", "blue", "beach", "snow", "object"]


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding in which each known word is one token; 77 tokens at most."""
    vocabulary = {
        token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *(f"{w}</w>" for w in WORDS)])
    }
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocabulary.setdefault(letter, len(vocabulary))
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    merges = []
    for word in WORDS:
        # Byte-pair merges that build each word from the left.
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
            vocabulary.setdefault(pieces[0], len(vocabulary))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in dict.fromkeys(merges)))
        return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram model in which each known word is one token; 512 tokens at most."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), *((f"▁{word}", 0.0) for word in WORDS), ("▁", -20.0)]
    pieces += [(letter, -20.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = Tokenizer(Unigram(pieces, unk_id=2))
    words.pre_tokenizer = Metaspace(replacement="▁", prepend_scheme="always")
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0, "model_max_length": 512}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5TokenizerFast", **names}))
        return T5TokenizerFast.from_pretrained(folder)
