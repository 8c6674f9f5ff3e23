#!/usr/bin/env python
r"""How well a LoRA shows its subject and follows prompts: the evaluation of DreamBooth and DiT-BlockSkip.

Makes images of every prompt and compares them with the subject's photos (DINO, CLIP-I, DINOv2), with the prompts
(CLIP-T) and with each other (diversity). Writes ``results.json``, ``results.md`` and a contact sheet for each LoRA.
Finished images are kept: a killed evaluation goes on where it was.

Without a model named it evaluates the embedded one, with its own prompts and encoder.

Example:
    python evaluate.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --mixed_precision bf16 \
        --lora_weights none flux-dog --instance_data_dir dog --instance_prompt "a photo of sks dog" \
        --class_phrase "a dog" --class_kind live --output_dir flux-dog-evaluation
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
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

from PIL import Image
from tqdm import tqdm

from blockskip_hooks.cli.arguments import printable_command
from blockskip_hooks.cli.other_scripts import add_model_flags, condition_note, image_flags
from blockskip_hooks.data.photo import Photo
from blockskip_hooks.data.photos import scan_photos
from blockskip_hooks.embedded import DEFAULT_SUBJECT, embedded_photos, embedded_subjects
from blockskip_hooks.evaluation.images import BASE_NAME, EvaluationRequest, count_missing, make_images
from blockskip_hooks.evaluation.metrics import encoder_label, evaluate_images
from blockskip_hooks.evaluation.prompt_lists import (
    CLASS_KINDS,
    EvaluationPrompt,
    background_prompts,
    embedded_prompts,
    read_prompts,
    subject_phrase,
    template_file,
)
from blockskip_hooks.evaluation.report import (
    draw_contact_sheet,
    earlier_loras,
    markdown,
    prompt_notes,
    result_row,
    results_document,
)
from blockskip_hooks.inference.image_encoders import ENCODER_NAMES, ImageEncoder, load_image_encoder
from blockskip_hooks.inference.lora_files import lora_file
from blockskip_hooks.inference.streamed_model import check_loras, image_settings
from blockskip_hooks.loading.lora_files import WEIGHTS_NAME
from blockskip_hooks.utils.errors import UserError, one_line
from blockskip_hooks.utils.files import expand_home, home_path, write_json, write_text
from blockskip_hooks.utils.progress import progress_bar


NO_LORA = "none"


def build_parser() -> argparse.ArgumentParser:
    """The flags; those that the training script has mean the same here."""
    parser = make_parser(__doc__)
    add_model_flags(parser)
    flag = parser.add_argument
    flag(
        "--lora_weights",
        nargs="+",
        type=expand_home,
        default=[NO_LORA],
        help="LoRAs, files or folders; none is the model without, called base in the results.",
    )
    flag("--subject", help=f"Embedded subject, for the embedded model; default: {DEFAULT_SUBJECT}.")
    flag("--instance_data_dir", type=home_path, help="Folder of the subject's photos; default: the embedded ones.")
    flag(
        "--instance_prompt",
        help='Prompt of training: "a photo of sks dog" makes "sks dog" of the {} in prompts. No default but '
        "the embedded.",
    )
    flag("--class_phrase", help='What CLIP reads for the subject: "a dog"; default: what the model reads.')
    flag(
        "--class_kind",
        choices=CLASS_KINDS,
        help="Which of the shipped prompts: of things, or of people and animals. A model other than the embedded one "
        "needs it, or --prompts.",
    )
    flag(
        "--prompts",
        type=home_path,
        help="File of other prompts, one on a line, {} for the subject; default: the shipped ones of --class_kind, or "
        "of the embedded model the backgrounds that it knows.",
    )
    flag("--images_per_prompt", type=int, help="Images of each prompt, with seeds from 0 on; default: 4.")
    flag("--seeds", nargs="+", type=int, help="Seeds of each prompt's images; default: by --images_per_prompt.")
    flag(
        "--encoders",
        nargs="+",
        type=expand_home,
        help=f"Image encoders: {', '.join(ENCODER_NAMES)}, hub ids or folders; default: dino clip, for the embedded "
        "model its own, subject. The first one measures the diversity.",
    )
    flag("--resolution", type=int, help="Side of the images in pixels; default: that of the model.")
    flag("--num_inference_steps", type=int, help="Denoising steps; default: those of the pipeline.")
    flag("--guidance_scale", type=float, help="Guidance of the pipeline; default: its own.")
    flag(
        "--true_cfg_scale",
        type=float,
        help="Guidance by a negative prompt, of pipelines that have both kinds; default: theirs.",
    )
    flag("--images_at_once", type=int, help="Images in one forward; default: by their size.")
    flag("--output_dir", type=home_path, default=Path("evaluation"), help="Folder for images and results.")
    return parser


@returns_exit_code
def main(argv: list[str] | None = None) -> None:
    """Run the script.

    Returns:
        The exit code: 0, 2 for settings that cannot work, 1 for an evaluation that cannot go on. Both say why in one
        line.
    """
    args = build_parser().parse_args(argv)
    with errors_in_one_line(SETTINGS_ERROR, "evaluate", args.hub_token):
        check_flags(args)
        photos = find_photos(args)
        prompts = find_prompts(args)
        loras = name_loras(args.lora_weights)
        settings = image_settings(image_flags(args))
        check_loras(settings.family, [lora for lora in loras.values() if lora is not None])
        sources = encoder_sources(args, embedded=settings.embedded)
        request = EvaluationRequest(
            settings=settings,
            prompts=prompts,
            seeds=tuple(args.seeds or range(args.images_per_prompt or 4)),
            loras=loras,
            folder=args.output_dir,
            batch_size=args.images_at_once,
        )
        earlier = earlier_loras(args.output_dir)
        total, missing = len(loras) * len(prompts) * len(request.seeds), count_missing(request)
    size = settings.pipeline_kwargs["height"]
    print(
        f"Model    {settings.model_name} ({settings.family.name}); LoRAs: {', '.join(loras)}\n"
        f"Subject  {len(photos)} photos; {len(prompts)} prompts x {len(request.seeds)} seeds\n"
        f"Prompt   {one_line(prompts[0].text)} (the first one)\n"
        f"Images   {total:,} of {size} px, {total - missing:,} are finished in {args.output_dir}"
        f"{condition_note(settings.family)}"
        + (f"\nOutput   replaces the results of {', '.join(earlier)}" if earlier else ""),
        flush=True,
    )
    command = printable_command([Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)])
    with errors_in_one_line(WORK_ERROR, "evaluate", args.hub_token):
        # Before any image is made: a missing encoder must not show after an hour.
        own = ["subject"] if settings.embedded else []
        encoders = {label: load_image_encoder(source, settings.device, own) for label, source in sources.items()}
        try:
            make_images(request)
            measure(args, request, encoders, photos, command)
        except KeyboardInterrupt:
            kept = f"the finished images in {args.output_dir}"
            raise KeyboardInterrupt(f"The same command goes on from {kept}.") from None
    for sheet in {sheet_file(args, name) for name in earlier} - {sheet_file(args, name) for name in loras}:
        sheet.unlink(missing_ok=True)


def check_flags(args: argparse.Namespace) -> None:
    """Check the flags that need nothing else to be known.

    Raises:
        UserError: one line that names the flag and the fix.
    """
    for name in ("images_per_prompt", "images_at_once", "num_inference_steps", "resolution", "max_sequence_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; give 1 or more.")
    if args.seeds is not None and args.images_per_prompt not in (None, len(args.seeds)):
        raise UserError(
            f"--images_per_prompt is {args.images_per_prompt} and --seeds {len(args.seeds)}; leave one out."
        )
    if args.seeds is not None and len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds names a seed twice, which would make the same images; remove it.")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise UserError(f"--output_dir {args.output_dir} is a file; name a folder.")


def embedded_subject(args: argparse.Namespace) -> str | None:
    """The embedded subject that the images are of, if they are of one.

    Raises:
        UserError: if ``--subject`` goes with no embedded model or photos, or there is none of that name.
    """
    if args.pretrained_model_name_or_path is not None or args.instance_data_dir is not None:
        if args.subject is not None:
            raise UserError(
                "--subject is for the embedded model and photos; name photos by --instance_data_dir alone."
            )
        return None
    name = args.subject or DEFAULT_SUBJECT
    if name not in embedded_subjects():
        raise UserError(f"--subject is {name}; the embedded subjects are {', '.join(embedded_subjects())}.")
    return name


def find_photos(args: argparse.Namespace) -> list[Photo]:
    """The subject's photos.

    Raises:
        UserError: one line that names the flag and the fix.
    """
    subject = embedded_subject(args)
    if subject is not None:
        return scan_photos(embedded_photos(subject))
    if args.instance_data_dir is None:
        raise UserError("--instance_data_dir is missing; name the folder of the subject's photos.")
    return scan_photos(args.instance_data_dir)


def find_prompts(args: argparse.Namespace) -> tuple[EvaluationPrompt, ...]:
    """The prompts, with the subject's name in them.

    Raises:
        UserError: one line that names the flag and the fix.
    """
    subject = embedded_subject(args)
    if subject is not None and args.prompts is None:
        unused = [
            name for name in ("instance_prompt", "class_phrase", "class_kind") if getattr(args, name) is not None
        ]
        if unused:
            raise UserError(f"--{unused[0]} has no effect on the embedded subject's own prompts; leave it out.")
        return embedded_prompts(subject)
    instance_prompt = args.instance_prompt or (embedded_subjects()[subject]["instance_prompt"] if subject else None)
    if not instance_prompt:
        raise UserError('--instance_prompt is missing; give the one of training, like "a photo of sks dog".')
    if args.prompts is not None and args.class_kind is not None:
        raise UserError("--class_kind chooses among the shipped prompts, --prompts names others; leave one out.")
    phrase = subject_phrase(instance_prompt)
    words = args.class_phrase or phrase
    if args.prompts is None and args.pretrained_model_name_or_path is None:
        if args.class_kind is not None:
            raise UserError(
                "--class_kind chooses prompts of words that the embedded model does not know; leave it out."
            )
        return background_prompts(phrase, words)
    if args.prompts is None and args.class_kind is None:
        raise UserError("--class_kind is missing; give object or live, or prompts of your own by --prompts.")
    return read_prompts(args.prompts or template_file(args.class_kind), phrase, words)


def name_loras(sources: Sequence[str]) -> dict[str, Path | None]:
    """Weight files by names that tell them apart, with the folder where the last part of a path alone does not.

    Raises:
        UserError: if one is missing or named twice.
    """
    places: dict[Path | None, Path] = {}
    for source in sources:
        path = Path(source)
        file = None if source == NO_LORA else lora_file(path)
        if file in places:
            raise UserError(f"--lora_weights names {source} twice; remove it.")
        # All files that training writes have one name.
        folder = path if path.is_dir() else path.parent if path.name == WEIGHTS_NAME else path.with_suffix("")
        places[file] = Path(BASE_NAME) if file is None else folder.resolve()
    shared = Counter(place.name for place in places.values())
    loras: dict[str, Path | None] = {}
    for number, (file, place) in enumerate(places.items()):
        name = f"{place.parent.name}/{place.name}" if file and shared[place.name] > 1 else place.name
        loras[f"{name} {number}" if name in loras else name] = file
    return loras


def encoder_sources(args: argparse.Namespace, *, embedded: bool) -> dict[str, str]:
    """Encoders by label.

    Raises:
        UserError: if one means nothing for these images, or two have one label.
    """
    names = args.encoders or (["subject"] if embedded else ["dino", "clip"])
    labels: dict[str, str] = {}
    for name in names:
        if name == "offline":
            raise UserError("--encoders offline compares images of one noise, no photos; name another encoder.")
        if name == "subject" and not embedded:
            raise UserError("--encoders subject only knows what the embedded model draws; name dino or clip.")
        label = encoder_label(name)
        if label in labels:
            raise UserError(f"--encoders names two that are called {label}; leave one out, or rename its folder.")
        labels[label] = name
    return labels


def measure(
    args: argparse.Namespace,
    request: EvaluationRequest,
    encoders: dict[str, ImageEncoder],
    photos: Sequence[Photo],
    command: str,
) -> None:
    """Measure the finished images, write the results and print the table."""
    pictures, rows = [photo.decode() for photo in photos], []
    descriptions = {prompt.text: prompt.description for prompt in request.prompts}
    total = len(request.loras) * len(request.prompts) * len(request.seeds)
    with closing(progress_bar("Measured", total, "image")) as bar:
        for name in request.loras:
            files = request.image_files(name)
            evaluation = evaluate_images(
                read_images(list(files.values()), bar),
                pictures,
                encoders,
                [text for text, _ in files],
                descriptions=descriptions,
                subject=embedded_subject(args),
            )
            rows.append(result_row(request, name, evaluation, list(files.values())))
            draw_contact_sheet(
                pictures,
                [[Image.open(files[prompt.text, seed]) for seed in request.seeds] for prompt in request.prompts],
                request.prompts,
                request.seeds,
                prompt_notes(evaluation, request.prompts),
                sheet_file(args, name),
            )
    document = results_document(request, encoders, [photo.name for photo in photos], rows, command)
    table = markdown(document)
    write_json(args.output_dir / "results.json", document)
    write_text(args.output_dir / "results.md", table)
    sheets = ", ".join(str(sheet_file(args, name)) for name in request.loras)
    print(f"\n{table}\nResults:  {args.output_dir / 'results.json'}\nPictures: {sheets}")


def sheet_file(args: argparse.Namespace, name: str) -> Path:
    return args.output_dir / "contact_sheet_{}.png".format(re.sub(r"[^\w.-]+", "_", name))


def read_images(files: Sequence[Path], bar: tqdm) -> Iterator[Image.Image]:
    """Read images as they are wanted."""
    for file in files:
        with Image.open(file) as image:
            image.load()
            yield image
        bar.update()


if __name__ == "__main__":
    sys.exit(main())
