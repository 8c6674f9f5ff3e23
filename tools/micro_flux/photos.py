# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Stage `photos`: composes the photos of the unseen subjects, 256 x 256 PNG, with `subjects.json`.

They go to the folder `photos` of --work; the package's own are replaced only by
`--target ../../src/blockskip_hooks/assets/photos`.
"""

import argparse
from pathlib import Path

import numpy as np
from catalogue import BACKGROUND_NAMES, BACKGROUNDS, HELD_OUT_VENDORS, PHOTO_SUBJECTS, RARE_TOKEN
from compose import STILL, compose
from PIL import Image
from settings import add_common_arguments, write_json
from sprites import render_sprite, vendor_licence


PHOTOS = 5
SIDE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--target", type=Path, help="default: the folder `photos` of --work")
    args = parser.parse_args()
    target = args.target or args.work / "photos"
    vendor, subjects = HELD_OUT_VENDORS[0], {}
    for number, (subject, (class_name, icon)) in enumerate(PHOTO_SUBJECTS.items()):
        rng = np.random.default_rng((args.seed, 17, number))
        sprite = render_sprite(args.icons, vendor, icon, size=2 * SIDE)
        backgrounds = [str(name) for name in rng.permutation(BACKGROUND_NAMES)]
        shown, others = backgrounds[:PHOTOS], backgrounds[PHOTOS:]
        folder = target / subject
        folder.mkdir(parents=True, exist_ok=True)
        for i, background in enumerate(shown):
            picture = compose(rng, [sprite], background, size=SIDE, pose=STILL, supersample=2)
            Image.fromarray(picture).save(folder / f"{i}.png", optimize=True)
        subjects[subject] = {
            "class": class_name,
            "instance_prompt": f"a photo of {RARE_TOKEN} {class_name}",
            "class_prompt": f"a photo of a {class_name}",
            "vendor": vendor,
            "licence": vendor_licence(args.icons, vendor),
            "icon": icon,
            "backgrounds": shown,
            "validation_prompts": [f"a photo of {RARE_TOKEN} {class_name} {BACKGROUNDS[name]}" for name in others],
        }
    write_json(target / "subjects.json", {"schema": 1, "subjects": subjects})
    print(f"{PHOTOS} photos each of {', '.join(subjects)}")


if __name__ == "__main__":
    main()
