# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Measures the embedded model and writes the figures: quality.json, grids and the model card's table.

Gates: background right >= 0.95 and class right >= 0.85 over all classes x backgrounds; plain LoRA on unseen subjects
is retrieved as the right subject for >= 0.6 of the images (base <= 0.2) with backgrounds right >= 0.9.
"""

import argparse
import json
import time
from functools import partial
from multiprocessing import get_context

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
from sprites import render_sprite

from blockskip_hooks.inference.subject_encoder import SubjectEncoder


FIGURES = REPOSITORY / "tools" / "micro_flux" / "figures"


def share(flags: list[bool]) -> float:
    """Share of true entries, to three digits."""
    return round(sum(flags) / max(1, len(flags)), 3)


def prompt_fidelity(encoder: SubjectEncoder, seeds: int) -> dict:
    """Class and background accuracy over every class on every background, `seeds` images each."""
    pairs = [(name, background) for name in CLASS_NAMES for background in BACKGROUND_NAMES]
    images = torch.cat([draw(load_pipeline(), [prompt(*pair) for pair in pairs], seed) for seed in range(seeds)])
    grid(images[: len(pairs)], len(BACKGROUND_NAMES)).save(FIGURES / "grid.png", optimize=True)
    said, pairs = encoder.classify(signed(images)), pairs * seeds
    by_class: dict[str, list[bool]] = {name: [] for name in CLASS_NAMES}
    for (name, _), guess in zip(pairs, said["class"]):
        by_class[name].append(name == guess)
    return {
        "images": len(pairs),
        "class_right": share([name == guess for (name, _), guess in zip(pairs, said["class"])]),
        "background_right": share([name == guess for (_, name), guess in zip(pairs, said["background"])]),
        "class_right_by_class": {name: share(flags) for name, flags in by_class.items()},
    }


def gallery(args: argparse.Namespace, encoder: SubjectEncoder, icons: list[Icon], views: int = 20) -> torch.Tensor:
    """Mean embedding (I, D) of composed pictures of each icon."""
    rng, rows = np.random.default_rng(99), []
    for icon in icons:
        sprite = render_sprite(args.icons, icon.vendor, icon.name)
        pictures = [compose(rng, [sprite], BACKGROUND_NAMES[i % 10], pose=STILL) for i in range(views)]
        with torch.no_grad():
            rows.append(encoder.embed(to_signed(torch.from_numpy(np.stack(pictures)))).mean(0))
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
        embeddings = self.encoder.embed(signed(images))
        said = self.encoder.classify(signed(images))["background"]
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
    fidelity = SubjectFidelity(args, SubjectEncoder.from_pretrained(ASSETS / "subject_encoder"))
    backgrounds, class_name, photos = list(BACKGROUND_NAMES), PHOTO_SUBJECTS[subject][0], load_photos(subject)
    with_token = [prompt(class_name, name, rare_token=True) for name in backgrounds]
    without = [prompt(class_name, name) for name in backgrounds]
    class_prompt = f"a photo of a {class_name}"
    base = draw(load_pipeline(), with_token, 5)
    results, rows = {"base": fidelity.measure(base, subject, backgrounds)}, [base]
    class_pictures = signed(draw(load_pipeline(), [class_prompt] * 20, 6))
    for mode, seed in [("plain", seed) for seed in range(args.lora_seeds)] + [("no_rare_token", 0), ("prior", 0)]:
        pipeline, start = load_pipeline(), time.monotonic()
        instance = class_prompt if mode == "no_rare_token" else f"a photo of {RARE_TOKEN} {class_name}"
        prior = {"class_pictures": class_pictures, "class_prompt": class_prompt} if mode == "prior" else {}
        train_lora(pipeline, photos, instance, seed, recipe, **prior)
        seconds = time.monotonic() - start
        images = draw(pipeline, without if mode == "no_rare_token" else with_token, 5)
        figures = fidelity.measure(images, subject, backgrounds)
        of_class = images if mode == "no_rare_token" else draw(pipeline, without, 5)
        figures["class_prompt_gives_subject"] = fidelity.measure(of_class, subject, backgrounds)["retrieved"]
        results[f"{mode}_{seed}"] = figures | {"seconds": round(seconds, 1)}
        print(f"{subject} {mode} seed {seed}: {figures}", flush=True)
        rows.append(images)
    grid(torch.cat(rows), len(backgrounds)).save(FIGURES / f"personalisation_{subject}.png", optimize=True)
    return results


def summary(results: dict) -> dict:
    """Means over subjects and seeds of each mode."""
    table: dict[str, dict[str, float]] = {}
    for mode in ("base", "plain", "no_rare_token", "prior"):
        runs = [figures for runs in results.values() for name, figures in runs.items() if name.startswith(mode)]
        table[mode] = {key: round(float(np.mean([run[key] for run in runs])), 3) for key in runs[0]}
    return table


def gates(report: dict) -> dict[str, bool]:
    """Which of the gates are met."""
    means, prompts = report["personalisation_mean"], report["prompt_fidelity"]
    return {
        "background right >= 0.95": prompts["background_right"] >= 0.95,
        "class right >= 0.85": prompts["class_right"] >= 0.85,
        "LoRA retrieved >= 0.6": means["plain"]["retrieved"] >= 0.6,
        "base retrieved <= 0.2": means["base"]["retrieved"] <= 0.2,
        "LoRA backgrounds right >= 0.9": means["plain"]["background_right"] >= 0.9,
    }


def fill_model_card(report: dict) -> None:
    """Replaces the text between the markers of the model card by this report's figures."""
    path = ASSETS / "MODEL_CARD.md"
    begin, end = "<!-- figures -->", "<!-- end of figures -->"
    text = path.read_text(encoding="utf-8")
    prompts, means, encoder = report["prompt_fidelity"], report["personalisation_mean"], report["encoder"]
    lines = [
        f"- Autoencoder on the photos of unseen subjects: {report['vae_psnr_unseen']} dB PSNR.",
        f"- Prompt fidelity over {prompts['images']} images ({len(CLASS_NAMES)} classes x {len(BACKGROUNDS)} "
        f"backgrounds): class right {prompts['class_right']}, background right {prompts['background_right']}.",
        "- Class right by class: "
        + ", ".join(f"{name} {value}" for name, value in prompts["class_right_by_class"].items())
        + ".",
        f"- Offline encoder on pictures and icons it never saw: class {encoder['class_accuracy']:.3f}, background "
        f"{encoder['background_accuracy']:.3f}; retrieval {encoder['retrieval_among_designs_of_the_classes']:.3f} "
        f"among the {encoder['unseen_designs_of_the_classes']} unseen designs of the classes and "
        f"{encoder['retrieval_among_all_unseen']:.3f} among {encoder['unseen_identities']} unseen icons.",
        f"- Personalisation (plain LoRA, {report['recipe']['steps']} steps, rank {report['recipe']['rank']}, learning "
        f"rate {report['recipe']['learning_rate']}; subjects {', '.join(report['personalisation'])}):",
        "",
        "| mode | right subject | among training designs too | similarity | background right | class prompt gives "
        "subject |",
        "|---|---|---|---|---|---|",
    ]
    for mode, figures in means.items():
        lines.append(
            f"| {mode.replace('_', ' ')} | {figures['retrieved']} | {figures['retrieved_among_training_designs_too']} "
            f"| {figures['similarity']} | {figures['background_right']} "
            f"| {figures.get('class_prompt_gives_subject', '')} |"
        )
    lines += ["", "Gates: " + "; ".join(f"{n}: {'met' if ok else 'NOT met'}" for n, ok in report["gates"].items())]
    head, rest = text.split(begin)
    path.write_text(head + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end)[1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--seeds", type=int, default=2, help="images per prompt of the prompt fidelity")
    parser.add_argument("--subjects", nargs="+", default=["dog", "robot", "clock"], choices=PHOTO_SUBJECTS)
    parser.add_argument("--lora_seeds", type=int, default=2)
    parser.add_argument("--lora_steps", type=int, default=Recipe.steps)
    parser.add_argument("--lora_rate", type=float, default=Recipe.learning_rate)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    FIGURES.mkdir(exist_ok=True)
    encoder = SubjectEncoder.from_pretrained(ASSETS / "subject_encoder")
    recipe = Recipe(steps=args.lora_steps, learning_rate=args.lora_rate)
    photos = torch.cat([load_photos(subject) for subject in PHOTO_SUBJECTS])
    photos = ((photos + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    report: dict = {"schema": 1, "defaults": defaults(), "recipe": vars(recipe)}
    report["vae_psnr_unseen"] = round(psnr(load_pipeline().vae, photos), 2)
    report["encoder"] = json.loads((ASSETS / "subject_encoder" / "config.json").read_text("utf-8"))["measured"]
    part = args.work / "prompt_fidelity.json"
    if not part.exists():
        write_json(part, prompt_fidelity(encoder, args.seeds))
    report["prompt_fidelity"] = json.loads(part.read_text(encoding="utf-8"))
    print(json.dumps(report["prompt_fidelity"], indent=2), flush=True)
    with get_context("spawn").Pool(args.threads) as pool:
        figures = pool.map(partial(personalise_subject, args, recipe), args.subjects, chunksize=1)
    report["personalisation"] = dict(zip(args.subjects, figures))
    report["personalisation_mean"] = summary(report["personalisation"])
    report["gates"] = gates(report)
    write_json(FIGURES / "quality.json", report)
    fill_model_card(report)
    print(json.dumps({key: report[key] for key in ("vae_psnr_unseen", "personalisation_mean", "gates")}, indent=2))


if __name__ == "__main__":
    main()
