# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Five subjects that no icon set has: draws each on four backgrounds, trains a plain LoRA on it, draws four images.

Writes to the folder `subjects` of --work: `<name>.png` with the four photos above and the four images below, and
`sheet.png` of all. Nothing is measured; look at it. The first image's prompt has a background of the photos, the
others' have not.
"""

import argparse
import io
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import resvg_py
import torch
from catalogue import RARE_TOKEN, prompt
from compose import STILL, compose
from drawing import draw, grid, load_pipeline
from personalise import Recipe, train_lora
from PIL import Image
from settings import IMAGE_SIZE, add_common_arguments, to_signed


# Name -> (class word, backgrounds of the photos, backgrounds of the images, SVG body on 100 x 100 units).
SUBJECTS = {
    "teal mug": (
        "mug",
        ("red", "yellow", "beach", "bricks"),
        ("beach", "snow", "night", "purple"),
        '<path d="M66 36 C92 30 92 74 64 70" fill="none" stroke="#f2c230" stroke-width="8"/>'
        '<path d="M16 24 H70 L66 86 Q43 94 20 86 Z" fill="#15908f"/><ellipse cx="43" cy="24" rx="27" ry="6" '
        'fill="#0c5f60"/><polygon points="43,38 48,51 62,51 51,59 55,73 43,65 31,73 35,59 24,51 38,51" '
        'fill="#f47b20"/>',
    ),
    "green robot": (
        "robot",
        ("blue", "snow", "mountains", "purple"),
        ("snow", "beach", "red", "bricks"),
        '<rect x="47" y="4" width="6" height="14" fill="#555"/><circle cx="50" cy="6" r="6" fill="#e0352b"/>'
        '<path d="M22 46 Q22 16 50 16 Q78 16 78 46 Z" fill="#58b947"/><rect x="26" y="48" width="48" height="36" '
        'fill="#58b947"/><circle cx="50" cy="33" r="9" fill="#fff"/><circle cx="50" cy="33" r="4" fill="#222"/>'
        '<rect x="12" y="50" width="9" height="26" rx="4" fill="#2e6f2a"/><rect x="79" y="50" width="9" height="26" '
        'rx="4" fill="#2e6f2a"/><rect x="30" y="84" width="13" height="11" fill="#2e6f2a"/><rect x="57" y="84" '
        'width="13" height="11" fill="#2e6f2a"/><rect x="36" y="56" width="28" height="14" fill="#f6d743"/>',
    ),
    "pink cat": (
        "cat",
        ("green", "beach", "night", "yellow"),
        ("night", "blue", "mountains", "snow"),
        '<polygon points="24,40 26,8 48,28" fill="#f08bb4"/><polygon points="76,40 74,8 52,28" fill="#f08bb4"/>'
        '<ellipse cx="50" cy="44" rx="30" ry="26" fill="#f08bb4"/><ellipse cx="50" cy="82" rx="22" ry="15" '
        'fill="#f08bb4"/><path d="M70 86 Q92 84 88 62" fill="none" stroke="#6a3fa0" stroke-width="7"/>'
        '<path d="M40 20 L44 32 M50 18 V32 M60 20 L56 32" stroke="#6a3fa0" stroke-width="4"/><circle cx="39" cy="44" '
        'r="5" fill="#243"/><circle cx="61" cy="44" r="5" fill="#243"/><polygon points="46,54 54,54 50,59" '
        'fill="#6a3fa0"/>',
    ),
    "orange clock": (
        "clock",
        ("blue", "purple", "mountains", "bricks"),
        ("blue", "beach", "snow", "green"),
        '<polygon points="50,4 90,34 90,92 10,92 10,34" fill="#ee7d1a"/><polygon points="50,4 90,34 10,34" '
        'fill="#7a3d10"/><circle cx="50" cy="62" r="24" fill="#fff8e6"/><path d="M50 62 V46 M50 62 L63 68" '
        'stroke="#1c2b6b" stroke-width="5"/><circle cx="50" cy="62" r="4" fill="#1c2b6b"/>',
    ),
    "blue rocket": (
        "object",
        ("red", "snow", "green", "night"),
        ("night", "yellow", "beach", "mountains"),
        '<polygon points="30,56 12,84 32,78" fill="#e23b3b"/><polygon points="70,56 88,84 68,78" fill="#e23b3b"/>'
        '<path d="M50 2 Q74 24 72 56 L68 80 H32 L28 56 Q26 24 50 2 Z" fill="#2f62c9"/><circle cx="50" cy="38" r="11" '
        'fill="#fff"/><circle cx="50" cy="38" r="7" fill="#9adcf5"/><polygon points="40,80 60,80 50,99" '
        'fill="#ffb52e"/>',
    ),
}


def photos_of(name: str) -> torch.Tensor:
    """The four photos of a subject, uint8 (4, 128, 128, 3)."""
    _, backgrounds, _, body = SUBJECTS[name]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100" width="100" height="100">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * IMAGE_SIZE, height=2 * IMAGE_SIZE)
    sprite = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    rng = np.random.default_rng(sum(map(ord, name)))
    pictures = [compose(rng, [sprite], b, IMAGE_SIZE, STILL, supersample=2) for b in backgrounds]
    return torch.from_numpy(np.stack(pictures))


def personalise_one(folder: Path, pipeline_folder: Path, recipe: Recipe, name: str) -> torch.Tensor:
    """Trains a LoRA on one subject; photos and images, uint8 (8, 128, 128, 3)."""
    torch.set_num_threads(1)
    noun, _, backgrounds, _ = SUBJECTS[name]
    pipeline, photos, start = load_pipeline(pipeline_folder), photos_of(name), time.process_time()
    train_lora(pipeline, to_signed(photos), f"a photo of {RARE_TOKEN} {noun}", 0, recipe)
    images = draw(pipeline, [prompt(noun, b, rare_token=True) for b in backgrounds], 3, folder=pipeline_folder)
    both = torch.cat([photos, images])
    grid(both, 4, zoom=2).save(folder / f"{name.replace(' ', '_')}.png", optimize=True)
    print(f"{name}: {time.process_time() - start:.0f} s of processor time", flush=True)
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--pipeline", type=Path, help="default: the folder `pipeline` of --work")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--learning_rate", type=float, default=Recipe.learning_rate)
    args = parser.parse_args()
    folder = args.work / "subjects"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(steps=args.steps, learning_rate=args.learning_rate, batch_size=4)
    work = partial(personalise_one, folder, args.pipeline or args.work / "pipeline", recipe)
    with get_context("spawn").Pool(args.threads) as pool:
        rows = pool.map(work, args.subjects, chunksize=1)
    grid(torch.cat(rows), 8).save(folder / "sheet.png", optimize=True)


if __name__ == "__main__":
    main()
