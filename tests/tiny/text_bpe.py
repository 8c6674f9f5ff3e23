"""Byte-level byte-pair tokenizers of the real classes, in which each known word is one token."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PixtralImageProcessor, PixtralProcessor, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.utils import is_torchvision_available

from .text import WORDS


# Words that chat templates and the system prompt of Qwen-Image are made of.
TEMPLATE_WORDS = (
    "system user assistant Describe the image by detailing the color shape size texture quantity text spatial "
    "relationships of the objects and background"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Without the system message, which alone is longer than the prompts of tests are allowed to be.
MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST]{% for part in message['content'] %}{{ part['text'] }}{% endfor %}[/INST]{% endif %}{% endfor %}"
)


def _byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges; a word with and without a space before it is one token."""
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys([*WORDS, *TEMPLATE_WORDS.split()]):
        for spelling in (word, f"Ġ{word}"):
            pieces = _split(spelling, merges)
            while len(pieces) > 1:
                merges.append((pieces[0], pieces[1]))
                pieces[:2] = ["".join(pieces[:2])]
                vocabulary.setdefault(pieces[0], len(vocabulary))
    return vocabulary, merges


def _split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The pieces that earlier merges leave of a word. New merges come after all others, so words stay whole."""
    pieces = list(word)
    for pair in merges:
        position = 0
        while position < len(pieces) - 1:
            if (pieces[position], pieces[position + 1]) == pair:
                pieces[position : position + 2] = ["".join(pair)]
            position += 1
    return pieces


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Tokenizer of Qwen2 and Qwen3 with a chat template."""
    vocabulary, merges = _byte_pairs()
    words = Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=512)
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    words.chat_template = QWEN_TEMPLATE
    return words


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of Mistral 3 with a chat template that leaves the system message out."""
    vocabulary, merges = _byte_pairs()
    backend = Tokenizer(BPE(vocabulary, merges))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"],
        padding_side="left",
        model_max_length=512,
        chat_template=MISTRAL_TEMPLATE,
    )


def pixtral_processor() -> PixtralProcessor | PreTrainedTokenizerFast:
    """Processor of Mistral 3; without torchvision, which it insists on, its tokenizer: for text they do the same."""
    words = mistral_tokenizer()
    if not is_torchvision_available():
        return words
    images = PixtralImageProcessor(size={"longest_edge": 28}, patch_size=14)
    return PixtralProcessor(images, words, patch_size=14, chat_template=MISTRAL_TEMPLATE)
