"""Command line of the training script: the flags, and the settings that a command line and its file hold."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args

from ..config import PatchMode, ResidualMode
from ..data.buckets import parse_buckets
from ..data.photo_set import INTERPOLATION
from ..families import FAMILIES, Flag
from ..loading.quantization import METHODS
from ..planning.options import MEMORY_OPTIONS
from ..residuals.dtype import ResidualDtype
from ..selection import parse_skip_blocks
from ..training.settings import TrainSettings
from ..utils.errors import UserError, one_line
from ..utils.files import expand_home
from .config_files import GONE, config_words
from .console import shipped
from .flag_names import with_flags
from .startup import OneLineParser, make_parser


_BYTE_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_TRUE_WORDS = ("true", "yes", "on", "1")
_FALSE_WORDS = ("false", "no", "off", "0")


def printable_command(words: Sequence[str]) -> str:
    """A command line as it may be shown and repeated: quoted for a shell, without the token.

    ``--resume_from_checkpoint`` is left out: what repeats a run begins it anew.
    """
    shown, before = [], ""
    for word in words:
        name, given, _ = word.partition("=")
        if "--resume_from_checkpoint" not in (name, before):
            hidden = before == "--hub_token"
            shown.append("***" if hidden else f"{name}=***" if name == "--hub_token" and given else word)
        before = word
    return shlex.join(shown)


def parse_bool(text: str) -> bool:
    """Turn the words true/yes/on/1 and false/no/off/0, in any case, into what they say.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    word = text.strip().lower()
    if word not in _TRUE_WORDS + _FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return word in _TRUE_WORDS


class ByteCount(int):
    """A number of bytes that shows as it was typed."""

    text: str

    def __str__(self) -> str:
        return self.text


def parse_bytes(text: str) -> ByteCount:
    """Number of bytes in a text like ``"8GB"`` (1e9), ``"500MiB"`` (2**20), ``"1.5 TB"`` or ``"1000000"``.

    Raises:
        UserError: if the text has another form or the amount is below one byte.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    unit = _BYTE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise UserError(f"'{text}' is not a number of bytes; write it like 8GB, 500MiB or 1000000.")
    # Whole numbers stay exact: a float has no room for every large byte count.
    count = ByteCount(int(match[1]) * unit if match[1].isdigit() else int(float(match[1]) * unit))
    count.text = text
    return count


def parse_cache(text: str) -> str | ByteCount:
    """``--stream_cache``: the words ``auto`` and ``none``, or a number of bytes."""
    word = text.strip().lower()
    return word if word in ("auto", "none") else parse_bytes(text)


def parse_names(text: str) -> tuple[str, ...]:
    """The names in a text that separates them by commas."""
    return tuple(name.strip() for name in text.split(","))


def parse_trackers(text: str) -> tuple[str, ...]:
    """The names in ``--report_to``, known or not; none for ``none``."""
    return () if text == "none" else tuple(dict.fromkeys(parse_names(text)))


def skip_blocks_text(text: str) -> str:
    """``--skip_blocks`` in one of its forms, without blanks around it and in lower case."""
    parse_skip_blocks(text)
    return text.strip().lower()


def argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A function that reads a text as the type of a flag: what is wrong with the text becomes the parser's error."""

    def convert(text: str) -> Any:
        if not text.strip():
            raise argparse.ArgumentTypeError("is empty; give a value, or leave the flag out.")
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(with_flags(str(error))) from None

    return convert


SIZE, NAMES = argument_type(parse_bytes), argument_type(parse_names)


def family_flags() -> dict[str, Flag]:
    """The flags that some families own, by name; of several owners' descriptions the first one's."""
    flags: dict[str, Flag] = {}
    for family in FAMILIES.values():
        for flag in family.own_flags:
            flags.setdefault(flag.name, flag)
    return flags


def _settings_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("settings").add_argument
    flag(
        "--config",
        type=expand_home,
        help="YAML file with flags as keys, or a recipe: configs/NAME. What is typed wins. Default: none.",
    )
    flag("--dump_config", action="store_true", help="Print all settings as such a file, and stop.")


def _model_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("model").add_argument
    flag(
        "--pretrained_model_name_or_path",
        type=expand_home,
        help="Hub id or folder of a pipeline; default: the embedded model.",
    )
    flag("--revision", help="Branch, tag or commit of the model on the hub; default: main.")
    flag("--variant", help="Weight file variant, fp16 say; default: files without one.")
    flag(
        "--cache_dir",
        type=expand_home,
        help="Where downloaded models and datasets are kept; default: the hub's cache.",
    )
    flag("--max_sequence_length", type=int, default=512, help="Tokens of a prompt that the long text encoder sees.")
    flag(
        "--bnb_quantization_config_path",
        type=expand_home,
        help="JSON file that says how bitsandbytes holds kept blocks' weights; default: as --quantization says.",
    )
    flag("--quantization", choices=METHODS, default="none", help="Hold kept blocks in 4 (nf4) or 8 bits (int8).")


def _photos_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("photos").add_argument
    flag(
        "--instance_data_dir",
        type=expand_home,
        help="Folder with photos of the subject; name.txt beside name.jpg is its caption. Default: the "
        "embedded photos.",
    )
    flag(
        "--instance_prompt",
        help="Prompt for photos without a caption, with the subject's rare word in it; "
        "no default but the embedded one.",
    )
    flag(
        "--dataset_name",
        type=expand_home,
        help="Dataset with the photos, a hub id or a local folder, in place of --instance_data_dir; default: none.",
    )
    flag("--dataset_config_name", help="Configuration of --dataset_name; default: its only one.")
    flag("--image_column", default="image", help="Column of --dataset_name with the photos.")
    flag("--caption_column", help="Column of --dataset_name with captions; default: none, so --instance_prompt.")
    flag("--repeats", type=int, default=1, help="How many times each photo counts in an epoch.")
    flag("--resolution", type=int, default=512, help="Side in pixels of the training crop, and of the largest patch.")
    flag("--center_crop", action="store_true", help="Crop from the middle; otherwise anywhere.")
    flag("--random_flip", action="store_true", help="Mirror half of the samples.")
    flag(
        "--image_interpolation_mode",
        choices=tuple(INTERPOLATION),
        default="lanczos",
        help="Filter that photos and patches are resized with.",
    )
    flag("--use_aspect_ratio_buckets", action="store_true", help="Crop to common aspect ratios, not to a square.")
    flag(
        "--aspect_ratio_buckets",
        type=argument_type(parse_buckets),
        help="Crop to these shapes, in pixels, in place of a square: height,width;height,width;... "
        "Default: the square.",
    )
    flag(
        "--caption_dropout",
        type=float,
        default=0.0,
        help="Part of the samples, 0 to 1, that trains on an empty prompt.",
    )


def _block_skipping_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("block skipping").add_argument
    flag(
        "--skip_blocks",
        type=argument_type(skip_blocks_text),
        default="none",
        help="Blocks to skip: none, auto, N in all, or n,m (leading,trailing).",
    )
    flag("--skip_ratio", type=float, default=0.3, help="Part of all blocks, 0 to 1, that --skip_blocks auto skips.")
    flag(
        "--skip_budget",
        type=SIZE,
        help="Bytes of parameters that --skip_blocks auto frees instead, like 10GiB; default: --skip_ratio decides.",
    )
    flag(
        "--selection_table",
        type=expand_home,
        help="Table that says which blocks to skip, from select_blocks.py; default: what is known.",
    )
    flag("--strict_table", action="store_true", help="Refuse to choose blocks by anything that was not measured.")
    flag(
        "--residuals",
        choices=get_args(ResidualMode),
        default="precomputed",
        help="What stands in for skipped blocks: records made before training, a forward in every step, or nothing.",
    )
    flag(
        "--keep_modulation",
        action="store_true",
        help="Keep the kept blocks' modulation layers in memory; by default their outputs are part of the records.",
    )
    flag(
        "--residual_dtype",
        choices=get_args(ResidualDtype),
        default="auto",
        help="Number format of the records: that of the hidden states, or float8, which halves the disk.",
    )
    flag(
        "--residual_dir",
        type=expand_home,
        help="Folder of the residual records, kept afterwards; default: inside --output_dir, deleted at the end.",
    )
    flag(
        "--residual_budget",
        type=SIZE,
        help="Bytes of disk the records may fill at a time, like 8GB; fewer are then made per stretch. "
        "Default: 16GB, or half of what is free.",
    )
    flag("--stretch_steps", type=int, help="Steps whose records are made at a time; default: as many as fit.")
    flag("--record_repeats", type=int, default=1, help="Times each record is trained on; 2 halves the precompute.")
    flag(
        "--refresh_residuals",
        action=argparse.BooleanOptionalAction,
        help="Make each stretch's records with the LoRA learnt so far; without --stretch_steps, in ten stretches. "
        "Default: where trailing blocks are skipped, unless --residual_dir keeps the records for other runs.",
    )
    flag("--precompute_batch_size", type=int, help="Samples per forward when making records; default: what fits.")
    flag(
        "--stream_cache",
        type=argument_type(parse_cache),
        default="auto",
        help="Host memory that skipped blocks stay in once read: a number of bytes, none, or auto: half of what is "
        "free, beside an accelerator.",
    )
    flag("--overwrite_residuals", action="store_true", help="Replace records that another run left.")
    flag(
        "--memory_budget",
        type=SIZE,
        help="Bytes of memory that every stage must fit in, like 12GiB; chooses how many blocks to skip. "
        "Default: no limit.",
    )
    flag(
        "--memory_options",
        nargs="+",
        default=[],
        help=f"What --memory_budget may use beside skipping, in this order: {', '.join(MEMORY_OPTIONS)}. "
        "Default: none.",
    )
    flag("--plan_only", action="store_true", help="Print the plan and its memory and disk needs, write it, and stop.")


def _patch_sampling_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("patch sampling").add_argument
    flag(
        "--patch_sampling",
        choices=("auto", *get_args(PatchMode)),
        default="auto",
        help="How large a patch each timestep trains on; auto is dynamic when blocks are skipped, else none.",
    )
    flag(
        "--min_patch_size",
        type=int,
        help="Smallest patch in pixels, and the size trained at; default: half of --resolution.",
    )
    flag("--max_patch_size", type=int, help="Largest patch in pixels; default: --resolution.")


def _prior_preservation_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("prior preservation").add_argument
    flag("--with_prior_preservation", action="store_true", help="Also train on pictures of the subject's class.")
    flag("--prior_loss_weight", type=float, default=1.0, help="Weight of the class pictures in the loss.")
    flag(
        "--class_data_dir",
        type=expand_home,
        help="Folder of class pictures; those that are missing are generated. No default.",
    )
    flag("--class_prompt", help="Prompt of the class pictures; no default.")
    flag("--num_class_images", type=int, default=100, help="Class pictures wanted in --class_data_dir.")
    flag("--sample_batch_size", type=int, default=4, help="Class pictures generated at a time.")
    flag(
        "--prior_generation_precision",
        choices=("no", "fp32", "fp16", "bf16"),
        help="Number format for them; default: that of training.",
    )


def _lora_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("LoRA").add_argument
    flag("--rank", type=int, default=4, help="Rank of the LoRA matrices.")
    flag("--lora_alpha", type=int, default=4, help="LoRA scale; updates are multiplied by alpha / rank.")
    flag("--lora_dropout", type=float, default=0.0, help="Dropout in the LoRA layers.")
    flag(
        "--lora_layers",
        type=NAMES,
        help="Comma-separated ends of the names of the layers to adapt, within kept blocks; default: the family's.",
    )
    flag(
        "--lora_blocks",
        type=NAMES,
        help="Comma-separated numbers of the only blocks to adapt, counted from 0; default: all kept ones.",
    )
    flag(
        "--assistant_lora",
        type=expand_home,
        help="Frozen LoRA beside the one that trains, for distilled models: a file, a folder, owner/name or "
        "owner/name/file of the hub. It takes part in training and in the records, not in pictures, and is not "
        "exported. Default: none.",
    )
    flag("--train_text_encoder", action="store_true", help="Also train a LoRA on the CLIP text encoders.")
    flag("--fsdp_text_encoder", action="store_true", help="Not supported: sharding of the text encoder.")


def _training_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("training").add_argument
    flag("--train_batch_size", type=int, default=4, help="Samples per step and process.")
    flag("--gradient_accumulation_steps", type=int, default=1, help="Batches per optimizer step.")
    flag("--num_train_epochs", type=int, default=1, help="Passes over the photos.")
    flag(
        "--max_train_steps",
        type=int,
        help="Optimizer steps in all; takes the place of --num_train_epochs. Default: the steps of those.",
    )
    flag("--seed", type=int, help="Seed of everything random; default: another in each run.")
    flag("--gradient_checkpointing", action="store_true", help="Less activation memory for one more forward.")
    flag("--cache_latents", action="store_true", help="Encode the photos once and free the VAE.")
    flag("--dataloader_num_workers", type=int, default=0, help="Processes that prepare samples; 0: the main one.")
    flag(
        "--weighting_scheme",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none"),
        default="none",
        help="Distribution of timesteps and weight of the loss.",
    )
    flag("--logit_mean", type=float, default=0.0, help="Mean for --weighting_scheme logit_normal.")
    flag("--logit_std", type=float, default=1.0, help="Standard deviation for --weighting_scheme logit_normal.")
    flag("--mode_scale", type=float, default=1.29, help="Scale for --weighting_scheme mode.")


def _optimizer_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--optimizer", default="AdamW", help="AdamW or prodigy.")
    flag("--learning_rate", type=float, default=1e-4, help="Peak learning rate; about 1 with prodigy.")
    flag("--text_encoder_lr", type=float, default=5e-6, help="Learning rate of the text encoder's LoRA.")
    flag("--scale_lr", action="store_true", help="Multiply the rate by processes, batch size and accumulation.")
    flag("--lr_scheduler", default="constant", help="Shape of the learning rate over time, cosine say.")
    flag("--lr_warmup_steps", type=int, default=500, help="Steps over which the learning rate rises.")
    flag("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    flag("--lr_power", type=float, default=1.0, help="Exponent of polynomial.")
    flag("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state, from bitsandbytes.")
    flag("--adam_beta1", type=float, default=0.9, help="First beta, of prodigy too.")
    flag("--adam_beta2", type=float, default=0.999, help="Second beta, of prodigy too.")
    flag("--adam_weight_decay", type=float, default=1e-4, help="Weight decay of the transformer's LoRA.")
    flag("--adam_weight_decay_text_encoder", type=float, default=1e-3, help="Weight decay of the encoder's LoRA.")
    flag("--adam_epsilon", type=float, default=1e-8, help="Added to the denominator, of prodigy too.")
    flag("--prodigy_beta3", type=float, help="Beta of prodigy's step size; default: the root of the second beta.")
    flag("--prodigy_decouple", type=parse_bool, default=True, help="Decoupled weight decay in prodigy: True or False.")
    flag("--prodigy_use_bias_correction", type=parse_bool, default=True, help="Bias correction: True or False.")
    flag("--prodigy_safeguard_warmup", type=parse_bool, default=True, help="Hold prodigy back in warmup: True, False.")
    flag("--max_grad_norm", type=float, default=1.0, help="Norm that gradients are clipped to.")


def _validation_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("validation").add_argument
    flag(
        "--validation_prompt",
        nargs="+",
        help="Prompts, each in quotes, to draw pictures of in and after training; default: none.",
    )
    flag("--num_validation_images", type=int, default=4, help="Pictures per validation.")
    flag(
        "--validation_resolution",
        type=int,
        help="Side of the pictures in pixels; default: the model's own, or --resolution where it has none.",
    )
    flag("--validation_epochs", type=int, default=50, help="Epochs between validations.")
    flag(
        "--validation_model_path",
        type=expand_home,
        help="Hub id or folder of the model that makes the pictures, with the LoRA put on it: the distilled sibling "
        "of the trained one, say; default: the trained one.",
    )
    flag("--final_validation_prompt", help="Prompt of the pictures after training; default: --validation_prompt.")
    flag("--skip_final_inference", action="store_true", help="Draw no pictures after training.")


def _output_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("output").add_argument
    flag(
        "--output_dir",
        type=expand_home,
        default="flux-dreambooth-lora",
        help="Folder for the LoRA, reports and checkpoints.",
    )
    flag("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    flag("--checkpoints_total_limit", type=int, help="Checkpoints kept; older ones are removed. Default: all.")
    flag(
        "--resume_from_checkpoint",
        type=expand_home,
        help="Checkpoint folder to go on from, or latest; default: begin anew.",
    )
    flag("--upcast_before_saving", action="store_true", help="Save the LoRA in float32.")
    flag(
        "--save_format",
        choices=("diffusers", "comfyui"),
        default="diffusers",
        help="comfyui: beside the file that diffusers reads, one that ComfyUI reads.",
    )
    flag("--export_merged", action="store_true", help="Also write the transformer with the LoRA in its weights.")
    flag("--open", action="store_true", help="Show report.html in this machine's browser at the end.")
    flag("--logging_dir", type=expand_home, default="logs", help="Folder for tracker logs, inside --output_dir.")
    flag(
        "--report_to",
        type=argument_type(parse_trackers),
        default="tensorboard",
        help="Trackers: tensorboard, wandb, ..., several by commas, all or none.",
    )
    flag(
        "--log_level",
        choices=("debug", "info", "warning", "error"),
        default="warning",
        help="What is said on stderr: everything, each stage's cost, warnings and progress, or errors alone.",
    )
    flag("--push_to_hub", action="store_true", help="Upload the result to the hub.")
    flag("--hub_token", help="Token for the upload; default: that of hf auth login, which is safer.")
    flag("--hub_model_id", help="Name of the repository on the hub; default: the name of --output_dir.")


def _machine_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("machine").add_argument
    flag("--mixed_precision", choices=("no", "fp16", "bf16"), help="Number format; default: accelerate's setting.")
    flag("--do_fp8_training", action="store_true", help="Not supported: training in float8.")
    flag("--offload", action="store_true", help="Keep models that are not in use off the device; always so here.")
    flag("--enable_vae_tiling", action="store_true", help="Let the VAE work tile by tile: less memory for it.")
    flag("--compile", action="store_true", help="Compile kept blocks: faster steps after slow first ones.")
    flag("--allow_tf32", action="store_true", help="Let NVIDIA cards multiply matrices in TF32.")
    flag("--enable_npu_flash_attention", action="store_true", help="Flash attention on Ascend NPUs.")
    flag("--local_rank", type=int, default=-1, help="Process number on this machine; LOCAL_RANK takes precedence.")


def _family_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("flags of some model families").add_argument
    for name, own in sorted(family_flags().items()):
        owners = ", ".join(dict.fromkeys(f.name for f in FAMILIES.values() if own in f.own_flags))
        flag(f"--{name}", **{**own.settings, "help": f"{own.settings['help']} Only {owners}."})


def build_parser() -> OneLineParser:
    """Parser with the flags of the upstream DreamBooth-LoRA scripts of all families, and those of block skipping."""
    # Without abbreviations a command keeps its meaning when flags are added.
    parser = make_parser("DreamBooth-LoRA on a diffusion transformer, with part of its blocks skipped.")
    for add_group in (
        _settings_flags,
        _model_flags,
        _photos_flags,
        _block_skipping_flags,
        _patch_sampling_flags,
        _prior_preservation_flags,
        _lora_flags,
        _training_flags,
        _optimizer_flags,
        _validation_flags,
        _output_flags,
        _machine_flags,
        _family_flags,
    ):
        add_group(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> TrainSettings:
    """The settings of a command line and of the file of its ``--config``, before a model has its say.

    The file's values come before the command line's as arguments do, so what is typed wins.

    Args:
        argv: Arguments without the program name, or None for those of the process.

    Returns:
        The settings. ``local_rank`` is the variable ``LOCAL_RANK`` where a launcher set it.

    A flag or a file that cannot be parsed ends the program with one line on stderr and code 2.
    """
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    defaults = vars(parser.parse_args([]))
    # argparse fills in a default only where the namespace has no value yet, so what stays was not typed.
    untyped = object()
    found = argparse.Namespace(**dict.fromkeys(defaults, untyped))
    in_file: frozenset[str] = frozenset()
    if (path := _config_file(words)) is not None:
        try:
            file_words, in_file = config_words(path, parser)
        except UserError as error:
            parser.exit(2, f"error: {one_line(str(error))}\n")
        parser.source = f"--config {path}: "
        parser.parse_args(file_words, found)
        parser.source = ""
    _, unknown = parser.parse_known_args(words, found)
    if unknown:
        _refuse_unknown(parser, unknown)
    typed = {name: value for name, value in vars(found).items() if value is not untyped}
    values = {**defaults, **typed}
    if values["validation_prompt"] is not None:
        values["validation_prompt"] = tuple(dict.fromkeys(values["validation_prompt"]))
    launcher_rank = os.environ.get("LOCAL_RANK", "-1")
    if launcher_rank != "-1":
        values["local_rank"] = int(launcher_rank)
    own = {field.name for field in fields(TrainSettings)} - {"given", "family_flags"}
    return TrainSettings(
        given=in_file | typed.keys(),
        family_flags={name: values[name] for name in family_flags()},
        **{name: values[name] for name in own},
    )


def _config_file(words: Sequence[str]) -> Path | None:
    """The file of ``--config``, if the command line names one; recipes of the package are found from every folder."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=expand_home)
    path = parser.parse_known_args(words)[0].config
    if path is not None and Path(path).parts[:1] == ("configs",) and not Path(path).exists():
        with contextlib.suppress(UserError):
            return shipped(Path(path).as_posix())
    return None if path is None else Path(path)


def _refuse_unknown(parser: OneLineParser, unknown: Sequence[str]) -> NoReturn:
    names = [word.split("=")[0] for word in unknown]
    for name in names:
        if (gone := name.removeprefix("--")) in GONE:
            parser.error(f"{name} is gone; {GONE[gone]}.")
    known = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(names[0], known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def apply_defaults(settings: TrainSettings, defaults: Mapping[str, Any]) -> TrainSettings:
    """The settings with the defaults of a model or family in place of those flags that the user did not give.

    Args:
        settings: From `parse_args`.
        defaults: Value by flag name without the dashes.

    Raises:
        ValueError: if a name is not a flag.
    """
    settings.with_values(defaults)
    return settings.with_values({name: value for name, value in defaults.items() if name not in settings.given})
