# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Draws the icons of every class, training ones first, then the held-out ones, to choose them by eye."""

import argparse
from pathlib import Path

from catalogue import CLASS_NAMES, held_out_icons, training_icons
from PIL import Image
from settings import add_common_arguments
from sprites import render_sprite


CELL = 72


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    rows = [
        [icon for icons in (training_icons(), held_out_icons()) for icon in icons if icon.class_name == name]
        for name in CLASS_NAMES
    ]
    sheet = Image.new("RGB", (CELL * max(map(len, rows)), CELL * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, icon in enumerate(row):
            sprite = Image.fromarray(render_sprite(args.icons, icon.vendor, icon.name)).resize((CELL - 6, CELL - 6))
            sheet.paste(sprite, (x * CELL + 3, y * CELL + 3), sprite)
    sheet.save(args.output)


if __name__ == "__main__":
    main()
