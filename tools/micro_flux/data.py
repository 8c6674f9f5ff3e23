# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Stage `data`: composes the training pictures of every later stage and stores them under the work folder.

`pictures.safetensors`: `images` uint8 (P, 64, 64, 3), `class` and `background` int64 (P,), with `captions.json`.
`assorted.safetensors`: `images` uint8 (A, 64, 64, 3) of any icon of the training vendors, for the autoencoder.
"""

import argparse
import json
import random
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from catalogue import BACKGROUND_NAMES, CLASS_NAMES, TRAINING_VENDORS, caption, training_icons
from compose import Pose, compose
from safetensors.torch import save_file
from settings import add_common_arguments
from sprites import load_icon_set, render_sprite


CHUNK = 500


def _picture_chunk(icons: Path, seed: int, chunk: int) -> tuple[np.ndarray, list[int], list[int], list[str]]:
    rng, words = np.random.default_rng((seed, chunk)), random.Random(seed * 100003 + chunk)
    by_class: dict[str, list[np.ndarray]] = {name: [] for name in CLASS_NAMES}
    for icon in training_icons():
        by_class[icon.class_name].append(render_sprite(icons, icon.vendor, icon.name))
    images, classes, backgrounds, captions = [], [], [], []
    for i in range(CHUNK):
        number = chunk * CHUNK + i
        class_index = number % len(CLASS_NAMES)
        background_index = int(rng.integers(len(BACKGROUND_NAMES)))
        class_name, background = CLASS_NAMES[class_index], BACKGROUND_NAMES[background_index]
        images.append(compose(rng, by_class[class_name], background))
        classes.append(class_index)
        backgrounds.append(background_index)
        captions.append(caption(words, class_name, background))
    return np.stack(images), classes, backgrounds, captions


def _assorted_chunk(icons: Path, seed: int, chunk: int) -> np.ndarray:
    rng = np.random.default_rng((seed, 7, chunk))
    names = [(vendor, name) for vendor in TRAINING_VENDORS for name in sorted(load_icon_set(icons, vendor)["icons"])]
    images = []
    while len(images) < CHUNK:
        vendor, name = names[int(rng.integers(len(names)))]
        try:
            sprite = render_sprite.__wrapped__(icons, vendor, name)
        except ValueError:
            continue
        background = BACKGROUND_NAMES[int(rng.integers(len(BACKGROUND_NAMES)))]
        images.append(compose(rng, [sprite], background, pose=Pose(hue=60.0)))
    return np.stack(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--pictures", type=int, default=16_000)
    parser.add_argument("--assorted", type=int, default=8_000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(args.threads) as pool:
        chunks = pool.map(partial(_picture_chunk, args.icons, args.seed), range(args.pictures // CHUNK), chunksize=4)
        images, classes, backgrounds, captions = zip(*chunks)
        pictures = {
            "images": torch.from_numpy(np.concatenate(images)),
            "class": torch.tensor(sum(classes, [])),
            "background": torch.tensor(sum(backgrounds, [])),
        }
        save_file(pictures, args.work / "pictures.safetensors")
        (args.work / "captions.json").write_text(json.dumps(sum(captions, [])), encoding="utf-8")
        if not args.assorted:
            return
        assorted = pool.map(partial(_assorted_chunk, args.icons, args.seed), range(args.assorted // CHUNK))
        save_file({"images": torch.from_numpy(np.concatenate(assorted))}, args.work / "assorted.safetensors")
    print(f"{args.pictures} pictures of {len(CLASS_NAMES)} classes and {args.assorted} assorted ones in {args.work}")


if __name__ == "__main__":
    main()
