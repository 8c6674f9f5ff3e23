"""The script ``evaluate.py``: images that are made once, what it leaves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from blockskip_hooks.embedded import embedded_photos, embedded_subjects
from blockskip_hooks.evaluation import images as evaluation_images
from blockskip_hooks.evaluation.prompt_lists import read_prompts, template_file
from blockskip_hooks.evaluation.report import draw_contact_sheet, earlier_loras
from tests.loras import save_large_lora
from tests.script import WEIGHTS, load_script, save_photos
from tests.test_image_encoders import save_clip, save_vit
from tests.tiny import TINY_FAMILIES


FLUX = TINY_FAMILIES[0]


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
    lora, output = save_large_lora(FLUX, tmp_path / "lora"), tmp_path / "out"
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
    lora = save_large_lora(family, tmp_path / "lora")
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
    plain, text = save_large_lora(FLUX, tmp_path / "plain"), save_large_lora(FLUX, tmp_path / "text", text=True)
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
    file = save_large_lora(FLUX, tmp_path / "lora") / WEIGHTS
    file.write_bytes(file.read_bytes()[:100] if damage == "cut" else b"")
    assert evaluate("--lora_weights", file, "--output_dir", tmp_path / "out") == 2
    assert "is not a whole safetensors file" in capsys.readouterr().err


def test_a_lora_of_another_model_and_a_missing_encoder_end_the_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lora = save_large_lora(FLUX, tmp_path / "lora")
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
