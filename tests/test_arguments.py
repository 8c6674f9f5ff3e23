"""The command line: its contract with the upstream script, what counts as typed, and one-line errors."""

import json
from pathlib import Path

import pytest

from blockskip_hooks import arguments
from blockskip_hooks.arguments import (
    apply_defaults,
    build_parser,
    parse_args,
    parse_bool,
    parse_bytes,
    parse_skip_blocks,
    validate_args,
)


CONTRACT = json.loads((Path(__file__).parent / "flags" / "flags_flux.json").read_text())
# Without a model or a prompt the embedded model is trained, so these two are not required here.
NOT_REQUIRED_HERE = {"--pretrained_model_name_or_path", "--instance_prompt"}
# Adding a flag is a decision: it fails here until this list is changed too.
OUR_FLAGS = {
    "--skip_blocks": (None, "none", None),
    "--skip_ratio": (float, 0.3, None),
    "--residuals": (None, "precomputed", ("precomputed", "online", "none")),
    "--residual_dir": (None, None, None),
    "--residual_budget": (None, None, None),
    "--precompute_batch_size": (int, None, None),
    "--overwrite_residuals": ("store_true", False, None),
    "--plan_only": ("store_true", False, None),
    "--patch_sampling": (None, "auto", ("auto", "dynamic", "resize", "random", "high_to_low", "none")),
    "--min_patch_size": (int, None, None),
    "--max_patch_size": (int, None, None),
    "--skip_final_inference": ("store_true", False, None),
}
TYPES = {"str": (None, str), "int": (int,), "float": (float,), "bool": (parse_bool,)}
NAMED = [
    "--pretrained_model_name_or_path",
    "some/model",
    "--instance_prompt",
    "a sks dog",
    "--instance_data_dir",
    "dog",
]


def actions():
    return {action.option_strings[0]: action for action in build_parser()._actions if action.dest != "help"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def installed(monkeypatch):
    """Make every optional package look installed, or all but those of a set."""

    def pretend(missing=()):
        monkeypatch.setattr(
            arguments.importlib.util, "find_spec", lambda name: None if name in missing else "a package"
        )

    pretend()
    return pretend


def test_the_flags_are_those_of_upstream_and_ours():
    assert set(actions()) == {flag["name"] for flag in CONTRACT} | set(OUR_FLAGS)


@pytest.mark.parametrize("flag", CONTRACT, ids=lambda flag: flag["name"])
def test_upstream_flag_keeps_its_meaning(flag):
    action = actions()[flag["name"]]
    assert action.option_strings == [flag["name"]] and action.dest == flag["name"][2:]
    assert action.default == flag["default"] and type(action.default) is type(flag["default"])
    assert (list(action.choices) if action.choices else None) == flag["choices"]
    assert action.required is (flag["required"] and flag["name"] not in NOT_REQUIRED_HERE)
    assert action.help
    if flag["action"] == "store_true":
        assert action.nargs == 0 and action.const is True
    else:
        assert action.nargs == flag["nargs"] and action.type in TYPES[flag["type"]]


@pytest.mark.parametrize("name", OUR_FLAGS)
def test_our_flag(name):
    kind, default, choices = OUR_FLAGS[name]
    action = actions()[name]
    assert action.default == default and action.choices == choices and action.help
    if kind == "store_true":
        assert action.nargs == 0 and action.const is True
    else:
        assert action.type is kind


def test_help_text_formats():
    assert "block skipping" in build_parser().format_help()


def test_given_holds_what_was_typed_even_if_it_is_the_default():
    args = parse_args(["--rank", "4", "--plan_only", "--prodigy_decouple=False"])
    assert args.given == {"rank", "plan_only", "prodigy_decouple"}
    assert (args.rank, args.plan_only, args.prodigy_decouple, args.learning_rate) == (4, True, False, 1e-4)
    assert parse_args([]).given == frozenset()


def test_defaults_give_way_to_typed_flags():
    args = parse_args(["--resolution", "512"])
    apply_defaults(args, {"resolution": 64, "rank": 16})
    assert (args.resolution, args.rank) == (512, 16)


@pytest.mark.parametrize("name", ["no_such_flag", "given"])
def test_unknown_defaults_change_nothing(name):
    args = parse_args([])
    with pytest.raises(ValueError, match=name):
        apply_defaults(args, {"rank": 16, name: 1})
    assert args.rank == 4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rank", "many"], ["--rank", "many"]),
        (["--mixed_precision", "fp8"], ["--mixed_precision", "fp8", "bf16"]),
        (["--skip_block", "2,3"], ["--skip_block 2,3", "did you mean --skip_blocks?"]),
        (["--prodigy_decouple", "maybe"], ["--prodigy_decouple", "maybe", "True"]),
        (["--residual", "online"], ["--residuals"]),
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


@pytest.mark.parametrize("text", ["", "GB", "-8GB", "0", "0.1B", "8 GB free", "8G", "1e9", "nan", "8,5GB"])
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
    with pytest.raises(ValueError, match="--skip_blocks") as error:
        parse_skip_blocks(text)
    assert "\n" not in str(error.value) and "none, auto" in str(error.value)


@pytest.mark.parametrize("text", ["12", "13", "6,6", "12,0", "0,20"])
def test_skip_blocks_leave_one(text):
    with pytest.raises(ValueError, match="--skip_blocks.*at most 11"):
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
        (["--seed", "4294967296"], ["--seed", "2**32"]),
        (["--skip_ratio", "1.0"], ["--skip_ratio", "--skip_blocks none"]),
        (["--skip_ratio", "0"], ["--skip_ratio", "--skip_blocks none"]),
        (["--adam_beta2", "1"], ["--adam_beta2"]),
        (["--optimizer", "SGD"], ["--optimizer", "SGD", "AdamW", "prodigy"]),
        (["--lr_scheduler", "cosin"], ["--lr_scheduler", "cosin", "cosine_with_restarts"]),
        (["--lr_scheduler", "piecewise_constant"], ["--lr_scheduler", "constant_with_warmup"]),
        (["--report_to", "excel"], ["--report_to", "excel", "tensorboard"]),
        (["--report_to", "wandb", "--hub_token", "abc"], ["--hub_token", "--report_to wandb", "hf auth login"]),
        (["--skip_blocks", "1,2,3"], ["--skip_blocks", "1,2,3"]),
        (["--residual_budget", "lots"], ["--residual_budget", "lots", "8GB"]),
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
    max_grad_norm adam_epsilon""".split(),  # noqa: SIM905
)
def test_numbers_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"^--{name} is {value}.*; give "):
        validate_args(parse_args([f"--{name}", value]))


@pytest.mark.parametrize("name", ["dataloader_num_workers", "lr_warmup_steps", "seed", "adam_weight_decay"])
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
    monkeypatch.setattr(arguments.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="--output_dir new cannot be written"):
        validate_args(parse_args(["--output_dir", "new"]))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_checkpoint_may_be_a_path_or_a_name_in_the_output_dir(tmp_path):
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    for value in ("checkpoint-5", "out/checkpoint-5", str(tmp_path / "out" / "checkpoint-5")):
        validate_args(parse_args(["--output_dir", "out", "--resume_from_checkpoint", value]))


def test_photos_of_the_embedded_model_give_way_to_the_users():
    args = parse_args(["--dataset_name", "set", "--instance_prompt", "a sks dog"])
    apply_defaults(args, {"instance_data_dir": "embedded"})
    validate_args(args)
