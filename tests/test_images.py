"""Images made around the loaded modules: in batches, with a VAE that waits its turn or decodes in tiles."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, UserError
from blockskip_hooks.inference.generate import VaePlacement, generate_images
from blockskip_hooks.inference.lora_files import with_adapter
from blockskip_hooks.loading import checkpoint_index
from blockskip_hooks.loading.checks import check_lora_file
from tests.tiny import TINY_FAMILIES, TinyFamily


def test_images_come_in_batches_and_alone_without_a_difference() -> None:
    """Chunks of a prompt's images, and a VAE that takes turns with the transformer, give the same images."""
    tiny = TINY_FAMILIES[0]
    family = tiny.make_family()
    vae = family.load_vae(torch.float32, "cpu")
    prompt = family.encode_prompts(family.load_text_pipeline(torch.float32, "cpu"), ["a photo of sks dog"])
    model = DiTBlockSkipTransformer.from_pretrained(tiny.folder, BlockSkipConfig(leading=1, trailing=1))
    kwargs = {"height": 32, "width": 32, "num_inference_steps": 2}
    on_host: list[int] = []
    original = model.on_host

    @contextlib.contextmanager
    def spy() -> Any:
        with original():
            on_host.append(1)
            yield

    model.on_host = spy  # type: ignore[method-assign]
    together, apart = (
        generate_images(
            prompt, family=family, model=model, vae=vae, seeds=[1, 2, 3], pipeline_kwargs=kwargs, **settings
        )[0]
        for settings in ({}, {"images_at_once": 2, "placement": VaePlacement(alone=True)})
    )
    assert len(on_host) == 2 and len(apart) == 3
    for one, other in zip(together, apart):
        difference = torch.from_numpy(np.asarray(one).astype(int) - np.asarray(other).astype(int))
        assert difference.abs().max() <= 1
    assert "decode" not in vars(vae) and not vae.use_slicing and not hasattr(vae, "_hf_hook")
    kwargs["callback_on_step_end_tensor_inputs"] = ["nothing"]
    model.train()
    with pytest.raises(UserError, match="^FluxPipeline makes no images with these settings"):
        generate_images(prompt, family=family, model=model, vae=vae, seeds=[1], pipeline_kwargs=kwargs)
    assert model.transformer.training and "decode" not in vars(vae)


def test_images_in_step_read_each_block_once_and_stay_the_same(
    tiny: TinyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two prompts, also where the VAE takes turns with the transformer: to the bit as one after the other."""
    family = tiny.make_family()
    vae = family.load_vae(torch.float32, "cpu")
    embeds = family.encode_prompts(
        family.load_text_pipeline(torch.float32, "cpu"), ["a photo of sks dog", "a cat", ""]
    )
    transformer = tiny.make_transformer()
    model = DiTBlockSkipTransformer.from_pretrained(
        tiny.folder,
        BlockSkipConfig(leading=1, trailing=1),
        stacks=family.block_stacks,
        transformer_class=type(transformer),
    )
    kwargs = json.loads((tiny.folder / "blockskip_defaults.json").read_text())["pipeline_kwargs"]
    reads, read = [], checkpoint_index.read_bytes
    monkeypatch.setattr(checkpoint_index, "read_bytes", lambda *args: (reads.append(args), read(*args)))
    streamed = [p for module in model.streamed_modules.values() for p in module.parameters()]
    decode = type(vae).decode

    def alone(*args: Any, **kwargs: Any) -> Any:
        # The images that go in step are all denoised before one is decoded.
        assert all(parameter.is_meta for parameter in streamed) and not model._streamer._ahead
        return decode(*args, **kwargs)

    monkeypatch.setattr(type(vae), "decode", alone)

    def images(**settings: Any) -> tuple[list[Any], int]:
        reads.clear()
        made = generate_images(
            embeds[:2],
            family=family,
            model=model,
            vae=vae,
            negative=None if family.negative_prompt is None else embeds[2],
            seeds=[1, 2],
            pipeline_kwargs=kwargs,
            images_at_once=1,
            **settings,
        )
        assert [len(of_prompt) for of_prompt in made] == [2, 2]
        return [np.asarray(image) for of_prompt in made for image in of_prompt], len(reads)

    one_by_one, all_reads = images()
    in_step, fewest = images(together=4)
    done: list[int] = []
    some, more = images(together=3, placement=VaePlacement(alone=True), progress=done.append)
    # Those that go in step count when all of them are done: a rate from the first would be wrong.
    assert done == [3, 1]
    assert fewest < all_reads / 3 and fewest < more < all_reads
    assert all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(one_by_one, in_step, some))


def test_vae_and_transformer_are_never_on_the_device_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The places that the VAE and the transformer's frozen weights are sent to, in order."""
    tiny = TINY_FAMILIES[0]
    family = tiny.make_family()
    vae = family.load_vae(torch.float32, "cpu")
    prompt = family.encode_prompts(family.load_text_pipeline(torch.float32, "cpu"), ["a photo of sks dog"])
    model = DiTBlockSkipTransformer.from_pretrained(tiny.folder, BlockSkipConfig(leading=1, trailing=1))
    events: list[str] = []
    move, decode, on_host, forward = type(vae).to, type(vae)._decode, model.on_host, type(model.transformer).forward

    def note(event: str, call: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            events.append(event)
            return call(*args, **kwargs)

        return noted

    @contextlib.contextmanager
    def host() -> Any:
        events.append("transformer away")
        with on_host():
            yield
        events.append("transformer back")

    # On a CPU the VAE is in place when it is asked to decode, so that move is missing.
    monkeypatch.setattr(type(vae), "to", note("vae moves", move))
    monkeypatch.setattr(type(vae), "_decode", note("decodes", decode))
    monkeypatch.setattr(type(model.transformer), "forward", note("denoises", forward))
    model.on_host = host  # type: ignore[method-assign]
    settings = {"height": 32, "width": 32, "num_inference_steps": 1}
    placement = VaePlacement(alone=True)
    generate_images(
        prompt, family=family, model=model, vae=vae, seeds=[1], pipeline_kwargs=settings, placement=placement
    )
    turns = ["denoises", "transformer away", "decodes", "vae moves", "transformer back"]
    assert events == ["vae moves", *turns, "vae moves"]


def test_every_vae_fetches_itself_when_it_decodes(tiny: TinyFamily) -> None:
    """What lets a VAE wait in host memory: diffusers' decoration of ``decode``, which calls accelerate's hook."""
    vae = tiny.make_family().load_vae(torch.float32, "cpu")
    fetched: list[bool] = []
    vae._hf_hook = SimpleNamespace(pre_forward=lambda module: fetched.append(module is vae))
    height, width = 64, 64
    vae.decode(torch.zeros(1, *tiny.make_family().vae_latent_shape(height, width)), return_dict=False)
    assert fetched == [True]


def test_tiling_ends_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TINY_FAMILIES[0]
    family = tiny.make_family()
    vae = family.load_vae(torch.float32, "cpu")
    prompt = family.encode_prompts(family.load_text_pipeline(torch.float32, "cpu"), ["a photo of sks dog"])
    model = DiTBlockSkipTransformer(tiny.make_transformer(), BlockSkipConfig(leading=1))
    tiled: list[bool] = []
    decode = type(vae)._decode

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        tiled.append(self.use_tiling)
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(type(vae), "_decode", spy)
    settings = {"height": 32, "width": 32, "num_inference_steps": 1}
    for placement in (VaePlacement(tiled=True), None):
        generate_images(
            prompt, family=family, model=model, vae=vae, seeds=[1], pipeline_kwargs=settings, placement=placement
        )
    assert tiled == [True, False] and not vae.use_tiling


@pytest.mark.parametrize(
    ("name", "layer", "stored"),
    [
        ("z-image", "layers.0.attention.to_q", "diffusion_model.layers.0.attention.to_q"),
        ("flux2-klein", "transformer_blocks.0.attn.to_q", "lycoris_transformer_blocks_0_attn_to_q"),
    ],
)
def test_a_lokr_file_takes_part_in_images_and_is_taken_off(name: str, layer: str, stored: str, tmp_path: Path) -> None:
    """In the names that other trainers give its tensors, where diffusers reads them."""
    (tiny,) = (tiny for tiny in TINY_FAMILIES if tiny.name == name)
    model = DiTBlockSkipTransformer(tiny.make_transformer(), BlockSkipConfig(), tiny.family.block_stacks)
    transformer: Any = model.transformer
    linear = transformer.get_submodule(layer)
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
    plain = linear(x)
    small, large = torch.eye(2), torch.full((linear.out_features // 2, linear.in_features // 2), 0.1)
    file = tmp_path / "lokr.safetensors"
    save_file({f"{stored}.lokr_w1": small, f"{stored}.lokr_w2": large, f"{stored}.alpha": torch.tensor(1.0)}, file)
    check_lora_file(file, transformer, "--lora_weights")
    family = tiny.make_family()
    with with_adapter(family, model, family.load_vae(torch.float32, "cpu"), file):
        changed = transformer.get_submodule(layer)(x)
        assert torch.allclose(changed - plain, x @ torch.kron(small, large).T, atol=1e-5)
    assert torch.equal(transformer.get_submodule(layer)(x), plain)
