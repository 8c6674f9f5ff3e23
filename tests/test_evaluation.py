"""Evaluation: measures against values by hand, prompts, and LoRAs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from blockskip_hooks.embedded import BACKGROUND_PHRASES, embedded_photos, embedded_subjects, unknown_words
from blockskip_hooks.evaluation.metrics import (
    diversity,
    embedded_gallery,
    encoder_label,
    evaluate_images,
    feature_distances,
    nearest_subjects,
    subject_fidelity,
    text_fidelity,
)
from blockskip_hooks.evaluation.prompt_fidelity import named_background, named_class, prompt_fidelity
from blockskip_hooks.evaluation.prompt_lists import embedded_prompts, read_prompts, subject_phrase, template_file
from blockskip_hooks.inference.image_encoders import ImageEncoder, load_image_encoder
from blockskip_hooks.inference.lora_files import changes_text, with_adapter
from blockskip_hooks.inference.streamed_model import load_image_transformer
from tests.loras import save_large_lora
from tests.script import WEIGHTS, load_script
from tests.test_image_encoders import save_clip
from tests.tiny import TINY_FAMILIES, TinyFamily


FLUX = TINY_FAMILIES[0]


class ColourEncoder(ImageEncoder):
    """Mean colour as the embedding; as maps, the colours of 2 x 2 cells and the mean colour."""

    name = "colour"

    def _features(self, images: list[Image.Image]) -> torch.Tensor:
        return self._layers(images)[1].flatten(1)

    def _layers(self, images: list[Image.Image]) -> list[torch.Tensor]:
        pixels = torch.tensor([list(image.resize((2, 2), Image.Resampling.BOX).getdata()) for image in images])
        cells = pixels.float().reshape(-1, 2, 2, 3).movedim(-1, 1)
        return [cells, F.avg_pool2d(cells, 2)]


def photos_of(subject: str) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(embedded_photos(subject).glob("*.png"))]


# Measures


def test_cosines_are_those_by_hand():
    images, photos = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.8, 0.6]])
    assert subject_fidelity(images, photos).tolist() == pytest.approx([(0 + 1 + 0.8) / 3, (0.8 + 0.6 + 0.96) / 3])
    assert text_fidelity(images, photos[:2]).tolist() == pytest.approx([0.0, 0.6])
    assert nearest_subjects(images, {"a": photos[:1], "b": photos[1:]}) == ["b", "a"]
    assert nearest_subjects(images, {"a": photos[:1], "b": -photos}) == ["a", "a"]


def test_feature_distances_are_those_by_hand():
    """Two maps; in the first, one of two places is turned by a right angle, in the second the only one by 180."""
    first = torch.tensor([[[[3.0, 1.0]], [[0.0, 0.0]]], [[[7.0, 0.0]], [[0.0, 5.0]]]])
    second = torch.tensor([[[[1.0]], [[0.0]]], [[[-2.0]], [[0.0]]]])
    distances = feature_distances([first, second])
    torch.testing.assert_close(distances, torch.tensor([[0.0, (1.0 + 4.0) / 2], [(1.0 + 4.0) / 2, 0.0]]))
    # The pairs of three images: two that are alike, and each of them with the other one.
    assert diversity([first[[0, 1, 1]]]) == pytest.approx((1.0 + 1.0 + 0.0) / 3)
    with pytest.raises(ValueError, match="not of 1"):
        diversity([first[:1]])


def test_measures_of_images_of_one_colour():
    red, green, yellow = (Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (255, 255, 0)))
    measured = evaluate_images([red, green, yellow, yellow], [red, yellow], ColourEncoder(), ["a", "a", "b", "b"])
    half = 2**-0.5
    expected = [(1 + half) / 2, half / 2, (half + 1) / 2, (half + 1) / 2]
    assert [values["colour"] for values in measured.images] == pytest.approx(expected, abs=1e-6)
    assert measured.diversity == pytest.approx({"a": 2.0, "b": 0.0})
    aggregate = measured.aggregate()
    assert aggregate["colour"]["mean"] == pytest.approx(sum(expected) / 4, abs=1e-4)
    assert aggregate["diversity"] == {"mean": 1.0, "low": 0.0, "high": 2.0, "values": 2}
    assert aggregate["colour"]["low"] < aggregate["colour"]["mean"] < aggregate["colour"]["high"]


def test_images_of_a_prompt_in_two_places_are_refused():
    images = [Image.new("RGB", (8, 8), "red")] * 3
    with pytest.raises(ValueError, match="two places"):
        evaluate_images(images, images[:1], ColourEncoder(), ["a", "b", "a"])


def test_clip_gives_similarity_to_photos_and_to_the_description_of_the_prompt(tmp_path: Path):
    torch.manual_seed(0)
    save_clip(tmp_path / "tiny-clip")
    encoder = load_image_encoder(tmp_path / "tiny-clip")
    images, photos = photos_of("cat")[:2], photos_of("dog")
    measured = evaluate_images(images, photos, encoder, ["a sks dog"] * 2, descriptions={"a sks dog": "a red dog"})
    vectors = encoder.embed(images)
    assert [row["tiny-clip-I"] for row in measured.images] == pytest.approx(
        (vectors @ encoder.embed(photos).T).mean(1).tolist(), abs=1e-5
    )
    assert [row["tiny-clip-T"] for row in measured.images] == pytest.approx(
        (vectors @ encoder.embed_text(["a red dog"])[0]).tolist(), abs=1e-5
    )
    assert measured.diversity["a sks dog"] == pytest.approx(diversity(encoder.spatial_features(images)))


@pytest.mark.parametrize(
    ("source", "label"),
    [("dino", "DINO"), ("facebook/dino-vits16", "DINO"), ("clip", "CLIP"), ("a/folder/", "folder"), ("x/y", "y")],
)
def test_labels_of_encoders(source: str, label: str):
    assert encoder_label(source) == label


# The embedded encoder


def test_photos_have_the_background_and_class_that_they_were_made_with():
    encoder = load_image_encoder("subject")
    for name, subject in embedded_subjects().items():
        prompts = [f"{subject['instance_prompt']} {BACKGROUND_PHRASES[place]}" for place in subject["backgrounds"]]
        right = prompt_fidelity(photos_of(name), prompts, encoder)
        wrong = prompt_fidelity(photos_of(name), prompts[1:] + prompts[:1], encoder)
        assert right["background_right"] == [1.0] * 5 and wrong["background_right"] == [0.0] * 5, name
    assert prompt_fidelity(photos_of("dog")[:1], ["a photo of a dog"], encoder) == {
        "background_right": [None],
        "class_right": [1.0],
    }


def test_what_a_prompt_names():
    assert named_background("A photo of sks dog  on the Beach") == "beach"
    assert named_background("a photo of a dog") is None
    assert named_background("a dog at night on the beach") is None
    classes = ["teddy bear", "dog", "boot"]
    assert named_class("a photo of sks teddy bear at night", classes) == "teddy bear"
    assert named_class("a photo of boots", classes) is None
    assert named_class("a dog in a boot", classes) is None


def test_photos_of_the_subject_beat_those_of_another_and_copies_have_no_diversity():
    encoder = load_image_encoder("subject")
    dog, cat = photos_of("dog"), photos_of("cat")
    prompts = ["a photo of a dog"] * 3
    own, other, copies = (
        evaluate_images(images, dog, encoder, prompts, subject="dog").aggregate()
        for images in (dog[:3], cat[:3], [dog[0]] * 3)
    )
    assert own["subject"]["mean"] > other["subject"]["mean"] + 0.3
    assert (own["retrieved"]["mean"], other["retrieved"]["mean"]) == (1.0, 0.0)
    assert (own["class_right"]["mean"], other["class_right"]["mean"]) == (1.0, 0.0)
    assert "background_right" not in own
    assert copies["diversity"]["mean"] == pytest.approx(0.0, abs=1e-6) and own["diversity"]["mean"] > 0.1
    assert set(embedded_gallery(encoder)) == set(embedded_subjects())


# Prompts


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("object", {"recontextualisation": 20, "property": 5}),
        ("live", {"recontextualisation": 10, "accessory": 10, "property": 5}),
    ],
)
def test_shipped_prompts(kind: str, counts: dict[str, int]):
    prompts = read_prompts(template_file(kind), "sks dog", "a dog")
    assert {name: sum(prompt.kind == name for prompt in prompts) for name in counts} == counts
    assert len(prompts) == 25
    for prompt in prompts:
        assert prompt.text.count("sks dog") == 1 and prompt.text.replace("sks dog", "a dog") == prompt.description


def test_a_subject_of_ones_own_is_shown_on_the_backgrounds_that_the_embedded_model_knows():
    load = load_script("evaluate")
    words = ["--instance_data_dir", "photos", "--instance_prompt", "a photo of sks mug", "--class_phrase", "a mug"]
    prompts = load.find_prompts(load.build_parser().parse_args(words))
    assert len(prompts) == len(BACKGROUND_PHRASES) == 10
    assert prompts[0].text == "a photo of sks mug on a red background"
    assert prompts[0].description == "a photo of a mug on a red background"
    assert not any(unknown_words(prompt.text) for prompt in prompts)


def test_prompts_of_the_embedded_subjects_say_what_they_show_in_plain_words():
    for name, subject in embedded_subjects().items():
        prompts = embedded_prompts(name)
        assert [prompt.text for prompt in prompts] == subject["validation_prompts"]
        assert all("sks" not in prompt.description for prompt in prompts)


def test_phrase_of_an_instance_prompt():
    assert subject_phrase("a photo of sks dog") == "sks dog"
    assert subject_phrase("sks dog") == "sks dog"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{} here\na dog\n", r"line 2 has no \{\}"),
        ("{} here\n\n{} here\n", "line 3 repeats"),
        ("# place\n", "holds no prompt"),
        (None, "is not a file"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used(text: str | None, reason: str, tmp_path: Path):
    file = tmp_path / "prompts.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        read_prompts(file, "sks dog", "a dog")
    assert "\n" not in str(error.value) and str(file) in str(error.value)


# LoRAs


def test_a_lora_changes_the_model_while_it_is_on(tiny: TinyFamily, tmp_path: Path):
    lora = save_large_lora(tiny, tmp_path) / WEIGHTS
    family, device = tiny.make_family(), torch.device("cpu")
    model = load_image_transformer(family, dtype=torch.float32, device=device, takes_lora=True)
    vae, inputs = family.load_vae(torch.float32, device), tiny.make_inputs(1)

    @torch.no_grad()
    def predict() -> torch.Tensor:
        output = model.transformer(**inputs, return_dict=False)[0]
        return output if isinstance(output, torch.Tensor) else torch.stack(list(output))

    assert not changes_text(family, lora)
    plain, keys = predict(), set(model.transformer.state_dict())
    with with_adapter(family, model, vae, lora):
        assert (predict() - plain).abs().max() > 1e-3
    assert torch.equal(predict(), plain) and set(model.transformer.state_dict()) == keys
