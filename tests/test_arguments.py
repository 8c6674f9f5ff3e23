"""The command line: what counts as typed, how texts are read, and one-line errors."""

from dataclasses import FrozenInstanceError

import pytest

from blockskip_hooks.cli import argument_checks
from blockskip_hooks.cli.argument_checks import validate_args
from blockskip_hooks.cli.arguments import apply_defaults, build_parser, parse_args
from blockskip_hooks.data.photo_set import INTERPOLATION
from blockskip_hooks.families import FAMILIES
from blockskip_hooks.selection import parse_skip_blocks
from blockskip_hooks.training.flags.types import parse_bool, parse_bytes


NAMED = [
    "--pretrained_model_name_or_path",
    "some/model",
    "--instance_prompt",
    "a sks dog",
    "--instance_data_dir",
    "dog",
]


pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture
def installed(monkeypatch):
    """Make every optional package look installed, or all but those of a set."""

    def pretend(missing=()):
        monkeypatch.setattr(
            argument_checks.importlib.util, "find_spec", lambda name: None if name in missing else "a package"
        )

    pretend()
    return pretend


def test_the_settings_have_a_field_for_every_flag():
    assert set(parse_args([]).flags()) == {action.dest for action in build_parser()._actions} - {"help"}


def test_settings_do_not_change():
    settings = parse_args([])
    with pytest.raises(FrozenInstanceError):
        settings.rank = 8
    other = settings.with_values({"rank": 8, "guidance_scale": 1.0})
    assert (other.rank, other.family_flags["guidance_scale"]) == (8, 1.0)
    assert (settings.rank, settings.family_flags["guidance_scale"]) == (4, 3.5)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("skip_blocks", " 2 , 3", "2 , 3"),
        ("memory_budget", "1.5 GiB", 1536 * 2**20),
        ("lora_layers", "to_q, to_k", ("to_q", "to_k")),
        ("aspect_ratio_buckets", "64,64; 96,64", ((64, 64), (96, 64))),
        ("report_to", "none", ()),
    ],
)
def test_texts_are_read_once_and_are_texts_again_in_files(name, text, value):
    settings = parse_args([f"--{name}", text])
    assert getattr(settings, name) == value
    written = settings.plain()[name]
    assert isinstance(written, str) and getattr(parse_args([f"--{name}", written]), name) == value


def test_help_text_formats():
    assert "block skipping" in build_parser().format_help()


def test_given_holds_what_was_typed_even_if_it_is_the_default():
    args = parse_args(["--rank", "4", "--plan_only", "--prodigy_decouple=False"])
    assert args.given == {"rank", "plan_only", "prodigy_decouple"}
    assert (args.rank, args.plan_only, args.prodigy_decouple, args.learning_rate) == (4, True, False, 1e-4)
    assert parse_args([]).given == frozenset()


def test_defaults_give_way_to_typed_flags():
    args = apply_defaults(parse_args(["--resolution", "512"]), {"resolution": 64, "rank": 16})
    assert (args.resolution, args.rank) == (512, 16)


def test_family_defaults_are_of_known_flags_and_checked_values(installed):
    for family in FAMILIES.values():
        args = apply_defaults(parse_args(NAMED), family.flag_defaults)
        validate_args(args.with_values({"lora_alpha": args.lora_alpha or args.rank}))


@pytest.mark.parametrize("name", ["no_such_flag", "given"])
def test_unknown_defaults_are_refused(name):
    with pytest.raises(ValueError, match=name):
        apply_defaults(parse_args([]), {"rank": 16, name: 1})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rank", "many"], ["--rank", "many"]),
        (["--mixed_precision", "fp8"], ["--mixed_precision", "fp8", "bf16"]),
        (["--image_interpolation_mode", "area"], ["--image_interpolation_mode", "area", *INTERPOLATION]),
        (["--text_encoder_out_layers"], ["--text_encoder_out_layers", "at least one"]),
        (["--skip_block", "2,3"], ["--skip_block 2,3", "did you mean --skip_blocks?"]),
        (["--prodigy_decouple", "maybe"], ["--prodigy_decouple", "maybe", "True"]),
        (["--residual", "online"], ["--residuals"]),
        (["--skip_blocks", "1,2,3"], ["--skip_blocks is '1,2,3'", "none, auto"]),
        (["--residual_budget", "lots"], ["--residual_budget: 'lots' is not", "8GB"]),
        (["--aspect_ratio_buckets", "64x96"], ["--aspect_ratio_buckets is '64x96'", "height,width", "1024,1024;"]),
        (["--lora_layers", " "], ["--lora_layers is empty"]),
        (["--select_on", "base"], ["--select_on is gone", "blockskip select", "--skip_blocks auto"]),
        (["--probe_steps=5"], ["--probe_steps is gone", "--lora_weights"]),
    ],
)
def test_parse_errors_are_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and message.startswith("error: ")
    assert all(word in message for word in words)


def test_local_rank_of_the_launcher_wins(monkeypatch):
    assert parse_args(["--local_rank", "1"]).local_rank == 1
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert parse_args(["--local_rank", "1"]).local_rank == 3


@pytest.mark.parametrize(
    ("text", "value"), [("True", True), ("FALSE", False), ("1", True), ("0", False), ("no", False)]
)
def test_bool_words_mean_what_they_say(text, value):
    assert parse_bool(text) is value
    assert parse_args(["--prodigy_safeguard_warmup", text]).prodigy_safeguard_warmup is value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8GB", 8 * 10**9),
        ("500MiB", 500 * 2**20),
        ("1.5 tb", 1_500_000_000_000),
        ("2gib", 2**31),
        ("1000", 1000),
        ("7B", 7),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_bytes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-8GB", "0", "0.1B", "8", "8 GB free", "8G", "1e9", "nan", "8,5GB"])
def test_malformed_bytes(text):
    with pytest.raises(ValueError, match="8GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("none", "none"), ("auto", "auto"), (" AUTO ", "auto"), ("5", 5), ("0", 0), ("2,3", (2, 3)), ("2 , 0", (2, 0))],
)
def test_skip_blocks(text, value):
    assert parse_skip_blocks(text) == value
    assert parse_skip_blocks(text, num_blocks=12) == value


@pytest.mark.parametrize("text", ["", "-1", "-1,2", "2,-1", "2.5", "1,2,3", "2,", ",2", "half", "30%", "1_0", "٣"])
def test_malformed_skip_blocks(text):
    with pytest.raises(ValueError, match="select_blocks.skip_blocks") as error:
        parse_skip_blocks(text)
    assert "\n" not in str(error.value) and "none, auto" in str(error.value)


@pytest.mark.parametrize("text", ["12", "13", "6,6", "12,0", "0,20"])
def test_skip_blocks_leave_one(text):
    with pytest.raises(ValueError, match="BlockSkipConfig.*at most 11|skip_blocks.*at most 11"):
        parse_skip_blocks(text, num_blocks=12)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        NAMED,
        [*NAMED, "--skip_blocks", "none", "--patch_sampling", "none"],
        [*NAMED, "--optimizer", "Prodigy", "--learning_rate", "1"],
        [*NAMED, "--optimizer", "ADAMW", "--use_8bit_adam"],
        [*NAMED, "--with_prior_preservation", "--class_data_dir", "dogs", "--class_prompt", "a dog"],
        [*NAMED, "--report_to", "none", "--hub_token", "abc"],
        [*NAMED, "--report_to", "all", "--resume_from_checkpoint", "latest"],
        [*NAMED, "--skip_blocks", "auto", "--residual_budget", "8GB", "--residual_dir", "records"],
        [*NAMED, "--output_dir", "not/yet/there"],
        [*NAMED, "--skip_blocks", "2,3", "--resolution", "64", "--min_patch_size", "32", "--max_patch_size", "64"],
        ["--instance_data_dir", "cat", "--instance_prompt", "a sks cat"],
    ],
)
def test_good_commands_pass_without_a_word(argv, installed, caplog):
    validate_args(parse_args(argv))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--pretrained_model_name_or_path", "m", "--instance_prompt", "p"],
            ["--instance_data_dir", "--dataset_name"],
        ),
        (["--pretrained_model_name_or_path", "m", "--instance_data_dir", "dog"], ["--instance_prompt"]),
        ([*NAMED, "--instance_prompt", " "], ["--instance_prompt"]),
        ([*NAMED, "--dataset_name", "set"], ["--instance_data_dir dog", "--dataset_name set"]),
        (["--with_prior_preservation", "--class_prompt", "a dog"], ["--class_data_dir"]),
        (["--with_prior_preservation", "--class_data_dir", "dogs"], ["--class_prompt"]),
        (["--learning_rate", "nan"], ["--learning_rate", "nan"]),
        (["--learning_rate", "inf"], ["--learning_rate", "inf"]),
        (["--skip_ratio", "1.0"], ["--skip_ratio", "--skip_blocks none"]),
        (["--skip_ratio", "0"], ["--skip_ratio", "--skip_blocks none"]),
        (["--adam_beta2", "1"], ["--adam_beta2"]),
        (["--optimizer", "SGD"], ["--optimizer", "SGD", "AdamW", "prodigy"]),
        (["--lr_scheduler", "cosin"], ["--lr_scheduler", "cosin", "cosine_with_restarts"]),
        (["--lr_scheduler", "piecewise_constant"], ["--lr_scheduler", "constant_with_warmup"]),
        (["--report_to", "excel"], ["--report_to", "excel", "tensorboard"]),
        (["--report_to", "wandb", "--hub_token", "abc"], ["--hub_token", "--report_to wandb", "hf auth login"]),
        (["--min_patch_size", "96", "--max_patch_size", "64"], ["--min_patch_size 96", "--max_patch_size 64"]),
        (
            ["--skip_blocks", "5", "--min_patch_size", "1024"],
            ["--min_patch_size 1024", "--max_patch_size 512 (--resolution)"],
        ),
        (
            ["--skip_blocks", "5", "--max_patch_size", "128"],
            ["--min_patch_size 256 (half of --resolution)", "--max_patch_size 128"],
        ),
        (["--resume_from_checkpoint", "checkpoint-9"], ["--resume_from_checkpoint checkpoint-9", "latest"]),
        (["--caption_dropout", "1"], ["--caption_dropout is 1.0", "from 0 up to, but not including, 1"]),
        (["--caption_dropout", "-0.1"], ["--caption_dropout is -0.1", "from 0 up to"]),
        (["--caption_dropout", "nan"], ["--caption_dropout is nan"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_commands_are_refused_in_one_line(argv, words, installed):
    with pytest.raises(ValueError) as error:
        validate_args(parse_args(argv))
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize(
    "name",
    """resolution train_batch_size gradient_accumulation_steps rank lora_alpha checkpointing_steps num_train_epochs
    max_train_steps repeats sample_batch_size num_class_images max_sequence_length checkpoints_total_limit
    validation_epochs lr_num_cycles min_patch_size max_patch_size precompute_batch_size learning_rate text_encoder_lr
    max_grad_norm adam_epsilon validation_num_inference_steps""".split(),  # noqa: SIM905
)
def test_numbers_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"^--{name} is {value}.*; give "):
        validate_args(parse_args([f"--{name}", value]))


@pytest.mark.parametrize("name", ["dataloader_num_workers", "lr_warmup_steps", "seed", "guidance_scale"])
def test_numbers_may_be_zero_but_not_negative(name):
    validate_args(parse_args([f"--{name}", "0"]))
    with pytest.raises(ValueError, match=f"^--{name} is -1.*; give 0 or more"):
        validate_args(parse_args([f"--{name}", "-1"]))


@pytest.mark.parametrize(
    ("argv", "package"),
    [(["--use_8bit_adam"], "bitsandbytes"), (["--optimizer", "prodigy"], "prodigyopt")],
)
def test_missing_packages(argv, package, installed):
    installed(missing={package})
    with pytest.raises(ValueError, match=f"{argv[0]}.*pip install {package}"):
        validate_args(parse_args(argv))


def test_missing_tracker(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ValueError, match="--report_to tensorboard is not installed"):
        validate_args(parse_args([]))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--class_prompt", "a dog"], "--class_prompt has no effect without --with_prior_preservation"),
        (["--skip_blocks", "2,3", "--skip_ratio", "0.5"], "--skip_ratio has no effect without --skip_blocks auto"),
        (["--patch_sampling", "none", "--min_patch_size", "64"], "--min_patch_size has no effect"),
        (["--skip_blocks", "0", "--min_patch_size", "64"], "--min_patch_size has no effect"),
        (["--skip_blocks", "none", "--residual_budget", "8GB"], "--residual_budget has no effect"),
        (["--skip_blocks", "5", "--residuals", "online", "--residual_dir", "x"], "--residual_dir has no effect"),
        (["--optimizer", "prodigy", "--learning_rate", "1", "--use_8bit_adam"], "--use_8bit_adam has no effect"),
        (["--optimizer", "prodigy"], "--learning_rate 0.0001 is low for prodigy"),
        (["--prodigy_decouple", "False"], "--prodigy_decouple has no effect without --optimizer prodigy"),
        (["--text_encoder_lr", "1e-5"], "--text_encoder_lr has no effect without --train_text_encoder"),
        (["--lr_warmup_steps", "5"], "--lr_warmup_steps has no effect without --lr_scheduler other than constant"),
        (["--lr_power", "2"], "--lr_power has no effect without --lr_scheduler polynomial"),
        (["--caption_column", "text"], "--caption_column has no effect without --dataset_name"),
        (["--instance_data_dir", "cat"], "No --instance_prompt for your photos"),
    ],
)
def test_flags_without_effect_are_said_so(argv, words, installed, caplog):
    installed(missing={"bitsandbytes"})
    validate_args(parse_args(argv))
    assert [words in record.getMessage() for record in caplog.records] == [True]


def test_output_dir_must_be_a_folder_that_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    for name in ("file", "file/below"):
        with pytest.raises(ValueError, match="--output_dir .*is a file; name a folder"):
            validate_args(parse_args(["--output_dir", name]))
    monkeypatch.setattr(argument_checks.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="--output_dir new cannot be written"):
        validate_args(parse_args(["--output_dir", "new"]))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_checkpoint_may_be_a_path_or_a_name_in_the_output_dir(tmp_path):
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    for value in ("checkpoint-5", "out/checkpoint-5", str(tmp_path / "out" / "checkpoint-5")):
        validate_args(parse_args(["--output_dir", "out", "--resume_from_checkpoint", value]))


def test_photos_of_the_embedded_model_give_way_to_the_users():
    args = parse_args(["--dataset_name", "set", "--instance_prompt", "a sks dog"])
    validate_args(apply_defaults(args, {"instance_data_dir": "embedded"}))
