"""Validation images of another model, a distilled sibling say: its weights with the LoRA, and nothing else changes."""

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoModel

from blockskip_hooks.cli import preparation
from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.cli.run_plan import plan_for
from blockskip_hooks.families.facts import VALIDATION_FLAGS
from blockskip_hooks.planning.devices import rounded
from blockskip_hooks.training.validation import Validation
from blockskip_hooks.utils.errors import UserError
from tests.script import PROMPT, assert_same_weights, load_script, save_photos, settings, train
from tests.tiny import TINY_FAMILIES
from tests.tiny.base import randomise


TINY = {tiny.name: tiny for tiny in TINY_FAMILIES}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("photos"), [(64, 64), (80, 64)])


def sibling(name, folder, **pipeline_kwargs):
    """A copy of a tiny pipeline with other weights in its transformer."""
    shutil.copytree(TINY[name].folder, folder)
    model = AutoModel.from_pretrained(str(folder), subfolder="transformer")
    randomise(model, seed=7).save_pretrained(folder / "transformer")
    images = {"height": 32, "width": 32, **pipeline_kwargs}
    (folder / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))
    return str(folder)


@pytest.mark.parametrize(
    ("trained", "distilled", "steps"),
    [
        ("flux-dev", "flux-schnell", {}),
        *(
            pytest.param(*names, {"num_inference_steps": 2}, marks=pytest.mark.slow)
            for names in (("z-image", "z-image"), ("krea2", "krea2"), ("sana-1.5", "sana-sprint"))
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_are_those_of_the_sibling_with_the_lora(trained, distilled, steps, photos, tmp_path, monkeypatch):
    tiny, made, final = TINY[trained], [], Validation.final
    other = sibling(distilled, tmp_path / "sibling", **steps)
    monkeypatch.setattr(Validation, "final", lambda *args: made.append(final(*args)) or made[-1])
    sizes = {"resolution": tiny.resolution, "text_tokens": tiny.text_tokens}
    flags = ("--skip_blocks", "1,1", *tiny.flags)
    images = ("--validation_prompt", PROMPT, "--num_validation_images", "1", "--validation_epochs", "2")
    output = train(tiny.folder, photos, tmp_path / "out", *flags, *images, "--validation_model_path", other, **sizes)
    family = TINY[distilled].family(Path(other), flags={"max_sequence_length": tiny.text_tokens})
    pipeline, stock = family.load_pipeline(torch.float32), []
    size = {"height": 32, "width": 32, **family.few_step_arguments(), **steps}
    size.pop("max_sequence_length", None)
    size |= {"guidance_scale": 0.0} if trained == "krea2" else {}
    size |= {"use_resolution_binning": False} if distilled == "sana-sprint" else {}
    for lora in (None, output):
        if lora is not None:
            pipeline.load_lora_weights(lora)
        noise = torch.Generator().manual_seed(3)
        stock += pipeline(**family.prompt_inputs(PROMPT), generator=noise, **size).images
    assert not np.array_equal(*stock)
    for images_made, expected in zip(made[0], stock, strict=True):
        assert np.abs(np.asarray(images_made[0][0], int) - np.asarray(expected, int)).max() <= 1
    if trained == "flux-dev":
        assert_same_weights(output, train(tiny.folder, photos, tmp_path / "plain", *flags, **sizes))


def prepared(photos, folder, *flags):
    made = ("--validation_prompt", PROMPT, *flags)
    return preparation.prepare_run(parse_args(settings(TINY["flux-dev"].folder, photos, folder, *made)))


def test_guidance_and_steps_are_what_the_sibling_needs_unless_flags_say(photos, tmp_path):
    other = ("--validation_model_path", sibling("flux-schnell", tmp_path / "sibling"))
    run = prepared(photos, tmp_path / "out", *other)
    assert run.image_kwargs.items() >= {"num_inference_steps": 4, "guidance_scale": 0.0, "height": 32}.items()
    assert run.pipeline_kwargs["num_inference_steps"] == 2 and "guidance_scale" not in run.pipeline_kwargs
    flags = ("--validation_num_inference_steps", "6", "--validation_guidance_scale", "1.5")
    typed = prepared(photos, tmp_path / "out", *other, *flags).image_kwargs
    assert (typed["num_inference_steps"], typed["guidance_scale"]) == (6, 1.5)
    assert prepared(photos, tmp_path / "out", *flags).image_kwargs["num_inference_steps"] == 6


def test_the_plan_is_of_the_sibling_beside_the_lora_of_the_trained_model(photos, tmp_path):
    flags = ("--skip_blocks", "1,1", "--num_validation_images", "1")
    other = sibling("flux-dev", tmp_path / "sibling", num_inference_steps=2)
    runs = prepared(photos, tmp_path, *flags), prepared(photos, tmp_path, *flags, "--validation_model_path", other)
    plain, with_sibling = (
        {stage["name"]: stage["parameter_bytes"] for stage in plan_for(run, torch.bfloat16, 1, "cuda")["stages"]}
        for run in runs
    )
    linears = [runs[0].skeleton.transformer.get_submodule(name) for name in runs[0].targets]
    sizes = [size for layer in linears for size in (2 * layer.in_features, 2 * layer.out_features)]
    lora = sum(rounded(4 * size, "cuda") for size in sizes)
    assert with_sibling == {**plain, "validate": plain["validate"] + lora}


def test_pipelines_take_what_flags_and_families_ask_for_their_images():
    for tiny in TINY.values():
        taken = inspect.signature(tiny.family.pipeline_class.__call__).parameters.keys()
        assert taken >= tiny.make_family().few_step_arguments().keys(), tiny.name
        if VALIDATION_FLAGS[0] in tiny.family.own_flags:
            assert taken >= {"guidance_scale", "num_inference_steps"}, tiny.name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--validation_model_path", "{sana}"], "has other blocks or layers than"),
        (["--validation_model_path", "{empty}"], "--validation_model_path {empty} is not a diffusers pipeline"),
        (["--validation_model_path", "some/model"], "--validation_model_path some/model is not a folder"),
        (["--validation_model_path", "{flux}", "--train_text_encoder"], "has text encoders of its own"),
    ],
)
def test_what_cannot_make_the_images_is_refused_before_anything_loads(flags, words, photos, tmp_path, capsys):
    places = {"sana": TINY["sana"].folder, "empty": tmp_path, "flux": TINY["flux-dev"].folder}
    typed = [flag.format(**places) for flag in flags]
    argv = settings(TINY["flux-dev"].folder, photos, tmp_path / "out", "--validation_prompt", PROMPT, *typed)
    assert load_script().main(argv) == 2
    said = capsys.readouterr().err.rpartition("error: ")[2]
    assert words.format(**places) in said and said.count("\n") == 1 and "pretrained_model" not in said


def test_a_prompt_without_images_is_no_validation(photos, tmp_path):
    flags = ("--validation_prompt", PROMPT, "--num_validation_images", "0", "--validation_epochs", "1")
    output = train(TINY["flux-dev"].folder, photos, tmp_path / "out", *flags, "--max_train_steps", "4")
    assert (output / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_images_of_the_base_model_know_nothing_of_text_encoders_that_train(photos, tmp_path, monkeypatch):
    made, final = [], Validation.final
    monkeypatch.setattr(Validation, "final", lambda *args: made.append(final(*args)) or made[-1])
    flags = ("--skip_blocks", "1,1", "--stretch_steps", "1", "--max_train_steps", "3", "--validation_prompt", PROMPT)
    flags += ("--num_validation_images", "1")
    for name, more in (("still", ()), ("trained", ("--train_text_encoder", "--text_encoder_lr", "0.1"))):
        train(TINY["flux-dev"].folder, photos, tmp_path / name, *flags, *more)
    (base, _), (same, _) = made
    assert np.array_equal(base[0][0], same[0][0])


def test_a_sibling_that_takes_no_condition_image_is_refused(photos, tmp_path):
    image = next(photos.glob("*.png"))
    for photo in sorted(photos.glob("*.png")):
        shutil.copy(photo, tmp_path / photo.name)
        shutil.copy(photo, tmp_path / f"{photo.stem}_cond.png")
    pairs = ("--cond_data_dir", str(tmp_path), "--validation_image", str(image))
    other = ("--validation_model_path", sibling("flux-dev", tmp_path / "sibling"), "--validation_prompt", PROMPT)
    words = settings(TINY["flux-kontext"].folder, tmp_path, tmp_path / "out", *pairs, *other)
    with pytest.raises(UserError, match="takes no condition image, and --validation_image is one"):
        preparation.prepare_run(parse_args(words))
