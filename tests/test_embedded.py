"""The embedded model, photos and encoder: what the README's first command stands on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from blockskip_hooks.cli.arguments import build_parser, parse_args
from blockskip_hooks.cli.preparation import prepare_run
from blockskip_hooks.data.photo_set import PhotoSet
from blockskip_hooks.data.photos import scan_photos
from blockskip_hooks.embedded import BEST_CLASSES, embedded_model, embedded_photos, embedded_subjects, unknown_words
from blockskip_hooks.families import detect_family
from blockskip_hooks.families.flux import Flux
from blockskip_hooks.inference.subject_encoder import SubjectEncoder
from blockskip_hooks.loading.model_defaults import model_defaults
from blockskip_hooks.reporting.model_card import usage_snippet


ROOT = Path(__file__).parents[1]
MIB = 2**20


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def photos_as_tensor(subject: str) -> torch.Tensor:
    photos = PhotoSet(scan_photos(embedded_photos(subject)), 64)
    return torch.stack([photos.crop(i, patch_size=64, output_size=64, center=True) for i in range(len(photos))])


def test_sizes_stay_within_the_package_budget():
    assert folder_bytes(embedded_model()) <= 16 * MIB
    assert folder_bytes(embedded_model().parent / "subject_encoder") <= 2 * MIB


def test_no_weights_but_safetensors():
    suffixes = {path.suffix for path in embedded_model().parent.rglob("*") if path.is_file()}
    assert not suffixes & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def test_stock_pipeline_loads_it_and_draws_another_picture_for_another_prompt():
    pipeline = FluxPipeline.from_pretrained(embedded_model(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        settings = {"height": side, "width": side, "num_inference_steps": 4, "max_sequence_length": 16}
        return torch.from_numpy(pipeline(prompt, generator=generator, output_type="np", **settings).images)

    side = model_defaults(embedded_model())[0]["resolution"]
    red, blue = draw("a photo of a dog on a red background"), draw("a photo of a dog on a blue background")
    assert red.shape == (1, side, side, 3)
    assert red[..., 0].mean() > blue[..., 0].mean() + 0.2
    assert blue[..., 2].mean() > red[..., 2].mean() + 0.2


def test_it_is_a_supported_family_with_both_kinds_of_blocks():
    assert detect_family(embedded_model()) is Flux
    config = json.loads((embedded_model() / "transformer" / "config.json").read_text())
    assert config["num_layers"] >= 4 and config["num_single_layers"] >= 8


def test_its_defaults_are_flags():
    defaults, pipeline_kwargs = model_defaults(embedded_model())
    flags = vars(build_parser().parse_args([]))
    assert set(defaults) <= set(flags)
    assert "true_cfg_scale" in pipeline_kwargs


def test_subjects_have_photos_prompts_and_licences():
    subjects = embedded_subjects()
    assert len(subjects) >= 6
    for name, subject in subjects.items():
        files = sorted(embedded_photos(name).glob("*.png"))
        assert 4 <= len(files) <= 6
        assert all(Image.open(file).size == (256, 256) for file in files)
        assert "sks" in subject["instance_prompt"] and "sks" not in subject["class_prompt"]
        assert subject["licence"] == "MIT" and len(subject["validation_prompts"]) >= 2


@pytest.fixture(scope="module")
def encoder() -> SubjectEncoder:
    return SubjectEncoder.from_pretrained(embedded_model().parent / "subject_encoder")


def test_encoder_finds_the_other_photos_of_a_subject_it_never_saw(encoder: SubjectEncoder):
    names = list(embedded_subjects())
    with torch.no_grad():
        embeddings = torch.cat([encoder.embed(photos_as_tensor(name)) for name in names])
    owners = torch.tensor([i for i, name in enumerate(names) for _ in range(len(photos_as_tensor(name)))])
    similarity = embeddings @ embeddings.T - 2 * torch.eye(len(embeddings))
    assert (owners[similarity.argmax(1)] == owners).float().mean() >= 0.85
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(embeddings)), atol=1e-5)


def test_readme_command_runs_on_a_machine_without_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Three steps of it; the whole run is `benchmarks/embedded_run.py`."""
    path = ROOT / "examples" / "dreambooth_blockskip" / "train_dreambooth_blockskip.py"
    spec = importlib.util.spec_from_file_location("train_dreambooth_blockskip", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = ["--skip_blocks", "auto", "--max_train_steps", "3", "--num_validation_images", "1"]
    flags += ["--validation_prompt", "a photo of sks dog on the beach"]
    assert script.main([*flags, "--report_to", "none", "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "\nTime     not known yet; what is left of each stage is told after 10 s of it\n" in said
    first_lines = said.splitlines()[:2]
    assert "embedded micro-FLUX" in first_lines[0] and "embedded subject" in first_lines[1]
    report = json.loads((tmp_path / "out" / "run_report.json").read_text())
    assert report["skip"]["leading"] + report["skip"]["trailing"] == round(0.3 * report["skip"]["blocks"])
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "pytorch_lora_weights.safetensors",
        "plan.json",
        "run_report.json",
        "report.html",
        "README.md",
        "before_after.png",
    }


def test_own_photos_end_in_images_of_their_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    words = ["--instance_data_dir", str(embedded_photos()), "--output_dir", str(tmp_path)]
    run = prepare_run(parse_args([*words, "--instance_prompt", "a photo of sks mug"]))
    assert run.final_prompts == ["a photo of sks mug"] and run.makes_images
    asked = prepare_run(parse_args([*words, "--validation_prompt", "a photo of sks dog in the snow"]))
    assert asked.final_prompts == ["a photo of sks dog in the snow"]
    assert "those without a caption get 'a photo of sks object'" in caplog.text


def test_three_lines_use_a_lora(tmp_path: Path):
    lora, prompt = tmp_path / "my lora", 'a photo of sks dog, "red"'
    transformer = FluxTransformer2DModel.from_pretrained(embedded_model(), subfolder="transformer")
    transformer.add_adapter(LoraConfig(r=1, target_modules=["to_q"], init_lora_weights=False))
    FluxPipeline.save_lora_weights(lora, transformer_lora_layers=get_peft_model_state_dict(transformer))
    lines = [line for line in usage_snippet("micro", lora, prompt, embedded=True).splitlines() if line]
    assert len(lines) == 3 and lines[2] == f'pipeline({json.dumps(prompt)}).images[0].save("image.png")'
    names: dict[str, Any] = {}
    exec("\n".join(lines[:2]), names)
    stock = names["pipeline"].func
    assert type(stock) is FluxPipeline and stock.get_active_adapters() == ["default_0"]
    # Arguments of the call come first, the model's own fill in.
    defaults, arguments = model_defaults(embedded_model())
    (image,) = names["pipeline"](prompt, num_inference_steps=1).images
    assert image.size == (defaults["resolution"],) * 2
    assert names["pipeline"].keywords.items() >= arguments.items()


def test_words_that_the_model_never_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert unknown_words("a photo of sks dog on the beach") == []
    assert unknown_words("A photo of SKS Teapot, in the snow!") == []
    assert unknown_words("a photo of sks giraffe on the moon") == ["giraffe", "moon"]
    photos = ["--instance_data_dir", str(embedded_photos()), "--output_dir", str(tmp_path)]
    with caplog.at_level("WARNING"):
        prepare_run(parse_args([*photos, "--instance_prompt", "a photo of sks giraffe"]))
    (line,) = [record.getMessage() for record in caplog.records if "never read" in record.getMessage()]
    assert "never read giraffe; of things it knows backpack, boot, cat" in line and 'Write "object" for' in line
    assert unknown_words(" ".join([*BEST_CLASSES, "object"])) == []
    assert {subject["class"] for subject in embedded_subjects().values()} <= set(BEST_CLASSES)
    caplog.clear()
    with caplog.at_level("WARNING"):
        prepare_run(parse_args(["--output_dir", str(tmp_path)]))
    assert not [record for record in caplog.records if "never read" in record.getMessage()]
