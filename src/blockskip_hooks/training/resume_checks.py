"""Whether a checkpoint is whole and belongs to a run: from its header and numbers, before any model loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..loading.checkpoint_index import tensor_shapes
from ..loading.lora_files import WEIGHTS_NAME
from ..utils.digests import folder_digest
from ..utils.errors import UserError
from .checkpoints import OPTIMIZER_NAME, SCHEMA, read_state
from .run import Run


_LORA_A = re.compile(r"transformer\.(.+)\.lora_A\.weight")
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "seed": int,
    "loss": list,
    "optimizer": dict,
    "scheduler": dict,
    "stretch_steps": int,
}


def made_with(run: Run) -> dict[str, Any]:
    """What a run must share with a checkpoint beside its LoRA layers: base weights, skipped blocks, optimizer."""
    return {
        "skip": [run.config.leading, run.config.trailing],
        "optimizer": run.settings.optimizer.lower() + (" of 8 bits" if run.settings.use_8bit_adam else ""),
        # Checkpoints of before have a digest under "weights" that most tensors were no part of.
        "base_weights": folder_digest(run.family.model_path / "transformer"),
    }


def check_checkpoint(checkpoint: Path, run: Run) -> None:
    """Check that a checkpoint can be read and was made by a run like this one.

    Args:
        checkpoint: Its folder.
        run: The run that is to continue it, with the blocks that it will skip.

    Raises:
        UserError: one line that says what differs, or which file is damaged.
    """
    where = f"--resume_from_checkpoint {checkpoint}"
    state = read_state(checkpoint)
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise UserError(f"{where} holds no state of schema {SCHEMA}; name another one.")
    damaged = [name for name, kind in _FIELDS.items() if not isinstance(state.get(name, ...), kind)]
    if damaged:
        raise UserError(f"{where} is damaged: its state lacks {', '.join(damaged)}; name another one.")
    wanted = run.settings.max_train_steps
    if wanted is not None and state["step"] > wanted:
        raise UserError(
            f"{where} has trained {state['step']} steps, more than --max_train_steps {wanted}; give more, or start "
            "anew in another --output_dir."
        )
    if run.settings.seed not in (None, state["seed"]):
        raise UserError(
            f"--seed {run.settings.seed} is not the seed of {checkpoint}, {state['seed']}; leave the flag out."
        )
    try:
        lora = tensor_shapes(checkpoint / WEIGHTS_NAME)
        tensor_shapes(checkpoint / OPTIMIZER_NAME)
    except ValueError as error:
        raise UserError(f"{where} cannot be read ({error}); name another one.") from error
    _check_lora(lora, run, where)
    then, now = state.get("made_with", {}), made_with(run)
    if then.get("skip", now["skip"]) != now["skip"]:
        then_skipped, now_skipped = (",".join(map(str, pair["skip"])) for pair in (then, now))
        raise UserError(
            f"{where} was made with --skip_blocks {then_skipped}, and this run skips {now_skipped}; use the settings "
            "it was made with, or start anew in another --output_dir."
        )
    if then.get("optimizer", now["optimizer"]) != now["optimizer"]:
        raise UserError(
            f"{where} was made with the optimizer {then['optimizer']}, and this run's is {now['optimizer']}; use the "
            "settings it was made with, or start anew in another --output_dir."
        )
    if then.get("base_weights", now["base_weights"]) != now["base_weights"]:
        raise UserError(
            f"{where} was made on other weights than those of {run.model_name}; name the model it was made on, or "
            "start anew in another --output_dir."
        )


def _check_lora(found: dict[str, tuple[int, ...]], run: Run, where: str) -> None:
    """Compare the layers and the rank of a checkpoint's LoRA to those of the run."""
    layers = {match[1]: shape for name, shape in found.items() if (match := _LORA_A.fullmatch(name))}
    advice = "use the settings it was made with, or start anew in another --output_dir."
    if layers.keys() != set(run.targets):
        differing = sorted(layers.keys() ^ set(run.targets))
        raise UserError(
            f"{where} was made with other LoRA layers than this run ({len(differing)} differ, first {differing[0]}); "
            f"{advice}"
        )
    for name, shape in layers.items():
        wanted = (run.settings.rank, run.skeleton.transformer.get_submodule(name).in_features)
        if shape != wanted:
            raise UserError(
                f"{where} was made with another rank or model: its LoRA of {name} has the shape {shape}, and this "
                f"run's {wanted}; {advice}"
            )
    trains_text = any(name.startswith("text_encoder") for name in found)
    if trains_text != bool(run.settings.train_text_encoder):
        was = "with" if trains_text else "without"
        raise UserError(f"{where} was made {was} --train_text_encoder; {advice}")


__all__ = ["check_checkpoint", "made_with"]
