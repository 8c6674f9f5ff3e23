#!/usr/bin/env python
r"""Which blocks of a diffusion transformer to skip: the masking search of DiT-BlockSkip (section 3.4, Eq. 2).

Hides the text from the image in the first or last blocks and measures what that does to images of some subjects:
of fine-tuned LoRAs, as in the paper, or of the base model with class prompts. Writes ``selection.json``, which
``--skip_blocks auto`` finds again for the same weights, ``selection.png`` and ``masked_images.png``.

Without a model named it measures the embedded one.

Example:
    python select_blocks.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --mixed_precision bf16 \
        --search_stride 4 --output_dir flux-selection
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from blockskip_hooks.cli.startup import (
    SETTINGS_ERROR,
    WORK_ERROR,
    errors_in_one_line,
    keep_memory_whole,
    make_parser,
    quiet_libraries,
    returns_exit_code,
)


quiet_libraries()
keep_memory_whole()

from blockskip_hooks.cli.argument_checks import check_output_dir, check_texts
from blockskip_hooks.cli.arguments import printable_command
from blockskip_hooks.cli.other_scripts import add_model_flags, condition_note, image_flags
from blockskip_hooks.inference.image_encoders import DEFAULT_ENCODER
from blockskip_hooks.inference.lora_files import lora_file
from blockskip_hooks.inference.streamed_model import (
    block_parameters,
    check_loras,
    image_settings,
    stream_all,
)
from blockskip_hooks.loading.component_config import load_config
from blockskip_hooks.search.masking_search import RATIOS, MaskedImages, Subject
from blockskip_hooks.search.measure import (
    DEFAULT_SEEDS,
    DEFAULT_STEPS,
    SearchRequest,
    class_subjects,
    count_images,
    default_window_lengths,
    measure_table,
    open_search,
)
from blockskip_hooks.search.picture import draw_images, draw_table, masked_variants
from blockskip_hooks.search.tables import SelectionTable, cache_file, find_table, read_table
from blockskip_hooks.selection import number_of_skipped
from blockskip_hooks.utils.errors import UserError
from blockskip_hooks.utils.files import expand_home, home_path, write_json


LARGEST_SIDE = 512


def build_parser() -> argparse.ArgumentParser:
    """The flags; those that the training script has mean the same here."""
    parser = make_parser(__doc__)
    add_model_flags(parser)
    flag = parser.add_argument
    flag(
        "--lora_weights",
        nargs="+",
        type=home_path,
        default=[],
        help="LoRAs of subjects, files or folders; needs --prompts. Default: none.",
    )
    flag(
        "--prompts", nargs="+", help="One prompt for each LoRA, or prompts for the base model; default: some classes."
    )
    flag("--seeds", nargs="+", type=int, default=list(DEFAULT_SEEDS), help="Seeds of each subject's images.")
    flag(
        "--encoder",
        type=expand_home,
        help="Image encoder: hub id, folder, or offline, which compares colours and edges by place and needs no "
        f"download; default: {DEFAULT_ENCODER}, for the embedded model its own, subject.",
    )
    flag("--resolution", type=int, help="Side of the images in pixels; default: 512, or what the model asks for.")
    flag("--num_inference_steps", type=int, default=DEFAULT_STEPS, help="Denoising steps of the images.")
    flag("--search_stride", type=int, default=1, help="Measure every how many blocks, then closer where it counts.")
    flag(
        "--window_lengths",
        nargs="*",
        type=int,
        help="Lengths, in blocks, of inner runs to mask for the heat map, or nothing for none; default: 1, and a "
        "ninth, a sixth and a third of the blocks.",
    )
    flag("--images_at_once", type=int, help="Images in one forward; default: by their size.")
    flag("--stream_blocks", action="store_true", help="Read blocks from the files as they run, whatever is free.")
    flag("--no_cache", action="store_true", help="Do not keep the table where --skip_blocks auto looks for it.")
    flag(
        "--output_dir", type=home_path, default=Path("block-selection"), help="Folder for the table and the pictures."
    )
    return parser


@returns_exit_code
def main(argv: list[str] | None = None) -> None:
    """Run the script.

    Returns:
        The exit code: 0, 2 for settings that cannot work, 1 for a search that cannot go on. Both say why in one line.
    """
    args = build_parser().parse_args(argv)
    with errors_in_one_line(SETTINGS_ERROR, "select", args.hub_token):
        request = make_request(args)
        num_blocks = len(block_parameters(request.family, load_config(request.transformer_folder)))
        check_blocks(args, num_blocks)
        lengths = default_window_lengths(num_blocks) if args.window_lengths is None else tuple(args.window_lengths)
        spans = stream_all(num_blocks) if args.stream_blocks else None
        request = replace(request, window_lengths=lengths, spans=spans)
    steps, number = request.pipeline_kwargs["num_inference_steps"], count_images(request, num_blocks)
    print(
        f"Model    {request.model_name} ({request.family.name}), {num_blocks} blocks\n"
        f"Subjects {', '.join(subject.name for subject in request.subjects)}\n"
        f"Images   at most {number:,} of {request.pipeline_kwargs['height']} px in {steps} steps, "
        f"{request.images_at_once} at a time; finished ones are kept in {args.output_dir}"
        f"{condition_note(request.family)}",
        flush=True,
    )
    command = printable_command([Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)])
    with errors_in_one_line(WORK_ERROR, "select", args.hub_token):
        images = open_search(request)
        print(f"Found    {len(images.vectors):,} finished ones", flush=True)
        try:
            contents = measure_table(images, request, command)
            write_outputs(args, images, request, contents)
        except KeyboardInterrupt:
            kept = f"the {len(images.vectors):,} images that are kept in {args.output_dir}"
            raise KeyboardInterrupt(f"The same command goes on from {kept}.") from None


def make_request(args: argparse.Namespace) -> SearchRequest:
    """Resolve and check everything that needs no weights.

    Raises:
        UserError: one line that names the flag and the fix.
    """
    for name in ("num_inference_steps", "search_stride", "images_at_once", "resolution", "max_sequence_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; give 1 or more.")
    check_texts(vars(args))
    for seed in args.seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"--seeds has {seed}; give numbers from 0 to below 2**32.")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))} has a number twice; give each once.")
    if any(not prompt.strip() for prompt in args.prompts or ()):
        raise UserError('--prompts has an empty prompt; give texts like "a photo of a dog".')
    check_output_dir(args.output_dir)
    subjects = make_subjects(args, embedded=args.pretrained_model_name_or_path is None)
    settings = image_settings(image_flags(args), largest_side=LARGEST_SIDE)
    check_loras(settings.family, map(lora_file, args.lora_weights))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return SearchRequest(
        family=settings.family,
        model_name=settings.model_name,
        subjects=subjects,
        encoder=args.encoder or ("subject" if settings.embedded else DEFAULT_ENCODER),
        folder=args.output_dir,
        seeds=tuple(args.seeds),
        pipeline_kwargs=settings.pipeline_kwargs,
        stride=args.search_stride,
        batch_size=args.images_at_once,
        dtype=settings.dtype,
        device=settings.device,
    )


def make_subjects(args: argparse.Namespace, *, embedded: bool) -> tuple[Subject, ...]:
    """What the images show: the LoRAs' subjects, the given prompts, or classes of things.

    Raises:
        UserError: if LoRAs and prompts do not go together.
    """
    prompts = args.prompts or []
    if not args.lora_weights:
        given = tuple(Subject(f"prompt {number}", prompt) for number, prompt in enumerate(prompts))
        return given or class_subjects(embedded=embedded)
    if args.stream_blocks:
        raise UserError("--stream_blocks leaves no weights for --lora_weights to change; leave one of them out.")
    if len(prompts) != len(args.lora_weights):
        raise UserError(
            f"--lora_weights names {len(args.lora_weights)} LoRAs and --prompts {len(prompts)} prompts; give one "
            'prompt for each, like "a photo of sks dog".'
        )
    for path in args.lora_weights:
        lora_file(path)
    # Folders of several runs often have one name.
    names = [f"{number} {path.stem}" for number, path in enumerate(args.lora_weights)]
    return tuple(Subject(*item) for item in zip(names, prompts, args.lora_weights))


def check_blocks(args: argparse.Namespace, num_blocks: int) -> None:
    """Check the flags that count blocks.

    Raises:
        UserError: one line that names the flag and the fix.
    """
    for name, value in [
        ("search_stride", args.search_stride),
        *(("window_lengths", n) for n in args.window_lengths or ()),
    ]:
        if not 0 < value < num_blocks:
            raise UserError(f"--{name} is {value}; the model has {num_blocks} blocks: give 1 to {num_blocks - 1}.")


def write_outputs(args: argparse.Namespace, images: MaskedImages, request: SearchRequest, contents: dict) -> None:
    """Write the table and the pictures, and say what was chosen."""
    file = args.output_dir / "selection.json"
    write_json(file, contents)
    table = read_table(file)
    draw_table(contents, table, args.output_dir / "selection.png")
    columns = masked_variants(table.num_blocks, contents["pairs"])
    draw_images(
        {
            # One at a time: all columns of a row may be more than --images_at_once.
            f"{s.name}: {s.prompt}": [images.images(s, [(request.seeds[0], run)])[0] for run in columns.values()]
            for s in request.subjects
        },
        list(columns),
        args.output_dir / "masked_images.png",
    )
    for ratio in RATIOS:
        leading, trailing = table.pairs[number_of_skipped(ratio, table.num_blocks)]
        print(f"{ratio:.0%} skipped: first {leading}, last {trailing} of {table.num_blocks}")
    print(f"Table:    {file}\nPictures: {args.output_dir / 'selection.png'}, {args.output_dir / 'masked_images.png'}")
    if not args.no_cache:
        keep_table(contents, table)


def keep_table(contents: dict, table: SelectionTable) -> None:
    """Put the table where ``--skip_blocks auto`` looks for it, and say which one it takes the place of."""
    file, before = cache_file(contents["weights"]), None
    with suppress(UserError):  # A damaged one is replaced, too.
        before = find_table(table.num_blocks, table.names, table.weights)
    write_json(file, contents)
    instead = f", in place of {before.describe()}" if before and before != table else ""
    print(f"--skip_blocks auto uses it from now on{instead}; to go back, delete {file}")


if __name__ == "__main__":
    sys.exit(main())
