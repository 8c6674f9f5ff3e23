"""Public architectures of models, so that a run can be planned without the model's files."""

from __future__ import annotations

import difflib
import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ...families import FAMILIES, Family
from ...utils.errors import UserError


_SAME_ARCHITECTURE = {
    "flux.2-klein-base-4b": "flux.2-klein-4b",
    "flux.2-klein-base-9b": "flux.2-klein-9b",
}
"""Presets by names, without their owners and in small letters, of other models that they are right for."""


def preset_names() -> list[str]:
    """Names of the presets."""
    folder = resources.files(__name__)
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def find_preset(text: str) -> str:
    """The preset that a person means by its name or the model's hub id, in small letters or capitals.

    Raises:
        UserError: if there is none.
    """
    wanted = text.lower()
    wanted = _SAME_ARCHITECTURE.get(wanted.rpartition("/")[2], wanted)
    for name in preset_names():
        if wanted in (name, (hub_id := preset_facts(name)["name"].lower()), hub_id.rpartition("/")[2]):
            return name
    close = difflib.get_close_matches(wanted.rpartition("/")[2], preset_names(), n=1)
    hint = f"did you mean {close[0]}? There are" if close else "choose one of"
    others = "other models: blockskip train --pretrained_model_name_or_path ... --plan_only"
    raise UserError(f"--preset '{text}' does not exist; {hint} {', '.join(preset_names())}; {others}.")


def preset_facts(name: str) -> dict[str, Any]:
    """What a preset's file says: configs of the components, ``resolution`` of the recipe where it is not 1024 px, and
    ``reported``: subject fidelity in the paper by skipped blocks and sampled patches, of unquantised weights.

    Raises:
        UserError: if there is no preset of this name.
    """
    if name not in preset_names():
        raise UserError(f"--preset '{name}' does not exist; choose one of {', '.join(preset_names())}.")
    facts: dict[str, Any] = json.loads((resources.files(__name__) / f"{name}.json").read_text())
    return facts


def write_preset(name: str, folder: Path, pipeline_settings: Mapping[str, Any] | None = None) -> str:
    """Write a preset as a model folder without weights: the index of the pipeline and the configs of its components.

    Args:
        name: Name of the preset.
        folder: Where to.
        pipeline_settings: What the folder asks the pipeline for, such as the size of images.

    Returns:
        The model's name.

    Raises:
        UserError: if there is no preset of this name.
    """
    data = preset_facts(name)
    encoders = {f"text_encoder{'' if n == 1 else f'_{n}'}": c for n, c in enumerate(data["text_encoders"], start=1)}
    configs = {part: data[part] for part in ("transformer", "vae", "scheduler")} | encoders
    # By this name a table that says which blocks to skip is found.
    configs["transformer"] = {**data["transformer"], "_name_or_path": data["name"]}
    components = FAMILIES[data["pipeline"]].text_components
    # Tokenizers have empty folders: nothing is known of them, and a plan needs none.
    index = dict.fromkeys(components, ["transformers", "PreTrainedTokenizerFast"])
    for part in components:
        (folder / part).mkdir(parents=True)
    index |= {part: ["diffusers", data[part]["_class_name"]] for part in ("transformer", "vae", "scheduler")}
    index |= {part: ["transformers", config["architectures"][0]] for part, config in encoders.items()}
    for part, config in configs.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / f"{'scheduler_' if part == 'scheduler' else ''}config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": data["pipeline"], **index}))
    if pipeline_settings:
        (folder / "blockskip_defaults.json").write_text(json.dumps({"pipeline_kwargs": dict(pipeline_settings)}))
    return data["name"]


def preset_family(name: str) -> Family:
    """A preset's family, on configs alone.

    Raises:
        UserError: if there is no preset of this name.
    """
    # A family reads its configs from a model folder, at any time: the folder lives as long as the family.
    folder = Path(tempfile.mkdtemp(prefix="blockskip_preset_"))
    write_preset(name, folder)
    family = FAMILIES[preset_facts(name)["pipeline"]](folder)
    weakref.finalize(family, shutil.rmtree, folder, ignore_errors=True)
    return family
