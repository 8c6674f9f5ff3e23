"""Models as people have them: without T5, in one file, in one variant only, in half precision without a GPU."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FluxTransformer2DModel, StableDiffusion3Pipeline

from blockskip_hooks.families import detect_family
from blockskip_hooks.families.prompts import encode_prompts
from blockskip_hooks.loading.download import check_weights
from tests import script
from tests.tiny import TINY_FAMILIES, TinyFamily


TINY = {tiny.name: tiny for tiny in TINY_FAMILIES}
PROMPT = "a photo of sks dog on the beach"
RESUMED = ("--resume_from_checkpoint", "latest")


def run(model: Path, photos: Path, output: Path, *flags: str) -> int:
    """The script's exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return script.load_script().main(script.settings(model, photos, output, "--skip_blocks", "1,1", *flags))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The line of error that a script has printed, the only thing on its standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def rename(index: Path, **entries: object) -> None:
    index.write_text(json.dumps({**json.loads(index.read_text()), **entries}))


# Stable Diffusion 3 without T5


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the stock pipeline saves itself, with the sizes of the tiny pipeline's images beside it."""
    folder, whole = tmp_path_factory.mktemp("sd3"), TINY["sd3"].folder
    StableDiffusion3Pipeline.from_pretrained(whole, text_encoder_3=None, tokenizer_3=None).save_pretrained(folder)
    shutil.copy(whole / "blockskip_defaults.json", folder)
    assert json.loads((folder / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    return folder


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_sd3_without_t5_is_encoded_as_by_the_stock_pipeline(without_t5: Path, streamed: bool):
    stock = StableDiffusion3Pipeline.from_pretrained(without_t5, text_encoder_3=None, tokenizer_3=None)
    with torch.no_grad():
        tokens, _, pooled, _ = stock.encode_prompt(
            PROMPT, None, None, do_classifier_free_guidance=False, max_sequence_length=12
        )
    family = detect_family(without_t5)(without_t5, flags={"max_sequence_length": 12})
    embeds, _ = encode_prompts(family, [PROMPT], dtype=torch.float32, device=torch.device("cpu"), streamed=streamed)
    assert torch.equal(embeds[PROMPT]["prompt_embeds"], tokens[0])
    assert torch.equal(embeds[PROMPT]["pooled_prompt_embeds"], pooled[0])
    assert not tokens[0, -12:].any() and tokens[0, :-12].any()


def test_sd3_without_t5_trains_and_leaves_a_stock_lora(without_t5: Path, photos: Path, tmp_path: Path):
    flags = ("--validation_prompt", PROMPT, "--num_validation_images", "1", "--train_text_encoder")
    assert run(without_t5, photos, tmp_path, *flags) == 0
    pipeline = detect_family(without_t5)(without_t5).load_pipeline(torch.float32)
    assert pipeline.text_encoder_3 is None
    pipeline.load_lora_weights(tmp_path)
    assert script.losses(tmp_path)
    assert "text_encoder_3=None, tokenizer_3=None, dtype=torch.float32" in (tmp_path / "README.md").read_text()
    makes_an_image(without_t5, tmp_path)


def makes_an_image(model: Path, lora: Path) -> None:
    """What the model card says runs as it stands, but for where the files lie."""
    card = (lora / "README.md").read_text()
    code = re.search(r"```(?:py|python)\n(import torch.*?)```", card, re.DOTALL)[1]
    for name, path in ((model.name, model), (lora.name, lora), ("image.png", lora / "made.png")):
        code = code.replace(f'"{name}"', repr(str(path)))
    exec(code, {})
    assert (lora / "made.png").is_file()


@pytest.mark.slow
def test_the_card_says_what_loads_a_llama_that_the_model_comes_without(photos: Path, tmp_path: Path):
    whole, model, output = TINY["hidream"].folder, tmp_path / "model", tmp_path / "out"
    shutil.copytree(whole, model)
    flags = []
    for name in ("text_encoder_4", "tokenizer_4"):
        shutil.move(model / name, tmp_path / name)
        flags += [f"--pretrained_{name}_name_or_path", str(tmp_path / name)]
    rename(model / "model_index.json", text_encoder_4=[None, None], tokenizer_4=[None, None])
    assert run(model, photos, output, *flags) == 0
    card = (output / "README.md").read_text()
    assert 'text_encoder_4 = LlamaForCausalLM.from_pretrained("text_encoder_4", dtype=torch.float32)' in card
    card = card.replace('from_pretrained("t', f'from_pretrained("{tmp_path}/t')
    (output / "README.md").write_text(card)
    makes_an_image(model, output)


@pytest.mark.slow
def test_the_card_names_the_pipeline_that_reads_the_lora(photos: Path, tmp_path: Path):
    assert run(TINY["pixart-sigma"].folder, photos, tmp_path) == 0
    assert "from blockskip_hooks.families.pixart_lora import" in (tmp_path / "README.md").read_text()
    makes_an_image(TINY["pixart-sigma"].folder, tmp_path)


def test_t5_without_its_tokenizer_is_one_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = shutil.copytree(TINY["sd3"].folder, tmp_path / "model")
    shutil.rmtree(model / "tokenizer_3")
    rename(model / "model_index.json", tokenizer_3=[None, None])
    assert run(model, photos, tmp_path / "out") == 2
    assert "without its tokenizer_3" in one_line(capsys)


def test_a_text_encoder_that_its_pipeline_needs_is_missed_at_once(tiny: TinyFamily, tmp_path: Path):
    family = tiny.family
    for name in ("transformer", "vae", "scheduler"):
        (tmp_path / name).mkdir()
    index = {"_class_name": family.pipeline_name, **dict.fromkeys(family.text_components, [None, None])}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    needed = sorted(set(family.text_components) - set(family.optional_components))
    with pytest.raises(ValueError, match=re.escape(f"lacks the folder(s) {', '.join(needed)}.")):
        detect_family(tmp_path)


# Files


def test_a_single_file_is_told_how_to_become_a_folder(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "flux1-dev.safetensors"
    shutil.copy(model / "transformer" / "diffusion_pytorch_model.safetensors", file)
    assert run(file, photos, tmp_path / "out") == 2
    line = one_line(capsys)
    assert str(file) in line and "from_single_file" in line and "docs/troubleshooting.md" in line


def test_the_documented_conversion_of_a_single_file_is_the_same_model(model: Path, tmp_path: Path):
    file = tmp_path / "flux1-dev.safetensors"
    shutil.copy(model / "transformer" / "diffusion_pytorch_model.safetensors", file)
    converted = FluxTransformer2DModel.from_single_file(str(file), config=str(model), subfolder="transformer")
    whole = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer").state_dict()
    assert converted.state_dict().keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in converted.state_dict().items())


def with_names(folder: Path, old: str, new: str) -> None:
    for path in [path for path in folder.rglob("*.safetensors") if path.name.endswith(old)]:
        path.rename(path.with_name(path.name.removesuffix(old) + new))


def test_a_folder_with_one_variant_only_names_the_flag_and_trains_with_it(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    variant = shutil.copytree(model, tmp_path / "model")
    with_names(variant, "model.safetensors", "model.bf16.safetensors")
    assert run(variant, photos, tmp_path / "out") == 2
    assert "transformer holds only the variant bf16 of its weights; give --variant bf16." in one_line(capsys)
    assert run(variant, photos, tmp_path / "out", "--variant", "bf16") == 0


@pytest.mark.parametrize(
    ("files", "variant"),
    [
        (["model.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["model.safetensors", "model.fp16.safetensors"], None),
        (["diffusion_pytorch_model.fp16.safetensors"], "fp16"),
        (["model-00001-of-00002.fp16.safetensors"], "fp16"),
        (["model.bf16-00001-of-00002.safetensors"], "bf16"),
    ],
)
def test_variants_are_told_from_shards(tmp_path: Path, files: list[str], variant: str | None):
    for component in ("transformer", "vae"):
        (tmp_path / component).mkdir()
        for name in files:
            (tmp_path / component / name).touch()
    if variant is None:
        check_weights(tmp_path, (), None)
    else:
        with pytest.raises(ValueError, match=f"give --variant {variant}"):
            check_weights(tmp_path, (), None)
        check_weights(tmp_path, (), variant)


# Precision, prompts and sizes


def test_fp16_without_a_gpu_is_one_line_and_can_be_planned(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if torch.accelerator.is_available():
        pytest.skip("this machine has a GPU")
    assert run(model, photos, tmp_path, "--mixed_precision", "fp16") == 2
    assert "--mixed_precision fp16 needs a GPU" in one_line(capsys)
    assert run(model, photos, tmp_path, "--mixed_precision", "fp16", "--plan_only") == 0


def test_a_caption_over_the_limit_is_named(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny = TINY["ideogram4"]
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "1.txt").write_text("a photo of sks dog " * 20)
    assert run(tiny.folder, folder, tmp_path / "out", "--max_sequence_length", str(tiny.text_tokens)) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "'a photo of sks dog a photo" in line and f"max_sequence_length={tiny.text_tokens}" in line


def test_a_size_that_the_pipeline_refuses_is_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = shutil.copytree(TINY["sd3"].folder, tmp_path / "model")
    rename(model / "blockskip_defaults.json", pipeline_kwargs={"height": 33, "width": 32, "num_inference_steps": 1})
    assert run(model, photos, tmp_path / "out", "--validation_prompt", PROMPT, "--num_validation_images", "1") == 1
    error = capsys.readouterr().err
    (line,) = (line for line in error.splitlines() if line.startswith("error: "))
    assert "StableDiffusion3Pipeline" in line and "divisible" in line and "Traceback" not in error


# Resuming


def test_a_checkpoint_beyond_the_steps_asked_for_is_refused(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    script.train(model, photos, tmp_path, "--max_train_steps", "2", "--checkpointing_steps", "2")
    capsys.readouterr()
    assert run(model, photos, tmp_path, "--skip_blocks", "none", "--max_train_steps", "1", *RESUMED) == 2
    assert "has 2 steps done, and --max_train_steps 1" in one_line(capsys)
