"""Evaluation: measures against values by hand, prompts, images that are made once, and what evaluate.py leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image

from blockskip_hooks.embedded import BACKGROUND_PHRASES, embedded_photos, embedded_subjects, unknown_words
from blockskip_hooks.evaluation import images as evaluation_images
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
from blockskip_hooks.evaluation.report import draw_contact_sheet, earlier_loras
from blockskip_hooks.inference.image_encoders import ImageEncoder, load_image_encoder
from blockskip_hooks.inference.lora_files import changes_text, with_adapter
from blockskip_hooks.inference.streamed_model import load_image_transformer
from blockskip_hooks.loading.lora_files import save_lora
from blockskip_hooks.lora import add_lora
from tests.script import WEIGHTS, load_script, save_photos
from tests.test_image_encoders import save_clip, save_vit
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


def random_lora(tiny: TinyFamily, folder: Path, text: bool = False) -> Path:
    """A LoRA of large random weights on the transformer, or on the first text encoder as well."""
    family, modules = tiny.make_family(), {"transformer": tiny.make_transformer()}
    if text:
        name = family.trained_text_components[0]
        modules[name] = getattr(family.load_text_pipeline(torch.float32, "cpu"), name)
    for module in modules.values():
        layers = [name for name, child in module.named_modules() if isinstance(child, torch.nn.Linear)]
        targets = [name for name in layers if name.endswith((".to_q", ".q_proj", ".to_k", ".qkv"))]
        for parameter in add_lora(module, targets, rank=2, alpha=4, dropout=0.0, seed=0):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    encoders = {name: module for name, module in modules.items() if name != "transformer"}
    save_lora(folder, type(family), modules["transformer"], encoders)
    return folder


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
    lora = random_lora(tiny, tmp_path) / WEIGHTS
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


# The script


def evaluate(*flags: Any) -> int:
    """Run evaluate.py."""
    # Accelerate's state lives as long as the process; a run of its own would start without.
    AcceleratorState._reset_state(reset_partial_state=True)
    return load_script("evaluate").main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def tiny_flags(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Flags for the tiny FLUX with a tiny CLIP and a tiny DINO."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    save_clip(folder / "tiny-clip")
    save_vit(folder / "tiny-dino")
    (folder / "prompts.txt").write_text("# place\n{} on a red cat\n{} on a beach\n")
    return [
        *("--pretrained_model_name_or_path", FLUX.folder),
        *("--instance_data_dir", save_photos(folder / "photos", [(40, 32), (32, 32)])),
        *("--instance_prompt", "a photo of sks dog", "--class_phrase", "a dog"),
        *("--prompts", folder / "prompts.txt", "--max_sequence_length", 12),
        *("--encoders", folder / "tiny-dino", folder / "tiny-clip"),
        *("--resolution", 16, "--num_inference_steps", 2, "--images_per_prompt", 2),
    ]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of the images that are made."""
    seeds: list[int] = []
    generate = evaluation_images.generate_images

    def counted(*args: Any, **kwargs: Any) -> list[list[Image.Image]]:
        seeds.extend(kwargs["seeds"])
        return generate(*args, **kwargs)

    monkeypatch.setattr(evaluation_images, "generate_images", counted)
    return seeds


def test_script_measures_models_with_and_without_a_lora(
    tiny_flags: list[Any], made: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lora, output = random_lora(FLUX, tmp_path / "lora"), tmp_path / "out"
    assert evaluate(*tiny_flags, "--lora_weights", "none", lora, "--output_dir", output) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["schema"] == 1 and results["family"] == "flux"
    assert results["encoders"].keys() == {"tiny-dino", "tiny-clip"} and results["encoder_quality"] == {}
    assert results["diversity_encoder"] == "tiny-dino" and results["seeds"] == [0, 1]
    assert results["prompts"][0] == {
        "text": "sks dog on a red cat",
        "description": "a dog on a red cat",
        "kind": "place",
    }
    assert results["settings"]["pipeline_kwargs"] == {"height": 16, "width": 16, "num_inference_steps": 2}
    assert results["versions"]["blockskip_hooks"] and results["photos"] == ["0.png", "1.png"]
    measures = {"tiny-dino", "tiny-clip-I", "tiny-clip-T"}
    assert results["measures"].keys() == {*measures, "diversity"}
    base, adapted = results["results"]
    assert (base["name"], base["lora"], adapted["name"]) == ("base", None, "lora")
    for row in (base, adapted):
        assert [(image["prompt"], image["seed"]) for image in row["images"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert all(image["measures"].keys() == measures for image in row["images"])
        assert all((output / image["file"]).is_file() for image in row["images"])
        mean = sum(image["measures"]["tiny-clip-T"] for image in row["images"]) / 4
        assert row["aggregate"]["tiny-clip-T"]["mean"] == pytest.approx(mean, abs=1e-4)
        assert row["aggregate"]["diversity"]["mean"] == pytest.approx(sum(row["diversity_by_prompt"]) / 2, abs=1e-4)
    assert base["aggregate"] != adapted["aggregate"]
    assert (output / "contact_sheet_base.png").is_file() and (output / "contact_sheet_lora.png").is_file()
    table = (output / "results.md").read_text()
    assert f"| lora | {adapted['aggregate']['tiny-dino']['mean']:.3f} [" in table
    assert table in capsys.readouterr().out
    assert made == [0, 1] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "sana", "pixart-sigma", "qwen-image"])
def test_other_families_with_and_without_a_lora(name: str, tiny_flags: list[Any], tmp_path: Path):
    (family,) = (tiny for tiny in TINY_FAMILIES if tiny.name == name)
    lora = random_lora(family, tmp_path / "lora")
    flags = ["--pretrained_model_name_or_path", family.folder, "--max_sequence_length", family.text_tokens]
    flags += ["--resolution", 64, "--lora_weights", "none", lora, "--output_dir", tmp_path / "out"]
    assert evaluate(*tiny_flags, *flags) == 0
    base, adapted = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    for first, second in zip(base["images"], adapted["images"], strict=True):
        assert first["measures"] != second["measures"]


def test_a_stopped_evaluation_says_how_to_go_on_and_what_the_model_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(load_script("evaluate"), "make_images", stop)
    flags = ["--instance_data_dir", embedded_photos("dog"), "--instance_prompt", "photograph of my sks dog, 8k"]
    assert evaluate(*flags, "--output_dir", tmp_path / "out") == 130
    said = capsys.readouterr()
    assert "Prompt   a photo of photograph of my sks dog, 8k on a red background (the first one)\n" in said.out
    assert f"goes on from the finished images in {tmp_path / 'out'}." in said.err


def test_loras_of_one_name_are_told_apart_by_their_folders(tmp_path: Path):
    folders = [tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2", tmp_path / "c"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / WEIGHTS).touch()
    sources = ["none", folders[0], folders[1] / WEIGHTS, folders[2] / WEIGHTS]
    names = load_script("evaluate").name_loras([str(source) for source in sources])
    assert list(names) == ["base", "a/checkpoint-2", "b/checkpoint-2", "c"]


def test_results_of_something_else_are_not_replaced(tmp_path: Path):
    assert earlier_loras(tmp_path) == []
    (tmp_path / "results.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="results.json is of no evaluation and would be replaced"):
        earlier_loras(tmp_path)


def test_a_killed_evaluation_makes_only_what_is_missing(
    tiny_flags: list[Any], made: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert evaluate(*tiny_flags, "--output_dir", tmp_path) == 0
    first = json.loads((tmp_path / "results.json").read_text())["results"]
    made.clear()
    assert evaluate(*tiny_flags, "--output_dir", tmp_path) == 0
    assert made == []
    (tmp_path / first[0]["images"][3]["file"]).unlink()
    assert evaluate(*tiny_flags, "--output_dir", tmp_path) == 0
    assert made == [1]
    assert json.loads((tmp_path / "results.json").read_text())["results"] == first
    made.clear()
    capsys.readouterr()
    (tmp_path / "results.json").write_text('{"results": [{"name": "a/gone"}]}')
    for name in ("a_gone", "mine"):
        (tmp_path / f"contact_sheet_{name}.png").touch()
    assert evaluate(*tiny_flags, "--guidance_scale", 9, "--output_dir", tmp_path) == 0
    assert len(made) == 4
    assert "Output   replaces the results of a/gone\n" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {"contact_sheet_base.png", "contact_sheet_mine.png"}
    assert json.loads((tmp_path / "results.json").read_text())["results"][0]["aggregate"] != first[0]["aggregate"]


def test_a_lora_of_the_text_encoder_takes_part(tiny_flags: list[Any], tmp_path: Path):
    """Its transformer part is that of the other LoRA, so another image is the text's doing."""
    plain, text = random_lora(FLUX, tmp_path / "plain"), random_lora(FLUX, tmp_path / "text", text=True)
    assert evaluate(*tiny_flags, "--lora_weights", plain, text, "--output_dir", tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    first, second = ((tmp_path / "out" / row["images"][0]["file"]).read_bytes() for row in rows)
    assert first != second


def test_script_evaluates_the_embedded_model_without_any_flag_about_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--subject", "robot", "--seeds", 5, "--num_inference_steps", 1, "--output_dir", tmp_path]
    assert evaluate(*flags) == 0
    # A log gets lines, no bars.
    said = capsys.readouterr().err
    assert "Images: 5/5 images (100%)" in said and "Measured: 5/5 images (100%)" in said and "\r" not in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert [prompt["text"] for prompt in results["prompts"]] == embedded_subjects()["robot"]["validation_prompts"]
    assert results["measures"].keys() == {"subject", "retrieved", "background_right", "class_right"}
    assert (
        "99.2%" in results["encoder_quality"]["subject"] and "MODEL_CARD.md" in results["encoder_quality"]["subject"]
    )
    assert "encoder_quality: subject finds" in (tmp_path / "results.md").read_text()


def test_contact_sheet_of_many_prompts_is_no_strip(tmp_path: Path):
    prompts = read_prompts(template_file("object"), "sks teapot", "a teapot")
    picture = Image.new("RGB", (300, 200), "red")
    notes = [["DINO 0.71", "CLIP-I 0.80"]] * 25
    draw_contact_sheet([picture] * 40, [[picture] * 2] * 25, prompts, [0, 1], notes, tmp_path / "sheet.png")
    width, height = Image.open(tmp_path / "sheet.png").size
    assert height < 2.5 * width


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--subject", "unicorn"], "--subject is unicorn; the embedded subjects are robot"),
        (["--lora_weights", "nowhere"], "--lora_weights nowhere is no file"),
        (["--lora_weights", "none", "none"], "--lora_weights names none twice"),
        (["--images_per_prompt", "0"], "--images_per_prompt is 0"),
        (["--images_per_prompt", "3", "--seeds", "1"], "--images_per_prompt is 3 and --seeds 1"),
        (["--output_dir", "FILE"], "is a file; name a folder"),
        (["--seeds", "1", "1"], "--seeds names a seed twice"),
        (["--resolution", "63"], "--resolution is 63"),
        (["--encoders", "offline"], "--encoders offline"),
        (["--encoders", "subject", "subject"], "two that are called subject"),
        (["--class_kind", "live"], "--class_kind has no effect"),
        (["--instance_data_dir", "nowhere"], "--instance_data_dir nowhere does not exist"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt is not a file"),
        (["--pretrained_model_name_or_path", "TINY"], "--instance_data_dir is missing"),
        (["--pretrained_model_name_or_path", "TINY", "--subject", "dog"], "--subject is for the embedded model"),
        (["--pretrained_model_name_or_path", "TINY", "--instance_data_dir", "DOG"], "--instance_prompt is missing"),
        (["--instance_data_dir", "DOG", "--instance_prompt", "x", "--class_kind", "live"], "--class_kind chooses"),
        (
            ["--pretrained_model_name_or_path", "TINY", "--instance_data_dir", "DOG", "--instance_prompt", "x"],
            "--class_kind is missing",
        ),
        (
            [
                *("--pretrained_model_name_or_path", "TINY", "--instance_data_dir", "DOG", "--instance_prompt", "x"),
                *("--class_kind", "live", "--encoders", "subject"),
            ],
            "--encoders subject only knows",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(
    flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    places = {"TINY": FLUX.folder, "DOG": embedded_photos("dog"), "FILE": Path(__file__)}
    capsys.readouterr()  # What was said while the tiny model was made.
    assert evaluate("--output_dir", tmp_path / "out", *(places.get(flag, flag) for flag in flags)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and reason in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_lora_that_cannot_be_read_is_refused(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = random_lora(FLUX, tmp_path / "lora") / WEIGHTS
    file.write_bytes(file.read_bytes()[:100] if damage == "cut" else b"")
    assert evaluate("--lora_weights", file, "--output_dir", tmp_path / "out") == 2
    assert "is not a whole safetensors file" in capsys.readouterr().err


def test_a_lora_of_another_model_and_a_missing_encoder_end_the_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lora = random_lora(FLUX, tmp_path / "lora")
    assert evaluate("--lora_weights", lora, "--seeds", 0, "--output_dir", tmp_path / "out") == 2
    assert "is of another model" in capsys.readouterr().err
    assert evaluate("--encoders", "nobody/nothing", "--output_dir", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "error: The image encoder nobody/nothing cannot be loaded" in error
    assert error.endswith("name a folder or a hub id that can be reached or subject.\n")


@pytest.mark.parametrize(("name", "noted"), [("flux-kontext", True), ("flux-dev", False)])
def test_condition_images_that_are_not_used_are_said(
    name: str, noted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By both scripts that make images of prompts, before anything is loaded."""
    model = next(tiny.folder for tiny in TINY_FAMILIES if tiny.name == name)
    common = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(tmp_path / "out")]
    subject = ["--instance_data_dir", str(embedded_photos("dog")), "--instance_prompt", "a photo of sks dog"]
    assert evaluate(*common, *subject, "--class_kind", "live", "--encoders", "nobody/nothing") == 1
    assert load_script("select_blocks").main([*common, "--encoder", "nobody/nothing"]) == 1
    said = capsys.readouterr().out
    assert said.count("condition images that a LoRA was trained with are not used") == (2 if noted else 0)
