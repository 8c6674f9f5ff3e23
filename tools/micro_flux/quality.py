# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Measures a pipeline folder and writes the figures: quality.json, grids and the model card's table.

Gates: class right >= 0.97 and background right >= 0.98 over all classes x backgrounds; the shape measure of
`silhouette.py` above the old model's; autoencoder >= 32 dB on the photos of unseen subjects; plain LoRA on unseen
subjects is retrieved as the right subject for >= 0.9 of the images (base <= 0.2) with backgrounds right >= 0.9.
Whether a person names at least 36 of the 40 pictures of `grid.png` at once is for a person to say.

Everything goes to the folder `quality` of --work; `--publish` copies it to `figures` and into the model card.
"""

import argparse
import json
import shutil
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import psnr
from catalogue import (
    BACKGROUND_NAMES,
    BACKGROUNDS,
    CLASS_NAMES,
    HELD_OUT_VENDORS,
    PHOTO_SUBJECTS,
    RARE_TOKEN,
    Icon,
    held_out_icons,
    prompt,
    training_icons,
)
from compose import STILL, compose
from drawing import defaults, draw, grid, load_pipeline, signed
from personalise import Recipe, load_photos, train_lora
from settings import ASSETS, REPOSITORY, add_common_arguments, to_signed, write_json
from silhouette import SIDE, Shapes, blobs, load_cutter
from sprites import render_sprite

from blockskip_hooks.inference.subject_encoder import SubjectEncoder


FIGURES = REPOSITORY / "tools" / "micro_flux" / "figures"


def share(flags: list[bool]) -> float:
    """Share of true entries, to three digits."""
    return round(sum(flags) / max(1, len(flags)), 3)


def prompt_fidelity(args: argparse.Namespace, encoder: SubjectEncoder, pipeline_folder: Path, file: Path) -> dict:
    """Class, background and shape over every class on every background, `--seeds` images each.

    The first four backgrounds of each class, the first shifted from class to class, are drawn to `file`.
    """
    pairs = [(name, background) for name in CLASS_NAMES for background in BACKGROUND_NAMES]
    side, pipeline = defaults(pipeline_folder)["resolution"], load_pipeline(pipeline_folder)
    prompts = [prompt(*pair) for pair in pairs]
    images = torch.cat([draw(pipeline, prompts, seed, side, pipeline_folder) for seed in range(args.seeds)])
    shown = [10 * row + (row + 3 * i) % 10 for row in range(len(CLASS_NAMES)) for i in range(4)]
    grid(images[shown], 8).save(file, optimize=True)
    small = signed(images, SIDE)
    said, pairs = encoder.classify(small), pairs * args.seeds
    cutter, shapes, classes = load_cutter(args), Shapes(args.icons), [name for name, _ in pairs]
    by_class: dict[str, list[bool]] = {name: [] for name in CLASS_NAMES}
    for (name, _), guess in zip(pairs, said["class"]):
        by_class[name].append(name == guess)
    control = blobs(small, cutter)
    return {
        "images": len(pairs),
        "class_right": share([name == guess for (name, _), guess in zip(pairs, said["class"])]),
        "background_right": share([name == guess for (_, name), guess in zip(pairs, said["background"])]),
        "class_right_by_class": {name: share(flags) for name, flags in by_class.items()},
        "shape": shapes.measure(cutter, small, classes),
        "as_blobs": shapes.measure(cutter, control, classes)
        | {"class_right": share([a == b for a, b in zip(classes, encoder.classify(control)["class"])])},
    }


def shape_of_drawings(args: argparse.Namespace) -> dict:
    """The shape measure of composed pictures of the classes' icons in new poses: what a perfect model would get."""
    rng, images, classes = np.random.default_rng(41), [], []
    for icon in training_icons():
        sprite = render_sprite(args.icons, icon.vendor, icon.name)
        images += [compose(rng, [sprite], BACKGROUND_NAMES[i]) for i in range(10)]
        classes += [icon.class_name] * 10
    pictures = signed(torch.from_numpy(np.stack(images)), SIDE)
    return Shapes(args.icons).measure(load_cutter(args), pictures, classes)


def gallery(args: argparse.Namespace, encoder: SubjectEncoder, icons: list[Icon], views: int = 20) -> torch.Tensor:
    """Mean embedding (I, D) of composed pictures of each icon."""
    rng, rows = np.random.default_rng(99), []
    for icon in icons:
        sprite = render_sprite(args.icons, icon.vendor, icon.name)
        pictures = [compose(rng, [sprite], BACKGROUND_NAMES[i % 10], pose=STILL) for i in range(views)]
        with torch.no_grad():
            rows.append(encoder.embed(signed(torch.from_numpy(np.stack(pictures)), SIDE)).mean(0))
    return F.normalize(torch.stack(rows), dim=1)


class SubjectFidelity:
    """Which drawing, among all galleries, an image is nearest to."""

    def __init__(self, args: argparse.Namespace, encoder: SubjectEncoder) -> None:
        self.encoder = encoder
        self.held_out = held_out_icons()
        self.unseen = gallery(args, encoder, self.held_out)
        self.everything = torch.cat([self.unseen, gallery(args, encoder, training_icons())])

    @torch.no_grad()
    def measure(self, images: torch.Tensor, subject: str, backgrounds: list[str]) -> dict:
        """Retrieval among unseen designs, among unseen and training designs, and backgrounds right."""
        row = self.held_out.index(Icon(HELD_OUT_VENDORS[0], PHOTO_SUBJECTS[subject][1], PHOTO_SUBJECTS[subject][0]))
        small = signed(images, SIDE)
        embeddings, said = self.encoder.embed(small), self.encoder.classify(small)["background"]
        return {
            "retrieved": share(((embeddings @ self.unseen.T).argmax(1) == row).tolist()),
            "retrieved_among_training_designs_too": share(
                ((embeddings @ self.everything.T).argmax(1) == row).tolist()
            ),
            "similarity": round((embeddings @ self.unseen[row]).mean().item(), 3),
            "background_right": share([a == b for a, b in zip(said, backgrounds)]),
        }


def personalise_subject(args: argparse.Namespace, recipe: Recipe, subject: str) -> dict:
    """Base and LoRA figures of one subject: plain, without the rare token, with prior preservation."""
    torch.set_num_threads(1)
    fidelity = SubjectFidelity(args, SubjectEncoder.from_pretrained(args.encoder))
    backgrounds, class_name = list(BACKGROUND_NAMES), PHOTO_SUBJECTS[subject][0]
    photos, load = load_photos(subject, args.photos), partial(load_pipeline, args.pipeline)
    paint = partial(draw, folder=args.pipeline)
    with_token = [prompt(class_name, name, rare_token=True) for name in backgrounds]
    without = [prompt(class_name, name) for name in backgrounds]
    class_prompt = f"a photo of a {class_name}"
    base = paint(load(), with_token, 5)
    results, rows = {"base": fidelity.measure(base, subject, backgrounds)}, [base]
    class_pictures = to_signed(paint(load(), [class_prompt] * 20, 6)) if "prior" in args.modes else None
    runs = [("plain", seed) for seed in range(args.lora_seeds)] + [(mode, 0) for mode in args.modes if mode != "plain"]
    for mode, seed in runs:
        pipeline, start = load(), time.process_time()
        instance = class_prompt if mode == "no_rare_token" else f"a photo of {RARE_TOKEN} {class_name}"
        prior = {"class_pictures": class_pictures, "class_prompt": class_prompt} if mode == "prior" else {}
        train_lora(pipeline, photos, instance, seed, recipe, **prior)
        seconds = time.process_time() - start
        images = paint(pipeline, without if mode == "no_rare_token" else with_token, 5)
        figures = fidelity.measure(images, subject, backgrounds)
        of_class = images if mode == "no_rare_token" else paint(pipeline, without, 5)
        figures["class_prompt_gives_subject"] = fidelity.measure(of_class, subject, backgrounds)["retrieved"]
        results[f"{mode}_{seed}"] = figures | {"processor_seconds": round(seconds, 1)}
        print(f"{subject} {mode} seed {seed}: {figures}", flush=True)
        rows.append(images)
    file = args.work / "quality" / f"personalisation_{subject}.png"
    grid(torch.cat(rows), len(backgrounds)).save(file, optimize=True)
    return results


def summary(results: dict) -> dict:
    """Means over subjects and seeds of each mode."""
    table: dict[str, dict[str, float]] = {}
    for mode in ("base", "plain", "no_rare_token", "prior"):
        runs = [figures for runs in results.values() for name, figures in runs.items() if name.startswith(mode)]
        if not runs:
            continue
        table[mode] = {key: round(float(np.mean([run[key] for run in runs])), 3) for key in runs[0]}
    return table


def gates(report: dict) -> dict[str, bool]:
    """Which of the gates are met."""
    prompts = report["prompt_fidelity"]
    met = {
        "autoencoder >= 32 dB": report["vae_psnr_unseen"] >= 32,
        "class right >= 0.97": prompts["class_right"] >= 0.97,
        "background right >= 0.98": prompts["background_right"] >= 0.98,
    }
    if "old_prompt_fidelity" in report:
        old = report["old_prompt_fidelity"]["shape"]
        met["shape right above the old model's"] = prompts["shape"]["shape_right"] > old["shape_right"]
    if means := report.get("personalisation_mean"):
        met["LoRA retrieved >= 0.9"] = means["plain"]["retrieved"] >= 0.9
        met["base retrieved <= 0.2"] = means["base"]["retrieved"] <= 0.2
        met["LoRA backgrounds right >= 0.9"] = means["plain"]["background_right"] >= 0.9
    return met


def write_model_card(report: dict, progress: dict) -> None:
    """The package's model card: this folder's, with the report's figures and what the weights were trained on."""
    text = Path(__file__).with_name("MODEL_CARD.md").read_text(encoding="utf-8")
    seen = progress["seen"]
    trained = (
        f"{seen['half']:,} whole pictures and {seen['patch']:,} crops of 64 tokens, {seen['full']:,} pictures of 256 "
        f"tokens, {progress['cpu_hours']:.1f} processor hours"
    )
    for mark, filling in (("trained", trained), ("figures", "\n" + "\n".join(figure_lines(report)) + "\n")):
        head, rest = text.split(f"<!-- {mark} -->")
        text = f"{head}<!-- {mark} -->{filling}<!-- end of {mark} -->{rest.split(f'<!-- end of {mark} -->')[1]}"
    (ASSETS / "MODEL_CARD.md").write_text(text, encoding="utf-8")


def figure_lines(report: dict) -> list[str]:
    """The figures as Markdown."""
    prompts, encoder = report["prompt_fidelity"], report["encoder"]
    lines = [
        f"- Autoencoder on the photos of unseen subjects: {report['vae_psnr_unseen']} dB PSNR.",
        f"- Prompt fidelity over {prompts['images']} images ({len(CLASS_NAMES)} classes x {len(BACKGROUNDS)} "
        f"backgrounds): class right {prompts['class_right']}, background right {prompts['background_right']}.",
        "- Class right by class: "
        + ", ".join(f"{name} {value}" for name, value in prompts["class_right_by_class"].items())
        + ".",
        "",
        "| shape, by silhouettes | a drawing of its class agrees best | agreement with its class | below 0.7 |",
        "|---|---|---|---|",
    ]
    rows = {
        "this model": prompts["shape"],
        "its pictures, objects made to discs of the same pixels": prompts["as_blobs"],
        "the 64 px model before": report.get("old_prompt_fidelity", {}).get("shape"),
        "composed pictures of the training icons": report.get("drawings_shape"),
    }
    lines += [
        f"| {name} | {row['shape_right']} | {row['agreement']} | {row['agreement_below_0.7']} |"
        for name, row in rows.items()
        if row
    ]
    lines += [
        "",
        f"- The classifier of class and background takes {prompts['as_blobs']['class_right']} of the discs for their "
        "class, by their colours alone; one in ten would be chance.",
        f"- Offline encoder on pictures and icons it never saw: class {encoder['class_accuracy']:.3f}, background "
        f"{encoder['background_accuracy']:.3f}; retrieval {encoder['retrieval_among_designs_of_the_classes']:.3f} "
        f"among the {encoder['unseen_designs_of_the_classes']} unseen designs of the classes and "
        f"{encoder['retrieval_among_all_unseen']:.3f} among {encoder['unseen_identities']} unseen icons.",
    ]
    if means := report.get("personalisation_mean"):
        lines += [
            f"- Personalisation (plain LoRA, {report['recipe']['steps']} steps, rank {report['recipe']['rank']}, "
            f"learning rate {report['recipe']['learning_rate']}; subjects {', '.join(report['personalisation'])}):",
            "",
            "| mode | right subject | among training designs too | similarity | background right | class prompt gives "
            "subject |",
            "|---|---|---|---|---|---|",
        ]
        for mode, figures in means.items():
            lines.append(
                f"| {mode.replace('_', ' ')} | {figures['retrieved']} "
                f"| {figures['retrieved_among_training_designs_too']} | {figures['similarity']} "
                f"| {figures['background_right']} | {figures.get('class_prompt_gives_subject', '')} |"
            )
    return [
        *lines,
        "",
        "Gates: " + "; ".join(f"{n}: {'met' if ok else 'NOT met'}" for n, ok in report["gates"].items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--pipeline", type=Path, help="default: the folder `pipeline` of --work")
    parser.add_argument("--old", type=Path, help="pipeline folder of the model to compare with")
    parser.add_argument("--encoder", type=Path, default=ASSETS / "subject_encoder")
    parser.add_argument("--photos", type=Path, help="default: the folder `photos` of --work")
    parser.add_argument("--seeds", type=int, default=2, help="images per prompt of the prompt fidelity")
    parser.add_argument("--subjects", nargs="*", default=["dog", "robot", "clock"], choices=PHOTO_SUBJECTS)
    parser.add_argument("--modes", nargs="+", default=["plain", "no_rare_token", "prior"])
    parser.add_argument("--lora_seeds", type=int, default=2)
    parser.add_argument("--lora_steps", type=int, default=Recipe.steps)
    parser.add_argument("--lora_rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--cutter_minutes", type=float, default=4.0, help="processor time of the silhouettes' network")
    parser.add_argument("--publish", action="store_true", help="copy to `figures` and the model card")
    args = parser.parse_args()
    args.pipeline, args.photos = args.pipeline or args.work / "pipeline", args.photos or args.work / "photos"
    torch.set_num_threads(args.threads)
    folder = args.work / "quality"
    folder.mkdir(exist_ok=True)
    encoder = SubjectEncoder.from_pretrained(args.encoder)
    recipe = Recipe(steps=args.lora_steps, learning_rate=args.lora_rate)
    photos = torch.cat([load_photos(subject, args.photos) for subject in PHOTO_SUBJECTS])
    photos = ((photos + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    report: dict = {"schema": 2, "defaults": defaults(args.pipeline), "recipe": vars(recipe)}
    report["vae_psnr_unseen"] = round(psnr(load_pipeline(args.pipeline).vae, photos), 2)
    report["encoder"] = json.loads((args.encoder / "config.json").read_text("utf-8"))["measured"]
    report["prompt_fidelity"] = prompt_fidelity(args, encoder, args.pipeline, folder / "grid.png")
    report["drawings_shape"] = shape_of_drawings(args)
    if args.old:
        report["old_prompt_fidelity"] = prompt_fidelity(args, encoder, args.old, folder / "grid_old.png")
    if args.subjects:
        with get_context("spawn").Pool(args.threads) as pool:
            figures = pool.map(partial(personalise_subject, args, recipe), args.subjects, chunksize=1)
        report["personalisation"] = dict(zip(args.subjects, figures))
        report["personalisation_mean"] = summary(report["personalisation"])
    report["gates"] = gates(report)
    write_json(folder / "quality.json", report)
    print("\n".join(figure_lines(report)))
    if args.publish:
        FIGURES.mkdir(exist_ok=True)
        for path in folder.iterdir():
            shutil.copy(path, FIGURES / path.name)
        write_model_card(report, json.loads((args.work / "pipeline_progress.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
