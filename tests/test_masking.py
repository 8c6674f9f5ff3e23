"""Masking: in chosen blocks the image does not see the text, and nothing else changes (section 3.4 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch.overrides import TorchFunctionMode

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer
from blockskip_hooks.blocks import list_blocks
from blockskip_hooks.search.masking import image_to_text_mask, text_masked_by_row
from tests.tiny import TINY_FAMILIES, TinyFamily


PROMPTS = ["a dog", "a photo of the red sks cat on a sunny beach"]
DISPATCHED = [tiny for tiny in TINY_FAMILIES if tiny.name in ("flux-dev", "flux2", "qwen-image", "z-image")]
JOINT = [tiny for tiny in TINY_FAMILIES if tiny.family.cross_attention is None]
CROSS = [tiny for tiny in TINY_FAMILIES if tiny.family.cross_attention is not None]


class Products(TorchFunctionMode):
    """Records what reaches torch's attention: queries, keys and the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            kwargs = dict(kwargs)
            query, key = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key")))
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.calls.append((query.detach(), key.detach(), mask))
        return func(*args, **(kwargs or {}))


def probabilities(call: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    query, key, mask = call
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def embeds_of(tiny: TinyFamily, prompts: list[str]) -> list[dict[str, torch.Tensor]]:
    family = tiny.make_family()
    return family.encode_prompts(family.load_text_pipeline(torch.float32, "cpu"), prompts)


def inputs_for(tiny: TinyFamily, embeds: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """A batch of prompts of different lengths, padded as in training."""
    family, transformer = tiny.make_family(), tiny.make_transformer()
    generator = torch.Generator().manual_seed(0)
    side = 2 * family.latent_token_size
    latents = torch.randn(len(embeds), *family.latent_shape(side, side), generator=generator)
    timesteps = torch.full((len(embeds),), float(family.scheduler.timesteps[400]))
    return family.transformer_inputs(transformer.config, latents, timesteps, family.collate_embeds(embeds))


@torch.no_grad()
def predict(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    output = model(**inputs, return_dict=False)[0]
    return output if isinstance(output, torch.Tensor) else torch.stack(list(output))


def readers(transformer: Any, family: Any) -> list[int]:
    """Indices of the blocks in which the image sees the text."""
    return [block.index for block in list_blocks(transformer, family.block_stacks) if block.only is None]


def text_masked(transformer: Any, family: Any, blocks: Iterable[int]) -> AbstractContextManager[None]:
    """The same blocks masked for every image."""
    return text_masked_by_row(transformer, family, [set(blocks)])


def image_part(tiny: TinyFamily, inputs: dict[str, Any], prediction: torch.Tensor) -> torch.Tensor:
    """The prediction without tokens of text, which some models return too."""
    if prediction.ndim == 3 and "indicator" in inputs:
        return prediction[:, (inputs["indicator"][0] == inputs["indicator"][0, 0])]
    # Qwen-Image 2.1's image is at the end.
    return prediction[:, -inputs["hidden_states"].shape[1] :] if "img_mask" in inputs else prediction


def test_with_every_block_masked_the_text_does_not_matter(tiny: TinyFamily):
    """Text tokens of other values; what else depends on the prompt (pooled embeddings, lengths) stays."""
    transformer, family = tiny.make_transformer().eval(), tiny.make_family()
    blocks = readers(transformer, family)
    embeds = embeds_of(tiny, PROMPTS)
    pooled = [name for name, tensor in embeds[0].items() if not tensor.is_floating_point() or "pooled" in name]
    others = [
        {name: t if name in pooled or "mask" in name else t.flip(0) + 0.5 for name, t in prompt.items()}
        for prompt in embeds
    ]
    inputs, changed = inputs_for(tiny, embeds), inputs_for(tiny, others)
    with text_masked(transformer, family, blocks):
        masked = [image_part(tiny, given, predict(transformer, given)) for given in (inputs, changed)]
    assert (masked[0] - masked[1]).abs().max() <= 1e-5
    for left_out in (blocks[0], blocks[-1]):
        with text_masked(transformer, family, set(blocks) - {left_out}):
            seen = [image_part(tiny, given, predict(transformer, given)) for given in (inputs, changed)]
        assert (seen[0] - seen[1]).abs().max() > 1e-4, left_out
    plain = [image_part(tiny, given, predict(transformer, given)) for given in (inputs, changed)]
    assert (plain[0] - masked[0]).abs().max() > 1e-4


@pytest.mark.parametrize("tiny", CROSS, ids=lambda tiny: tiny.name)
def test_a_masked_cross_attention_contributes_nothing_and_others_work_on(tiny: TinyFamily):
    """Outputs of the layers that read the text: zero in the masked block, the same before it, not zero after it."""
    transformer, family = tiny.make_transformer().eval(), tiny.make_family()
    inputs = inputs_for(tiny, embeds_of(tiny, PROMPTS))
    blocks = list_blocks(transformer, family.block_stacks)

    def contributions(masked: list[int]) -> list[torch.Tensor]:
        with text_masked(transformer, family, masked):
            seen: list[torch.Tensor] = []
            for block in blocks:
                layer = block.module.get_submodule(family.cross_attention)
                handles.append(layer.register_forward_hook(lambda module, args, output: seen.append(output)))
            predict(transformer, inputs)
            while handles:
                handles.pop().remove()
        return seen

    handles: list[Any] = []
    plain = contributions([])
    assert len(plain) == len(blocks) and all(output.any() for output in plain)
    for index in range(len(blocks)):
        masked = contributions([index])
        assert not masked[index].any()
        assert all(torch.equal(masked[before], plain[before]) for before in range(index))
        assert all(output.any() for output in masked[index + 1 :])


@pytest.mark.parametrize("tiny", JOINT, ids=lambda tiny: tiny.name)
def test_image_queries_lose_text_keys_and_nothing_else_changes(tiny: TinyFamily):
    """The probabilities of one masked block: those of image queries over image keys are renormalised."""
    transformer, family = tiny.make_transformer().eval(), tiny.make_family()
    inputs = inputs_for(tiny, embeds_of(tiny, PROMPTS))
    for block in list_blocks(transformer, family.block_stacks):
        calls: dict[bool, list] = {}
        for masks in (False, True):
            with Products() as products, text_masked(transformer, family, [block.index] if masks else []):
                predict(transformer, inputs)
            calls[masks] = products.calls
        assert len(calls[True]) == len(calls[False])
        changed = 0
        for plain, masked in zip(calls[False], calls[True]):
            length = masked[1].shape[-2]
            same_mask = plain[2] is None and masked[2] is None
            if same_mask or plain[2] is not None and masked[2] is not None and torch.equal(plain[2], masked[2]):
                continue
            changed += 1
            assert torch.equal(plain[0], masked[0]) and torch.equal(plain[1], masked[1])
            is_text = family.text_positions(transformer.config, inputs, length).expand(len(PROMPTS), -1)
            before, after = probabilities(plain), probabilities(masked)
            for row, text in enumerate(is_text):
                assert text.any() and not text.all()
                # Some models ask for image tokens, the last ones, in a call of their own.
                asked = text[-plain[0].shape[-2] :]
                image_rows = after[row][:, ~asked].nan_to_num()
                assert (image_rows[:, :, text] == 0).all()
                expected = before[row][:, ~asked].masked_fill(text, 0.0)
                expected = (expected / expected.sum(-1, keepdim=True)).nan_to_num()
                assert (image_rows - expected).abs().max() <= 1e-5
                torch.testing.assert_close(after[row][:, asked], before[row][:, asked], equal_nan=True)
            if changed == 1:
                break
        assert bool(changed) == (block.only is None), block.name


def test_without_the_hooks_the_model_is_what_it_was(tiny: TinyFamily):
    transformer, family = tiny.make_transformer().eval(), tiny.make_family()
    inputs = inputs_for(tiny, embeds_of(tiny, PROMPTS))
    before = predict(transformer, inputs)
    with text_masked(transformer, family, readers(transformer, family)[:2]):
        masked = predict(transformer, inputs)
    assert not torch.equal(masked, before)
    assert torch.equal(predict(transformer, inputs), before)
    with pytest.raises(ZeroDivisionError), text_masked(transformer, family, [0]):
        raise ZeroDivisionError
    assert torch.equal(predict(transformer, inputs), before)


def test_each_image_of_a_batch_has_masked_blocks_of_its_own(tiny: TinyFamily):
    """As if each were made alone, also in a batch of twice the size, which guidance asks for."""
    transformer, family = tiny.make_transformer().eval(), tiny.make_family()
    first, second, third, *_ = readers(transformer, family)
    rows: list[set[int]] = [{first, second}, {third}, set()]
    inputs = inputs_for(tiny, 6 * embeds_of(tiny, PROMPTS[1:]))
    expected = []
    for row in rows:
        with text_masked(transformer, family, row):
            expected.append(predict(transformer, inputs))
    with text_masked_by_row(transformer, family, rows):
        together = predict(transformer, inputs)
    assert not torch.allclose(expected[0], expected[1], atol=1e-5)
    for position in range(6):
        assert (together[position] - expected[position % 3][position]).abs().max() <= 1e-5


def test_streamed_blocks_are_masked_alike(tiny: TinyFamily):
    # Frozen as the streamed one is, or some CPUs round otherwise.
    transformer, family = tiny.make_transformer().eval().requires_grad_(False), tiny.make_family()
    inputs, chosen = inputs_for(tiny, embeds_of(tiny, PROMPTS)), readers(transformer, family)[0:3:2]
    with text_masked(transformer, family, chosen):
        expected = predict(transformer, inputs)
    model = DiTBlockSkipTransformer.from_pretrained(
        tiny.folder,
        BlockSkipConfig(leading=1, trailing=1),
        stacks=family.block_stacks,
        transformer_class=type(transformer),
    )
    with model.full_model() as streamed, text_masked(streamed, family, chosen):
        assert torch.equal(predict(streamed, inputs), expected)


def backends_of_this_machine(transformer: Any, inputs: dict[str, Any]) -> list[str]:
    """The dispatcher's backends that run here at all."""
    working = []
    for backend in AttentionBackendName:
        try:
            transformer.set_attention_backend(backend.value)
            predict(transformer, inputs)
        except Exception:  # each says in its own way that it needs another device or package
            continue
        working.append(backend.value)
    return working


@pytest.fixture
def restored_backend() -> Iterator[None]:
    """Choosing a model's backend makes it the process's own, too."""
    with attention_backend("native"):
        yield


@pytest.mark.usefixtures("restored_backend")
@pytest.mark.parametrize("tiny", DISPATCHED, ids=lambda tiny: tiny.name)
def test_every_backend_of_the_dispatcher_masks_alike(tiny: TinyFamily):
    transformer, family = tiny.make_transformer().eval(), tiny.make_family()
    inputs = inputs_for(tiny, embeds_of(tiny, PROMPTS[:1]))
    working = backends_of_this_machine(transformer, inputs)
    assert {"native", "_native_math"} <= set(working)
    transformer.set_attention_backend("native")
    plain = predict(transformer, inputs)
    with text_masked(transformer, family, [0, 2]):
        expected = predict(transformer, inputs)
    assert (expected - plain).abs().max() > 1e-4
    for backend in working:
        transformer.set_attention_backend(backend)
        with text_masked(transformer, family, [0, 2]):
            assert (predict(transformer, inputs) - expected).abs().max() <= 1e-5, backend
        assert (predict(transformer, inputs) - plain).abs().max() <= 1e-5, backend


def without_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None):
    """A backend as packages of kernels are: no mask, and not by torch's attention."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * (scale or query.shape[-1] ** -0.5)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


@pytest.mark.usefixtures("restored_backend")
@pytest.mark.parametrize("chosen_by", ["model", "process"])
@pytest.mark.parametrize("tiny", DISPATCHED, ids=lambda tiny: tiny.name)
def test_a_backend_without_masks_is_left_alone_in_masked_blocks(tiny: TinyFamily, chosen_by: str, monkeypatch):
    """Kernels that take no mask would show no harm of masking; the masked forward is the native one's."""
    registry, name = attention_dispatch._AttentionBackendRegistry, AttentionBackendName.FLASH
    calls = []
    monkeypatch.setitem(registry._backends, name, lambda **kwargs: calls.append(0) or without_torch(**kwargs))
    monkeypatch.setitem(registry._supported_arg_names, name, {"query", "key", "value", "scale"})
    transformer, family = tiny.make_transformer().eval(), tiny.make_family()
    inputs = inputs_for(tiny, embeds_of(tiny, PROMPTS[:1]))
    with text_masked(transformer, family, [0, 2]):
        expected = predict(transformer, inputs)
    if chosen_by == "process":
        registry.set_active_backend(name)
    else:
        for module in transformer.modules():
            if hasattr(getattr(module, "processor", None), "_attention_backend"):
                module.processor._attention_backend = name
    plain = predict(transformer, inputs)
    assert calls
    with text_masked(transformer, family, [0, 2]):
        masked = predict(transformer, inputs)
    assert (masked - plain).abs().max() > 1e-4
    assert (masked - expected).abs().max() <= 1e-5
    calls.clear()
    assert torch.equal(predict(transformer, inputs), plain) and calls


def test_an_attention_that_no_mask_reaches_is_refused():
    class Processor:
        def __call__(
            self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, *_: Any, **__: Any
        ) -> Any:
            return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)

    tiny = TINY_FAMILIES[0]
    transformer, family = tiny.make_transformer().eval(), tiny.make_family()
    transformer.transformer_blocks[0].attn.processor = Processor()
    inputs = tiny.make_inputs(1)
    with (
        text_masked(transformer, family, [0]),
        pytest.raises(ValueError, match="cannot be masked in transformer_blocks.0.* default attention processors"),
    ):
        predict(transformer, inputs)


def test_a_block_that_does_not_exist_is_named():
    tiny = TINY_FAMILIES[0]
    transformer = tiny.make_transformer()
    with pytest.raises(ValueError, match=r"Blocks \[1, 99\] cannot be masked: the \d+ blocks are 0 to \d+"):
        text_masked(transformer, tiny.make_family(), [99, 1]).__enter__()


def test_the_mask_of_a_sequence():
    mask = image_to_text_mask(torch.tensor([[True, False, False]]))
    assert mask is not None and mask.tolist() == [[[[True] * 3, [False, True, True], [False, True, True]]]]
    assert image_to_text_mask(torch.tensor([[False, False]])) is None
