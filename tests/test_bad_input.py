"""Settings that cannot work end in one line that names the flag, before anything is loaded or written."""

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from blockskip_hooks import trainer
from blockskip_hooks.checkpoint_index import index_safetensors
from blockskip_hooks.data import scan_photos
from blockskip_hooks.embedded import model_defaults
from blockskip_hooks.families.flux import Flux
from blockskip_hooks.lora import WEIGHTS_NAME
from blockskip_hooks.losses import flow_matching_loss
from blockskip_hooks.model_checks import check_model
from tests.bad_input_cases import PLAN_CASES, SELECT_CASES, TRAIN_CASES, shards
from tests.script import load_script
from tests.tiny import save_tiny_flux


@pytest.fixture(scope="module")
def script():
    return load_script()


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with a tiny model, photos, and folders that are wrong in one way each."""
    root = tmp_path_factory.mktemp("ground")
    model = save_tiny_flux(root / "model")
    (root / "photos").mkdir()
    for number in range(2):
        Image.new("RGB", (80, 64), (90 * number, 120, 40)).save(root / "photos" / f"{number}.png")

    (root / "no photos").mkdir()
    (root / "no photos" / "notes.txt").write_text("no image")
    (root / "broken").mkdir()
    Image.new("RGB", (64, 64)).save(root / "broken" / "good.png")
    (root / "broken" / "empty.jpg").touch()
    (root / "broken" / "page.png").write_text("<html>\nnot found\n</html>")
    (root / "broken" / "cut.png").write_bytes((root / "photos" / "1.png").read_bytes()[:60])
    (root / "a file").write_text("kept")

    (root / "no index").mkdir()
    for name, index in (
        ("damaged index", "{"),
        ("list index", "[]"),
        ("other pipeline", json.dumps({"_class_name": "StableDiffusionPipeline"})),
        ("no class", "{}"),
    ):
        (root / name).mkdir()
        (root / name / "model_index.json").write_text(index)
    for name, without in (
        ("no transformer", "transformer"),
        ("no vae", "vae"),
        ("no text_encoder", "text_encoder"),
        ("no tokenizer_2", "tokenizer_2"),
        ("no transformer config", "transformer/config.json"),
        ("no weights", "transformer/diffusion_pytorch_model.safetensors"),
        ("no vae weights", "vae/diffusion_pytorch_model.safetensors"),
        ("no scheduler config", "scheduler/scheduler_config.json"),
    ):
        shutil.copytree(model, root / name)
        path = root / name / without
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, config in (
        ("damaged config", '{"_class_name":'),
        ("unknown class", '{"_class_name": "NoSuchTransformer2DModel"}'),
    ):
        shutil.copytree(model, root / name)
        (root / name / "transformer" / "config.json").write_text(config)
    return root


@pytest.fixture(autouse=True)
def in_the_ground_folder(monkeypatch, ground):
    monkeypatch.chdir(ground)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@contextlib.contextmanager
def logging_as_in_a_terminal():
    """Let the script set up logging, and let the libraries' warnings reach the standard error of now."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    libraries = [
        handler
        for name in ("diffusers", "transformers")
        for handler in logging.getLogger(name).handlers
        if type(handler) is logging.StreamHandler
    ]
    streams = [handler.stream for handler in libraries]
    try:
        root.handlers[:] = []
        for handler in libraries:
            handler.stream = sys.stderr
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for handler, stream in zip(libraries, streams):
            handler.stream = stream


GOOD = {
    "--pretrained_model_name_or_path": "model",
    "--instance_data_dir": "photos",
    "--instance_prompt": "a photo of sks dog",
    "--resolution": "64",
    "--max_sequence_length": "12",
    "--skip_blocks": "1,1",
    "--train_batch_size": "1",
    "--max_train_steps": "1",
    "--seed": "0",
    "--report_to": "none",
    "--lr_warmup_steps": "0",
}


def command(output_dir, changes):
    """The good command with flags changed, added, or left out where the value is None."""
    flags = {**GOOD, "--output_dir": str(output_dir), **changes}
    return [
        word
        for flag, value in flags.items()
        if value is not None
        for word in ([flag] if value is True else [flag, value])
    ]


@pytest.fixture
def run(script, capfd):
    """Run a script's main and return its exit code, standard output and standard error."""

    def call(argv, module=script):
        capfd.readouterr()
        with logging_as_in_a_terminal():
            try:
                code = module.main(argv)
            except SystemExit as stop:  # from the argument parser
                code = stop.code
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def assert_one_line(result, code, words):
    assert result.code == code, result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert [word for word in words if word not in result.err] == [], result.err


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


EMBEDDED = {"--pretrained_model_name_or_path": None, "--instance_data_dir": None, "--instance_prompt": None}

REFUSED = {
    # Which blocks
    "skip_blocks word": ({"--skip_blocks": "half"}, ["--skip_blocks is 'half'", "none, auto"]),
    "skip_blocks percent": ({"--skip_blocks": "30%"}, ["--skip_blocks", "30%"]),
    "skip_blocks triple": ({"--skip_blocks": "1,2,3"}, ["--skip_blocks", "1,2,3"]),
    "skip_blocks negative pair": ({"--skip_blocks": "2,-1"}, ["--skip_blocks", "2,-1"]),
    "skip_blocks empty": ({"--skip_blocks": ""}, ["--skip_blocks"]),
    "skip_blocks fraction": ({"--skip_blocks": "0.5"}, ["--skip_blocks", "0.5"]),
    "no block left by a number": ({"--skip_blocks": "5"}, ["--skip_blocks 5", "at most 4"]),
    "no block left by a pair": ({"--skip_blocks": "2,3"}, ["--skip_blocks 2,3", "at most 4"]),
    "no block left of the embedded model": ({**EMBEDDED, "--skip_blocks": "99"}, ["--skip_blocks 99", "at most"]),
    "skip_ratio": ({"--skip_blocks": "auto", "--skip_ratio": "1"}, ["--skip_ratio is 1"]),
    "residuals word": ({"--residuals": "sometimes"}, ["--residuals", "sometimes", "online"]),
    # Sizes
    "resolution off the grid": ({"--resolution": "60"}, ["--resolution is 60", "8 px", "64"]),
    "resolution below the grid": ({"--resolution": "3"}, ["--resolution is 3", "use 8"]),
    "embedded resolution off the grid": ({**EMBEDDED, "--resolution": "60"}, ["--resolution is 60"]),
    "min_patch_size above the maximum": (
        {"--min_patch_size": "64", "--max_patch_size": "32"},
        ["--min_patch_size 64", "--max_patch_size 32"],
    ),
    "min_patch_size above the resolution": ({"--min_patch_size": "72"}, ["--min_patch_size 72", "--resolution"]),
    "min_patch_size off the grid": ({"--min_patch_size": "33"}, ["--min_patch_size is 33", "32"]),
    "max_patch_size off the grid": ({"--max_patch_size": "63"}, ["--max_patch_size is 63", "64"]),
    "patch_sampling word": ({"--patch_sampling": "big"}, ["--patch_sampling", "big", "dynamic"]),
    "buckets in another form": (
        {"--aspect_ratio_buckets": "64x96"},
        ["--aspect_ratio_buckets is '64x96'"],
    ),
    "buckets off the grid": ({"--aspect_ratio_buckets": "64,60"}, ["--aspect_ratio_buckets has 64,60", "8 px"]),
    # Photos and prompts
    "no photos": ({"--instance_data_dir": None}, ["--instance_data_dir", "--dataset_name"]),
    "absent photos": ({"--instance_data_dir": "nowhere"}, ["--instance_data_dir nowhere", "does not exist"]),
    "photos are a file": ({"--instance_data_dir": "a file"}, ["--instance_data_dir a file", "is a file"]),
    "no images": ({"--instance_data_dir": "no photos"}, ["--instance_data_dir no photos", "no images", "png"]),
    "unreadable images": (
        {"--instance_data_dir": "broken"},
        ["--instance_data_dir broken", "3 images", "empty.jpg", "page.png", "cut.png", "replace or remove"],
    ),
    "two sources of photos": ({"--dataset_name": "photos"}, ["--instance_data_dir", "--dataset_name"]),
    "absent dataset": (
        {"--instance_data_dir": None, "--dataset_name": "nowhere-at-all"},
        ["--dataset_name nowhere-at-all"],
    ),
    "no prompt": ({"--instance_prompt": None}, ["--instance_prompt"]),
    "empty prompt": ({"--instance_prompt": " "}, ["--instance_prompt"]),
    "class prompt missing": (
        {"--with_prior_preservation": True, "--class_data_dir": "classes"},
        ["--with_prior_preservation", "--class_prompt"],
    ),
    "class folder missing": (
        {"--with_prior_preservation": True, "--class_prompt": "a dog"},
        ["--with_prior_preservation", "--class_data_dir"],
    ),
    "class folder is a file": (
        {"--with_prior_preservation": True, "--class_prompt": "a dog", "--class_data_dir": "a file"},
        ["--class_data_dir a file"],
    ),
    # LoRA
    "unknown layers": ({"--lora_layers": "attn.to_q,attn.to_x"}, ["--lora_layers 'attn.to_x'"]),
    "layers of no kept block": (
        {"--skip_blocks": "2,0", "--lora_layers": "attn.add_q_proj"},
        ["--lora_layers 'attn.add_q_proj'", "single_transformer_blocks.0"],
    ),
    "layers that cannot learn": ({"--skip_blocks": "1,3", "--lora_layers": "attn.add_q_proj"}, ["--lora_layers"]),
    "a skipped block": ({"--lora_blocks": "1,4"}, ["--lora_blocks 4 is a skipped block", "1 to 3"]),
    "a block that is not there": ({"--lora_blocks": "5"}, ["--lora_blocks '5'", "0 to 4"]),
    "rank": ({"--rank": "0"}, ["--rank is 0", "1 or more"]),
    "lora_dropout": ({"--lora_dropout": "1"}, ["--lora_dropout is 1"]),
    # The model
    "model without an index": (
        {"--pretrained_model_name_or_path": "no index"},
        ["--pretrained_model_name_or_path no index", "model_index.json"],
    ),
    "damaged index": ({"--pretrained_model_name_or_path": "damaged index"}, ["--pretrained_model_name_or_path"]),
    "index that is a list": ({"--pretrained_model_name_or_path": "list index"}, ["--pretrained_model_name_or_path"]),
    "index without a class": ({"--pretrained_model_name_or_path": "no class"}, ["--pretrained_model_name_or_path"]),
    "unsupported pipeline": (
        {"--pretrained_model_name_or_path": "other pipeline"},
        ["--pretrained_model_name_or_path", "StableDiffusionPipeline", "FluxPipeline"],
    ),
    "model without a transformer": (
        {"--pretrained_model_name_or_path": "no transformer"},
        ["--pretrained_model_name_or_path", "transformer"],
    ),
    "model without a VAE": (
        {"--pretrained_model_name_or_path": "no vae"},
        ["--pretrained_model_name_or_path", "vae"],
    ),
    "transformer without a config": (
        {"--pretrained_model_name_or_path": "no transformer config"},
        ["--pretrained_model_name_or_path"],
    ),
    "damaged transformer config": (
        {"--pretrained_model_name_or_path": "damaged config"},
        ["--pretrained_model_name_or_path"],
    ),
    "unknown transformer class": (
        {"--pretrained_model_name_or_path": "unknown class"},
        ["--pretrained_model_name_or_path", "NoSuchTransformer2DModel"],
    ),
    "scheduler without a config": (
        {"--pretrained_model_name_or_path": "no scheduler config"},
        ["--pretrained_model_name_or_path"],
    ),
    "model without a text encoder": (
        {"--pretrained_model_name_or_path": "no text_encoder"},
        ["--pretrained_model_name_or_path", "text_encoder"],
    ),
    "model without a tokenizer": (
        {"--pretrained_model_name_or_path": "no tokenizer_2"},
        ["--pretrained_model_name_or_path", "tokenizer_2"],
    ),
    "transformer without weights": (
        {"--pretrained_model_name_or_path": "no weights"},
        ["--pretrained_model_name_or_path", "safetensors"],
    ),
    "VAE without weights": (
        {"--pretrained_model_name_or_path": "no vae weights"},
        ["--pretrained_model_name_or_path", "safetensors"],
    ),
    "variant that is not there": ({"--variant": "fp16"}, ["--variant", "fp16"]),
    "absent model": (
        {"--pretrained_model_name_or_path": "nobody/nothing-here"},
        ["--pretrained_model_name_or_path nobody/nothing-here"],
    ),
    # Training
    "lr_scheduler": ({"--lr_scheduler": "cosin"}, ["--lr_scheduler is 'cosin'", "cosine"]),
    "optimizer": ({"--optimizer": "SGD"}, ["--optimizer is 'SGD'", "AdamW"]),
    "learning_rate": ({"--learning_rate": "-1"}, ["--learning_rate is -1"]),
    "not a number": ({"--rank": "four"}, ["--rank", "four"]),
    "negative batch size": ({"--train_batch_size": "-2"}, ["--train_batch_size is -2", "1 or more"]),
    "negative steps": ({"--max_train_steps": "-1"}, ["--max_train_steps is -1"]),
    "zero steps": ({"--max_train_steps": "0"}, ["--max_train_steps is 0"]),
    "negative workers": ({"--dataloader_num_workers": "-1"}, ["--dataloader_num_workers is -1"]),
    "negative warmup": ({"--lr_warmup_steps": "-5"}, ["--lr_warmup_steps is -5"]),
    "negative seed": ({"--seed": "-1"}, ["--seed is -1"]),
    "negative repeats": ({"--repeats": "-1"}, ["--repeats is -1"]),
    "negative checkpoint limit": ({"--checkpoints_total_limit": "-1"}, ["--checkpoints_total_limit is -1"]),
    "precision": ({"--mixed_precision": "fp8"}, ["--mixed_precision", "fp8", "bf16"]),
    # Disk
    "residual_budget": ({"--residual_budget": "lots"}, ["--residual_budget", "lots", "8GB"]),
    "negative residual_budget": ({"--residual_budget": "-8GB"}, ["--residual_budget"]),
    "zero residual_budget": ({"--residual_budget": "0"}, ["--residual_budget"]),
    "absent checkpoint": ({"--resume_from_checkpoint": "checkpoint-9"}, ["--resume_from_checkpoint checkpoint-9"]),
    "tracker": ({"--report_to": "excel"}, ["--report_to", "excel"]),
    "flag of another family": ({"--precondition_outputs": "0"}, ["--precondition_outputs", "sd3", "leave it out"]),
    "unknown flag": ({"--skip_block": "1,1"}, ["--skip_block", "did you mean --skip_blocks"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_work_end_in_one_line(run, tmp_path, case):
    changes, words = REFUSED[case]
    if "--skip_block" in changes:
        changes = {**changes, "--skip_blocks": None}
    output_dir = tmp_path / "out"
    result = run(command(output_dir, changes))
    assert_one_line(result, 2, words)
    assert result.out == "" and tree(tmp_path) == {} and [*tmp_path.iterdir()] in ([], [output_dir])
    assert not output_dir.exists() or not any(output_dir.iterdir())


# Every script against the tables of bad input

SCRIPTS = {
    "train_dreambooth_blockskip": (TRAIN_CASES, GOOD, "train"),
    "select_blocks": (
        SELECT_CASES,
        {**{name: GOOD[name] for name in ("--pretrained_model_name_or_path", "--max_sequence_length")}}
        | {"--encoder": "offline", "--no_cache": True},
        "open_search",
    ),
    "plan_memory": (PLAN_CASES, {"--preset": "flux.1-dev"}, "plan_run"),
}


def stamps(*folders):
    """When every file below some folders was last written, its size, and where links lead."""
    return {
        path: (status.st_mtime_ns, status.st_size, status.st_ino)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        for status in [path.lstat()]
        if not path.is_dir()
    } | {path: None for folder in folders for path in folder.rglob("*") if path.is_dir()}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """What an earlier run left in the output folder."""
    folder = tmp_path_factory.mktemp("earlier")
    for name in ("plan.json", "run_report.json", "report.html", "selection.json", WEIGHTS_NAME):
        (folder / name).write_text("from an earlier run")
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "training_state.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, (cases, _, _) in SCRIPTS.items() for case in cases], ids=str
)
def test_bad_input_ends_in_one_line_before_models_load(
    run, ground, finished, earlier, tmp_path, monkeypatch, name, case
):
    cases, good, loads = SCRIPTS[name]
    changes, words = cases[case]
    module = load_script(name)

    def too_late(*args, **kwargs):
        raise AssertionError("models were about to load")

    if name != "plan_memory":
        monkeypatch.setattr(module, loads, too_late)
    output = shutil.copytree(earlier, tmp_path / "out")
    flags = {**good, **({} if name == "plan_memory" else {"--output_dir": str(output)})}
    for flag, value in changes.items():
        if callable(value):
            folder = tmp_path / "made" / flag.strip("-")
            folder.mkdir(parents=True)
            value = str(value(folder))
        flags[flag] = value
    argv = [
        word
        for flag, value in flags.items()
        if value is not None
        for word in ([flag] if value is True else [flag, value])
    ]
    kept = [ground, output, *(path for path in tmp_path.glob("made/*") if path.name != "cache_dir")]
    before = stamps(*kept)
    result = run(argv, module)
    # Reading a dataset draws a bar, which may come before the line.
    result.err = "\n".join(line for line in result.err.split("\n") if not line.endswith("examples/s]"))
    assert_one_line(result, 2, words)
    assert result.out == "" and stamps(*kept) == before


def test_sound_models_of_every_family_pass(tiny):
    check_model(tiny.folder, tiny.family, None)
    assert model_defaults(tiny.folder)[1]


def test_a_sound_model_in_shards_and_of_a_variant_passes(tmp_path):
    model = Path(shards(lambda *_: None)(tmp_path))
    index = model / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    check_model(model, Flux, None)
    index.rename(index.with_name("diffusion_pytorch_model.safetensors.index.fp16.json"))
    check_model(model, Flux, "fp16")
    assert len(index_safetensors(model / "transformer", "fp16")) == len(index_safetensors(Path("model/transformer")))


def test_the_tables_hold_many_cases():
    assert sum(len(cases) for cases, _, _ in SCRIPTS.values()) + len(REFUSED) >= 400


def test_the_command_the_cases_start_from_is_good(run, tmp_path):
    result = run(command(tmp_path / "out", {"--plan_only": True}))
    assert (result.code, result.err) == (0, "")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_output_folder_that_is_a_file_is_refused_and_kept(run, tmp_path, name):
    (tmp_path / "file").write_text("kept")
    assert_one_line(run(command(tmp_path / name, {})), 2, ["--output_dir", "is a file"])
    assert tree(tmp_path) == {tmp_path / "file": b"kept"}


def test_an_output_folder_that_cannot_be_written_is_refused(run, tmp_path, monkeypatch):
    # Where root runs the tests, no mode of a folder would keep it out.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path) and access(path, mode))
    assert_one_line(run(command(tmp_path / "out", {})), 2, ["--output_dir", "cannot be written"])
    assert not (tmp_path / "out").exists()


def test_a_caption_for_some_photos_only_still_needs_the_prompt(run, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(photos / f"{name}.png")
    (photos / "a.txt").write_text("a dog on the beach")
    changes = {"--instance_data_dir": str(photos), "--instance_prompt": None}
    assert_one_line(run(command(tmp_path / "out", changes)), 2, ["--instance_prompt"])


# What only a run that has begun can tell


@pytest.fixture(scope="module")
def finished(script, ground):
    """A short run with records and a checkpoint that stay."""
    folder = ground / "finished"
    changes = {"--residual_dir": str(folder / "records"), "--checkpointing_steps": "1", "--skip_final_inference": True}
    changes |= {name: str(ground / GOOD[name]) for name in ("--pretrained_model_name_or_path", "--instance_data_dir")}
    assert script.main(command(folder / "out", changes)) == 0
    assert (folder / "out" / WEIGHTS_NAME).is_file() and any((folder / "records").glob("records-*.safetensors"))
    return folder


@pytest.fixture
def begin(run, script, finished, monkeypatch):
    """Run with the plan of the finished run: making one takes longer than all the rest."""
    plan = json.loads((finished / "out" / "plan.json").read_text())
    monkeypatch.setattr(script, "make_plan", lambda run, *args: (run, plan))
    return run


def error_lines(result):
    return [line for line in result.err.splitlines() if line.startswith("error: ")]


def assert_stopped(result, words):
    """Exit code 1 and one error line; progress bars may have been drawn before."""
    assert result.code == 1, result.err
    assert "Traceback" not in result.err and "WARNING" not in result.err
    assert len(error_lines(result)) == 1, result.err
    assert [word for word in words if word not in error_lines(result)[0]] == [], result.err
    assert result.err.rstrip("\n").splitlines()[-1] == error_lines(result)[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--seed": "1"}, ["samples"]),
        ({"--skip_blocks": "1,2"}, ["spans"]),
        ({"--instance_prompt": "a photo of sks cat", "--guidance_scale": "1"}, ["guidance_scale, photos"]),
    ],
    ids=["seed", "spans", "prompt and guidance"],
)
def test_records_of_another_run_are_refused_and_kept(begin, finished, tmp_path, changes, words):
    before = tree(finished)
    result = begin(command(tmp_path / "out", {"--residual_dir": str(finished / "records"), **changes}))
    assert_stopped(result, [f"--residual_dir {finished / 'records'}", "--overwrite_residuals", *words])
    assert tree(finished) == before


def test_a_residual_folder_with_other_files_is_refused_and_kept(begin, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.jpg").write_text("kept")
    changes = {"--residual_dir": str(tmp_path / "pictures"), "--overwrite_residuals": True}
    assert_stopped(begin(command(tmp_path / "out", changes)), ["--residual_dir", "neither empty"])
    assert tree(tmp_path / "pictures") == {tmp_path / "pictures" / "holiday.jpg": b"kept"}


def test_a_residual_folder_that_is_a_file_is_refused_and_kept(begin, tmp_path):
    (tmp_path / "file").write_text("kept")
    result = begin(command(tmp_path / "out", {"--residual_dir": str(tmp_path / "file")}))
    assert result.code in (1, 2) and "Traceback" not in result.err
    assert len(error_lines(result)) == 1 and "--residual_dir" in error_lines(result)[0]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_budget_below_one_step_is_refused(begin, tmp_path):
    result = begin(command(tmp_path / "out", {"--residual_budget": "1KB"}))
    assert_one_line(result, 2, ["--residual_budget", "1000 bytes", "raise it or lower --train_batch_size"])
    assert not (tmp_path / "out" / "residuals").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--rank": "8"}, ["--resume_from_checkpoint", "rank"]),
        ({"--optimizer": "prodigy", "--learning_rate": "1"}, ["--resume_from_checkpoint", "optimizer"]),
        ({"--seed": "1"}, ["--seed 1"]),
    ],
    ids=["rank", "optimizer", "seed"],
)
def test_a_checkpoint_of_other_settings_is_refused_and_kept(begin, finished, tmp_path, changes, words):
    if changes.get("--optimizer") == "prodigy":
        pytest.importorskip("prodigyopt")
    checkpoint = finished / "out" / "checkpoint-1"
    before = tree(finished)
    changes = {"--resume_from_checkpoint": str(checkpoint), "--max_train_steps": "2", **changes}
    assert_one_line(begin(command(tmp_path / "out", changes)), 2, words)
    assert tree(finished) == before and not (tmp_path / "out" / WEIGHTS_NAME).exists()


def test_an_incomplete_checkpoint_is_refused(begin, tmp_path):
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    result = begin(command(tmp_path / "out", {"--resume_from_checkpoint": "checkpoint-3"}))
    assert_one_line(result, 2, ["--resume_from_checkpoint checkpoint-3", "complete"])


def test_a_damaged_checkpoint_is_refused(begin, finished, tmp_path):
    damaged = shutil.copytree(finished / "out" / "checkpoint-1", tmp_path / "checkpoint-1")
    (damaged / WEIGHTS_NAME).write_bytes((damaged / WEIGHTS_NAME).read_bytes()[:100])
    changes = {"--resume_from_checkpoint": str(damaged), "--max_train_steps": "2"}
    assert_one_line(begin(command(tmp_path / "out", changes)), 2, ["--resume_from_checkpoint"])


def test_unreadable_class_images_are_all_listed(begin, ground, tmp_path):
    changes = {
        "--with_prior_preservation": True,
        "--class_prompt": "a dog",
        "--class_data_dir": "broken",
        "--num_class_images": "4",
    }
    before = tree(ground / "broken")
    words = ["--class_data_dir broken", "3 images", "empty.jpg", "page.png", "cut.png"]
    assert_one_line(begin(command(tmp_path / "out", changes)), 2, words)
    assert tree(ground / "broken") == before


# What goes wrong while a run is under way


NOT_A_NUMBER = float("nan")


def with_nan(path, name):
    """Put a NaN into a tensor of a safetensors file."""
    tensors = load_file(path)
    tensors[name].view(-1)[0] = NOT_A_NUMBER
    save_file(tensors, path)


def fresh_model(tmp_path):
    return shutil.copytree("model", tmp_path / "model")


@pytest.mark.parametrize("residuals", ["precomputed", "online"])
def test_latents_that_are_not_numbers_stop_the_run_and_name_the_photo(begin, tmp_path, residuals):
    model = fresh_model(tmp_path)
    with_nan(model / "vae" / "diffusion_pytorch_model.safetensors", "encoder.conv_out.bias")
    changes = {"--pretrained_model_name_or_path": str(model), "--residuals": residuals}
    result = begin(command(tmp_path / "out", changes))
    assert_stopped(
        result, ["not finite" if residuals == "precomputed" else "loss of step 1 is nan", "sample 0 (", ".png)"]
    )
    assert not (tmp_path / "out" / WEIGHTS_NAME).exists()


def test_embeddings_that_are_not_numbers_stop_the_run_and_name_the_prompt(begin, tmp_path):
    model = fresh_model(tmp_path)
    with_nan(model / "text_encoder_2" / "model.safetensors", "encoder.final_layer_norm.weight")
    result = begin(command(tmp_path / "out", {"--pretrained_model_name_or_path": str(model)}))
    assert_stopped(result, ["text encoders", "not finite", "'a photo of sks dog'"])


def test_parts_of_different_models_are_found_before_the_transformer_loads(begin, tmp_path, monkeypatch, script):
    from transformers import T5Config, T5EncoderModel

    model = fresh_model(tmp_path)
    shutil.rmtree(model / "text_encoder_2")
    config = T5Config(vocab_size=64, d_model=16, d_ff=32, d_kv=12, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(model / "text_encoder_2")
    monkeypatch.setattr(
        script.DiTBlockSkipTransformer, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded")
    )
    result = begin(command(tmp_path / "out", {"--pretrained_model_name_or_path": str(model)}))
    assert_stopped(result, ["--pretrained_model_name_or_path", "prompt_embeds", "different models"])


def test_a_vae_of_another_model_is_found_by_the_plan(run, tmp_path):
    from diffusers import AutoencoderKL

    model = fresh_model(tmp_path)
    shutil.rmtree(model / "vae")
    config = {
        name: value for name, value in AutoencoderKL.load_config("model", subfolder="vae").items() if name[0] != "_"
    }
    AutoencoderKL(**{**config, "latent_channels": 8}).save_pretrained(model / "vae")
    result = run(command(tmp_path / "out", {"--pretrained_model_name_or_path": str(model)}))
    assert_one_line(result, 2, ["--pretrained_model_name_or_path", "different models"])


def spoil_loss(monkeypatch, step, sample):
    """Let the loss of one sample of a batch be NaN in a step."""
    steps = []

    def spoilt(*args):
        losses = flow_matching_loss(*args)
        steps.append(len(steps) + 1)
        return losses * torch.tensor(
            [NOT_A_NUMBER if (steps[-1], n) == (step, sample) else 1.0 for n in range(len(losses))]
        )

    monkeypatch.setattr(trainer, "flow_matching_loss", spoilt)


def test_a_loss_that_is_not_a_number_stops_at_its_step_and_names_the_sample(begin, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, step=3, sample=1)
    changes = {"--train_batch_size": "2", "--max_train_steps": "5", "--checkpointing_steps": "1"}
    result = begin(command(tmp_path / "out", changes))
    # The third step's second sample; only that one is named.
    assert_stopped(result, ["loss of step 3 is nan", "by instance sample 5 (", ".png);", "Checkpoints", "intact"])
    assert result.err.count("instance sample") == 1
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "out" / WEIGHTS_NAME).exists()
    assert all(
        tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / "checkpoint-2" / WEIGHTS_NAME).values()
    )


def test_with_accumulated_batches_every_batch_is_looked_at(begin, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, step=1, sample=0)
    changes = {"--gradient_accumulation_steps": "2", "--train_batch_size": "2"}
    assert_stopped(begin(command(tmp_path / "out", changes)), ["loss of step 1 is nan", "by instance sample 0 ("])


def test_weights_that_are_not_numbers_never_replace_the_last_good_checkpoint(begin, tmp_path, monkeypatch):
    step = torch.optim.AdamW.step
    calls = []

    def spoilt(optimizer, *args, **kwargs):
        result = step(optimizer, *args, **kwargs)
        calls.append(None)
        if len(calls) == 2:
            optimizer.param_groups[0]["params"][0].data.view(-1)[0] = NOT_A_NUMBER
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spoilt)
    changes = {"--max_train_steps": "4", "--checkpointing_steps": "1", "--checkpoints_total_limit": "1"}
    result = begin(command(tmp_path / "out", changes))
    assert_stopped(result, ["The LoRA of", "not finite", "intact"])
    (kept,) = (tmp_path / "out").glob("checkpoint-*")
    assert kept.name == "checkpoint-1"
    assert all(tensor.isfinite().all() for tensor in load_file(kept / WEIGHTS_NAME).values())


def raises(error):
    def call(*args, **kwargs):
        raise error

    return call


ENVIRONMENT = {
    "a full GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the docs."),
        ["Memory ran out in stage load", "Tried to allocate 2.00 GiB", "--memory_budget"],
    ),
    "a GPU that others fill": (
        RuntimeError("CUDA error: out of memory\nCompile with"),
        ["Memory ran out in stage load"],
    ),
    "no batch that fits": (
        RuntimeError("No executable batch size found, reached zero."),
        ["Memory ran out in stage load", "--memory_budget"],
    ),
    "full host memory": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        ["Memory ran out in stage load", "--memory_budget"],
    ),
    "no memory for Python": (MemoryError(), ["Memory ran out in stage load (MemoryError)"]),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "x"), ["The disk is full", "--residual_budget"]),
    "a full disk below safetensors": (
        SafetensorError("Error while serializing: IoError(Os { code: 28, kind: StorageFull })"),
        ["The disk is full"],
    ),
    "a file that went away": (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x.bin"),
        ["x.bin: No such"],
    ),
    "a shard that broke": (SafetensorError("Error while deserializing header"), ["A safetensors file cannot be read"]),
    "a worker that was killed": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        ["--dataloader_num_workers"],
    ),
}


@pytest.mark.parametrize("case", ENVIRONMENT)
def test_what_the_environment_does_is_said_in_one_line(begin, script, tmp_path, monkeypatch, case):
    error, words = ENVIRONMENT[case]
    monkeypatch.setattr(script, "encode_prompts", lambda *args, **kwargs: ({}, None))
    monkeypatch.setattr(script.DiTBlockSkipTransformer, "from_pretrained", raises(error))
    assert_stopped(begin(command(tmp_path / "out", {})), words)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyError("hidden_states"),
        TypeError("'NoneType' object is not callable"),
        AssertionError("never"),
        IndexError("list index out of range"),
        NotImplementedError("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_bugs_keep_their_traceback(begin, script, tmp_path, monkeypatch, error):
    monkeypatch.setattr(script, "encode_prompts", raises(error))
    with pytest.raises(type(error)) as caught:
        begin(command(tmp_path / "out", {}))
    assert caught.value is error


def test_a_value_error_of_a_library_is_a_bug_too(begin, script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "encode_prompts", lambda *args, **kwargs: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        begin(command(tmp_path / "out", {}))


def test_a_plan_that_cannot_be_written_is_said_in_one_line(begin, tmp_path):
    (tmp_path / "out" / "plan.json").mkdir(parents=True)
    result = begin(command(tmp_path / "out", {"--plan_only": True}))
    assert_one_line(result, 1, ["plan.json"])


# Pictures that are odd and fine


def odd_pictures():
    """Name, how it is saved, and the 8-bit RGB pixels that it must decode to."""
    rng = np.random.default_rng(5)
    rgb = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    grey = rng.integers(0, 256, (48, 64), dtype=np.uint8)
    image, wide = Image.fromarray(rgb), Image.fromarray(grey.astype(np.uint16) * 257)
    in_grey = np.repeat(grey[..., None], 3, axis=2)
    palette = Image.fromarray(np.repeat(np.repeat(rgb[:4, :4], 12, axis=0), 16, axis=1)).quantize(16)
    colours = np.asarray(palette.convert("RGB"))
    clear = np.where(np.asarray(palette)[..., None] == 3, 255, colours)
    turned = Image.Exif()
    turned[274] = 6
    other = Image.fromarray(255 - rgb)
    veil = np.dstack([rgb, np.full((48, 64), 128, np.uint8)])
    mixed = np.asarray(
        Image.alpha_composite(Image.new("RGBA", (64, 48), "white"), Image.fromarray(veil)).convert("RGB")
    )
    cmyk = image.convert("CMYK")
    return {
        "16-bit grey.png": (wide, {}, in_grey),
        "16-bit grey.tif": (wide, {}, in_grey),
        "32-bit grey.tif": (Image.fromarray(grey.astype(np.int32) * 257), {}, in_grey),
        "float grey.tif": (Image.fromarray(grey.astype(np.float32)), {}, in_grey),
        "8-bit grey.png": (Image.fromarray(grey), {}, in_grey),
        "bilevel.png": (Image.fromarray(grey > 127), {}, np.where(in_grey > 127, 255, 0).astype(np.uint8)),
        "cmyk.tif": (cmyk, {}, np.asarray(cmyk.convert("RGB"))),
        "palette.gif": (palette, {}, colours),
        "palette with alpha.png": (palette, {"transparency": 3}, clear),
        "alpha.png": (Image.fromarray(veil), {}, mixed),
        "alpha.webp": (Image.fromarray(veil), {"lossless": True, "exact": True}, mixed),
        "animated.png": (image, {"save_all": True, "append_images": [other]}, rgb),
        "animated.webp": (image, {"save_all": True, "append_images": [other], "lossless": True}, rgb),
        "animated.gif": (palette, {"save_all": True, "append_images": [palette.rotate(180)]}, colours),
        "pages.tif": (image, {"save_all": True, "append_images": [other]}, rgb),
        "turned.png": (image, {"exif": turned}, np.rot90(rgb, k=-1)),
        "turned.webp": (image, {"exif": turned, "lossless": True}, np.rot90(rgb, k=-1)),
        "two pixels.png": (image.crop((0, 0, 2, 2)), {}, rgb[:2, :2]),
        "upper case.PNG": (image, {}, rgb),
    }


ODD = odd_pictures()


@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_decodes_to_what_it_shows(tmp_path, name):
    image, options, expected = ODD[name]
    image.save(tmp_path / name, **options)
    (photo,) = scan_photos(tmp_path)
    decoded = np.asarray(photo.decode())
    assert decoded.dtype == np.uint8 and photo.size == expected.shape[:2]
    np.testing.assert_array_equal(decoded, expected)


def test_cmyk_and_turned_jpegs_keep_their_colours(tmp_path):
    ramp = np.linspace(0, 255, 48 * 64).astype(np.uint8).reshape(48, 64)
    image = Image.merge(
        "RGB", [Image.fromarray(channel) for channel in (ramp, ramp[::-1].copy(), ramp[:, ::-1].copy())]
    )
    turned = Image.Exif()
    turned[274] = 8
    image.convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    image.save(tmp_path / "b.jpg", quality=100, subsampling=0, exif=turned)
    cmyk, sideways = (np.asarray(photo.decode()).astype(int) for photo in scan_photos(tmp_path))
    assert np.abs(cmyk - np.asarray(image)).max() <= 6
    assert np.abs(sideways - np.rot90(np.asarray(image))).max() <= 6


def test_odd_pictures_train_as_their_plain_copies_do(run, begin, tmp_path):
    losses = []
    for kind in ("odd", "plain"):
        folder = tmp_path / kind
        folder.mkdir()
        for number, (name, (image, options, expected)) in enumerate(ODD.items()):
            if kind == "odd":
                image.save(folder / f"{number:02d} {name}", **options)
            else:
                Image.fromarray(np.ascontiguousarray(expected)).save(folder / f"{number:02d} {name}.png")
        changes = {"--instance_data_dir": str(folder), "--train_batch_size": "5", "--max_train_steps": "4"}
        assert begin(command(tmp_path / f"out {kind}", {**changes, "--skip_final_inference": True})).code == 0
        losses.append(json.loads((tmp_path / f"out {kind}" / "run_report.json").read_text())["train"]["loss"])
    assert losses[0] == losses[1] and len(losses[0]) == 4
