# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""What the pictures show: classes and their icons, held-out subjects, backgrounds and captions."""

import random
from dataclasses import dataclass

from blockskip_hooks.embedded import BACKGROUND_PHRASES


TRAINING_VENDORS = ("noto", "fxemoji", "twemoji", "emojione")
HELD_OUT_VENDORS = ("fluent-emoji", "fluent-emoji-flat")

# Icons of the training vendors, chosen by eye on a contact sheet (`python contact_sheet.py`).
CLASSES = {
    "backpack": {"noto": ("backpack",), "fxemoji": ("schoolsatchel",), "emojione": ("backpack",)},
    "teddy bear": {"noto": ("teddy-bear",), "twemoji": ("teddy-bear",)},
    "dog": {"noto": ("dog-face",), "fxemoji": ("dogside",), "twemoji": ("dog", "dog-face"), "emojione": ("dog-face",)},
    "cat": {"noto": ("cat", "cat-face"), "twemoji": ("cat", "black-cat"), "emojione": ("cat-face",)},
    "clock": {"noto": ("alarm-clock", "three-oclock"), "fxemoji": ("alarmclock",), "twemoji": ("alarm-clock",)},
    "teapot": {"noto": ("teapot",), "twemoji": ("teapot",)},
    "robot": {"noto": ("robot",), "twemoji": ("robot",), "emojione": ("robot-face",)},
    "vase": {"noto": ("amphora",), "twemoji": ("amphora",), "emojione": ("amphora",)},
    "mug": {"noto": ("hot-beverage", "beer-mug"), "fxemoji": ("hotbeverage",), "twemoji": ("beer-mug",)},
    "boot": {"noto": ("hiking-boot", "womans-boot"), "fxemoji": ("boot",), "twemoji": ("hiking-boot",)},
}

# Icons of the held-out designs, by class. The two Fluent sets draw the same designs (shaded and flat), so an identity
# is a design of the shaded set; the flat set is left out of every training too, and of every gallery. Classes that the
# model does not know are only distractors of the retrieval.
HELD_OUT_ICONS = {
    "backpack": ("backpack",),
    "teddy bear": ("teddy-bear",),
    "dog": ("dog", "dog-face", "guide-dog", "service-dog", "poodle"),
    "cat": ("cat", "cat-face", "black-cat"),
    "clock": ("alarm-clock", "mantelpiece-clock", "timer-clock", "three-oclock"),
    "teapot": ("teapot",),
    "robot": ("robot",),
    "vase": ("amphora",),
    "mug": ("hot-beverage", "beer-mug", "teacup-without-handle"),
    "car": ("automobile", "oncoming-automobile", "sport-utility-vehicle", "taxi", "police-car", "racing-car"),
    "duck": ("duck",),
    "boot": ("hiking-boot", "womans-boot"),
    "glasses": ("glasses", "sunglasses", "goggles"),
    "candle": ("candle",),
}

# Icons that are signs, letters and people in all skin tones rather than things.
_NO_THINGS = ("flag", "keycap", "button", "squared", "circled", "negative", "regional", "input-", "japanese-", "skin")
_TONES = ("-light", "-medium-light", "-medium", "-medium-dark", "-dark")


def is_thing(name: str) -> bool:
    """Whether an icon of a training vendor may be a picture of "an object"."""
    return not name.endswith(_TONES) and not any(part in name for part in _NO_THINGS)


# The subjects whose photos ship: folder name -> (class, icon of the shaded Fluent set).
PHOTO_SUBJECTS = {
    "robot": ("robot", "robot"),
    "dog": ("dog", "dog"),
    "cat": ("cat", "black-cat"),
    "teapot": ("teapot", "teapot"),
    "clock": ("clock", "alarm-clock"),
    "backpack": ("backpack", "backpack"),
    "teddy_bear": ("teddy bear", "teddy-bear"),
    "boot": ("boot", "hiking-boot"),
}

# Name -> how a caption says it.
BACKGROUNDS = BACKGROUND_PHRASES

RARE_TOKEN = "sks"
CLASS_NAMES = tuple(CLASSES)
BACKGROUND_NAMES = tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Icon:
    """One drawing: a vendor's icon and the class word of what it shows."""

    vendor: str
    name: str
    class_name: str


def training_icons() -> list[Icon]:
    """Every icon the text-to-image model is trained on."""
    return [
        Icon(vendor, name, class_name)
        for class_name, vendors in CLASSES.items()
        for vendor, names in vendors.items()
        for name in names
    ]


def held_out_icons() -> list[Icon]:
    """The designs that no training sees: the gallery of unseen subjects."""
    return [
        Icon(HELD_OUT_VENDORS[0], name, class_name) for class_name, names in HELD_OUT_ICONS.items() for name in names
    ]


def article(noun: str) -> str:
    """`a` or `an`."""
    return "an" if noun[0] in "aeiou" else "a"


def caption(rng: random.Random, noun: str, background: str, colour: str | None = None) -> str:
    """A training caption: three templates, one in eight without background, one in thirty with the rare token.

    The rare token stands before any noun at random, so it means nothing to the model but has a trained embedding. One
    caption in eight is written as a sentence, with a capital letter and punctuation.
    """
    phrase = noun if colour is None else f"{colour} {noun}"
    if rng.random() < 1 / 30:
        phrase = f"{RARE_TOKEN} {phrase}"
    elif rng.random() > 0.1:
        phrase = f"{article(phrase)} {phrase}"
    opening = rng.choices(("a photo of ", "a picture of ", ""), (0.7, 0.15, 0.15))[0]
    written = rng.random() < 1 / 8
    between = ", " if written and rng.random() < 0.5 else " "
    where = "" if rng.random() < 1 / 8 else between + BACKGROUNDS[background]
    text = f"{opening}{phrase}{where}"
    return text[0].upper() + text[1:] + rng.choice((".", ".", ".", "!", "")) if written else text


def prompt(class_name: str, background: str, rare_token: bool = False) -> str:
    """The prompt that measures a class on a background, with or without the rare token."""
    noun = f"{RARE_TOKEN} {class_name}" if rare_token else f"a {class_name}"
    return f"a photo of {noun} {BACKGROUNDS[background]}"
