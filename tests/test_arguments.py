"""The command line: its contract with the upstream scripts, what counts as typed, and one-line errors."""

import functools
import json
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from blockskip_hooks.cli import argument_checks
from blockskip_hooks.cli.argument_checks import check_family_flags, validate_args
from blockskip_hooks.cli.arguments import apply_defaults, build_parser, family_flags, parse_args
from blockskip_hooks.cli.errors import explain
from blockskip_hooks.cli.flags.types import parse_bool, parse_bytes
from blockskip_hooks.cli.preparation import prepare_run
from blockskip_hooks.data.buckets import standard_buckets
from blockskip_hooks.data.photo_set import INTERPOLATION
from blockskip_hooks.families import FAMILIES
from blockskip_hooks.selection import parse_skip_blocks
from blockskip_hooks.utils.files import expand_home
from tests.script import load_script, save_photos
from tests.tiny import TINY_FAMILIES


FAMILY = {family.name: family for family in FAMILIES.values()}
CONTRACTS = {
    path.stem.removeprefix("flags_").replace("_", "-"): json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "flags").glob("flags_*.json"))
}
# Upstream has a second script for pairs of these; a run takes the flags of both.
IMG2IMG = {
    "flux2-img2img": "flux2",
    "flux2-klein-img2img": "flux2-klein",
    "qwen-image-2.1-img2img": "qwen-image-2.1",
}
# There is no upstream DreamBooth-LoRA script for these.
WITHOUT_CONTRACT = {"flux3", "sana-sprint", "pixart-sigma"}
# Choices of the other families that one parser cannot but offer to this one too.
EXTRA_CHOICES = {("sd3", "--weighting_scheme"): {"none"}}
# Flags of a family's upstream script that its runs refuse, with what to do; all others must pass.
REFUSED = {
    "do_fp8_training": "leave it out and use --mixed_precision bf16",
    "fsdp_text_encoder": "nothing to shard; leave it out",
    "remote_text_encoder": "leave it out, and the local text encoder is used",
    "disable_training_autocast": "leave it out",
}
REFUSED_EVERYWHERE = ("do_fp8_training", "fsdp_text_encoder")
# Without a model or a prompt the embedded model is trained, so these two are not required here.
NOT_REQUIRED_HERE = {"--pretrained_model_name_or_path", "--instance_prompt"}
# Adding a flag is a decision: it fails here until this list is changed too.
OUR_FLAGS = {
    "--skip_blocks": (None, "none", None),
    "--skip_ratio": (float, 0.3, None),
    "--skip_budget": (None, None, None),
    "--selection_table": (expand_home, None, None),
    "--strict_table": ("store_true", False, None),
    "--residuals": (None, "precomputed", ("precomputed", "online", "none")),
    "--residual_dtype": (None, "auto", ("auto", "float8")),
    "--stretch_steps": (int, None, None),
    "--record_repeats": (int, 1, None),
    "--refresh_residuals": ("--no-refresh_residuals", None, None),
    "--residual_dir": (expand_home, None, None),
    "--keep_modulation": ("store_true", False, None),
    "--memory_budget": (None, None, None),
    "--memory_options": (None, [], None),
    "--residual_budget": (None, None, None),
    "--precompute_batch_size": (int, None, None),
    "--stream_cache": (None, "auto", None),
    "--overwrite_residuals": ("store_true", False, None),
    "--plan_only": ("store_true", False, None),
    "--log_level": (None, "warning", ("debug", "info", "warning", "error")),
    "--patch_sampling": (None, "auto", ("auto", "dynamic", "resize", "random", "high_to_low", "none")),
    "--quantization": (None, "none", ("nf4", "int8", "none")),
    "--min_patch_size": (int, None, None),
    "--max_patch_size": (int, None, None),
    "--config": (expand_home, None, None),
    "--dump_config": ("store_true", False, None),
    "--save_format": (None, "diffusers", ("diffusers", "comfyui")),
    "--export_merged": ("store_true", False, None),
    "--open": ("store_true", False, None),
    "--compile": ("store_true", False, None),
    "--assistant_lora": (expand_home, None, None),
    "--validation_resolution": (int, None, None),
    "--cond_data_dir": (expand_home, None, None),
}
# The upstream scripts take one.
SEVERAL = {"--validation_prompt"}
# Texts that are read as something else, whatever the upstream script does with them.
PARSED = dict.fromkeys(
    """--skip_blocks --skip_budget --memory_budget --residual_budget --lora_layers --lora_blocks --report_to
    --aspect_ratio_buckets --stream_cache""".split()  # noqa: SIM905
)
TYPES = {"str": (None, str, expand_home), "int": (int,), "float": (float,), "bool": (parse_bool,)}
NAMED = [
    "--pretrained_model_name_or_path",
    "some/model",
    "--instance_prompt",
    "a sks dog",
    "--instance_data_dir",
    "dog",
]


@functools.cache
def actions():
    return {action.option_strings[0]: action for action in build_parser()._actions if action.dest != "help"}


def words_for(name):
    """A command line with the flag and some value."""
    action = actions()[f"--{name}"]
    # "1" is a word for a switch too.
    value = action.choices[0] if action.choices else "1" if action.type else "x"
    value = "64,64" if name == "aspect_ratio_buckets" else value
    return [f"--{name}"] if action.nargs == 0 else [f"--{name}", value]


def family_of(name):
    """The family that a contract is about."""
    return FAMILY[IMG2IMG.get(name, name)]


def args_of(family, argv=()):
    """The settings as a run of this family has them."""
    return apply_defaults(parse_args(argv), family.flag_defaults)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def installed(monkeypatch):
    """Make every optional package look installed, or all but those of a set."""

    def pretend(missing=()):
        monkeypatch.setattr(
            argument_checks.importlib.util, "find_spec", lambda name: None if name in missing else "a package"
        )

    pretend()
    return pretend


# The contract


def test_every_family_has_a_contract_where_upstream_has_a_script():
    scripts = set(CONTRACTS) - set(IMG2IMG)
    assert scripts | WITHOUT_CONTRACT == set(FAMILY) and not scripts & WITHOUT_CONTRACT
    assert set(IMG2IMG) <= set(CONTRACTS)


def test_the_flags_are_those_of_upstream_and_ours():
    upstream = {flag["name"] for contract in CONTRACTS.values() for flag in contract}
    assert set(actions()) == upstream | set(OUR_FLAGS)
    assert not upstream & set(OUR_FLAGS)


@pytest.mark.parametrize("name", CONTRACTS)
def test_upstream_flags_keep_their_form(name):
    wrong = []
    for flag in CONTRACTS[name]:
        action = actions()[flag["name"]]
        switch = flag["action"] == "store_true"
        extra = EXTRA_CHOICES.get((name, flag["name"]), set())
        choices = None if action.choices is None else set(action.choices) - extra
        kind = PARSED.get(flag["name"], action.type)
        fits = {
            "name": action.option_strings == [flag["name"]] and action.dest == flag["name"][2:],
            "choices": choices == (None if flag["choices"] is None else set(flag["choices"])),
            "required": not action.required and (not flag["required"] or flag["name"] in NOT_REQUIRED_HERE),
            "help": bool(action.help),
            "action": (action.nargs == 0 and action.const is True) if switch else action.const is None,
            "nargs": switch or action.nargs == ("+" if flag["name"] in SEVERAL else flag["nargs"]),
            "type": switch or kind in TYPES[flag["type"]],
        }
        wrong += [(flag["name"], what) for what, holds in fits.items() if not holds]
    assert wrong == []


@pytest.mark.parametrize("name", CONTRACTS)
def test_upstream_flags_keep_their_default(name):
    values = args_of(family_of(name)).plain()
    ours = {flag["name"]: values[flag["name"][2:]] for flag in CONTRACTS[name]}
    theirs = {flag["name"]: flag["default"] for flag in CONTRACTS[name]}
    assert ours == theirs
    assert {flag: type(value) for flag, value in ours.items()} == {f: type(value) for f, value in theirs.items()}


@pytest.mark.parametrize("name", FAMILY)
def test_a_family_without_a_flag_for_alpha_scales_by_one(name):
    """Upstream scripts without ``--lora_alpha`` take the rank for it."""
    has_flag = name in WITHOUT_CONTRACT or "--lora_alpha" in {flag["name"] for flag in CONTRACTS[name]}
    assert (args_of(FAMILY[name]).lora_alpha is None) is not has_flag


def test_family_defaults_are_of_known_flags_and_checked_values(installed):
    for family in FAMILY.values():
        args = args_of(family, NAMED)
        validate_args(args.with_values({"lora_alpha": args.lora_alpha or args.rank}))


# Flags of some families


def test_a_flag_that_several_families_own_is_parsed_the_same_for_all():
    for family in FAMILY.values():
        for flag in family.own_flags:
            parsed = [{**own.settings, "help": None} for own in (flag, family_flags()[flag.name])]
            assert parsed[0] == parsed[1], (family.name, flag.name)


def test_help_says_what_a_flag_does_for_the_families_that_use_it():
    helps = {name: actions()[f"--{name}"].help for name in family_flags()}
    assert helps["guidance_scale"].endswith(" Only flux, flux-kontext, flux2, flux2-klein, z-image, ideogram4.")
    assert helps["pretrained_text_encoder_4_name_or_path"].startswith("Llama to encode prompts with")
    for name, text in helps.items():
        assert any(family.name in text.rpartition(" Only ")[2] for family in FAMILY.values()), name


def refusal(family, argv):
    """Why the family refuses a command line, or None."""
    try:
        check_family_flags(parse_args(argv), family)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_family_takes_the_flags_of_its_upstream_script(name):
    refused = {
        flag["name"][2:]
        for flag in CONTRACTS[name]
        if refusal(family_of(name), words_for(flag["name"][2:])) is not None
    }
    assert refused == {flag["name"][2:] for flag in CONTRACTS[name]} & set(REFUSED)


@pytest.mark.parametrize("name", FAMILY)
def test_a_flag_of_other_families_is_refused_with_their_names(name):
    own = {flag.name for flag in FAMILY[name].own_flags}
    for flag in set(family_flags()) - own:
        owners = [family.name for family in FAMILY.values() if flag in {own.name for own in family.own_flags}]
        assert refusal(FAMILY[name], words_for(flag)) == (
            f"--{flag} cannot be used: it belongs to models of {', '.join(owners)} and does nothing for {name}; "
            "leave it out."
        )


@pytest.mark.parametrize("name", FAMILY)
def test_a_flag_that_no_run_can_honour_is_refused_with_what_to_do(name):
    own = {flag.name for flag in FAMILY[name].own_flags if flag.refusal}
    assert own <= set(REFUSED)
    for flag in (*REFUSED_EVERYWHERE, *own):
        message = refusal(FAMILY[name], words_for(flag))
        assert message.startswith(f"--{flag} cannot be used: ") and "\n" not in message
        assert REFUSED[flag] in message


@pytest.mark.parametrize("name", FAMILY)
def test_flags_that_were_not_typed_are_not_refused(name, tmp_path):
    (tmp_path / "1").write_text("rank: 4")
    assert refusal(FAMILY[name], []) is None
    of_all = [flag for flag in OUR_FLAGS if flag[2:] not in family_flags()]
    assert refusal(FAMILY[name], [word for flag in of_all for word in our_words(flag)]) is None


def our_words(flag):
    kind, default, choices = OUR_FLAGS[flag]
    return [flag] if isinstance(kind, str) else [flag, str(default or (choices or ("1",))[0])]


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


@pytest.mark.parametrize(
    ("pipeline", "argv", "words"),
    [
        ("FluxPipeline", ["--complex_human_instruction", "x"], ["sana, sana-sprint", "nothing for flux", "leave it"]),
        ("FluxPipeline", ["--do_fp8_training"], ["float8", "--mixed_precision bf16"]),
        ("SanaPipeline", ["--guidance_scale", "2"], ["flux, flux-kontext", "nothing for sana", "leave it out"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0] if value[0].startswith("--") else "",
)
def test_the_script_refuses_a_flag_before_it_reads_a_weight(pipeline, argv, words, tmp_path, capsys):
    model = tmp_path / "model"
    for component in ("transformer", "vae", "scheduler", *FAMILIES[pipeline].text_components):
        (model / component).mkdir(parents=True)
    (model / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    named = ["--pretrained_model_name_or_path", str(model), *NAMED[2:], "--report_to", "none", "--output_dir", "out"]
    assert load_script().main([*named, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {argv[0]} cannot be used: ") and err.count("\n") == 1
    assert [word for word in words if word not in err] == []
    assert not (tmp_path / "out").exists()


# Our flags


@pytest.mark.parametrize("name", OUR_FLAGS)
def test_our_flag(name):
    kind, default, choices = OUR_FLAGS[name]
    action = actions()[name]
    assert action.default == default and action.choices == choices and action.help
    if kind == "store_true":
        assert action.nargs == 0 and action.const is True
    elif isinstance(kind, str):
        assert action.nargs == 0 and action.option_strings == [name, kind]
    else:
        assert PARSED.get(name, action.type) is kind


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
        (["--select_on", "base"], ["--select_on is gone", "select_blocks.py", "--skip_blocks auto"]),
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


# Flags that need the model's shape


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    """Prepare a run on a tiny model."""
    photos = save_photos(tmp_path_factory.mktemp("photos"), [(64, 64)])

    def call(*argv, name="flux"):
        tiny = next(tiny for tiny in TINY_FAMILIES if tiny.family.name == name)
        settings = ["--pretrained_model_name_or_path", tiny.folder, "--instance_data_dir", photos, *NAMED[2:4]]
        settings += ["--resolution", tiny.resolution, "--report_to", "none"]
        return prepare_run(parse_args([*map(str, settings), *argv]))

    return call


def test_alpha_is_the_rank_where_the_family_has_no_flag_for_it(prepare):
    assert prepare("--rank", "7", name="sd3").settings.lora_alpha == 7
    assert prepare("--rank", "7", "--lora_alpha", "2", name="sd3").settings.lora_alpha == 2
    assert prepare("--rank", "7").settings.lora_alpha == 4


@pytest.mark.parametrize(
    ("skipped", "numbers", "blocks"),
    [
        ("none", "0,4", {"transformer_blocks.0", "single_transformer_blocks.2"}),
        ("none", " 1 , 1", {"transformer_blocks.1"}),
        ("1,1", "1,2,3", {"transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1"}),
        ("2,0", "3", {"single_transformer_blocks.1"}),
    ],
)
def test_lora_blocks_are_numbers_of_blocks_in_order_of_execution(prepare, skipped, numbers, blocks):
    run = prepare("--skip_blocks", skipped, "--lora_blocks", numbers)
    assert {".".join(target.split(".")[:2]) for target in run.targets} == blocks
    assert len(run.targets) == len(set(run.targets))
    every = prepare("--skip_blocks", skipped).targets
    assert set(run.targets) == {target for target in every if ".".join(target.split(".")[:2]) in blocks}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_blocks", "0"], r"^--lora_blocks 0 is a skipped block; name kept ones \(1 to 3\) or change --skip_b"),
        (["--lora_blocks", "1,4"], "^--lora_blocks 4 is a skipped block"),
        (["--lora_blocks", "5"], "^--lora_blocks '5': '5' is no block; the 5 blocks are numbered 0 to 4"),
        (["--lora_blocks", "-1"], "^--lora_blocks '-1': '-1' is no block"),
        (["--lora_blocks", "1-3"], "^--lora_blocks '1-3': '1-3' is no block"),
        (["--lora_blocks", "1,"], "^--lora_blocks '1,': '' is no block"),
        (["--lora_blocks", "1,\u00b2"], "^--lora_blocks .* is no block"),
        (["--lora_blocks", "9" * 5000], "^--lora_blocks .* is no block"),
        (["--lora_blocks", "3", "--lora_layers", "attn.add_q_proj"], "none of single_.*name others"),
        (["--aspect_ratio_buckets", "64,64;60,64"], "^--aspect_ratio_buckets has 60,64, which are not .*8 px"),
        (["--aspect_ratio_buckets", "64,68"], "^--aspect_ratio_buckets has 64,68"),
        (["--aspect_ratio_buckets", "0,64"], "^--aspect_ratio_buckets has 0,64, which are not positive"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_does_not_fit_the_model_is_refused_in_one_line(prepare, argv, message):
    with pytest.raises(ValueError) as error:
        prepare("--skip_blocks", "1,1", *argv)
    shown = explain(error.value)
    assert re.search(message, shown) and "\n" not in shown


@pytest.mark.parametrize("layers", ["1", "1 2 -9", "1 2 999"])
def test_layers_that_the_text_encoder_lacks_are_refused(prepare, layers):
    with pytest.raises(ValueError, match=f"^--text_encoder_out_layers {layers} does not fit this model; give 3 num"):
        prepare("--text_encoder_out_layers", *layers.split(), name="flux2-klein")


def test_buckets_are_those_typed_or_standard_ones_of_the_largest_patch(prepare):
    typed = ("--aspect_ratio_buckets", "64,64; 96,64")
    assert prepare().patch.buckets == ()
    assert prepare(*typed).patch.buckets == ((64, 64), (96, 64))
    assert prepare(*typed, "--use_aspect_ratio_buckets").patch.buckets == ((64, 64), (96, 64))
    assert prepare("--use_aspect_ratio_buckets").patch.buckets == standard_buckets(64, 8)
    largest = ("--skip_blocks", "1,1", "--max_patch_size", "48", "--min_patch_size", "24")
    assert prepare("--use_aspect_ratio_buckets", *largest).patch.buckets == standard_buckets(48, 8)
