"""Config files of model components."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def load_config(folder: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a pipeline component, its class name included.

    Raises:
        OSError: if the file is missing or is not a JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise OSError(f"{path} is not a JSON object")
    return config
