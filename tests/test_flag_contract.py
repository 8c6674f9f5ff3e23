"""The flags: those of the upstream scripts with their meaning, those of some families, and ours."""

import functools
import json
from pathlib import Path

import pytest

from blockskip_hooks.cli.argument_checks import check_family_flags
from blockskip_hooks.cli.arguments import apply_defaults, build_parser, family_flags, parse_args
from blockskip_hooks.families import FAMILIES
from blockskip_hooks.training.flags.types import parse_bool
from blockskip_hooks.utils.files import expand_home
from tests.script import load_script


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
    "--patch_positions": (None, "patch", ("patch", "photo")),
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


pytestmark = pytest.mark.usefixtures("no_launcher")


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
    word = "1GB" if flag.endswith("_budget") else "1"
    return [flag] if isinstance(kind, str) else [flag, str(default or (choices or (word,))[0])]


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
    named = ["--pretrained_model_name_or_path", str(model), "--instance_prompt", "a sks dog"]
    named += ["--instance_data_dir", "dog", "--report_to", "none", "--output_dir", "out"]
    assert load_script().main([*named, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {argv[0]} cannot be used: ") and err.count("\n") == 1
    assert [word for word in words if word not in err] == []
    assert not (tmp_path / "out").exists()


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
