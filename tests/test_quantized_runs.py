"""Whole runs with quantised kept blocks: what they leave, how they go on, and what their records belong to."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from blockskip_hooks import DiTBlockSkipTransformer
from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.cli.preparation import prepare_run
from blockskip_hooks.training.record_plan import describe_records
from blockskip_hooks.training.samples import load_samples
from tests import script
from tests.quantized import CONFIGS, FLUX, SANA, SPANS, needs, run_script
from tests.script import PROMPT, assert_same_weights, losses, weights
from tests.tiny import TinyFamily


RUNS = pytest.mark.parametrize(
    ("tiny", "method"),
    [
        pytest.param(FLUX, "nf4", id="flux-nf4", marks=needs("bitsandbytes")),
        pytest.param(SANA, "int8", id="sana-int8", marks=[needs("torchao"), pytest.mark.slow]),
    ],
)
_finished: dict[str, Path] = {}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.save_photos(tmp_path_factory.mktemp("photos"), [(160, 128), (128, 128), (128, 192)])


@pytest.fixture
def finished(tiny: TinyFamily, method: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with 8-bit Adam where it is installed, gradient checkpointing, class images and validation images."""
    if method not in _finished:
        output = tmp_path_factory.mktemp("run") / "out"
        flags = ["--quantization", method, "--validation_prompt", PROMPT, "--num_validation_images", "1"]
        prior = ("--with_prior_preservation", "--class_prompt", "a dog", "--num_class_images", "2")
        flags += [*prior, "--class_data_dir", str(output.parent / "class"), *eight_bit_adam()]
        _finished[method] = run_script(tiny, photos, output, *flags)
    yield _finished[method]


def eight_bit_adam() -> list[str]:
    return ["--use_8bit_adam"] if importlib.util.find_spec("bitsandbytes") else []


@RUNS
def test_a_run_trains_and_leaves_a_stock_lora(tiny: TinyFamily, method: str, finished: Path):
    assert len(losses(finished)) == 4 and all(torch.isfinite(torch.tensor(losses(finished))))
    assert len(list((finished.parent / "class").iterdir())) == 2
    assert CONFIGS[method].name in json.loads((finished / "plan.json").read_text())["quantization"]
    assert json.loads((finished / "run_report.json").read_text())["train"]["quantization"] == CONFIGS[method].name
    assert f"| Kept blocks held in | {CONFIGS[method].name} |" in (finished / "README.md").read_text()
    model = DiTBlockSkipTransformer(tiny.make_transformer(), SPANS, tiny.family.block_stacks)
    kept = tuple(f"transformer.{block.name}." for block in model.spans.kept)
    exported = weights(finished)
    assert exported and all(name.startswith(kept) and ".lora_" in name for name in exported)
    assert all(tensor.dtype == torch.float32 and tensor.abs().max() > 0 for tensor in exported.values())

    pipeline = tiny.family.pipeline_class.from_pretrained(tiny.folder)
    pipeline.set_progress_bar_config(disable=True)
    kwargs = json.loads((tiny.folder / "blockskip_defaults.json").read_text())["pipeline_kwargs"]
    call = {**tiny.make_family().prompt_inputs(PROMPT), **kwargs, "output_type": "np"}
    before = torch.from_numpy(pipeline(**call, generator=torch.Generator().manual_seed(0)).images)
    pipeline.load_lora_weights(finished)
    loaded = [p for n, p in pipeline.transformer.named_parameters() if "lora_B" in n]
    assert len(loaded) == sum("lora_B" in name for name in exported) and all(p.abs().max() > 0 for p in loaded)
    after = torch.from_numpy(pipeline(**call, generator=torch.Generator().manual_seed(0)).images)
    assert not torch.equal(before, after)


@RUNS
def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    tiny: TinyFamily, method: str, finished: Path, photos: Path, tmp_path: Path
):
    output = tmp_path / "out"
    shutil.copytree(finished / "checkpoint-2", output / "checkpoint-2")
    prior = ("--with_prior_preservation", "--class_prompt", "a dog", "--num_class_images", "2")
    flags = ("--class_data_dir", str(finished.parent / "class"), *eight_bit_adam(), *prior)
    run_script(tiny, photos, output, "--quantization", method, *flags, "--resume_from_checkpoint", "latest")
    assert losses(output) == losses(finished)
    assert_same_weights(output, finished)


@needs("bitsandbytes")
def test_a_config_file_of_upstream_does_what_the_flag_does(photos: Path, tmp_path: Path):
    tiny = FLUX
    file = tmp_path / "nf4.json"
    file.write_text(json.dumps({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))
    flags = ("--max_train_steps", "2")
    one = run_script(tiny, photos, tmp_path / "one", *flags, "--bnb_quantization_config_path", str(file))
    other = run_script(tiny, photos, tmp_path / "other", *flags, "--quantization", "nf4")
    assert_same_weights(one, other)


@needs("bitsandbytes")
@needs("torchao")
def test_records_belong_to_one_quantisation(photos: Path, tmp_path: Path):
    """The trailing residual depends on the kept blocks before it."""
    tiny = FLUX
    descriptions = []
    for method in ("none", "nf4", "int8"):
        argv = ["--pretrained_model_name_or_path", tiny.folder, "--instance_data_dir", photos, "--report_to", "none"]
        argv += ["--instance_prompt", PROMPT, "--output_dir", tmp_path, "--resolution", "64", "--quantization", method]
        run = prepare_run(parse_args([str(word) for word in (*argv, "--skip_blocks", "1,2", "--seed", "0")]))
        sources, plan = load_samples(run)
        descriptions.append(json.dumps(describe_records(run, plan, sources, torch.float32)))
    assert len(set(descriptions)) == 3
