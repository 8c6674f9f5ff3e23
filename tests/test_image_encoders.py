"""Image encoders: lengths and order of embeddings, what tells images apart, and which text belongs to which image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from blockskip_hooks.embedded import embedded_photos, embedded_subjects
from blockskip_hooks.inference.image_encoders import ImageEncoder, load_image_encoder
from tests.tiny.text import clip_tokenizer


WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE = {"image_size": 32, "patch_size": 8}


def save_vit(folder: Path) -> None:
    """DINO's class: a vision transformer."""
    ViTModel(ViTConfig(**WIDTH, **SIZE, intermediate_size=32)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def save_dinov2(folder: Path) -> None:
    Dinov2Model(Dinov2Config(**WIDTH, **SIZE)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def save_clip(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    text = {"vocab_size": len(tokenizer), "intermediate_size": 32, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**WIDTH, **SIZE, "intermediate_size": 32}
    config = CLIPConfig(text_config={**WIDTH, **text}, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


SAVERS = {"vit": save_vit, "dinov2": save_dinov2, "clip": save_clip}
NAMES = ["subject", "offline", *SAVERS]


@pytest.fixture(scope="module", params=NAMES)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageEncoder:
    return make(request.param, tmp_path_factory.mktemp("encoder"))


def make(name: str, folder: Path) -> ImageEncoder:
    if name not in SAVERS:
        return load_image_encoder(name)
    torch.manual_seed(0)
    SAVERS[name](folder)
    return load_image_encoder(folder)


def photos(subject: str) -> list[Image.Image]:
    return [Image.open(path) for path in sorted(embedded_photos(subject).glob("*.png"))]


def test_embeddings_have_length_1_and_do_not_depend_on_the_batch(encoder: ImageEncoder):
    images = [*photos("dog"), photos("cat")[0].convert("L"), photos("cat")[1].resize((40, 96))]
    together, one_by_one = encoder.embed(images), encoder.embed(images, batch_size=1)
    assert together.shape[0] == len(images) and together.dtype == torch.float32
    assert torch.allclose(together.norm(dim=1), torch.ones(len(images)), atol=1e-5)
    assert torch.allclose(together, one_by_one, atol=1e-5)


def test_an_image_is_nearest_to_itself(encoder: ImageEncoder):
    images = [photo for subject in embedded_subjects() for photo in photos(subject)]
    similarity = encoder.embed(images) @ encoder.embed(images).T
    assert similarity.argmax(1).tolist() == list(range(len(images)))


def test_spatial_features_say_where_a_change_is(encoder: ImageEncoder):
    """A black corner changes the maps' own corner more than the opposite one, at the first depth."""
    picture = photos("dog")[0].convert("RGB")
    changed = picture.copy()
    changed.paste("black", (0, 0, 32, 32))
    layers = encoder.spatial_features([picture, changed])
    assert all(layer.ndim == 4 and len(layer) == 2 and layer.dtype == torch.float32 for layer in layers)
    difference = (layers[0][0] - layers[0][1]).norm(dim=0)
    assert difference[0, 0] > 2 * difference[-1, -1]


@pytest.mark.parametrize(("name", "prefix"), [("vit", 1), ("dinov2", 1), ("clip", 1)])
def test_spatial_features_are_the_hidden_states_of_the_patches(name: str, prefix: int, tmp_path: Path):
    encoder = make(name, tmp_path)
    model = AutoModel.from_pretrained(tmp_path).eval()
    model = model.vision_model if name == "clip" else model
    picture = photos("dog")[0].convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(images=[picture], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    layers = encoder.spatial_features([picture])
    assert len(layers) == len(states) - 1 == 2
    for layer, state in zip(layers, states[1:]):
        assert layer.shape == (1, 16, 4, 4)
        torch.testing.assert_close(layer[0, :, 1, 2], state[0, prefix + 4 + 2])


def test_class_token_is_that_of_the_model(tmp_path: Path):
    encoder = make("vit", tmp_path)
    image = photos("dog")[0].convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    pixels = ViTImageProcessor(size={"height": 32, "width": 32})(images=[image], return_tensors="pt")["pixel_values"]
    model = ViTModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert torch.allclose(encoder.embed([image]), expected / expected.norm(), atol=1e-5)


def test_clip_scores_are_those_of_the_whole_model(tmp_path: Path):
    encoder = make("clip", tmp_path)
    prompts = ["a photo of a dog", "a red cat"]
    model, tokens = CLIPModel.from_pretrained(tmp_path).eval(), clip_tokenizer()(prompts, padding=True)
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    images = photos("dog")[:2]
    with torch.no_grad():
        expected = (
            model(
                pixel_values=processor(images=images, return_tensors="pt")["pixel_values"],
                **{name: torch.tensor(value) for name, value in tokens.items()},
            ).logits_per_image
            / model.logit_scale.exp()
        )
    assert encoder.reads_text
    assert torch.allclose(encoder.embed(images) @ encoder.embed_text(prompts).T, expected, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "clip"])
def test_encoders_without_text_say_so(name: str, tmp_path: Path):
    encoder = make(name, tmp_path)
    assert not encoder.reads_text
    with pytest.raises(ValueError, match="does not read text"):
        encoder.embed_text(["a dog"])


def test_subject_encoder_finds_other_photos_of_the_same_subject():
    owners = [subject for subject in embedded_subjects() for _ in photos(subject)]
    embeddings = load_image_encoder("subject").embed([p for subject in embedded_subjects() for p in photos(subject)])
    nearest = (embeddings @ embeddings.T - 2 * torch.eye(len(owners))).argmax(1).tolist()
    assert sum(owners[i] == owner for i, owner in zip(nearest, owners, strict=True)) >= 0.85 * len(owners)


def test_offline_encoder_sees_a_change_of_layout_and_of_colour():
    encoder = load_image_encoder("offline")
    picture = photos("robot")[0].convert("RGB")
    slightly = picture.point(lambda value: min(255, value + 4))
    flipped = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    recoloured = Image.merge("RGB", picture.split()[::-1])
    original, *others = encoder.embed([picture, slightly, flipped, recoloured])
    distances = [1 - float(original @ other) for other in others]
    assert distances[0] < 0.02 < 0.05 < min(distances[1:])


@pytest.mark.parametrize("source", ["nobody/nothing", "empty"])
def test_a_missing_encoder_is_refused_in_one_line(source: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_image_encoder(tmp_path / source if source == "empty" else source)
    assert "\n" not in str(error.value) and source in str(error.value)
