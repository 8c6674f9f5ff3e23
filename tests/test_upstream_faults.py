"""Mistakes of the upstream FLUX, SANA and SD3 scripts that this one must not make, each for the families concerned."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prodigyopt
import pytest
import torch
from accelerate import Accelerator
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from blockskip_hooks.residuals.batches import Batch, SampleMaker
from blockskip_hooks.training.adapters import Adapters
from blockskip_hooks.training.history import History
from blockskip_hooks.training.records import RecordSource
from tests import script
from tests.script import PROMPT, WEIGHTS, assert_same_weights, losses, weights
from tests.tiers import fast_first, fast_rows
from tests.tiny import TINY_FAMILIES


TINY = {tiny.name: tiny for tiny in TINY_FAMILIES if tiny.name in ("flux-dev", "sana", "sd3")}
WITH_TEXT = ["flux-dev", "sd3"]
CLASS_PROMPT = "a photo of cat"
CAPTIONS = ["a red dog", "a dog in snow", "a photo of sks dog on the beach"]
TRAIN_TEXT = ("--train_text_encoder", "--text_encoder_lr", "1e-2")

every_family = pytest.mark.parametrize("name", fast_first(TINY))
families_with_text = pytest.mark.parametrize("name", fast_first(WITH_TEXT))


@dataclass
class Watched:
    """What a run did: its training batches, its parts, and what each clipping was given and returned."""

    batches: list[Batch] = field(default_factory=list)
    adapters: Adapters = None  # type: ignore[assignment]
    records: RecordSource = None  # type: ignore[assignment]
    history: History = None  # type: ignore[assignment]
    optimizer: Any = None
    clipped: list[tuple[list[torch.nn.Parameter], float, float]] = field(default_factory=list)

    def stray_gradients(self) -> list[str]:
        """Names of the text encoders' parameters that are no LoRA and could have or do have a gradient."""
        return [
            name
            for encoder in self.adapters.text_encoders.values()
            for name, parameter in encoder.named_parameters()
            if "lora_" not in name and (parameter.requires_grad or parameter.grad is not None)
        ]


def on_cpu(batch: Batch) -> Batch:
    """What of a batch is compared here, wherever it was trained on."""
    embeds = {name: tensor.detach().cpu() for name, tensor in batch.embeds.items()}
    return dataclasses.replace(batch, latents=batch.latents.cpu(), embeds=embeds)


@contextmanager
def watch() -> Iterator[Watched]:
    seen = Watched()
    module = script.load_script()
    complete, train_steps, clip = RecordSource.complete, module.train_steps, Accelerator.clip_grad_norm_

    def on_batch(self, batch):
        complete(self, batch)
        seen.batches.append(on_cpu(batch))

    def on_steps(steps, run, context, learner, records, history, *rest):
        seen.adapters, seen.optimizer = learner.adapters, learner.optimizer
        seen.records, seen.history = records, history
        train_steps(steps, run, context, learner, records, history, *rest)

    def on_clip(self, parameters, *args, **kwargs):
        parameters = list(parameters)
        expected = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in parameters if p.grad is not None))
        norm = clip(self, parameters, *args, **kwargs)
        seen.clipped.append((parameters, float(norm), expected))
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordSource, "complete", on_batch)
        patch.setattr(module, "train_steps", on_steps)
        patch.setattr(Accelerator, "clip_grad_norm_", on_clip)
        yield seen


def train(name: str, photos: Path, output: Path, *flags: str) -> Path:
    return script.train(TINY[name].folder, photos, output, *flags)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.save_photos(tmp_path_factory.mktemp("photos"), [(160, 128), (128, 128), (128, 192)])


@pytest.fixture(scope="module")
def captioned(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioned")
    for number, caption in enumerate(CAPTIONS):
        shutil.copy(photos / f"{number}.png", folder)
        (folder / f"{number}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def prior_flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Prior preservation with class pictures that are there already."""
    folder = script.save_photos(tmp_path_factory.mktemp("classes"), [(128, 128), (128, 160)])
    flags = ("--with_prior_preservation", "--class_data_dir", str(folder), "--class_prompt", CLASS_PROMPT)
    return (*flags, "--num_class_images", "2")


@pytest.fixture(scope="module")
def text_runs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run with trained text encoders and a checkpoint halfway, for each family that has it."""
    runs: dict[str, tuple[Path, Watched]] = {}

    def run(name: str) -> tuple[Path, Watched]:
        if name not in runs:
            output = tmp_path_factory.mktemp(name) / "out"
            with watch() as seen:
                train(name, photos, output, *TRAIN_TEXT, "--checkpointing_steps", "2")
            runs[name] = output, seen
        return runs[name]

    return run


@pytest.fixture(scope="module")
def bfloat16_runs(captioned: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One bf16 run with cached latents and, where the family has it, trained text encoders."""
    runs: dict[str, tuple[Path, Watched]] = {}

    def run(name: str) -> tuple[Path, Watched]:
        if name not in runs:
            output = tmp_path_factory.mktemp(name) / "out"
            flags = ("--mixed_precision", "bf16", "--cache_latents", "--checkpointing_steps", "4")
            with watch() as seen:
                train(name, captioned, output, *flags, *(TRAIN_TEXT if name in WITH_TEXT else ()))
            runs[name] = output, seen
        return runs[name]

    return run


# 1


@every_family
@pytest.mark.parametrize("spans", fast_first(["none", "1,1"]))
def test_cached_latents_meet_the_caption_of_their_own_photo(name: str, spans: str, captioned: Path, tmp_path: Path):
    """Over five epochs of batches of two from three photos; each photo is encoded again and compared."""
    flags = ("--cache_latents", "--skip_blocks", spans, "--max_train_steps", "8", "--random_flip")
    with watch() as seen:
        train(name, captioned, tmp_path, *flags)
    maker = seen.records.maker
    assert len(seen.batches) == 8
    assert [sample.index for batch in seen.batches for sample in batch.samples] == list(range(16))
    uncached = SampleMaker(
        dataclasses.replace(maker.plan, fixed_crops=False),
        maker.sources,
        maker.family,
        maker.embeds,
        maker.device,
        maker.dtype,
    )
    vae = maker.family.load_vae(maker.dtype, maker.device)
    orders = []
    for batch in seen.batches:
        for row, sample in enumerate(batch.samples):
            orders.append(sample.image)
            assert batch.prompts[row] == CAPTIONS[sample.image]
            for key, tensor in maker.embeds[CAPTIONS[sample.image]].items():
                assert torch.equal(batch.embeds[key][row], tensor)
            for image in range(3):
                other = uncached.encode(vae, [dataclasses.replace(sample, image=image)])[0].cpu()
                same = torch.allclose(batch.latents[row], other, rtol=1e-4, atol=1e-5)
                assert same == (image == sample.image)
    epochs = [tuple(orders[start : start + 3]) for start in range(0, 15, 3)]
    assert all(set(epoch) == {0, 1, 2} for epoch in epochs) and len(set(epochs)) > 1


# 2


@every_family
@pytest.mark.parametrize("own_captions", fast_first([True, False]), ids=["captions", "one prompt"])
def test_each_prompt_is_encoded_once_and_no_text_encoder_is_left_for_training(
    name: str, own_captions: bool, photos: Path, captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoded: list[str] = []
    alive: list[type] = []
    family = TINY[name].family
    encode, begin = family.encode_prompts, RecordSource.loader

    def on_encode(self, pipeline, prompts):
        encoded.extend(prompts)
        return encode(self, pipeline, prompts)

    def models() -> list[PreTrainedModel]:
        gc.collect()
        return [thing for thing in gc.get_objects() if issubclass(type(thing), PreTrainedModel)]

    def on_train(self, steps):
        alive.extend(type(model) for model in models() if id(model) not in known)
        return begin(self, steps)

    monkeypatch.setattr(family, "encode_prompts", on_encode)
    monkeypatch.setattr(RecordSource, "loader", on_train)
    # Models of other tests are held, so that none of the run's can have the place in memory of one that goes.
    before = models()
    known = {id(model) for model in before}
    train(name, captioned if own_captions else photos, tmp_path)
    assert sorted(encoded) == sorted(CAPTIONS if own_captions else [PROMPT])
    assert alive == []


# 3


@every_family
def test_resuming_in_the_middle_of_an_epoch_stops_at_max_train_steps(name: str, photos: Path, tmp_path: Path):
    flags = ("--checkpointing_steps", "4", "--train_batch_size", "1")
    train(name, photos, tmp_path, *flags, "--max_train_steps", "4")
    with watch() as seen:
        train(name, photos, tmp_path, *flags, "--max_train_steps", "6", "--resume_from_checkpoint", "latest")
    assert [sample.index for batch in seen.batches for sample in batch.samples] == [4, 5]
    assert seen.history.step == 6 and len(losses(tmp_path)) == 6


# 4, 5 and 6


@pytest.mark.parametrize("with_prior", fast_first([True, False]), ids=["prior", "plain"])
@pytest.mark.parametrize(
    "name, flags",
    fast_rows([("flux-dev", TRAIN_TEXT), ("flux-dev", ()), ("sana", ()), ("sd3", ()), ("sd3", TRAIN_TEXT)]),
    ids=["flux-text", "flux", "sana", "sd3", "sd3-text"],
)
def test_a_batch_of_two_gives_every_picture_its_prompt(
    name: str, flags: tuple[str, ...], with_prior: bool, photos: Path, prior_flags: tuple[str, ...], tmp_path: Path
):
    """With one fixed prompt; class pictures come after the others and have the class prompt's embeddings."""
    with watch() as seen:
        output = train(name, photos, tmp_path, *flags, *(prior_flags if with_prior else ()))
    prompts = [PROMPT] * 2 + [CLASS_PROMPT] * 2 if with_prior else [PROMPT] * 2
    assert len(losses(output)) == 4
    assert [batch.prompts for batch in seen.batches] == [prompts] * 4
    kinds = ["instance", "instance", "class", "class"][: len(prompts)]
    assert [[sample.kind for sample in batch.samples] for batch in seen.batches] == [kinds] * 4
    # At the first step a trained encoder is still the one that encoded the prompts.
    encoded = seen.records.maker.embeds
    for key, tensor in seen.batches[0].embeds.items():
        expected = torch.stack([encoded[prompt][key] for prompt in prompts])
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)
    for batch in seen.batches:
        told_apart = []
        for tensor in batch.embeds.values():
            assert torch.allclose(tensor[0], tensor[1])
            if with_prior:
                assert torch.allclose(tensor[2], tensor[3])
                told_apart.append(not torch.allclose(tensor[0], tensor[2]))
        assert any(told_apart) == with_prior


@pytest.mark.parametrize("name", fast_first(["flux-dev", "sd3"]))
def test_trained_text_encoders_move_the_embeddings_of_both_prompts(
    name: str, photos: Path, prior_flags: tuple[str, ...], tmp_path: Path
):
    with watch() as seen:
        train(name, photos, tmp_path, *TRAIN_TEXT, *prior_flags)
    first, last = (seen.batches[step].embeds["pooled_prompt_embeds"] for step in (0, 3))
    assert not torch.allclose(first[0], last[0]) and not torch.allclose(first[2], last[2])


# 7


@every_family
def test_cached_latents_train_in_bfloat16(name: str, bfloat16_runs):
    output, seen = bfloat16_runs(name)
    assert len(losses(output)) == 4
    assert {batch.latents.dtype for batch in seen.batches} == {torch.bfloat16}


@every_family
def test_cached_latents_and_residuals_train_in_bfloat16(name: str, captioned: Path, tmp_path: Path):
    flags = ("--mixed_precision", "bf16", "--cache_latents", "--skip_blocks", "1,1")
    assert len(losses(train(name, captioned, tmp_path, *flags))) == 4


# 8


@families_with_text
def test_text_encoders_of_any_width_are_in_checkpoints_and_resume(name: str, text_runs, photos: Path, tmp_path: Path):
    finished, seen = text_runs(name)
    components = set(seen.adapters.text_encoders)
    assert components == ({"text_encoder", "text_encoder_2"} if name == "sd3" else {"text_encoder"})
    assert not {encoder.config.hidden_size for encoder in seen.adapters.text_encoders.values()} & {768, 1280}
    saved = load_file(finished / "checkpoint-2" / WEIGHTS)
    for component in components:
        learnt = [v for k, v in saved.items() if k.startswith(f"{component}.") and "lora_B" in k]
        assert learnt and all(value.any() for value in learnt)

    shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
    train(name, photos, tmp_path, *TRAIN_TEXT, "--resume_from_checkpoint", "latest")
    assert losses(tmp_path) == losses(finished)
    assert_same_weights(tmp_path, finished)


# 9


@every_family
def test_adapters_and_optimizer_state_are_float32_under_bfloat16(name: str, bfloat16_runs):
    output, seen = bfloat16_runs(name)
    parameters = seen.adapters.parameters
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    state = seen.optimizer.state_dict()["state"]
    assert len(state) == len(parameters)
    assert {t.dtype for entry in state.values() for t in entry.values() if torch.is_tensor(t)} == {torch.float32}
    for module in seen.adapters.modules:
        frozen = {p.dtype for p in module.parameters() if not p.requires_grad}
        assert torch.bfloat16 in frozen
    for file in (WEIGHTS, "optimizer.safetensors"):
        assert {tensor.dtype for tensor in load_file(output / "checkpoint-4" / file).values()} == {torch.float32}


# 10


@families_with_text
def test_text_encoders_have_no_gradients_beyond_their_lora_and_clipping_counts_none(name: str, text_runs):
    _, seen = text_runs(name)
    assert seen.stray_gradients() == []
    lora = {
        id(parameter)
        for module in seen.adapters.modules
        for key, parameter in module.named_parameters()
        if "lora_" in key
    }
    assert len(seen.clipped) == 4
    for parameters, norm, expected in seen.clipped:
        assert {id(parameter) for parameter in parameters} == lora
        assert norm == pytest.approx(expected, rel=1e-4) and norm > 0


# 11


@every_family
def test_the_file_says_rank_and_alpha_of_every_part(name: str, text_runs, photos: Path, tmp_path: Path):
    output = text_runs(name)[0] if name in WITH_TEXT else train(name, photos, tmp_path)
    parts = {key.partition(".")[0] for key in weights(output)}
    assert parts >= {"transformer"} and (name not in WITH_TEXT or "text_encoder" in parts)
    for folder in (output, output / "checkpoint-2") if name in WITH_TEXT else (output,):
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
        assert {key.partition(".")[0] for key in metadata} == parts
        for part in parts:
            assert metadata[f"{part}.r"] == 2 and metadata[f"{part}.lora_alpha"] == 4


# 12


@every_family
@pytest.mark.parametrize("word", ["False", "True"])
def test_prodigy_switches_mean_what_they_say(
    name: str, word: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[dict[str, Any]] = []

    class Spy(prodigyopt.Prodigy):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.extend({k: v for k, v in group.items() if k != "params"} for group in self.param_groups)

    monkeypatch.setattr(prodigyopt, "Prodigy", Spy)
    switches = ("decouple", "use_bias_correction", "safeguard_warmup")
    flags = [part for switch in switches for part in (f"--prodigy_{switch}", word)]
    flags += ["--optimizer", "prodigy", "--learning_rate", "1", "--max_train_steps", "2"]
    output = train(name, photos, tmp_path, *flags)
    assert len(losses(output)) == 2
    assert [{switch: group[switch] for switch in switches} for group in made] == [
        dict.fromkeys(switches, word == "True")
    ]
