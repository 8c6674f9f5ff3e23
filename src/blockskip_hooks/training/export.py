"""The results of a run: the LoRA as diffusers reads it and, when asked for, in other forms."""

from __future__ import annotations

import torch

from ..loading.lora_files import WEIGHTS_NAME
from ..utils.monitor import StageMonitor
from .adapters import Adapters
from .checkpoints import clear_unfinished
from .comfyui import write_comfyui
from .merged import export_merged
from .run import Run


def export_lora(run: Run, adapters: Adapters, monitor: StageMonitor, dtype: torch.dtype) -> None:
    """Write the final LoRA, the file for ComfyUI and the merged transformer, as far as they are asked for.

    Args:
        run: The run.
        adapters: The LoRA; the main process alone writes it.
        monitor: Measures the merge.
        dtype: Dtype of the base weights and, without ``--upcast_before_saving``, of the file.
    """
    folder, family = run.output_dir, run.family
    clear_unfinished(folder)
    adapters.save(folder, torch.float32 if run.settings.upcast_before_saving else dtype)
    if run.settings.save_format == "comfyui":
        write_comfyui(folder, type(family))
    if run.settings.export_merged:
        with monitor.stage("merge"):
            export_merged(family.model_path / "transformer", folder / WEIGHTS_NAME, folder, run.settings.variant)
