"""Public architectures of models, so that a run can be planned without the model's files."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ...blocks import modulation_layers
from ...config import BlockSkipConfig
from ...families import FAMILIES, Family, detect_family
from ...loading.component_config import load_config
from ...loading.models import empty_model
from ...lora import lora_targets
from ...transformer import DiTBlockSkipTransformer
from ...utils.errors import UserError


@dataclass(frozen=True)
class Preset:
    """The public architecture of a model, enough for a plan without its files.

    Attributes:
        name: Name of the model.
        family: Its family, on configs alone.
        transformer_config: Config of its transformer.
        text_encoders: Configs of its text encoders.
    """

    name: str
    family: Family
    transformer_config: dict[str, Any]
    text_encoders: list[dict[str, Any]] = field(default_factory=list)

    def skeleton(self, config: BlockSkipConfig) -> DiTBlockSkipTransformer:
        """The transformer without weights, placeholders on."""
        return DiTBlockSkipTransformer(
            empty_model(self.transformer_config, self.family.transformer_class(self.transformer_config)),
            config,
            self.family.block_stacks,
        )

    def lora_targets(self, config: BlockSkipConfig, layers: Sequence[str] | None = None) -> list[str]:
        """Full names of the layers that get LoRA; see :func:`~blockskip_hooks.lora.lora_targets`.

        Args:
            config: The spans to skip.
            layers: Names or name endings; by default the family's.

        Raises:
            ValueError: if nothing in the kept blocks matches, or a name matches nothing at all.
        """
        return lora_targets(self.skeleton(config), layers or self.family.lora_layers, self.family.text_stream_layers)

    def recorded_layers(self, config: BlockSkipConfig, targets: Sequence[str]) -> tuple[str, ...]:
        """Modulation layers of kept blocks, whose outputs records hold; none if nothing is skipped.

        Args:
            config: The spans to skip.
            targets: Layers with LoRA, which stay.
        """
        if not config.num_skipped:
            return ()
        names = modulation_layers(self.skeleton(config).spans, self.family.modulation_layers)
        return tuple(name for name in names if name not in set(targets))


def preset_names() -> list[str]:
    """Names that :func:`load_preset` knows."""
    folder = resources.files(__name__)
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


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


def load_preset(name: str) -> Preset:
    """Read a preset.

    Raises:
        UserError: if there is none of this name.
    """
    # A family reads its configs from a model folder, at any time: the folder lives as long as the family.
    folder = Path(tempfile.mkdtemp(prefix="blockskip_preset_"))
    model = write_preset(name, folder)
    family = detect_family(folder)(folder)
    weakref.finalize(family, shutil.rmtree, folder, ignore_errors=True)
    encoders = list(family.text_encoder_configs().values())
    return Preset(model, family, load_config(folder / "transformer"), encoders)
