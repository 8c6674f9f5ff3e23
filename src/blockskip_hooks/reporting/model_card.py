"""README.md of a trained LoRA in the Hub's format: front matter, gallery, how it was trained, how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from PIL import Image

from ..training.comfyui import COMFYUI_NAME
from ..utils.files import write_text
from ..utils.formatting import format_bytes, format_seconds
from .charts import loss_curve


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
_FILE_OF_A_REPOSITORY = re.compile(r"[\w-][\w./-]*")

PAPER = "[DiT-BlockSkip](https://arxiv.org/abs/2603.20755)"


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
    output_dir: str | Path,
    *,
    repo_id: str,
    base_model: str,
    base_license: License | None,
    instance_prompt: str | None,
    validation_prompt: str | Sequence[str] | None,
    images: Sequence[Image.Image],
    run_report: Mapping[str, Any],
    train_text_encoder: bool,
    tags: Iterable[str],
    snippet: str,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write README.md, and the widget images beside it, into ``output_dir``.

    The card is always made anew and never asks the Hub: a card fetched from an earlier upload to the same id would
    carry the figures of that run, and a run without network must end the same way.

    Args:
        output_dir: Folder of the run, the one that is uploaded.
        repo_id: Id on the Hub, or the name of the folder when nothing is uploaded; the card's title.
        base_model: Hub id or folder of the trained model. A folder is named, but not linked or put in the metadata.
        base_license: Licence of the base model, which the LoRA inherits, or None if unknown.
        instance_prompt: Prompt of the training photos, or None when every photo has its own caption.
        validation_prompt: Prompt of all ``images``, or one prompt for each.
        images: Images made with the trained LoRA, saved as ``image_0.png``, ``image_1.png``, ...
        run_report: Contents of run_report.json.
        train_text_encoder: Whether the LoRA also covers the text encoder.
        tags: The model family's tags, added to the usual ones.
        snippet: Python code that loads and runs the LoRA, see `usage_snippet`.
        settings: The settings by flag name; the card names those that matter for the result.

    Returns:
        Path of the README.md.

    Raises:
        ValueError: if ``validation_prompt`` is a list of another length than ``images``.
    """
    output_dir = Path(output_dir)
    if validation_prompt is None or isinstance(validation_prompt, str):
        prompts = [validation_prompt or instance_prompt or ""] * len(images)
    else:
        prompts = list(validation_prompt)
    if len(prompts) != len(images):
        raise ValueError(f"validation_prompt has {len(prompts)} prompts for {len(images)} images; give one for each.")

    output_dir.mkdir(parents=True, exist_ok=True)
    widget = []
    for index, (prompt, image) in enumerate(zip(prompts, images)):
        name = f"image_{index}.png"
        image.save(output_dir / name)
        # The Hub drops a widget entry whose text is empty.
        widget.append({"text": prompt or " ", "output": {"url": name}})

    listed = base_license is not None and base_license.id in HUB_LICENSES - {"other"}
    data = ModelCardData(
        license=base_license.id if base_license and listed else "other" if base_license else None,
        license_name=_slug(base_license.words) if base_license and not listed else None,
        license_link=base_license.link if base_license and not listed else None,
        library_name="diffusers",
        base_model=base_model if is_hub_id(base_model) else None,
        instance_prompt=instance_prompt,
        widget=widget or None,
    )
    body = _body(
        title=repo_id,
        base_model=base_model,
        base_license=base_license,
        instance_prompt=instance_prompt,
        has_images=bool(images),
        run_report=run_report,
        train_text_encoder=train_text_encoder,
        snippet=snippet,
        has_comfyui_file=(output_dir / COMFYUI_NAME).is_file(),
        settings=settings or {},
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    populate_model_card(card, tags=list(dict.fromkeys([*BASE_TAGS, *tags])))
    write_text(output_dir / "README.md", str(card))
    return output_dir / "README.md"


def usage_snippet(
    model: str,
    lora: str | Path,
    prompt: str,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    dtype: str | None = "bfloat16",
    *,
    embedded: bool = False,
) -> str:
    """Python code that loads a base model with diffusers, adds the LoRA and makes one image.

    Args:
        model: Hub id or folder of the base model.
        lora: Hub id or folder of the LoRA.
        prompt: Prompt of the example image.
        pipeline_kwargs: Further arguments of the pipeline call, such as ``max_sequence_length``.
        dtype: Name of a torch dtype for the weights, or None for the pipeline's default.
        embedded: Whether the base model is the embedded one, which the package finds itself.
    """
    arguments = [_literal(prompt), *(f"{key}={_literal(value)}" for key, value in (pipeline_kwargs or {}).items())]
    call = f"image = pipeline({', '.join(arguments)}).images[0]"
    if len(call) > 88:
        call = "\n".join(("image = pipeline(", *(f"    {argument}," for argument in arguments), ").images[0]"))
    base = "embedded_model()" if embedded else _literal(model)
    torch_dtype = f", torch_dtype=torch.{dtype}" if dtype else ""
    return "\n".join(
        (
            "import torch",
            "from diffusers import DiffusionPipeline",
            *(["from blockskip_hooks.embedded import embedded_model"] if embedded else []),
            "",
            f"pipeline = DiffusionPipeline.from_pretrained({base}{torch_dtype})",
            f"pipeline.load_lora_weights({_literal(str(lora))})",
            'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")',
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
    try:
        data = metadata_load(folder / "README.md") or {}
    except Exception:  # someone else's YAML, in which anything can be wrong, is no reason to lose a run's card
        return None
    license_id, name, link = (data.get(key) for key in ("license", "license_name", "license_link"))
    if not isinstance(license_id, str):
        return None
    link = link if isinstance(link, str) else ""
    if is_hub_id(base_model) and _FILE_OF_A_REPOSITORY.fullmatch(link):
        link = f"https://huggingface.co/{base_model}/blob/main/{link}"
    return License(license_id, name if isinstance(name, str) else None, link if _LINK.fullmatch(link) else None)


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


def _body(
    *,
    title: str,
    base_model: str,
    base_license: License | None,
    instance_prompt: str | None,
    has_images: bool,
    run_report: Mapping[str, Any],
    train_text_encoder: bool,
    snippet: str,
    has_comfyui_file: bool,
    settings: Mapping[str, Any],
) -> str:
    """The card's Markdown below the front matter."""
    name = base_model.rstrip("/\\")
    # Only the last part of a folder: where it lies on the machine that trained is nobody's business.
    base = f"[{base_model}](https://huggingface.co/{base_model})" if is_hub_id(base_model) else code_span(_last(name))
    if instance_prompt:
        trigger = f"Use {code_span(instance_prompt)} in the prompt to bring up the subject."
    else:
        trigger = "The training photos had captions of their own; prompts worded like them bring up the subject."
    skip = run_report.get("skip") or {}
    skipped = (skip.get("leading") or 0) + (skip.get("trailing") or 0)
    # Without residuals a skipped span is the identity, an ablation; the card must not claim the method.
    ablation = (run_report.get("residuals") or {}).get("mode") == "none"
    replaced = " without a replacement" if ablation else " and replaced by their residual features"
    method = (
        f" and {PAPER}: {skipped} of the transformer's {skip['blocks']} blocks were skipped during training"
        f"{replaced}, so that only the kept blocks had to be in memory"
        if skipped
        else ""
    )
    licence = f"The licence of {base}"
    if base_license:
        words = code_span(base_license.words)
        licence += f" ([{words}]({base_license.link}))" if base_license.link else f" ({words})"
    sections = [
        f"# {_plain(title)}",
        "<Gallery />" if has_images else "",
        f"LoRA weights for {base}, trained with DreamBooth{method}. They load into the ordinary, complete model.",
        "## Trigger words",
        trigger,
        "## How to use it",
        code_block(snippet, "python"),
        f"ComfyUI reads {code_span(COMFYUI_NAME)}." if has_comfyui_file else "",
        "[The diffusers guide to LoRA](https://huggingface.co/docs/diffusers/main/en/tutorials/"
        "using_peft_for_inference) shows how to weight, merge and combine adapters.",
        "## How it was trained",
        training_table(run_report, train_text_encoder, settings),
        "## Limits and licence",
        "The LoRA knows one subject from a few photos: poses and parts that they do not show are guessed. "
        f"{licence} applies to these weights as well.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def training_table(
    run_report: Mapping[str, Any], train_text_encoder: bool, settings: Mapping[str, Any] | None = None
) -> str:
    """Figures of a run as a Markdown table; parts that its report and its settings lack are left out."""
    settings = settings or {}
    rows: list[tuple[str, str]] = []
    skip, patch = run_report.get("skip") or {}, run_report.get("patch") or {}
    train, stages = run_report.get("train") or {}, run_report.get("stages") or []
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
    rows += [(label, str(settings[key])) for key, label in _SETTINGS.items() if settings.get(key) is not None]
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
    rows.append(("LoRA on the text encoder", "yes" if train_text_encoder else "no"))
    made_with = [f"{name} {version}" for name, version in (run_report.get("versions") or {}).items() if version]
    if made_with:
        rows.append(("Versions", ", ".join(made_with)))
    lines = ["| | |", "|---|---|", *(f"| {label} | {_plain(value)} |" for label, value in rows)]
    return "\n".join(lines)


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
    return f"{patch['mode']}, {patch.get('min')} to {patch.get('max')} px, trained at {resolution} px"


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
