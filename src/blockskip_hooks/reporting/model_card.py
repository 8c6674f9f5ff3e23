"""README.md of a trained LoRA in the Hub's format: front matter, gallery, how it was trained, how to use it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from PIL import Image

from ..embedded import embedded_arguments
from ..training.comfyui import COMFYUI_NAME
from ..utils.files import replacing, set_aside, write_text
from ..utils.formatting import format_bytes, format_seconds, format_setting
from .charts import loss_curve


logger = logging.getLogger(__name__)

# The tags by which the Hub finds a text-to-image LoRA and gives it a gallery and an inference widget.
BASE_TAGS = ("text-to-image", "diffusers-training", "diffusers", "lora", "template:sd-lora", "blockskip")

# The Hub refuses a card whose `license` is not on its list; any other name has to go into `license_name`.
# fmt: off
HUB_LICENSES = frozenset({
    "apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "bsd-2-clause",
    "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-3.0", "agpl-3.0",
    "other", "unknown",
})
# fmt: on

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LINK = re.compile(r"https?://[\w.-]+(/[\w./%~+-]*)?")
_TOKENIZER = "AutoTokenizer"
_FILE_OF_A_REPOSITORY = re.compile(r"[\w-][\w./-]*")


@dataclass(frozen=True)
class License:
    """Licence of a base model.

    Attributes:
        id: One of the Hub's names, or what its owner calls it.
        name: The owner's name for it, where ``id`` is "other".
        link: Address of its text.
    """

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def words(self) -> str:
        """What to call it."""
        return self.name or self.id


def write_model_card(
    output_dir: Path,
    run_report: Mapping[str, Any],
    images: Sequence[tuple[str, Image.Image]],
    *,
    repo_id: str,
    base_license: License | None,
    tags: Iterable[str],
    snippet: str,
) -> Path:
    """Write README.md, and the widget images beside it, into ``output_dir``.

    The card is always new and never asks the Hub: a card of an earlier upload would carry the figures of that run, and
    a run without network must end the same way. A README.md that is no such card gets another name.

    Args:
        output_dir: Folder of the run, the one that is uploaded.
        run_report: Contents of run_report.json. A base model that is a folder is named, but not linked.
        images: Prompt and image of each image made with the trained LoRA; saved as ``image_0.png``, ``image_1.png``...
        repo_id: Id on the Hub, or the name of the folder when nothing is uploaded; the card's title.
        base_license: Licence of the base model, which the LoRA inherits, or ``None`` if unknown.
        tags: The model family's tags, added to the usual ones.
        snippet: Python code that loads and runs the LoRA, see `usage_snippet`.

    Returns:
        Path of the README.md.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    widget = []
    for index, (prompt, image) in enumerate(images):
        name = f"image_{index}.png"
        with replacing(output_dir / name) as temporary:
            image.save(temporary, format="PNG")
        # The Hub drops a widget entry whose text is empty.
        widget.append({"text": prompt or " ", "output": {"url": name}})
    settings, skip = run_report.get("settings") or {}, run_report.get("skip") or {}
    model = str(run_report.get("model") or "")
    # The owner's name of a licence that is not on the Hub's list.
    other = base_license if base_license and base_license.id not in HUB_LICENSES - {"other"} else None
    data = ModelCardData(
        license="other" if other else base_license.id if base_license else None,
        license_name=_slug(other.words) if other else None,
        license_link=other.link if other else None,
        library_name="diffusers",
        base_model=model if is_hub_id(model) else None,
        instance_prompt=settings.get("instance_prompt"),
        widget=widget or None,
        tags=list(dict.fromkeys([*BASE_TAGS, *tags])),
    )
    template = (resources.files(__package__) / "templates" / "model_card.md").read_text(encoding="utf-8")
    content: dict[str, Any] = {
        "title": repo_id,
        # Only the last part of a folder: where it lies on the machine that trained is nobody's business.
        "base": f"[{model}](https://huggingface.co/{model})" if is_hub_id(model) else code_span(_last(model)),
        "has_images": bool(images),
        "instance_prompt": settings.get("instance_prompt"),
        "blocks": skip.get("blocks"),
        "skipped": (skip.get("leading") or 0) + (skip.get("trailing") or 0),
        "residuals": (run_report.get("residuals") or {}).get("mode"),
        "snippet": snippet,
        "comfyui_file": COMFYUI_NAME if (output_dir / COMFYUI_NAME).is_file() else None,
        "figures": training_figures(run_report),
        "base_license": base_license,
        "plain": _plain,
        "code_span": code_span,
        "code_block": code_block,
    }
    card = ModelCard.from_template(data, template_str=template, **content)
    path = output_dir / "README.md"
    if path.exists() and "blockskip" not in str(_front_matter(path).get("tags")):
        logger.warning("%s is not a model card of an earlier run; it is kept as %s.", path, set_aside(path).name)
    write_text(path, f"{card}\n")
    return path


def usage_snippet(
    model: str,
    lora: str | Path,
    prompt: str,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    dtype: str | None = "bfloat16",
    *,
    pipeline_class: tuple[str, str] = ("diffusers", "DiffusionPipeline"),
    components: Mapping[str, tuple[str, str] | None] | None = None,
    embedded: bool = False,
    condition: str | None = None,
) -> str:
    """Python code that loads a base model with diffusers, adds the LoRA and makes one image.

    Args:
        model: Hub id or folder of the base model.
        lora: Hub id or folder of the LoRA.
        prompt: Prompt of the example image.
        pipeline_kwargs: Further arguments of the pipeline call, such as ``max_sequence_length``.
        dtype: Name of a torch dtype for the weights, or None for the pipeline's default.
        pipeline_class: Module and name of the pipeline's class.
        components: Components that the base model comes without: a class of transformers and what it loads, or
            ``None`` where the pipeline does without.
        embedded: Whether the base model is the embedded one, which the package finds and calls itself.
        condition: File of the condition image, for LoRAs that were trained on pairs.
    """
    if embedded:
        own = embedded_arguments()
        others = [
            f"{key}={_literal(value)}" for key, value in (pipeline_kwargs or {}).items() if own.get(key) != value
        ]
        return "\n".join(
            (
                "from blockskip_hooks import embedded_pipeline",
                "",
                f"pipeline = embedded_pipeline({_literal(str(lora))})",
                f'pipeline({", ".join([_literal(prompt), *others])}).images[0].save("image.png")',
            )
        )
    # By name: some pipelines take an image first.
    arguments = [f"prompt={_literal(prompt)}", *([f"image=load_image({_literal(condition)})"] if condition else [])]
    arguments += (f"{key}={_literal(value)}" for key, value in (pipeline_kwargs or {}).items())
    call = f"image = pipeline({', '.join(arguments)}).images[0]"
    if len(call) > 88:
        call = "\n".join(("image = pipeline(", *(f"    {argument}," for argument in arguments), ").images[0]"))
    weights = f", dtype=torch.{dtype}" if dtype else ""
    loaded = {name: source for name, source in (components or {}).items() if source}
    given = [f"{name}={name if name in loaded else None}" for name in components or {}]
    return "\n".join(
        (
            "import torch",
            "from {} import {}".format(*pipeline_class),
            *(["from diffusers.utils import load_image"] if condition else []),
            *([f"from transformers import {', '.join(sorted({kind for kind, _ in loaded.values()}))}"] * bool(loaded)),
            "",
            *(
                f"{name} = {kind}.from_pretrained({_literal(source)}{'' if kind == _TOKENIZER else weights})"
                for name, (kind, source) in loaded.items()
            ),
            f"pipeline = {pipeline_class[1]}.from_pretrained({', '.join([_literal(model), *given])}{weights})",
            f"pipeline.load_lora_weights({_literal(str(lora))})",
            'pipeline.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")',
            call,
            'image.save("image.png")',
        )
    )


def read_license(folder: Path, base_model: str) -> License | None:
    """The licence that the card in a base model's folder names.

    Args:
        folder: Folder of the base model.
        base_model: Its Hub id, which links within the repository are completed with, or any other name.
    """
    data = _front_matter(folder / "README.md")
    license_id, name, link = (data.get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(license_id, str):
        return None
    link = link if isinstance(link, str) else ""
    if is_hub_id(base_model) and _FILE_OF_A_REPOSITORY.fullmatch(link):
        link = f"https://huggingface.co/{base_model}/blob/main/{link}"
    return License(license_id, name if isinstance(name, str) else None, link if _LINK.fullmatch(link) else None)


def _front_matter(card: Path) -> dict[str, Any]:
    """What stands at the head of a card; empty where that cannot be read."""
    try:
        return metadata_load(card) or {}
    except Exception:  # someone else's YAML, in which anything can be wrong, is no reason to lose a run's card
        return {}


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form ``owner/name`` of a Hub id and is not a folder on this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def code_span(text: str) -> str:
    """``text`` as inline code that no backtick, HTML tag or line break in it can end."""
    text = " ".join(text.split())
    fence = "`" * (_longest_backtick_run(text) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}" if text else ""


def code_block(code: str, language: str) -> str:
    """``code`` as a fenced block that no fence in it can end."""
    fence = "`" * max(3, _longest_backtick_run(code) + 1)
    return f"{fence}{language}\n{code.strip()}\n{fence}"


def training_figures(run_report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and value of each figure of a run that its report has, for the card's table."""
    skip, patch, train, stages, settings = (
        run_report.get(part) or {} for part in ("skip", "patch", "train", "stages", "settings")
    )
    rows: list[tuple[str, str]] = []
    if skip.get("blocks"):
        leading, trailing = skip.get("leading", 0), skip.get("trailing", 0)
        kept = skip["blocks"] - leading - trailing
        rows.append(("Blocks kept, with LoRA", f"{kept} of {skip['blocks']}"))
        rows.append(("Blocks skipped", f"{leading} leading, {trailing} trailing (from the {skip.get('source', '?')})"))
    if train.get("quantization"):
        rows.append(("Kept blocks held in", train["quantization"]))
    if patch.get("mode"):
        rows.append(("Patch sampling", _patches(patch)))
    if train.get("steps"):
        samples = f", {train['samples']:,} samples" if train.get("samples") else ""
        rows.append(("Steps", f"{train['steps']:,}{samples}"))
    changed = train.get("changed_settings") or {}
    rows += [
        (label, format_setting(settings[key], changed.get(key, ())))
        for key, label in _SETTINGS.items()
        if settings.get(key) is not None
    ]
    if loss := loss_curve(train.get("loss") or []):
        rows.append(("Loss", f"{loss.first:.3g} to {loss.final:.3g}, means of {loss.window} steps"))
    if train.get("step_seconds_median"):
        rows.append(("Median step", format_seconds(train["step_seconds_median"])))
    if stages:
        rows.append(("Time, all stages", format_seconds(sum(stage.get("seconds") or 0 for stage in stages))))
    for label, key in (("Peak process memory", "peak_rss_bytes"), ("Peak device memory", "peak_device_bytes")):
        peaks = [(stage[key], stage["name"]) for stage in stages if stage.get(key)]
        if peaks:
            peak, name = max(peaks)
            rows.append((label, f"{format_bytes(peak)}, measured in stage {name}"))
    rows.append(("LoRA on the text encoder", "yes" if settings.get("train_text_encoder") else "no"))
    made_with = [f"{name} {version}" for name, version in (run_report.get("versions") or {}).items() if version]
    if made_with:
        rows.append(("Versions", ", ".join(made_with)))
    return rows


# What a reader needs beside the figures to judge or to repeat the result.
_SETTINGS = {
    "rank": "LoRA rank",
    "lora_alpha": "LoRA alpha",
    "learning_rate": "Learning rate",
    "lr_scheduler": "Learning-rate schedule",
    "optimizer": "Optimizer",
    "train_batch_size": "Batch size",
    "gradient_accumulation_steps": "Gradient accumulation",
    "mixed_precision": "Precision",
    "seed": "Seed",
}


def _patches(patch: Mapping[str, Any]) -> str:
    resolution = patch.get("training_resolution")
    if patch["mode"] == "none":
        return f"none, whole images at {resolution} px" if resolution else "none"
    # Reports of before there were other positions do not name them.
    placed = ", half placed as in the photo" if patch.get("positions") == "photo" else ""
    return f"{patch['mode']}, {patch.get('min')} to {patch.get('max')} px, trained at {resolution} px{placed}"


def _plain(text: str) -> str:
    """``text`` with everything Markdown, tables and HTML could take for markup escaped."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(text.split()))


def _literal(value: Any) -> str:
    # JSON strings are Python strings too, and come in the double quotes that the rest of the snippet uses.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _last(path: str) -> str:
    return re.split(r"[/\\]", path)[-1] or path


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _longest_backtick_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
