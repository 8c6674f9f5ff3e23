"""Upload to the Hub: the repository of a LoRA, and what of a run's files goes there."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, metadata_load

from ..loading.lora_files import WEIGHTS_NAME
from ..training.comfyui import COMFYUI_NAME
from ..utils.errors import UserError, first_line


UPLOADED = (WEIGHTS_NAME, "README.md", "plan.json", "run_report.json", COMFYUI_NAME)
"""Files that are uploaded beside the images of the card, as far as the run has made them."""


def open_repository(name: str, token: str | None) -> str:
    """Create a repository, or find it, and return its full name.

    A run does this before the work begins: a token that may not write should not be found out after hours.

    Args:
        name: ``OWNER/NAME``, or a name of the token's owner.
        token: Token of the Hub; by default the one of ``hf auth login``.

    Raises:
        UserError: if there is none that can be written.
    """
    try:
        return HfApi(token=token).create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # the hub client and the network below it raise their own kinds
        raise UserError(
            f"--push_to_hub cannot open the repository {name} ({_reason(error)}); log in by `hf auth login`, "
            "give --hub_model_id OWNER/NAME, or leave --push_to_hub out."
        ) from error


def push_to_hub(repo_id: str, folder: Path, token: str | None) -> None:
    """Upload the LoRA, its card with the card's images, and the figures.

    ``report.html`` and ``before_after.png`` stay here, as they show the training photos; so do checkpoints, records
    and logs. Folders of this machine are left out of the figures.

    Args:
        repo_id: The repository.
        folder: Folder of the run.
        token: Token of the Hub; by default the one of ``hf auth login``.

    Raises:
        UserError: if the upload fails; the results are on disk.
    """
    widget = (metadata_load(folder / "README.md") or {}).get("widget") or []
    files: dict[str, Path | bytes] = {entry["output"]["url"]: folder / entry["output"]["url"] for entry in widget}
    files |= {name: folder / name for name in UPLOADED if (folder / name).is_file()}
    for name in ("plan.json", "run_report.json"):
        figures = without_folders(json.loads((folder / name).read_text(encoding="utf-8")))
        files[name] = (json.dumps(figures, indent=2, ensure_ascii=False) + "\n").encode()
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        HfApi(token=token).create_commit(repo_id, operations, commit_message="End of training")
    except Exception as error:  # as above
        raise UserError(
            f"The upload to {repo_id} failed ({_reason(error)}). Everything is in {folder}; log in by "
            f"`hf auth login` and run: hf upload {repo_id} {folder} --include "
            f"{' '.join(map(shlex.quote, [*UPLOADED, 'image_*.png']))}"
        ) from error


def without_folders(value: Any) -> Any:
    """``value`` as others may see it: only the last part of every absolute path of this machine."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def nearby(path: str | Path) -> str:
    """A path for a page that may be shared: below the folder of now as seen from it, else its last part alone."""
    place, here = Path(path), Path.cwd()
    if not place.is_absolute():
        return str(path)
    return str(place.relative_to(here)) if place.is_relative_to(here) else place.name


def _reason(error: Exception) -> str:
    """The first line of the client's message, and the hub's own message if it sent one."""
    said = (getattr(error, "server_message", None) or "").strip().rstrip(".")
    return f"{first_line(error)}: {said}" if said and said not in first_line(error) else first_line(error)
